"""python -m mtkernels.env: versions, devices, and which backend runs each op here, with the reason where one does not."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__, _backends, _native
from .ops import STEMS

OPTIONAL = ("triton", "numpy", "peft", "transformers", "matplotlib", "rich")


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_name():
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def report():
    """{"versions": ..., "devices": ..., "extension": ..., "ops": {stem: {device: Explanation}}}."""
    devices = {"cpu": f"{_cpu_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}
    if torch.cuda.is_available():
        devices |= {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    else:
        devices["cuda"] = "none" if torch.version.cuda else "none (this torch is built without CUDA)"
    kernels = "CPU and CUDA kernels" if _native.available() and _native.cuda_built() else "CPU kernels"
    return {
        "versions": {"mtkernels": __version__, "python": sys.version.split()[0], "torch": torch.__version__, **{p: _version(p) for p in OPTIONAL}},
        "devices": devices,
        "extension": kernels if _native.available() else _native.reason(),
        "ops": {stem: {device: _reasons(stem, device) for device in ("cpu", "cuda")} for stem in STEMS},
    }


def _reasons(stem, device):
    return {name: _backends.refusal(stem, name, device, torch.float32) or "yes" for name in _backends.NAMES}


def _matrix(ops):
    """Lines of the op x backend table, and the numbered reasons below it."""
    reasons, lines = [], [f"{'op':<20} {'device':<7}" + "".join(f"{name:<11}" for name in _backends.NAMES) + "automatic"]
    for stem, devices in ops.items():
        for device, row in devices.items():
            cells = []
            for why in row.values():
                if why != "yes" and why not in reasons:
                    reasons.append(why)
                cells.append("yes" if why == "yes" else f"no [{reasons.index(why) + 1}]")
            chosen = next(name for name in _backends.ORDER[device] if row[name] == "yes")
            lines.append(f"{stem:<20} {device:<7}" + "".join(f"{cell:<11}" for cell in cells) + chosen)
    return lines + [""] + [f"[{i}] {why}" for i, why in enumerate(reasons, 1)]


def main():
    found = report()
    for section in ("versions", "devices"):
        for name, value in found[section].items():
            print(f"{name:<14} {value}")
        print()
    print(f"{'extension':<14} {found['extension']}")
    print(f"{'backend':<14} {_backends.requested() or 'automatic'}\n")
    print("\n".join(_matrix(found["ops"])))


if __name__ == "__main__":
    main()
