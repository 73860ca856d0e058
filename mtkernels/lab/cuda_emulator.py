"""Run CUDA kernels on the CPU, from numpy, and look for their mistakes.

    emulator = CudaEmulator("saxpy.cu")                  # a .cu file that includes gpu.h and names GPU_ENTRY(saxpy)
    emulator.run("saxpy", y, x, 2.0, len(x), None)       # writes y; raises KernelMistake
    emulator.findings("saxpy", y, x, 2.0, len(x), None)  # every tool: bounds, races, schedules, uninitialised memory
    emulator.traffic("saxpy", y, x, 2.0, len(x), None)   # per line: sectors and bank conflicts

docs/cuda_emulator.md shows a kernel from start to end. Nothing here is a time.
"""

import operator
import os
import struct
import subprocess
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np

from ._cuda_build import CompileError, build_kernel, build_runtime, csrc, default_cache, sanitizer_libraries
from ._cuda_reports import Finding, Lines, emulator_findings, sanitizer_findings

__all__ = ["CompileError", "CudaEmulator", "Finding", "KernelMistake", "TOOLS", "Traffic", "csrc", "unwritten"]

TOOLS = ("asan", "tsan", "plain", "trace", "schedules")
RUNS = TOOLS[:4]
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:symbolize=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:symbolize=0",
    "TSAN_OPTIONS": "symbolize=0:exitcode=0:history_size=2",
}
SPACES, ACCESSES = ("other", "global", "shared"), ("load", "store", "atomic")
INTEGERS = {f"{sign}{bits}": np.dtype(f"{sign}{bits // 8}") for sign in "iu" for bits in (8, 16, 32, 64)}
DTYPES = {**INTEGERS, "f32": np.dtype("f4"), "f64": np.dtype("f8"), "f16": np.dtype("f2"), "bool": np.dtype("?"), "char": np.dtype("i1")}


class KernelMistake(RuntimeError):
    """A run found something; `findings` lists it."""

    def __init__(self, findings):
        super().__init__("\n".join(map(str, findings)))
        self.findings = findings


@dataclass(frozen=True)
class Traffic:
    """Memory traffic of one source line, over all warps; `bytes` per lane, the others summed over requests.

    Global memory: 32-byte sectors touched against the fewest that hold the bytes. Shared: passes over the 32 banks.
    """

    file: str
    line: int
    access: str
    space: str
    bytes: int
    requests: int
    lanes: int
    sectors: int
    ideal_sectors: int
    passes: int
    ideal_passes: int


class _Unwritten(np.ndarray):
    pass


def unwritten(shape, dtype):
    """An output array to be filled by a kernel: all bytes 0xff (NaN, -1); tool "trace" reports what stays unwritten."""
    array = np.empty(shape, dtype).view(_Unwritten)
    array.view(np.ndarray).reshape(-1).view(np.uint8)[:] = 0xFF
    return array


