"""Pure Python always; the abi3 extension when torch is found; CUDA kernels in it when nvcc is found too.

MTKERNELS_BUILD_EXT    0 | auto (default) | cpu | cuda; cpu and cuda fail where they cannot be built
MTKERNELS_CUDA_ARCHS   default "80;90": machine code for each, PTX of the last for newer GPUs
CXX, NVCC              compilers
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMMAND = "pip install --no-build-isolation ."
FLAGS = ["-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000"]  # runs on every torch >= 2.11
CXX_FLAGS = ["-ffp-contract=fast", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique"]


def read_version(path):
    return re.search(r'^__version__ = ["\'](.+?)["\']', (ROOT / path).read_text(), re.M)[1]


def find_torch():
    """torch's folder, found and not imported: importing it takes seconds and may need a driver."""
    spec = find_spec("torch")
    if not spec or not spec.origin:
        return None
    folder = Path(spec.origin).parent
    version = re.search(r"^__version__ = ['\"](.+?)['\"]", (folder / "version.py").read_text(), re.M)[1]
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < (2, 11):
        raise SystemExit(f"mtkernels needs torch >= 2.11, found {version} in {folder}; pip install -U torch")
    return folder


def cuda_home(nvcc):
    """The toolkit behind nvcc, which may itself be a wrapper script far from it."""
    dry = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.M)
    if not top:
        raise SystemExit(f"{nvcc} --dryrun names no toolkit:\n{dry.stderr}\nMTKERNELS_BUILD_EXT=cpu builds without CUDA")
    return Path(top[1].strip())


def gencode_flags():
    archs = os.environ.get("MTKERNELS_CUDA_ARCHS", "80;90").split(";")
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def plan_build():
    """(torch folder or None, nvcc or None) to build with."""
    want = os.environ.get("MTKERNELS_BUILD_EXT", "auto")
    if want not in ("0", "auto", "cpu", "cuda"):
        raise SystemExit(f"MTKERNELS_BUILD_EXT={want!r}; give 0, auto, cpu or cuda")
    if want == "0":
        return None, None
    torch, nvcc = find_torch(), os.environ.get("NVCC") or shutil.which("nvcc")
    if want != "auto" and torch is None:
        raise SystemExit(f"MTKERNELS_BUILD_EXT={want} needs torch in this environment: install it, then {COMMAND}")
    if want == "cuda" and nvcc is None:
        raise SystemExit("MTKERNELS_BUILD_EXT=cuda needs nvcc on PATH, or in NVCC")
    if torch is None:
        print(f"mtkernels: no torch here, so no compiled kernels; to get them, install torch, then {COMMAND}")
    return torch, nvcc if torch and want != "cpu" else None


TORCH, NVCC = plan_build()


class BuildKernels(build_ext):
    """Compiles the sources side by side; a source whose object is newer than it and every header is left alone."""

    def build_extension(self, ext):
        cxx = os.environ.get("CXX", "g++")
        if NVCC:
            home = cuda_home(NVCC)
            ext.library_dirs += [str(home / "lib64"), str(home / "lib"), str(home / "targets/x86_64-linux/lib")]
        headers = max(p.stat().st_mtime for p in [*ROOT.glob("csrc/**/*.h"), ROOT / "setup.py"])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ext.extra_objects = list(pool.map(lambda source: self.compile(cxx, source, headers), ext.sources))
        ext.sources = []
        self.force = True
        super().build_extension(ext)

    def compile(self, cxx, source, headers):
        out = Path(self.build_temp) / ("cuda" if NVCC else "cpu") / f"{source}.o"
        if out.exists() and out.stat().st_mtime > max(headers, Path(source).stat().st_mtime):
            return str(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        if source.endswith(".cu"):
            command = [NVCC, *FLAGS, *gencode_flags(), f"-Xcompiler={','.join(CXX_FLAGS)}"]
        else:
            command = [cxx, *FLAGS, *CXX_FLAGS, f"-I{TORCH / 'include'}", *(["-DMTKERNELS_CUDA"] if NVCC else [])]
        command += ["-c", source, "-o", str(out)]
        print(f"{command[0]} {source}\n", end="", flush=True)
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(*command, flush=True)
            without = "cpu builds without CUDA kernels" if source.endswith(".cu") else "0 installs without compiled kernels"
            status = getattr(error, "returncode", error)
            raise SystemExit(f"mtkernels: {source} did not compile ({status}); MTKERNELS_BUILD_EXT={without}") from error
        return str(out)


def extension():
    folders = ["csrc", "csrc/cpu", *(["csrc/cuda"] if NVCC else [])]
    sources = sorted(str(p.relative_to(ROOT)) for f in folders for p in (ROOT / f).glob("*.c[pu]*"))
    return Extension(
        "mtkernels._C",
        sources,
        language="c++",
        py_limited_api=True,
        library_dirs=[str(TORCH / "lib")],
        extra_link_args=["-Wl,-z,defs"],  # a declared kernel that nobody defines fails here, not at import
        libraries=["c10", "torch_cpu", *(["cudart_static", "dl", "rt", "pthread"] if NVCC else [])],
    )


setup(
    version=read_version("mtkernels/__init__.py"),
    packages=[
        *find_packages(include=["mtkernels", "mtkernels.*"]),
        "mtkernels.triton_kernels",
        "mtkernels.bench",
        "mtkernels.csrc",
    ],
    package_dir={
        "mtkernels.triton_kernels": "triton_kernels",
        "mtkernels.bench": "bench",
        "mtkernels.csrc": "csrc",
    },
    include_package_data=False,  # the sdist's files are not the wheel's
    package_data={
        "mtkernels": ["py.typed"],
        "mtkernels.triton_kernels": ["configs/*.json", "budgets/*.json"],
        "mtkernels.csrc": ["common/*.h", "cuda/*.h", "cuda/*.cu", "emulator/*.h", "emulator/*.cpp"],  # for lab.CudaEmulator
    },
    ext_modules=[extension()] if TORCH else [],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if TORCH else {},
)
