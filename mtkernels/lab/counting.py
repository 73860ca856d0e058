"""Counts every launch of a call, forward and backward: Triton kernels by the probe, torch's own operations by TorchOps."""

from dataclasses import dataclass, field

from .probe import Probe
from .torch_ops import TRITON, Launch, TorchOps


@dataclass
class Counted:
    """Launches of each pass ("fwd", "bwd"), and what the probe found wrong."""

    passes: dict = field(default_factory=dict)
    findings: list = field(default_factory=list)


def count(call):
    """Counted of call.forward() and, when the call has leaves, call.gradients(output); needs TRITON_INTERPRET=1."""
    with Probe() as probe, TorchOps() as torch_ops:
        out = call.forward()
        passes = {"fwd": _taken(probe, torch_ops)}
        if call.leaves:
            call.gradients(out)
            passes["bwd"] = _taken(probe, torch_ops)
    return Counted(passes, probe.findings)


def _taken(probe, torch_ops):
    launches = [*map(_of_probe, probe.launches), *torch_ops.launches]
    probe.launches.clear()
    torch_ops.launches.clear()
    return launches


def _of_probe(launch):
    requested = sum(traffic.bytes for traffic in launch.traffic.values())
    flops = {}
    for operands, n in launch.dot_flops.items():
        # of two types the wider one sets the rate; both are of one width but for fp8
        dtype = operands.split(" x ")[0]
        flops[dtype] = flops.get(dtype, 0) + n
    return Launch(launch.kernel, TRITON, launch.dram_floor_bytes, requested, flops, dict(launch.dot_flops_by_function))