class CudaEmulator:
    """One .cu file, compiled for the CPU when first needed.

    source: the file. entries: host functions to call, where the file itself does not say GPU_ENTRY(function).
    flags: more of them for g++, such as -DNAME or -Ifolder.
    """

    def __init__(self, source, entries=(), flags=(), cache=None):
        self.source = Path(source).resolve()
        if not self.source.is_file():
            raise FileNotFoundError(f"{source} is not a file; give a .cu file that includes gpu.h")
        self.entries, self.flags = tuple(entries), list(flags)
        self.cache = Path(cache or default_cache())

    def run(self, entry, *args, tool="plain", seed=0, resident=2, timeout=120):
        """Call `entry`: arrays for pointers, None for null. Arrays behind pointers to non-const are written in place.

        seed draws the order of blocks and threads; resident blocks run at the same time. Returns what the entry
        returns; raises KernelMistake when there are findings, and RuntimeError when it returns an error text.
        """
        value, found, _ = self._execute(entry, args, tool, seed, resident, timeout)
        if found:
            raise KernelMistake(found)
        if isinstance(value, str):
            raise RuntimeError(f"{entry}: {value}")
        return value

    def findings(self, entry, *args, tools=TOOLS, seeds=(0, 1, 2), timeout=120):
        """What `tools` find, each on copies of the arrays; [] for a kernel that is right, as far as they see.

        A kernel that leaves its memory under "asan" is not run in this process by the tools named after it.
        """
        found = []
        for tool in tools:
            if tool not in ("asan", "tsan") and any(f.kind == "out-of-bounds" and f.tool == "asan" for f in found):
                break
            if tool == "schedules":
                found += self._compare_schedules(entry, args, seeds)
                continue
            _, more, _ = self._execute(entry, _copied(args), tool, seeds[0], 2, timeout)
            found += more
        return found

    def traffic(self, entry, *args):
        """[Traffic], in source order, of a run on copies of the arrays."""
        _, found, lines = self._execute(entry, _copied(args), "trace", 0, 2, None)
        if found:
            raise KernelMistake(found)
        return lines

    def _compare_schedules(self, entry, args, seeds):
        """Other orders of threads and blocks must find nothing and change no bit."""
        first = None
        for seed in seeds:
            given = _copied(args)
            _, found, _ = self._execute(entry, given, "plain", seed, 1 + seed % 4, None)
            found = [Finding(f.kind, f.file, f.line, f"{f.message} (seed {seed})", "schedules", f.related) for f in found]
            if found:
                return found
            first = first or given
            for i, (a, b) in enumerate(zip(first, given)):
                if isinstance(a, np.ndarray) and a.tobytes() != b.tobytes():
                    count = int(sum(x != y for x, y in zip(_elements(a), _elements(b))))
                    message = f"{count} of {a.size} elements of argument {i} have other bits with seed {seed} than with seed {seeds[0]}"
                    return [Finding("order-dependent", None, None, message, "schedules")]
        return []

    def _execute(self, entry, args, tool, seed, resident, timeout):
        """-> (value, findings, traffic)"""
        if tool not in RUNS:
            raise ValueError(f"tool is {tool!r}; give one of {', '.join(RUNS)}")
        runtime, library = build_runtime(str(self.cache)), self._build(tool)
        module = _load(runtime.module)
        # A sanitized library cannot be opened here; the plain one has the same entries.
        parameters, result = self._signature(module.entries(str(self._build("plain").path)), entry)
        if len(args) != len(parameters):
            raise TypeError(f"{entry} takes {len(parameters)} arguments ({', '.join(parameters)}); got {len(args)}")
        given = [_convert(entry, i, arg, p) for i, (arg, p) in enumerate(zip(args, parameters))]
        lines = Lines(library)
        if tool in ("plain", "trace"):
            value, reports, traffic = module.run(str(library.path), entry, given, seed, resident, 0.1, tool == "trace")
            return value, list(emulator_findings(reports, lines, tool)), _by_line(traffic, lines)
        value, found = _run_sanitized(runtime.runner, library, lines, tool, _encode(entry, given, seed, resident), given, result, timeout)
        return value, found, []

    def _build(self, tool):
        return build_kernel(self.source, self.entries, tool, self.flags, str(self.cache))

    def _signature(self, entries, name):
        if name not in entries:
            known = ", ".join(entries) or "none; write GPU_ENTRY(function); after it, or name it in entries="
            raise ValueError(f"{self.source.name} has no entry {name!r}; it has: {known}")
        return entries[name]


@lru_cache(maxsize=None)
def _load(path):
    spec = spec_from_file_location("gpu_emulator", path, loader=ExtensionFileLoader("gpu_emulator", str(path)))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _copied(args):
    return [arg.copy() if isinstance(arg, np.ndarray) else arg for arg in args]


def _elements(array):
    return np.ascontiguousarray(array).view(np.ndarray).reshape(-1).view(f"V{array.itemsize}")


def _convert(entry, position, arg, kind):
    """What the emulator takes for a parameter of type `kind`: None, a number, or (array, unwritten)."""
    where = f"argument {position} of {entry} ({kind})"
    if kind.endswith("*"):
        return _convert_array(where, arg, kind)
    if kind[0] == "f":
        return float(arg)
    number = operator.index(arg)
    if kind in INTEGERS and not np.iinfo(INTEGERS[kind]).min <= number <= np.iinfo(INTEGERS[kind]).max:
        raise OverflowError(f"{where} is {number}")
    return number


