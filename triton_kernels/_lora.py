"""What the LoRA kernels know about a bank: a device table of addresses, ranks and strides, never of contents.

Column g * n + i of the table belongs to adapter i of target g; its rows are the fields below.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import _common
from ._common import cdiv

# Pointers to A_i [R, D], B_i [O, R], bias_i [O] and to their gradients; 0 = there is none, or nobody wants it.
PTR_A, PTR_B, PTR_BIAS, PTR_DA, PTR_DB, PTR_DBIAS = (tl.constexpr(f) for f in range(6))
RANK, STRIDE_A, STRIDE_B_O, STRIDE_B_R, STRIDE_DA, STRIDE_DB_O, STRIDE_DB_R = (tl.constexpr(f) for f in range(6, 13))
# First elements of dA_i, dB_i, dbias_i in a slot of partial sums.
PART_A, PART_B, PART_BIAS = (tl.constexpr(f) for f in range(13, 16))
# The target's first column of S, number of columns and output features; pointers to the adapter's scale, threshold and
# seed; the target's site.
S_BEGIN, S_WIDTH, D_OUT, SCALE, THRESHOLD, SEED, SITE = (tl.constexpr(f) for f in range(16, 23))

# LAYOUT of B and dB: rank contiguous, O contiguous, or 2 for neither.
RANK_CONTIGUOUS, O_CONTIGUOUS = tl.constexpr(0), tl.constexpr(1)

# Rows of an adapter are cut into chunks of this many for its gradients; only adapters of several chunks take slots.
CHUNK_ROWS = tl.constexpr(1024)
CHUNK = CHUNK_ROWS.value
_PART_ALIGN = 8
# 128 of them still fit an int32.
_MAX_STRIDE = 2**24

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Bank(NamedTuple):
    """Host side of the table. widths: columns of S per target; slot_size: float32 elements of one slot of partial sums."""

    table: torch.Tensor
    n_adapters: int
    widths: tuple
    slot_size: int
    d_in: int
    largest: tuple
    has_bias: bool
    constexprs: dict

    @property
    def n_targets(self):
        return len(self.widths)

    @property
    def max_rank(self):
        return max(self.widths)

    def pick(self, *names):
        return {name: self.constexprs[name] for name in names}


def bank_of(n_targets, A=(), B=(), bias=(), scale=(), threshold=(), seeds=(), sites=(), dA=(), dB=(), dbias=(), places=None):
    """Bank of target-major lists; those a launcher was not given are empty.

    places: where in scale, threshold and seeds each adapter of a target has its own; None = in order.
    The table is cached by every address, shape and stride in it, so a factor changed in place is seen.
    """
    first = (*A, *B)[0]
    ranks = tuple(a.shape[0] for a in A) or tuple(b.shape[1] for b in B)
    pointers = tuple(tuple(t.data_ptr() if t.numel() else 0 for t in ts) for ts in (A, B, bias, dA, dB, dbias))
    strides = tuple(tuple(t.stride() for t in ts) for ts in (A, B, dA, dB))
    vectors = tuple(tuple((t.data_ptr(), t.stride(0) * t.element_size()) for t in ts) for ts in (scale, threshold, seeds))
    d_out = tuple(b.shape[0] for b in B[:: len(ranks) // n_targets])
    grad = next((t.dtype for t in (*dA, *dB, *dbias) if t.numel()), first.dtype)
    key = (pointers, strides, vectors, tuple(sites), ranks, A[0].shape[1] if A else 0, d_out, first.dtype, grad, first.device, n_targets, places)
    if first.device.type == "cpu":
        return _bank(*key, None)
    if torch.cuda.is_current_stream_capturing():
        return _bank.__wrapped__(*key, None)
    # One table per stream: the copy that fills it, its uses and its release are then ordered without waiting.
    return _bank(*key, torch.cuda.current_stream(first.device).cuda_stream)


@functools.lru_cache(maxsize=4096)
def _bank(pointers, strides, vectors, sites, ranks, d_in, d_out, dtype, grad, device, n_targets, places, stream):
    n = len(ranks) // n_targets
    places = places or range(n)
    none = (0,) * len(ranks)
    a, b, bias, dA, dB, dbias = (p or none for p in pointers)
    s_A, s_B, s_dA, s_dB = (_used(s, p) for s, p in zip(strides, (a, b, dA, dB)))
    outs = _repeat(d_out, n, n_targets)
    sizes = [(r * d_in * bool(dA[j]), r * o * bool(dB[j]), o * bool(dbias[j])) for j, (r, o) in enumerate(zip(ranks, outs))]
    parts, slot_size = _slot_parts(sizes, n, n_targets)
    widths = tuple(max(ranks[g * n : (g + 1) * n]) for g in range(n_targets))
    begins = _repeat([sum(widths[:g]) for g in range(n_targets)], n, n_targets)
    layout = _layout((*s_B, *s_dB), (*ranks, *ranks), (*outs, *outs))
    if max((abs(v) for s in (*s_A, *s_B, *s_dA, *s_dB) for v in s), default=0) >= _MAX_STRIDE:
        raise ValueError(f"LoRA factors and their gradients take strides below {_MAX_STRIDE} elements; make them contiguous")
    rows_A, rows_B = [s[0] for s in (*s_A, *s_dA)], [] if layout == 2 else [s[layout] for s in (*s_B, *s_dB)]
    buckets = {(r > 16) + (r > 32) + (r > 64) for r, p in zip(ranks, bias) if r or p}
    constexprs = dict(
        BUCKETS=sum(1 << k for k in buckets),
        FACTOR=DTYPES[dtype],
        GRAD=DTYPES[grad],
        LAYOUT=layout,
        ALIGNED=all(p % 16 == 0 for row in (a, b, bias, dA, dB, dbias) for p in row),
        ALIGN=_alignment(*ranks, *begins, *rows_A, *rows_B),
        # Of the rows of A alone, whatever the ranks.
        ALIGN_A=_alignment(*rows_A),
        HAS_BIAS=any(bias),
        DENSE=_dense(layout, s_dA, s_dB, ranks, d_in, outs),
    )
    rows = [a, b, bias, dA, dB, dbias, ranks, [s[0] for s in s_A], *zip(*s_B), [s[0] for s in s_dA], *zip(*s_dB), *zip(*parts)]
    rows += [begins, _repeat(widths, n, n_targets), outs, *(_elements(v, places, n_targets) for v in vectors), _repeat(sites, n, n_targets)]
    largest = tuple(max(column) for column in zip(*sizes))
    return Bank(_upload(rows, device), n, widths, slot_size, d_in, largest, any(bias), constexprs)


def _alignment(*sizes):
    """Elements that divide every size: 8 or 1."""
    return 8 if all(n % 8 == 0 for n in sizes) else 1


def _used(strides, pointers):
    """Strides of the tensors that are there, zeros for the others."""
    return [s if p else (0, 0) for s, p in zip(strides or [(0, 0)] * len(pointers), pointers)]


def _repeat(values, n, n_targets):
    return [v for v in values or [0] * n_targets for _ in range(n)]


def _elements(vectors, places, n_targets):
    return [p + i * step for p, step in vectors or [(0, 0)] * n_targets for i in places]


def _slot_parts(sizes, n, n_targets):
    """(first elements of dA, dB, dbias of each column in its adapter's slot, elements of the largest slot)."""
    parts, largest = [None] * len(sizes), 0
    for i in range(n):
        end = 0
        for j in range(i, len(sizes), n):
            begins = []
            for size in sizes[j]:
                begins.append(end)
                end += cdiv(size, _PART_ALIGN) * _PART_ALIGN
            parts[j] = begins
        largest = max(largest, end)
    return parts, largest


def _layout(strides, ranks, d_out):
    """RANK_CONTIGUOUS, O_CONTIGUOUS or STRIDED, of B and dB together; a dimension of one element has any stride."""
    if all(s[1] == 1 or r < 2 or not any(s) for s, r in zip(strides, ranks)):
        return 0
    return 1 if all(s[0] == 1 or o < 2 or not any(s) for s, o in zip(strides, d_out)) else 2


def _dense(layout, s_dA, s_dB, ranks, d_in, d_out):
    """Whether every gradient lies in memory like its part of a slot: dA [R, D], dB [O, R], or [R, O] when O is contiguous."""
    sides = [(s[::-1] if layout == 1 else s, (r, o) if layout == 1 else (o, r)) for s, r, o in zip(s_dB, ranks, d_out)]
    sides += [(s, (r, d_in)) for s, r in zip(s_dA, ranks)]
    return all(not any(s) or ((s[0] == n[1] or n[0] < 2) and (s[1] == 1 or n[1] < 2)) for s, n in sides)


# A captured copy reads its host memory at every replay of the graph.
_captured = []


def _upload(rows, device):
    """int64 tensor on the device, without waiting for it."""
    rows = [list(row) for row in rows]
    if device.type == "cpu":
        return torch.tensor(rows, dtype=torch.int64)
    host = torch.tensor(rows, dtype=torch.int64, pin_memory=True)
    if torch.cuda.is_current_stream_capturing():
        _captured.append(host)
    return host.to(device, non_blocking=True)


def device_table(rows, device):
    """int64 [fields, n] of the tuples `rows` on the device; cached by its values, which are addresses and sizes, no contents."""
    if device.type == "cpu":
        return _device_table(rows, device, None)
    if torch.cuda.is_current_stream_capturing():
        return _upload(rows, device)
    return _device_table(rows, device, torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(maxsize=1024)
def _device_table(rows, device, stream):
    return _upload(rows, device)


def address(t):
    """Where t begins; 0 for an empty tensor."""
    return t.data_ptr() if t.numel() else 0


def options_of(stem, kernel, device, compute):
    return _common.launch_options(stem, kernel, _common.arch_of(device), 32 if compute == torch.float32 else 16)


def fill_width(bank):
    """Columns of S that one store of zeros covers."""
    return min(128, triton.next_power_of_2(max(1, bank.max_rank)))


def slots_of(perm, n_rows):
    """K of a plan over [T, K]."""
    return max(1, perm.numel() // max(1, n_rows))


@triton.jit
def field(table_ptr, n_columns, column, FIELD: tl.constexpr):
    return tl.load(table_ptr + FIELD * n_columns + column)


@triton.jit
def size_field(table_ptr, n_columns, column, FIELD: tl.constexpr, ALIGN: tl.constexpr):
    return tl.multiple_of(field(table_ptr, n_columns, column, FIELD).to(tl.int32), ALIGN)


@triton.jit
def factor_pointer(table_ptr, n_columns, column, FIELD: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = field(table_ptr, n_columns, column, FIELD).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def strides_of_B(
    table_ptr, n_columns, column, STRIDE_O: tl.constexpr, STRIDE_R: tl.constexpr, LAYOUT: tl.constexpr, ALIGN: tl.constexpr
):
    """(stride of O, stride of R)."""
    if LAYOUT == RANK_CONTIGUOUS:
        return size_field(table_ptr, n_columns, column, STRIDE_O, ALIGN), 1
    elif LAYOUT == O_CONTIGUOUS:
        return 1, size_field(table_ptr, n_columns, column, STRIDE_R, ALIGN)
    else:
        return (
            size_field(table_ptr, n_columns, column, STRIDE_O, 1),
            size_field(table_ptr, n_columns, column, STRIDE_R, 1),
        )


@triton.jit
def scale_of(table_ptr, n_columns, column):
    return tl.load(field(table_ptr, n_columns, column, SCALE).to(tl.pointer_type(tl.float32)))


@triton.jit
def dropout_of(table_ptr, n_columns, column, step_ptr, DROPOUT: tl.constexpr):
    """(threshold, seed, site, step); zeros without dropout."""
    if DROPOUT:
        threshold = tl.load(field(table_ptr, n_columns, column, THRESHOLD).to(tl.pointer_type(tl.int32)))
        seed = tl.load(field(table_ptr, n_columns, column, SEED).to(tl.pointer_type(tl.int64)))
        return threshold, seed, field(table_ptr, n_columns, column, SITE).to(tl.int32), tl.load(step_ptr)
    else:
        return 0, 0, 0, 0


@triton.jit
def pick(values, index):
    """values[index] of a tuple of scalars or pointers, by an index known at run time."""
    value = values[0]
    for g in tl.static_range(1, len(values)):
        value = tl.where(index == g, values[g], value)
    return value


@triton.jit
def bucket_of(rank):
    """b = 0..3 of the BLOCK_R = 16 << b that covers the rank; above 128, tiles of 128."""
    return (rank > 16).to(tl.int32) + (rank > 32).to(tl.int32) + (rank > 64).to(tl.int32)


def lora_cases(stem, kernels, arch):
    """Compile cases of {name: (kernel, its config, whether it drops out)}: bf16, float32, float32 factors over bf16 rows.

    Each for one target of ranks and widths that are all multiples of 8, and for two targets of any (`.ragged`), K slots,
    gates and e; with the narrowest and the widest rank bucket, for the branches between need less. `.bits` keep their masks.
    """
    for dtype, rows, factor in (("bf16", "bf16", "bfloat16"), ("fp32", "fp32", "float32"), ("mixed", "bf16", "float32")):
        bits = 16 if factor == "bfloat16" else 32
        types = dict.fromkeys(("perm_ptr", "offsets_ptr", "tiles_ptr"), "*i32") | dict.fromkeys(("table_ptr", "step_ptr"), "*i64")
        types |= dict.fromkeys(("x_ptr", "dx_ptr"), f"*{rows}") | dict.fromkeys(("partial_ptr", "gates_ptr", "e_ptr"), "*fp32")
        types |= dict.fromkeys(("s_ptr", "ds_ptr"), f"*{'bf16' if bits == 16 else 'fp32'}") | dict(bits_ptr="*u8")
        for name, (kernel, dropout) in kernels.items():
            options = _common.launch_options(stem, name, arch, bits)
            rows_index = _common.tile_index(options["BLOCK_M"] if "BLOCK_M" in options and "BLOCK_J" not in options else CHUNK)
            constexprs = dict(
                DROPOUT=dropout, HAS_BIAS=True, BUCKETS=0b1001, FILL_R=128, LAYOUT=0, DENSE=True, ALIGNED=True, ALIGN_A=8,
                FACTOR=getattr(tl, factor), GRAD=getattr(tl, factor), TILE_INDEX=rows_index,
            )  # fmt: skip
            plain, replayed = dict(n_slots=1, n_targets=1, gates_ptr=None, e_ptr=None, ALIGN=8), dict(bits_ptr=None)
            variants = [("", 1, plain | replayed), (".ragged", 2, dict(ALIGN=1) | replayed), (".bits", 1, plain)]
            for suffix, n, fixed in variants[: 3 if "bits_ptr" in kernel.arg_names else 2]:
                groups = {a: (t,) * n for a, t in (("ys", f"*{rows}"), ("dys", f"*{rows}"), ("strides", "i32"), ("widths", "i32"))}
                chosen = {k: v for k, v in {**constexprs, **fixed}.items() if k in kernel.arg_names}
                yield _common.compile_case(
                    f"{stem}.{name}.{dtype}{suffix}", kernel, types | groups, options,
                    tensor_cores=bits == 16, unaligned=("slot_size",) * (n > 1), **chosen,
                )  # fmt: skip
