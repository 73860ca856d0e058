"""The CUDA emulator: right kernels give no finding; test_mutations.py has those that are wrong."""

import platform
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from mtkernels.lab import _cuda_build
from mtkernels.lab.cuda_emulator import RUNS, CompileError, CudaEmulator, KernelMistake, unwritten

try:
    _cuda_build.compiler(), _cuda_build.cuda_headers()
except RuntimeError as missing:
    pytest.skip(str(missing), allow_module_level=True)
if find_spec("pybind11") is None:
    pytest.skip("no pybind11", allow_module_level=True)

HERE = Path(__file__).resolve().parent / "cuda"
RIGHT = CudaEmulator(HERE / "right.cu")
BROKEN = CudaEmulator(HERE / "broken.cu")
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_numbers_in_every_test():
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


def floats(*shape):
    return RNG.standard_normal(shape, np.float32)


def f32(*shape):
    return unwritten(shape, np.float32)


def zeros(*shape):
    return np.zeros(shape, np.int32)


def to_bf16(x):
    """Bits of float32 values that bfloat16 holds exactly."""
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def check(emulator, entry, *args, seeds=(0, 1, 2)):
    """No findings by any tool; then a plain run that writes the arrays."""
    assert not emulator.findings(entry, *args, seeds=seeds)
    assert emulator.run(entry, *args) is None


