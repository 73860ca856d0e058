"""An emulator for compiled GPU code: PTX is translated to numpy once per kernel and executed for many blocks at a time.

Found, as `Finding`: accesses out of bounds or misaligned, reads of asynchronous copies nobody waited for, shuffles from
inactive lanes, deadlocks, device assertions; on sm_90 also misuse of barriers in memory and missing proxy fences.
Refused by name, as `Unsupported`: clusters, sparse and f16-accumulating products, im2col, gather and multicast copies,
generic addresses of shared memory, calls, textures.
Not seen: races between the warps of a block and missing bar.sync (warps run in lockstep), wgmma results used before their
wait (ptxas checks those), flushing of subnormals (.ftz), the last bits of .approx functions (computed exactly here).
"""

from .errors import Finding, Unsupported
from .machine import Program
from .memory import GlobalMemory

__all__ = ["Finding", "GlobalMemory", "Program", "Unsupported"]
