"""Which tile configurations `tune` may choose, and the programs that each kernel launches at the reference shape.

Reference: 8192 rows over 8 adapters, one target of 4096 x 4096; 16 rows for the `*_small` configs. Rows of a tile are those for
which a plan has tile tables. What is not in a space stays as it is in configs/*.json.
"""

from dataclasses import dataclass
from math import ceil

from .tune_model import Pass

ROWS, SMALL_ROWS, WIDTH, ADAPTERS, CHUNK = 8192, 16, 4096, 8, 1024
REFERENCE = f"T={ROWS} ({SMALL_ROWS} for *_small), D=O={WIDTH}, {ADAPTERS} adapters"


@dataclass(frozen=True)
class Kernel:
    """space: {option: (least, most)}, powers of two but for num_stages; passes(bytes of an element): [Pass]."""

    space: dict
    passes: object
    bits: tuple = (16, 32)


_LAUNCH = {"num_warps": (4, 8), "num_stages": (1, 6)}
_ROW_TILES = (16, 128)
# Buckets of ranks that the compile cases hold: 16 and 128, the latter with half the step; gradients go in tiles of 64 ranks.
_SHRINK = ((16, 1), (128, 2))
_GRAD = ((16, 1), (64, 1))


def _tiles(block, rows=ROWS):
    """Row tiles: every adapter may end in a partial one."""
    return ceil(rows / block) + ADAPTERS


def _shrink(bytes_moved):
    return Pass(bytes_moved, lambda o: _tiles(o["BLOCK_M"]), ("BLOCK_M", "BLOCK_K"), "BLOCK_K", WIDTH, _SHRINK)


def _grad(bytes_moved):
    return Pass(bytes_moved, lambda o: ROWS // CHUNK * ceil(WIDTH / o["BLOCK_W"]), ("BLOCK_J", "BLOCK_W"), "BLOCK_J", CHUNK, _GRAD)


def _update(bytes_moved):
    return Pass(bytes_moved, lambda o: _tiles(o["BLOCK_M"]) * ceil(WIDTH / o["BLOCK_N"]), ("BLOCK_M", "BLOCK_N"))


def _gemm(bytes_moved, rows, partial):
    def programs(o):
        return (ceil(rows / o["BLOCK_M"]) + partial) * ceil(WIDTH / o["BLOCK_N"])

    return Pass(bytes_moved, programs, ("BLOCK_M", "BLOCK_K"), "BLOCK_K", WIDTH, (("BLOCK_N", 1),), gemm=True)


_MATRIX = ROWS * WIDTH
_SHRINK_SPACE = {"BLOCK_M": _ROW_TILES, "BLOCK_K": (32, 256), **_LAUNCH}
_GRAD_SPACE = {"BLOCK_J": (16, 128), "BLOCK_W": (32, 256), **_LAUNCH}
# All configs of a layer's GEMM sum in steps of one BLOCK_K and by one tensor-core instruction, so BLOCK_K is in no space, and
# neither is the BLOCK_M of few rows: on sm_90 and sm_100 it is the least that these instructions take.
_BASE_SPACE = {"BLOCK_M": (64, 128), "BLOCK_N": (64, 256), "num_warps": (4, 8), "num_stages": (2, 6)}
_SMALL_SPACE = {"BLOCK_N": (16, 256), "num_warps": (2, 8), "num_stages": (2, 8)}
_base = Kernel(_BASE_SPACE, lambda e: [_gemm((2 * _MATRIX + WIDTH * WIDTH) * e, ROWS, ADAPTERS)])
_small = Kernel(_SMALL_SPACE, lambda e: [_gemm(WIDTH * WIDTH * e, SMALL_ROWS, 0)], (16,))
_mixed = Kernel(_BASE_SPACE, _base.passes, (16,))

KERNELS = {
    "lora_shrink": {
        "shrink": Kernel(_SHRINK_SPACE, lambda e: [_shrink(_MATRIX * e)]),
        "grad_a": Kernel(_GRAD_SPACE, lambda e: [_grad(_MATRIX * e)]),
        "finish": Kernel({"BLOCK_M": _ROW_TILES, "BLOCK_N": (32, 256), "num_warps": (4, 8)}, lambda e: [_update(2 * _MATRIX * e)]),
    },
    "lora_expand": {
        "expand": Kernel({"BLOCK_M": _ROW_TILES, "BLOCK_N": (32, 256), "num_warps": (4, 8)}, lambda e: [_update(2 * _MATRIX * e)]),
        "bwd": Kernel({**_SHRINK_SPACE, **_GRAD_SPACE}, lambda e: [_shrink(_MATRIX * e), _grad(_MATRIX * e)]),
    },
    "lora_base": {
        "fwd": _base, "fwd_small": _small, "fwd_mixed": _mixed,
        "dx": _base, "dx_small": _small, "dx_mixed": _mixed,
    },
    "rmsnorm_lora_shrink": {
        "shrink": Kernel(_SHRINK_SPACE, lambda e: [_shrink(2 * _MATRIX * e)]),
        "grad_a": Kernel(_GRAD_SPACE, lambda e: [_grad(_MATRIX * e)]),
    },
    "swiglu_lora_shrink": {"shrink": Kernel(_SHRINK_SPACE, lambda e: [_shrink(3 * _MATRIX * e)])},
}  # fmt: skip


def neighbours(options, space):
    """Options that differ from these in one step of one option: half or double, one stage more or less; all within the space."""
    for name, (least, most) in space.items():
        value = options[name]
        for other in (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2):
            if least <= other <= most:
                yield {**options, name: other}
