"""Compiles the CUDA emulator and kernels for it with g++, and keeps what it built by the hash of its sources."""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

# -O1 keeps compiling short and every memory access on its source line.
KERNEL_FLAGS = ["-std=c++17", "-O1", "-gdwarf-4", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-DGPU_EMU", "-w"]
TOOL_FLAGS = {
    "plain": [],
    "asan": ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-omit-frame-pointer"],
    "tsan": ["-fsanitize=thread"],
    "trace": ["-fsanitize=thread"],
}
RUNTIME_FLAGS = ["-std=c++17", "-O2", "-fPIC"]
# Its memcpy and operator new must stay its own; what namespace emu declares is for all.
RUNTIME_EXPORTS = "{ global: *3emu*; local: *; };\n"
# Found after CUDA's own headers: Triton's copy of them lacks nv/target, which on a host only ever takes the other branch.
NV_TARGET = "#define NV_IF_ELSE_TARGET(condition, device, ...) __VA_ARGS__\n"
HOSTS = ("python.cpp", "runner.cpp", "trace_hooks.cpp")


class CompileError(RuntimeError):
    """g++ refused a source; the message is what it said."""


@dataclass(frozen=True)
class Runtime:
    library: Path
    module: Path
    runner: Path
    trace_hooks: Path


@dataclass(frozen=True)
class Library:
    """One kernel source, built for one tool. sources: the files it was made from, system headers aside."""

    path: Path
    sources: tuple


def csrc():
    """The package's C++ sources: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "cuda" / "gpu.h").is_file():
            return folder
    raise FileNotFoundError(f"csrc/cuda/gpu.h is neither in {package} nor beside it; reinstall mtkernels")


def default_cache():
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MTKERNELS_CACHE") or Path(root) / "mtkernels") / "cuda_emulator"


@lru_cache(maxsize=None)
def compiler():
    """(path of g++, its version)"""
    machine = (platform.system(), platform.machine())
    if machine != ("Linux", "x86_64"):
        raise RuntimeError(f"lab.CudaEmulator runs on x86-64 Linux; this is {' '.join(machine)}")
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is None:
        raise RuntimeError(f"lab.CudaEmulator needs a C++ compiler, and {name!r} is not on PATH; install g++, or name it in CXX")
    return path, _output(path, "--version").splitlines()[0]


@lru_cache(maxsize=None)
def cuda_headers():
    """A folder with cuda_runtime.h and cuda_bf16.h: of the toolkit, or those that Triton brings along."""
    folders = [Path(os.environ[name]) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if nvcc := shutil.which("nvcc"):
        dry = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
        folders += [Path(top.strip()) / "include" for top in re.findall(r"^#\$ TOP=(.+)$", dry, re.M)]
    folders.append(Path("/usr/local/cuda/include"))
    if (triton := find_spec("triton")) and triton.origin:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "include")
    for folder in folders:
        if (folder / "cuda_runtime.h").is_file() and (folder / "cuda_bf16.h").is_file():
            return folder
    raise RuntimeError("lab.CudaEmulator needs CUDA's headers: install triton, or a CUDA toolkit and name it in CUDA_HOME")


def sanitizer_libraries(tool):
    """What to preload for `tool`: the sanitizer, and libstdc++, whose exceptions it intercepts."""
    path, _ = compiler()
    found = []
    for name in ({"asan": "libasan.so", "tsan": "libtsan.so"}[tool], "libstdc++.so"):
        library = Path(_output(path, f"-print-file-name={name}").strip())
        if not library.is_absolute():
            raise RuntimeError(f"{path} has no {name}; install it (it is part of g++), or leave tool {tool!r} out")
        found.append(str(library.resolve()))
    return ":".join(found)


@lru_cache(maxsize=None)
def build_runtime(cache):
    folder = csrc() / "emulator"
    sources = sorted(p for p in folder.iterdir() if p.suffix in (".cpp", ".h"))
    if find_spec("pybind11") is None:
        raise RuntimeError("lab.CudaEmulator needs pybind11: pip install pybind11")
    import pybind11

    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    key = _digest([compiler(), str(cuda_headers()), RUNTIME_FLAGS, RUNTIME_EXPORTS, NV_TARGET, pybind11.__version__, suffix], sources)
    out = Path(cache) / f"runtime-{key}"
    runtime = Runtime(out / "libgpu_emulator.so", out / f"gpu_emulator{suffix}", out / "runner", out / "trace_hooks.o")
    if not out.is_dir():
        python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", "-fvisibility=hidden"]
        with _building(out) as building:
            _compile_runtime(folder, Path(building), python, runtime)
    return runtime


def _compile_runtime(folder, out, python, runtime):
    cxx, _ = compiler()
    include = _include_flags(out)
    (out / "include" / "nv").mkdir(parents=True)
    (out / "include" / "nv" / "target").write_text(NV_TARGET)

    def compile_one(source):
        extra = {"python.cpp": python, "trace_hooks.cpp": ["-fvisibility=hidden"]}.get(source.name, [])
        target = out / f"{source.stem}.o"
        _run([cxx, *RUNTIME_FLAGS, *extra, *include, "-c", str(source), "-o", str(target)])
        return target

    # The slowest first.
    sources = sorted(folder.glob("*.cpp"), key=lambda p: p.name not in HOSTS)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = dict(zip((p.name for p in sources), pool.map(compile_one, sources)))
    link = ["-L", str(out), "-lgpu_emulator", "-ldl", "-Wl,-rpath,$ORIGIN"]
    own = [str(target) for name, target in objects.items() if name not in HOSTS]
    exports = out / "exports.map"
    exports.write_text(RUNTIME_EXPORTS)
    _run([cxx, "-shared", *own, "-Wl,-Bsymbolic", f"-Wl,--version-script={exports}", "-o", str(out / runtime.library.name)])
    _run([cxx, "-shared", str(objects["python.cpp"]), *link, "-o", str(out / runtime.module.name)])
    _run([cxx, str(objects["runner.cpp"]), *link, "-o", str(out / runtime.runner.name)])


def _include_flags(runtime_folder):
    return ["-isystem", str(cuda_headers()), "-isystem", str(runtime_folder / "include")]


def build_kernel(source, entries, tool, flags, cache):
    """The shared library of a .cu file, rebuilt when the file, a header it includes, or a flag has changed."""
    runtime = build_runtime(cache)
    wrapper = f'#include "{source}"\n' + "".join(f"GPU_ENTRY({name});\n" for name in entries)
    key = _digest([compiler(), wrapper, tool, TOOL_FLAGS[tool], KERNEL_FLAGS, flags, str(runtime.library), str(cuda_headers())], [])
    out = Path(cache) / f"{source.stem}-{tool}-{key}"
    record = out / "sources.json"
    if not record.is_file() or json.loads(record.read_text()) != _hashes(json.loads(record.read_text())):
        with _building(out) as building:
            _compile_kernel(Path(building), wrapper, tool, [*flags, f"-I{csrc() / 'cuda'}"], runtime)
    sources = json.loads(record.read_text())
    return Library(out / _library_name(sources), tuple(sources))


def _compile_kernel(out, wrapper, tool, flags, runtime):
    cxx, _ = compiler()
    unit, target, depends = out / "kernel.cpp", out / "kernel.o", out / "kernel.d"
    unit.write_text(wrapper)
    compile_flags = [*KERNEL_FLAGS, *TOOL_FLAGS[tool], *flags, *_include_flags(runtime.library.parent)]
    _run([cxx, *compile_flags, "-MMD", "-MF", str(depends), "-c", str(unit), "-o", str(target)])
    link = ["-shared", str(target), "-L", str(runtime.library.parent), "-lgpu_emulator", f"-Wl,-rpath,{runtime.library.parent}"]
    if tool == "trace":
        link += [str(runtime.trace_hooks), "-Wl,--wrap=memcpy,--wrap=memset"]
    else:
        link += TOOL_FLAGS[tool]
    names = depends.read_text().replace("\\\n", " ").split()[1:]
    sources = _hashes({str(Path(name).resolve()) for name in names if Path(name) != unit})
    (out / "sources.json").write_text(json.dumps(sources))
    _run([cxx, *link, "-o", str(out / _library_name(sources))])


def _library_name(sources):
    # dlopen takes a library of the same name for the one it has already.
    return f"kernel-{_digest(sources, [])}.so"


class _building:
    """A folder that takes its final name, in one step, only when all of it has been made."""

    def __init__(self, final):
        self.final = final

    def __enter__(self):
        self.final.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = TemporaryDirectory(dir=self.final.parent, prefix="building-")
        self.inside = Path(self.temporary.name) / "out"
        self.inside.mkdir()
        return self.inside

    def __exit__(self, kind, value, trace):
        if kind is None:
            old = Path(self.temporary.name) / "old"
            if self.final.exists():
                self.final.rename(old)
            self.inside.rename(self.final)
        self.temporary.cleanup()


def _hashes(paths):
    return {p: hashlib.sha256(Path(p).read_bytes()).hexdigest() if Path(p).is_file() else "" for p in sorted(paths)}


def _digest(settings, paths):
    return hashlib.sha256(json.dumps([settings, list(_hashes(map(str, paths)).values())]).encode()).hexdigest()[:16]


def _output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{command[0]} failed ({done.returncode}):\n{done.stderr[:4000]}")
