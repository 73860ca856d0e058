"""Every shipped kernel on every target: which cases there are, and their resources, measured side by side and kept.

A result is kept under a hash of all that decides it: kernel source with its callees, signature, constants, options, target,
triton, its environment variables, and the code that measures.
"""

import functools
import hashlib
import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

from .occupancy import gpu
from .resources import Loop, Resources, measure_case, source_of

# The files that decide what a measurement says.
_MEASURING = ("amdgcn.py", "control_flow.py", "occupancy.py", "resources.py", "sass.py", "tensor_memory.py")


class CompileError(Exception):
    """A case that did not compile, with the compiler's words."""


def shipped_ops():
    """Names of the kernel modules that have compile cases."""
    stems = sorted(p.stem for p in Path(_module("_common").__file__).parent.glob("*.py") if not p.stem.startswith("_"))
    return [stem for stem in stems if hasattr(_module(stem), "compile_cases")]


def shipped_cases(target, ops=None):
    """Every compile case of the kernel modules (or of those named in `ops`), configured for `target`."""
    gpu(target)
    for op in shipped_ops() if ops is None else ops:
        yield from _module(op).compile_cases(_module("_common").config_arch(target))


def default_cases(target, ops=None):
    """One case for each kernel, the first two parts of the name: the last that needs tensor cores, or else the last."""
    chosen = {}
    for case in shipped_cases(target, ops):
        kernel = tuple(case.name.split(".")[:2])
        if case.tensor_cores or kernel not in chosen or not chosen[kernel].tensor_cores:
            chosen[kernel] = case
    return list(chosen.values())


def _module(op):
    return import_module(f"mtkernels.triton_kernels.{op}")


def default_cache():
    """Folder of kept results: mtkernels/resources in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mtkernels" / "resources"


def cache_key(case, target):
    """Hash of all that decides the resources of a case."""
    import triton
    from triton._C import libtriton

    source, device, options = source_of(case, target)
    variables = libtriton.get_cache_invalidating_env_vars()
    parts = (source.hash(), device, sorted(options.items()), triton.__version__, sorted(variables.items()), _measuring_code())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@functools.cache
def _measuring_code():
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in _MEASURING)).hexdigest()


class Cache:
    """Results in a folder, one file each; without a folder, or where it cannot be written, nothing is kept."""

    def __init__(self, folder):
        self.folder = folder and Path(folder)
        try:
            if self.folder:
                self.folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            self.folder = None

    def load(self, key):
        path = self.folder and self.folder / f"{key}.json"
        if not path or not path.exists():
            return None
        values = json.loads(path.read_text())
        return Resources(**{**values, "loops": tuple(Loop(**loop) for loop in values["loops"])})

    def store(self, key, found):
        if self.folder and os.access(self.folder, os.W_OK):
            part = self.folder / f"{key}.{os.getpid()}"
            part.write_text(json.dumps(asdict(found)))
            part.replace(self.folder / f"{key}.json")


def measure_all(pairs, *, jobs=2, cache=None, progress=lambda done, total, name: None):
    """{(case name, target): Resources, or CompileError} of [(case, target)], compiled in `jobs` processes.

    cache: a folder. Only shipped cases: the processes find them again by name.
    """
    keys = {(case.name, target): cache_key(case, target) for case, target in pairs}
    return measure_each(_measure_by_name, keys, jobs=jobs, cache=cache, progress=progress)


def measure_each(work, keys, *, jobs=2, cache=None, progress=lambda done, total, name: None):
    """{arguments: work(*arguments)}, Resources or CompileError, of {arguments: its cache key}; work is a module's function.

    The first two arguments are the names of a case and a target.
    """
    kept = Cache(cache)
    results = {arguments: kept.load(key) for arguments, key in keys.items()}
    missing = [arguments for arguments, found in results.items() if found is None]
    done = len(results) - len(missing)
    for arguments, found in _compile_missing(work, missing, jobs):
        results[arguments], done = found, done + 1
        if not isinstance(found, CompileError):
            kept.store(keys[arguments], found)
        progress(done, len(results), " ".join(arguments[:2]))
    return results


def _compile_missing(work, pairs, jobs):
    """Yield (pair, result). A compiler that dies takes its pool along: what was left then runs in a pool per case."""
    left = dict.fromkeys(pairs)
    if pairs:
        for pair, found in _in_pool(work, pairs, min(jobs, len(pairs))):
            if found is not None:
                del left[pair]
                yield pair, found
    for pair in left:
        for _, found in _in_pool(work, [pair], 1):
            yield pair, found or CompileError("the compiler crashed")


def _in_pool(work, pairs, jobs):
    """Yield (pair, result), the result None when the pool broke. Spawned: a fork would share torch's threads."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(work, *pair): pair for pair in pairs}
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool:
                yield futures[future], None


@functools.cache
def _cases_by_name(op, target):
    return {case.name: case for case in shipped_cases(target, [op])}


def _measure_by_name(name, target):
    return measured(_cases_by_name(name.split(".")[0], target)[name], target)


def measured(case, target):
    """Its resources, or the CompileError of a case that does not compile."""
    try:
        return measure_case(case, target)
    except Exception as error:
        return CompileError(f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else 'no message'}")
