"""The shared base in a fixed order of operations, as the C++ kernels compute it."""

import pytest
import torch
import torch.nn.functional as F

from mtkernels import _native
from mtkernels.testing import assert_accurate

pytestmark = pytest.mark.skipif(not _native.available(), reason=_native.reason())
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
T, D, O = 740, 1043, 1100  # beyond one tile of rows, depth and panel of outputs, and a multiple of none


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def draw(*shape, dtype):
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize("n_in", [D, D - 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_torch(dtype, n_in):
    x, w, bias, dy = draw(T, n_in, dtype=dtype), draw(O, n_in, dtype=dtype), draw(O, dtype=dtype), draw(T, O, dtype=dtype)
    run = _native.ops()
    for ours, plain, exact in (
        (run.lora_base_linear(x, w, bias), F.linear(x, w, bias), F.linear(x.double(), w.double(), bias.double())),
        (run.lora_base_dx([dy], [w]), dy @ w, dy.double() @ w.double()),
    ):
        assert ours.dtype == dtype
        assert_accurate(ours, plain, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_any_batch_on_any_number_of_threads(dtype, threads):
    x, w, dy, run = draw(T, D, dtype=dtype), draw(O, D, dtype=dtype), draw(T, O, dtype=dtype), _native.ops()
    threads(1)
    y, dx = run.lora_base_linear(x, w, None), run.lora_base_dx([dy], [w])
    for n in (1, 2, 5):
        threads(n)
        for rows in (slice(0, 1), slice(3, 16), slice(1, 74), slice(100, 370), slice(0, T)):
            assert torch.equal(run.lora_base_linear(x[rows], w, None), y[rows])
            assert torch.equal(run.lora_base_dx([dy[rows]], [w]), dx[rows])


def test_layers_of_one_input_add_up_before_rounding():
    widths = (O, 7, 64)
    w, dy = [draw(n, D, dtype=torch.bfloat16) for n in widths], [draw(T, n, dtype=torch.bfloat16) for n in widths]
    dx = _native.ops().lora_base_dx(dy, w)
    exact = sum(g.double() @ v.double() for g, v in zip(dy, w))
    assert_accurate(dx, exact.float().bfloat16(), exact, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [50, 51])
def test_strides_and_nothing_at_all(dtype, stride):
    run, x, w = _native.ops(), draw(9, 40, dtype=dtype), draw(20, stride, dtype=dtype)
    assert torch.equal(run.lora_base_linear(x[:, 3:27], w[:, 5:29], None), run.lora_base_linear(x[:, 3:27].contiguous(), w[:, 5:29].contiguous(), None))
    assert run.lora_base_linear(x[:0], w[:, :40], None).shape == (0, 20)
    assert not run.lora_base_linear(x[:, :0], w[:, :0], None).any()


def test_bad_input_is_named():
    run, x, w = _native.ops(), torch.randn(4, 8), torch.randn(6, 8)
    cases = [
        ("give them one dtype and matching sizes", lambda: run.lora_base_linear(x, w[:, 1:], None)),
        ("give them one dtype and matching sizes", lambda: run.lora_base_linear(x.half(), w, None)),
        ("kernels take float32", lambda: run.lora_base_linear(x.double(), w.double(), None)),
        ("unit stride", lambda: run.lora_base_linear(torch.randn(8, 4).T, w, None)),
        ("bias is", lambda: run.lora_base_linear(x, w, torch.randn(5))),
        ("got 1 of dy and 2 of w", lambda: run.lora_base_dx([x], [w, w])),
        ("layers of one input", lambda: run.lora_base_dx([x[:, :6], x[:, :6]], [w, w[:, 1:]])),
        (r"dy is float32 \[3, 6\]", lambda: run.lora_base_dx([x[:, :6], x[1:, :6]], [w, w])),
    ]
    for message, call in cases:
        with pytest.raises(RuntimeError, match=message):
            call()
