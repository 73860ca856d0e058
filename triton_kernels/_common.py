"""Device helpers, launch options and compile cases shared by the Triton kernels."""

import functools
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# Row-tile heights for which a group plan carries tile tables.
TILE_ROWS = (16, 32, 64, 128, 1024)

_CONFIGS = Path(__file__).resolve().parent / "configs"
# GPUs with a column of their own in configs/*.json, and those that share one.
_ARCHS = {
    "sm_80": "sm_80", "sm_87": "sm_80",
    "sm_86": "sm_86", "sm_89": "sm_86",
    "sm_90": "sm_90",
    "sm_100": "sm_100", "sm_103": "sm_100",
    "sm_120": "sm_120", "sm_121": "sm_120",
    "gfx942": "gfx942", "gfx950": "gfx942",
}  # fmt: skip
# Opt-in shared memory a GPU must have for each configuration class to fit, largest first.
_SHARED_MEMORY_CLASSES = ((227 * 1024, "sm_90"), (163 * 1024, "sm_80"), (99 * 1024, "sm_86"))


@triton.jit
def group_of_tile(p_tiles, n_groups, tile):
    """Group that owns row tile `tile` of one tile table, or n_groups when the tile is past the last row.

    Counting the groups that end at or before the tile takes one load; a binary search would chain several.
    """
    group = tl.zeros((), tl.int32)
    for g in range(0, n_groups, 256):
        o_g = g + tl.arange(0, 256)
        b_end = tl.load(p_tiles + 1 + o_g, mask=o_g < n_groups, other=2147483647)
        group += tl.sum((b_end <= tile).to(tl.int32))
    return group


@triton.jit
def dropout_keep(seed, uid, column, site, step, threshold, BLOCK_C: tl.constexpr):
    """Keep mask [M, BLOCK_C] of the rows uid [M], for columns starting at `column`, a multiple of 8."""
    M: tl.constexpr = uid.shape[0]
    o_c8 = column // 8 + tl.arange(0, BLOCK_C // 8)
    w0, w1, w2, w3 = tl.philox(seed, o_c8[None, :], uid[:, None], site, step.to(tl.uint32), n_rounds=7)
    # Columns 8c .. 8c+7 take the low and high halves of w0, w1, w2, w3: bits (2, 1) pick the word, bit 0 the half.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    threshold = threshold.to(tl.uint32)
    lanes = tl.join((words & 0xFFFF) >= threshold, (words >> 16) >= threshold)
    return tl.reshape(lanes, [M, BLOCK_C])