class TestRightKernels:
    @pytest.mark.parametrize("n", [0, 1, 33, 200])
    def test_route(self, n):
        expert = RNG.integers(0, 32, n).astype(np.int32)
        offsets, perm = unwritten(33, np.int32), unwritten(n, np.int32)
        if n == 200:
            assert not RIGHT.findings("run_route", expert, n, offsets, perm)
        RIGHT.run("run_route", expert, n, offsets, perm)
        assert np.array_equal(perm, np.argsort(expert, kind="stable"))
        assert np.array_equal(offsets, np.concatenate([[0], np.bincount(expert, minlength=32).cumsum()]))

    @pytest.mark.parametrize("fences", [False, True])
    def test_last_block(self, fences):
        x, out = floats(500), f32(1)
        check(RIGHT, "run_sum_last_block", fences, x, 500, f32(3), 3, zeros(1), out)
        assert abs(out[0] - x.sum()) < 1e-4

    def test_blocks_that_wait_for_each_other(self):
        x, out = RNG.integers(0, 9, 200).astype(np.int32), unwritten(200, np.int32)
        check(RIGHT, "run_chained_scan", x, 200, zeros(1), zeros(4), zeros(4), out)
        assert np.array_equal(out, x.cumsum())

    @pytest.mark.parametrize("dtype", ["bf16", "f16"])
    def test_matmul(self, dtype):
        a, b = (RNG.integers(-8, 9, shape).astype(np.float32) / 4 for shape in ((32, 48), (48, 16)))
        c = f32(32, 16)
        bits = to_bf16 if dtype == "bf16" else lambda x: x.astype(np.float16)
        check(RIGHT, f"run_matmul_{dtype}", bits(a), bits(b), c, 32, 16, 48, seeds=(0, 1))
        assert np.array_equal(c, a @ b)

    def test_warp_functions(self):
        x, out = np.arange(32, dtype=np.int32) % 9, unwritten((32, 8), np.uint32)
        check(RIGHT, "run_warp_functions", x, out)
        lane = np.arange(32)
        assert np.array_equal(out[:, 0], x[lane // 8 * 8 + 5])
        assert np.array_equal(out[:, 1], x[np.where(lane % 16 >= 3, lane - 3, lane)])
        assert np.array_equal(out[:, 2], x[np.where(lane % 16 < 13, lane + 3, lane)])
        assert np.array_equal(out[:, 3], x[lane ^ 6])
        assert set(out[:, 4]) == {(1 << 24) - 1} and set(out[:, 5]) == {8} and set(out[:, 6]) == {3}
        assert set(out[:, 7]) == {int((x > 3).sum())}

    def test_same_seed_same_run(self):
        x, sums = floats(512) * np.exp(3 * floats(512)), []
        for seed in (*range(5), *range(5)):
            out = np.zeros(1, np.float32)
            BROKEN.run("run_order_of_addition", True, x, f32(16), out, seed=seed)
            sums.append(out.tobytes())
        assert sums[:5] == sums[5:] and len(set(sums)) > 1


class TestTraffic:
    def line(self, traffic, text, access, source):
        lines = source.read_text().splitlines()
        return next(t for t in traffic if text in lines[t.line - 1] and t.access == access)

    def test_coalescing(self):
        for broken, sectors in ((False, 4), (True, 32)):
            traffic = BROKEN.traffic("run_scattered_rows", broken, floats(32, 16), 16, f32(32))
            load = self.line(traffic, "out[t] =", "load", HERE / "broken.cu")
            assert (load.requests, load.lanes, load.sectors, load.ideal_sectors) == (1, 32, sectors, 4)

    def test_bank_conflicts(self):
        for padded, passes in ((True, 1), (False, 32)):
            traffic = RIGHT.traffic("run_transpose", padded, floats(32, 32), 32, 32, f32(32, 32))
            load = next(t for t in traffic if t.space == "shared" and t.access == "load")
            assert (load.requests, load.passes / load.requests) == (32, passes)

    def test_ldmatrix_and_cp_async_are_counted(self):
        a, b = np.zeros((16, 16), np.float16), np.zeros((16, 16), np.float16)
        traffic = RIGHT.traffic("run_matmul_f16", a, b, f32(16, 16), 16, 16, 16)
        rows = self.line(traffic, "ldmatrix_x4", "load", HERE / "right.cu")
        assert (rows.bytes, rows.lanes, rows.passes / rows.requests, rows.ideal_passes / rows.requests) == (16, 64, 8, 4)
        copies = self.line(traffic, "cp_async16", "load", HERE / "right.cu")
        assert (copies.space, copies.sectors, copies.ideal_sectors) == ("global", 32, 32)


class TestInterface:
    def test_a_finding_is_raised_with_its_line(self):
        with pytest.raises(KernelMistake, match=r"broken.cu:\d+: divergence: .*\[plain\]") as caught:
            BROKEN.run("run_divergent_barrier", True, floats(64), f32(64))
        (finding,) = caught.value.findings
        assert "// BUG" in (HERE / "broken.cu").read_text().splitlines()[finding.line - 1] and "barrier in divergent code" in finding.message

    def test_the_process_survives_and_goes_on(self):
        with pytest.raises(KernelMistake):
            BROKEN.run("run_wild_store", True, f32(32))
        out = f32(32)
        BROKEN.run("run_wild_store", False, out)
        assert (out == 1).all()

    def test_an_invalid_launch_is_an_error(self):
        with pytest.raises(RuntimeError, match="1 to 1024 threads"):
            RIGHT.run("run_too_many_threads", f32(1))

    @pytest.mark.parametrize(
        "args, error, says",
        [
            ((1,), TypeError, r"takes 2 arguments \(const i32\*, u32\*\); got 1"),
            ((np.zeros(32, np.float32), None), TypeError, "argument 0 .* is an array of float32; give int32"),
            ((np.zeros((32, 2), np.int32)[:, 0], None), ValueError, "argument 0 .* is not contiguous"),
            (([1, 2], None), TypeError, "argument 0 .* is list; give a numpy array or None"),
        ],
    )
    def test_bad_arguments_are_named(self, args, error, says):
        with pytest.raises(error, match=says):
            RIGHT.run("run_warp_functions", *args)

    def test_numbers_that_do_not_fit_are_refused(self):
        with pytest.raises(OverflowError, match="argument 1 of run_route"):
            RIGHT.run("run_route", None, 2**31, None, None)

    def test_unknown_names_are_refused(self):
        with pytest.raises(ValueError, match="no entry 'nothing'; it has: run_route, "):
            RIGHT.run("nothing")
        with pytest.raises(ValueError, match=f"tool is 'valgrind'; give one of {', '.join(RUNS)}"):
            RIGHT.run("run_route", tool="valgrind")
        with pytest.raises(FileNotFoundError, match="is not a file"):
            CudaEmulator("nowhere.cu")

    def test_missing_tools_are_named(self, monkeypatch):
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(RuntimeError, match="'no-such-compiler' is not on PATH"):
            _cuda_build.compiler.__wrapped__()
        monkeypatch.setattr(_cuda_build, "find_spec", lambda name: None)
        monkeypatch.setattr(platform, "machine", lambda: "riscv64")
        with pytest.raises(RuntimeError, match="x86-64 Linux; this is Linux riscv64"):
            _cuda_build.compiler.__wrapped__()

    def test_missing_pybind11_is_named(self, monkeypatch, tmp_path):
        monkeypatch.setattr(_cuda_build, "find_spec", lambda name: None)
        with pytest.raises(RuntimeError, match="needs pybind11: pip install pybind11"):
            _cuda_build.build_runtime.__wrapped__(str(tmp_path))

    def test_a_changed_header_rebuilds(self, tmp_path):
        (tmp_path / "value.h").write_text("constexpr int kValue = 1;")
        source = tmp_path / "fill.cu"
        source.write_text(
            '#include "gpu.h"\n#include "value.h"\n'
            "__global__ void fill(int* x) { x[threadIdx.x] = kValue; }\n"
            "void run_fill(int* x) { gpu::launch(fill, 1, 4, 0, nullptr, x); }\n"
        )
        for value in (1, 2):
            (tmp_path / "value.h").write_text(f"constexpr int kValue = {value};")
            x = unwritten(4, np.int32)
            CudaEmulator(source, entries=["run_fill"]).run("run_fill", x)
            assert (x == value).all()
        source.write_text("no C++")
        with pytest.raises(CompileError, match="fill.cu"):
            CudaEmulator(source, entries=["run_fill"]).run("run_fill", x)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("name", ["right.cu", "broken.cu"])
def test_nvcc_compiles_the_same_source(name, tmp_path):
    architectures = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90"]
    command = ["nvcc", "-std=c++17", f"-I{_cuda_build.csrc() / 'cuda'}", *architectures, "-c", str(HERE / name), "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
