"""Where the numbers come from: versions, processor, threads, instruction set, measured ceilings."""

import os
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch

import mtkernels

# what torch and mtkernels read at start to use fewer instructions than the CPU has
ISA = {
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", "MTKERNELS_CPU_ISA": "avx512"},
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MTKERNELS_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}
ISA_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "MTKERNELS_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
BF16_FLAGS = ("avx512_bf16", "amx_bf16")
SHOWN_FLAGS = ("avx2", "avx512f", *BF16_FLAGS)
BF16_LEVELS = ("", "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX512_CORE_AMX_FP16", "DEFAULT", "ALL", "AVX10_1_512", "AVX10_1_512_AMX")
PACKAGES = ("triton", "peft", "transformers", "liger-kernel", "numpy")


def restart_with_isa(name, arguments):
    """Replace this process by the same command under that instruction set, unless it already is in force."""
    if all(os.environ.get(key) == value for key, value in ISA[name].items()):
        return
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "mtkernels.bench", *arguments], {**os.environ, **ISA[name]})


@lru_cache(maxsize=None)
def _cpuinfo():
    """{"model name": ..., "flags": ...} of the first processor, where Linux tells."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    pairs = (line.split(":", 1) for line in path.read_text().split("\n\n")[0].splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def cpu_flags():
    flags = _cpuinfo().get("flags", "").split()
    return [f for f in SHOWN_FLAGS if f in flags]


def native_bf16():
    """Whether torch may use bf16 instructions here."""
    level = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    return level in BF16_LEVELS and any(f in cpu_flags() for f in BF16_FLAGS)


def git_revision():
    """The checkout's commit, "+" when tracked files differ; "" in an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=7"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _fastest(fn, device, rounds=5):
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    best = float("inf")
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        fn()
        wait()
        best = min(best, time.perf_counter() - start)
    return best


def measured_ceilings(device):
    """Copy bandwidth and matmul rates that torch reaches here."""
    source = torch.zeros(1 << 24, device=device)
    target = torch.empty_like(source)
    ceilings = {"copy_gb_s": 2 * source.nbytes / _fastest(lambda: target.copy_(source), device) / 1e9}
    n = 8192 if device == "cuda" else 768
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        ceilings[f"matmul_{name}_gflop_s"] = 2 * n**3 / _fastest(lambda a=a, b=b: a @ b, device) / 1e9
    return ceilings


def describe(device, threads):
    """The `env` block of a report."""
    env = {
        "mtkernels": mtkernels.__version__,
        "git": git_revision(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "packages": {p: _version(p) for p in PACKAGES},
        "platform": platform.platform(),
        "device": device,
        "cpu": _cpuinfo().get("model name") or platform.processor() or platform.machine(),
        "cpus_available": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "cpu_flags": cpu_flags(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "native_bf16": native_bf16(),
        "isa_variables": {key: os.environ[key] for key in ISA_VARIABLES if key in os.environ},
        "measured": measured_ceilings(device),
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        env["gpu"] = {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return env