def _convert_array(where, arg, kind):
    if arg is None:
        return None
    if not isinstance(arg, np.ndarray):
        raise TypeError(f"{where} is {type(arg).__name__}; give a numpy array or None")
    constant, to = kind.startswith("const "), kind.removeprefix("const ").removesuffix("*")
    if to == "bf16":
        fits = arg.dtype.itemsize == 2 and (arg.dtype.name == "bfloat16" or arg.dtype.kind in "iu")
        wanted = "bfloat16 (ml_dtypes), or its bits as uint16"
    else:
        fits, wanted = to not in DTYPES or arg.dtype == DTYPES[to], DTYPES.get(to)
    if not fits:
        raise TypeError(f"{where} is an array of {arg.dtype}; give {wanted}")
    if not arg.flags.c_contiguous:
        raise ValueError(f"{where} is not contiguous; give numpy.ascontiguousarray of it")
    if not constant and not arg.flags.writeable:
        raise ValueError(f"{where} is a read-only array, behind a pointer to non-const; give a writable one")
    raw = arg.view(np.ndarray).reshape(-1).view(np.uint8)
    raw.flags.writeable = not constant
    return raw, isinstance(arg, _Unwritten)


def _encode(entry, given, seed, resident):
    """The call as runner.cpp reads it."""
    name = entry.encode()
    out = [struct.pack("<q", len(name)), name, struct.pack("<qqdq", seed, resident, 0.1, len(given))]
    for arg in given:
        if isinstance(arg, tuple):
            array, fresh = arg
            out += [struct.pack("<qqqq", 1, array.flags.writeable, fresh, array.nbytes), array.tobytes()]
        else:
            out.append(struct.pack("<qd" if isinstance(arg, float) else "<qq", 0, 0 if arg is None else arg))
    return b"".join(out)


class _Reader:
    def __init__(self, data):
        self.data, self.at = data, 0

    def integer(self):
        self.at += 8
        return struct.unpack_from("<q", self.data, self.at - 8)[0]

    def bytes(self):
        size = self.integer()
        self.at += size
        return self.data[self.at - size : self.at]

    def text(self):
        return self.bytes().decode()

    def report(self):
        return self.text(), self.text(), [(self.text(), self.integer()) for _ in range(self.integer())]


def _run_sanitized(runner, library, lines, tool, call, given, result, timeout):
    """-> (value, findings); the arrays of `given` are written when the process got to its end."""
    env = {**os.environ, **SANITIZER_OPTIONS, "LD_PRELOAD": sanitizer_libraries(tool)}
    command = [str(runner), str(library.path)]
    try:
        done = subprocess.run(command, input=call, capture_output=True, env=env, timeout=timeout)
        if b"unexpected memory mapping" in done.stderr:
            # Old TSan runtimes cannot place their shadow when addresses are randomised widely.
            done = subprocess.run(["setarch", "-R", *command], input=call, capture_output=True, env=env, timeout=timeout)
    except subprocess.TimeoutExpired:
        return None, [Finding("timeout", None, None, f"no end after {timeout} s", tool)]
    said = done.stderr.decode(errors="replace")
    found = sanitizer_findings(said, lines, tool)
    if not done.stdout:
        return None, found or [Finding("crash", None, None, f"exit status {done.returncode}: {said[-2000:]}", tool)]
    reply = _Reader(done.stdout)
    bits, text = reply.integer(), reply.text()
    reports = [reply.report() for _ in range(reply.integer())]
    for arg in given:
        if isinstance(arg, tuple) and arg[0].flags.writeable:
            arg[0][:] = np.frombuffer(reply.bytes(), np.uint8)
    values = {"void": None, "const char*": text or None}
    value = struct.unpack("<d", struct.pack("<q", bits))[0] if result[0] == "f" else values.get(result, bits)
    return value, [*emulator_findings(reports, lines, tool), *found]


def _by_line(traffic, lines):
    """Sum instructions of one source line, access, space and width."""
    lines.look_up([places[0] for places, *_ in traffic])
    totals = {}
    for places, access, space, size, *counts in traffic:
        file, line = lines.first(places) or ("?", 0)
        key = (file, line, ACCESSES[access], SPACES[space], size)
        totals[key] = [a + b for a, b in zip(totals.get(key, [0] * 6), counts)]
    return [Traffic(*key, *counts) for key, counts in sorted(totals.items())]
