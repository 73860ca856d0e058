"""The repaired interpreter agrees with torch where the stock one works on bit patterns."""

import pytest
import torch

from mtkernels.lab import interpreter

if not interpreter.interpreting():
    pytest.skip("needs TRITON_INTERPRET=1, in its own process", allow_module_level=True)

import triton
import triton.language as tl

pytestmark = pytest.mark.interpret
N = 4096
EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2]


@triton.jit
def _copy_kernel(x_ptr, y_ptr, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(y_ptr + o, tl.load(x_ptr + o).to(y_ptr.dtype.element_ty))


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, out_ptr, less_ptr, N: tl.constexpr):
    o = tl.arange(0, N)
    x, y = tl.load(x_ptr + o), tl.load(y_ptr + o)
    tl.store(out_ptr + o, x + y)
    tl.store(out_ptr + N + o, x * y)
    tl.store(out_ptr + 2 * N + o, -x)
    tl.store(out_ptr + 3 * N + o, tl.where(x < y, x, 0.0))
    tl.store(out_ptr + 4 * N + o, tl.maximum(x, y))
    tl.store(out_ptr + 5 * N + o, tl.fma(x, y, x))
    tl.store(less_ptr + o, (x < y).to(tl.int32))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    o = tl.arange(0, N)
    p = o[:, None] * N + o[None, :]
    tl.store(c_ptr + p, tl.dot(tl.load(a_ptr + p), tl.load(b_ptr + p), input_precision="ieee"))


@triton.jit
def _scalar_mask_kernel(x_ptr, y_ptr, n, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(y_ptr + o, tl.load(x_ptr + o), mask=(o < N) & (n != 0))


@triton.jit
def _philox_kernel(out_ptr, ROUNDS: tl.constexpr):
    zero = tl.arange(0, 1)
    words = tl.philox(tl.zeros((), tl.int64), zero, zero, zero, zero, n_rounds=ROUNDS)
    for i in tl.static_range(4):
        tl.store(out_ptr + i + zero, words[i].to(tl.int64))


@pytest.fixture(autouse=True)
def repaired():
    with interpreter.repaired():
        yield


def _convert(x, dtype):
    y = torch.empty(x.shape, dtype=dtype)
    _copy_kernel[(1,)](x, y, N=x.numel())
    return y


@pytest.mark.parametrize("wide", [torch.float32, torch.float16])
def test_cast_to_bf16_rounds_to_nearest_even(wide):
    x = (torch.randn(N) * torch.logspace(-4, 4, N)).to(wide)
    x[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 1 + 2**-8])
    torch.testing.assert_close(_convert(x, torch.bfloat16), x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_cast_to_fp8_rounds_and_saturates(dtype):
    x = torch.randn(N) * torch.logspace(-4, 6, N)
    largest = torch.finfo(dtype).max
    assert torch.equal(_convert(x, dtype).float(), x.clamp(-largest, largest).to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, *EIGHT_BITS])
def test_cast_to_float32_is_exact(dtype):
    x = torch.randn(N).to(dtype)
    assert torch.equal(_convert(x, torch.float32), x.float())


def test_bf16_arithmetic_rounds_once():
    x, y = torch.randn(N).bfloat16(), torch.randn(N).bfloat16()
    out, less = torch.empty(6, N, dtype=torch.bfloat16), torch.empty(N, dtype=torch.int32)
    _arithmetic_kernel[(1,)](x, y, out, less, N=N)
    fma = (x.double() * y.double() + x.double()).float().bfloat16()
    assert torch.equal(out, torch.stack([x + y, x * y, -x, torch.where(x < y, x, 0), torch.maximum(x, y), fma]))
    assert torch.equal(less, (x < y).int())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, *EIGHT_BITS])
def test_dot_accumulates_in_float32(dtype):
    a, b = torch.randn(64, 64).to(dtype), torch.randn(64, 64).to(dtype)
    c = torch.empty(64, 64)
    _dot_kernel[(1,)](a, b, c, N=64)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [0, 3])
def test_a_scalar_comparison_is_a_mask(n):
    x, y = torch.randn(16), torch.zeros(16)
    _scalar_mask_kernel[(1,)](x, y, n, N=16)
    assert torch.equal(y, x if n else torch.zeros(16))


@pytest.mark.parametrize(
    "rounds, words",
    [(10, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)), (7, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48))],
)
def test_philox_known_answers(rounds, words):
    out = torch.empty(4, dtype=torch.int64)
    _philox_kernel[(1,)](out, ROUNDS=rounds)
    assert out.tolist() == list(words)


def test_uninstall_restores_the_stock_interpreter():
    from triton.runtime.interpreter import InterpreterBuilder

    installed = dict(vars(InterpreterBuilder))
    interpreter.install()
    assert dict(vars(InterpreterBuilder)) == installed
    interpreter.uninstall()
    try:
        stock = dict(vars(InterpreterBuilder))
        with interpreter.repaired():
            assert vars(InterpreterBuilder)["cast_impl"] is not stock["cast_impl"]
        assert dict(vars(InterpreterBuilder)) == stock
    finally:
        interpreter.install()
