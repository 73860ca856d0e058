"""How many blocks of a kernel are resident on one multiprocessor (AMD: compute unit), and what stops the next.

NVIDIA: limits from the table of compute capabilities in the CUDA C++ Programming Guide, rounding as in NVIDIA's occupancy
calculator. AMD: limits of CDNA3 and CDNA4, rounding as in LLVM's AMDGPU backend.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Limits of one multiprocessor or compute unit; memory in bytes, registers in 32-bit words."""

    shared_per_block: int
    shared: int
    warps: int
    blocks: int
    # Instructions of which a kernel with dots needs at least one.
    tensor_cores: tuple
    warp_size: int = 32
    # Shared memory is granted in steps of this many bytes, and this many more are taken by the system.
    shared_step: int = 128
    shared_reserved: int = 1024


_MMA = ("HMMA", "IMMA", "QMMA", "OMMA", "DMMA")
_WGMMA = ("HGMMA", "QGMMA", "IGMMA")
_TCGEN05 = ("UTCHMMA", "UTCQMMA", "UTCOMMA", "UTCIMMA")
_SMALL = 99 * 1024, 100 * 1024
_HOPPER = 227 * 1024, 228 * 1024

TARGETS = {
    "sm_80": Gpu(163 * 1024, 164 * 1024, 64, 32, _MMA),
    "sm_86": Gpu(*_SMALL, 48, 16, _MMA),
    "sm_89": Gpu(*_SMALL, 48, 24, _MMA),
    "sm_90": Gpu(*_HOPPER, 64, 32, _WGMMA),
    "sm_100": Gpu(*_HOPPER, 64, 32, _TCGEN05),
    "sm_103": Gpu(*_HOPPER, 64, 32, _TCGEN05),
    "sm_120": Gpu(*_SMALL, 48, 24, _MMA),
    "gfx942": Gpu(64 * 1024, 64 * 1024, 32, 16, ("v_mfma", "v_smfmac"), 64, 512, 0),
    "gfx950": Gpu(160 * 1024, 160 * 1024, 32, 16, ("v_mfma", "v_smfmac"), 64, 1280, 0),
}
FAMILIES = ("sm_80", "sm_90", "sm_100", "gfx942")
TENSOR_CORES = _MMA + _WGMMA + _TCGEN05 + ("v_mfma", "v_smfmac")

_SCHEDULERS = 4
_TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True)
class Occupancy:
    """Resident blocks, the resident share of all warps, and every limit that allows no further block."""

    blocks: int
    fraction: float
    limits: tuple


def gpu(target) -> Gpu:
    if target not in TARGETS:
        raise ValueError(f"target {target!r} is not known; use one of {', '.join(TARGETS)}")
    return TARGETS[target]


def occupancy(target, *, registers, shared, num_warps, scalar_registers=0, tensor_memory=0) -> Occupancy:
    """Occupancy of blocks of `num_warps` warps that take `shared` bytes and `tensor_memory` columns.

    registers: per thread; on AMD VGPRs and AGPRs together, and scalar_registers per wave.
    """
    limit = gpu(target)
    per_scheduler = _amd_waves(registers, scalar_registers) if target.startswith("gfx") else 16384 // _ceil(32 * max(registers, 1), 256)
    allowed = {
        "registers": per_scheduler * _SCHEDULERS // num_warps,
        "warps": limit.warps // num_warps,
        "blocks": limit.blocks,
    }
    granted = _ceil(shared + limit.shared_reserved, limit.shared_step)
    if shared > limit.shared_per_block:
        allowed["shared"] = 0
    elif granted:
        allowed["shared"] = limit.shared // granted
    if tensor_memory:
        allowed["tensor memory"] = _TENSOR_MEMORY_COLUMNS // tensor_memory
    blocks = min(allowed.values())
    return Occupancy(blocks, blocks * num_warps / limit.warps, tuple(k for k, v in allowed.items() if v == blocks))


def _amd_waves(registers, scalar_registers):
    """Waves per SIMD: 512 vector registers in steps of 8; 800 scalar ones in steps of 16, 16 more for the trap handler."""
    by_scalar = 800 // (_ceil(max(scalar_registers, 1), 16) + 16)
    return min(8, 512 // _ceil(max(registers, 1), 8), by_scalar)


def _ceil(value, step):
    return -(-value // step) * step