@triton.jit
def dropout_bits(seed, uid, column, n_cols, site, step, threshold, BLOCK_C: tl.constexpr):
    """The same mask as uint8 [M, BLOCK_C / 8]: bit l of byte b is column 8 b + l, zero right of the last."""
    o_c8 = column // 8 + tl.arange(0, BLOCK_C // 8)
    words = tl.philox(seed, o_c8[None, :], uid[:, None], site, step.to(tl.uint32), n_rounds=7)
    threshold = threshold.to(tl.uint32)
    bits = tl.zeros([uid.shape[0], BLOCK_C // 8], tl.uint32)
    for w in tl.static_range(4):
        bits |= ((words[w] & 0xFFFF) >= threshold).to(tl.uint32) << 2 * w
        bits |= ((words[w] >> 16) >= threshold).to(tl.uint32) << 2 * w + 1
    missing = tl.minimum(tl.maximum(8 * (o_c8 + 1) - n_cols, 0), 8)
    return (bits & (255 >> missing)[None, :]).to(tl.uint8)


@triton.jit
def unpack_bits(b_bits):
    """Keep mask [M, 8 * bytes], its elements where dropout_keep has them."""
    M: tl.constexpr = b_bits.shape[0]
    b_bits = b_bits.to(tl.uint32)
    pairs = tl.join(tl.join(b_bits, b_bits >> 4), tl.join(b_bits >> 2, b_bits >> 6))
    return tl.reshape(tl.join(pairs & 1, pairs & 2) != 0, [M, 8 * b_bits.shape[1]])


@triton.jit
def dropout_scale(threshold, DROPOUT: tl.constexpr):
    """65536 / (65536 - threshold), 0 when everything is dropped, 1 without dropout."""
    if not DROPOUT:
        return tl.full((), 1.0, tl.float32)
    kept = tl.maximum(65536 - threshold, 1).to(tl.float32)
    # A Newton step rounds the quotient right; div_rn would call a subroutine, and callers would spill around it.
    inverse = 1.0 / kept
    scale = 65536.0 * inverse
    scale = tl.fma(tl.fma(-scale, kept, 65536.0), inverse, scale)
    return tl.where(threshold >= 65536, 0.0, scale)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def tile_index(rows: int) -> int:
    return TILE_ROWS.index(rows)


@functools.cache
def config_file(op: str) -> dict:
    return json.loads((_CONFIGS / f"{op}.json").read_text())


def arch_of(device: torch.device) -> str:
    """Configuration key of a device; of CPU tensors, that of the GPU that mtkernels.lab stands in for."""
    if device.type == "cuda":
        return _arch_of_gpu(device)
    lab = sys.modules.get("mtkernels.lab.driver")
    return config_arch(f"sm_{lab.arch()}") if lab else "default"


@functools.cache
def _arch_of_gpu(device: torch.device) -> str:
    """Its own architecture if we tuned for it, else the class its shared memory allows."""
    props = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return _ARCHS.get(props.gcnArchName.partition(":")[0], "default")
    known = _ARCHS.get(f"sm_{props.major}{props.minor}")
    shared = props.shared_memory_per_block_optin
    return known or next((arch for size, arch in _SHARED_MEMORY_CLASSES if shared >= size), "default")


@functools.cache
def launch_options(op: str, kernel: str, arch: str, bits: int = 16) -> dict:
    """Tile sizes, num_warps and num_stages of one kernel for elements of `bits` bits."""
    table = config_file(op)[kernel]
    table = table.get(str(bits), table)
    return {**table.get(arch, table["default"]), "enable_fp_fusion": True}


class CompileCase(NamedTuple):
    """One shipped specialisation of a kernel, enough to compile it for a GPU that is not there."""

    name: str
    kernel: Any
    signature: dict
    constexprs: dict
    options: dict
    tensor_cores: bool
    # Arguments that are multiples of 16 for ordinary shapes.
    aligned: tuple


_LAUNCH_KEYS = ("num_warps", "num_stages", "enable_fp_fusion")
_ALIGNED_SIZES = frozenset(("strides", "strides_o", "widths", "d_in", "slot_size", "n_classes", "n_bytes"))


def config_arch(target: str) -> str:
    """Configuration key of a GPU by name, "sm_89" -> "sm_86"."""
    return _ARCHS.get(target, "default")


def compile_case(name, kernel, types, options, tensor_cores=False, unaligned=(), **constexprs) -> CompileCase:
    """Case whose arguments take `types` (a tuple for a tuple of arguments) and, those without one, i32."""
    constexprs |= {k: v for k, v in options.items() if k not in _LAUNCH_KEYS}
    signature = {a: "constexpr" if a in constexprs else types.get(a, "i32") for a in kernel.arg_names}
    generic = {p.name for p in kernel.params if p.do_not_specialize}
    sizes = (_ALIGNED_SIZES | {a for a in signature if a.startswith("stride_")}) - generic - set(unaligned)
    first = {a: t[0] if isinstance(t, tuple) else t for a, t in signature.items()}
    aligned = tuple(a for a, t in first.items() if t.startswith("*") or (t == "i32" and a in sizes))
    launch = {k: options[k] for k in _LAUNCH_KEYS}
    return CompileCase(name, kernel, signature, constexprs, launch, tensor_cores, aligned)
