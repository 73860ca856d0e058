"""What the lab reads from compiled code: figures against known ones, and mistakes made on purpose."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import resource_kernels as kernels

from mtkernels.lab import amdgcn, matrix, resources, sass
from mtkernels.lab.interpreter import interpreting
from mtkernels.lab.occupancy import occupancy

pytestmark = pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET=1 turns kernels into Python; run in the ordinary process")

EXPECTED_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}


def matmul(target, kernel=kernels.matmul, dtype="bf16", warps=4, stages=3, precision=None, **sizes):
    """Resources of one of the matrix kernels; sizes M, N, K are 128, 64, 64 unless given."""
    signature = {name: "i32" for name in kernel.arg_names}
    signature |= {name: f"*{dtype}" for name in ("a_ptr", "b_ptr")} | {"c_ptr": "*bf16" if kernel is kernels.matmul_tma else "*fp32"}
    constexprs = {"M": 128, "N": 64, "K": 64, **sizes}
    if kernel is kernels.matmul:
        constexprs["PRECISION"] = precision or "tf32"
    signature |= dict.fromkeys(constexprs, "constexpr")
    aligned = [name for name, kind in signature.items() if kind != "constexpr"]
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return resources.measure(kernel, target, signature, constexprs, options, aligned)


@pytest.mark.parametrize("target, core", EXPECTED_CORES.items())
def test_matmul_is_read_right(target, core):
    found = matmul(target)
    assert set(found.tensor_cores) == {core} and not resources.problems(found, tensor_cores=True)
    # Three stages of both operands: 128 x 64 and 64 x 64 bf16. The barriers of sm_100 come on top; AMD keeps fewer.
    operands = 3 * 2 * (128 * 64 + 64 * 64)
    if target in ("sm_90", "sm_100"):
        assert operands <= found.shared <= operands + 64
    assert found.num_warps == 4 and 0 < found.registers <= 256 and found.instructions > 100
    assert found.hot_loop.tensor_cores > 0
    if target == "sm_80":
        # 128 x 64 x 64 by 16 x 8 x 16 for each of 4 warps; the tensor cores take one every 8 cycles.
        assert found.hot_loop.tensor_cores == 128 * 64 * 64 // (16 * 8 * 16) // 4
        assert found.hot_loop.cycles >= 8 * found.hot_loop.tensor_cores
    assert (found.hot_loop.cycles is None) == (target == "gfx942")
    if target == "sm_100":
        assert (found.tensor_memory, found.accumulators, found.doubled_accumulators) == (64, 1, 0)


@pytest.mark.parametrize("target", ("sm_90", "sm_100"))
def test_tensor_map_copies_are_counted(target):
    assert set(matmul(target, kernels.matmul_tma).tma) == {"UTMALDG", "UTMASTG"}
    assert not matmul(target).tma


def test_a_spill_is_reported():
    wide = matmul("sm_80", M=256, N=256, warps=4)
    assert wide.spills > 0 and wide.stack > 0
    assert any("spill instructions" in text for text in resources.problems(wide))
    wide = matmul("gfx942", M=512, N=256, K=32, warps=4, stages=1)
    assert wide.spills > 0 and any("spilled registers" in text for text in resources.problems(wide))


@pytest.mark.parametrize("target, stages", [("sm_86", 6), ("sm_90", 10), ("gfx942", 4)])
def test_too_much_shared_memory_is_reported(target, stages):
    found = matmul(target, stages=stages)
    assert any("bytes of shared memory" in text for text in resources.problems(found)), found
    assert found.occupancy.blocks == 0 and "shared" in found.occupancy.limits


@pytest.mark.parametrize("target", EXPECTED_CORES)
def test_lost_tensor_cores_are_reported(target):
    found = matmul(target, dtype="fp32", precision="ieee", K=16, M=64)
    if target == "gfx942":
        # CDNA has matrix instructions for float32 as well.
        assert not resources.problems(found, tensor_cores=True)
        found = dataclasses.replace(found, tensor_cores={})
    assert resources.problems(found, tensor_cores=True) == [f"no {EXPECTED_CORES[target]}: tensor-core instructions are none"]
    assert not resources.problems(found)


def test_hopper_without_wgmma_is_reported():
    """Two warps cannot issue wgmma, so the compiler falls back to the instructions of sm_80."""
    found = matmul("sm_90", M=16, warps=2)
    assert resources.problems(found, tensor_cores=True) == ["no HGMMA: tensor-core instructions are HMMA"]


@pytest.mark.parametrize("target", ("sm_100", "sm_103"))
def test_a_doubled_accumulator_is_reported(target):
    after, nested = (matmul(target, kernels.two_dots, NESTED=nested) for nested in (False, True))
    assert after.tensor_memory == 64 and not resources.problems(after, tensor_cores=True)
    assert nested.tensor_memory == 128 and nested.doubled_accumulators > 0
    assert any("a chain of dots goes from one to another" in text for text in resources.problems(nested, tensor_cores=True))


def test_a_kernel_without_dots_has_a_hot_loop():
    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}
    found = resources.measure(kernels.row_sums, "sm_90", signature, {"BLOCK": 256}, {"num_warps": 4, "enable_fp_fusion": True})
    assert found.hot_loop and not found.tensor_cores and found.hot_loop.cycles >= found.hot_loop.instructions


def test_pointers_are_aligned_also_in_a_tuple():
    """Four floats a thread: one load of 16 bytes for each array, or four loads where the address may be odd."""
    signature = {"xs": ("*fp32", "*fp32", "*fp32"), "y_ptr": "*fp32", "BLOCK": "constexpr"}
    options = {"num_warps": 1, "enable_fp_fusion": True}
    aligned, unaligned = (resources.measure(kernels.sums, "sm_80", signature, {"BLOCK": 128}, options, a) for a in (None, ()))
    assert unaligned.instructions - aligned.instructions >= 3 * (4 - 1)


@pytest.mark.parametrize(
    "target, taken, expected",
    [
        # NVIDIA's occupancy calculator: 64 registers x 256 threads fill the 65536 registers four times.
        ("sm_80", dict(registers=64, shared=0, num_warps=8), (4, 0.5, {"registers"})),
        ("sm_80", dict(registers=32, shared=0, num_warps=8), (8, 1.0, {"registers", "warps"})),
        ("sm_80", dict(registers=33, shared=0, num_warps=8), (6, 0.75, {"registers"})),
        ("sm_86", dict(registers=32, shared=0, num_warps=1), (16, 16 / 48, {"blocks"})),
        # 48 KiB and the 1 KiB that the system takes, of 164 and of 228 KiB.
        ("sm_80", dict(registers=32, shared=48 * 1024, num_warps=4), (3, 12 / 64, {"shared"})),
        ("sm_90", dict(registers=32, shared=48 * 1024, num_warps=4), (4, 16 / 64, {"shared"})),
        ("sm_90", dict(registers=255, shared=0, num_warps=8), (1, 0.125, {"registers"})),
        ("sm_100", dict(registers=32, shared=0, num_warps=4, tensor_memory=256), (2, 0.125, {"tensor memory"})),
        ("gfx942", dict(registers=128, shared=0, num_warps=4), (4, 0.5, {"registers"})),
        ("gfx942", dict(registers=32, shared=20 * 1024, num_warps=4), (3, 0.375, {"shared"})),
        ("gfx950", dict(registers=32, shared=20 * 1024, num_warps=4), (8, 1.0, {"registers", "warps", "shared"})),
        ("sm_120", dict(registers=32, shared=100 * 1024, num_warps=4), (0, 0.0, {"shared"})),
    ],
)
def test_occupancy(target, taken, expected):
    found = occupancy(target, **taken)
    assert (found.blocks, found.fraction, set(found.limits)) == expected


@pytest.mark.parametrize("size", (16, 64, 128))
def test_amd_occupancy_agrees_with_llvm(size):
    """The assembly text holds LLVM's own answer, for registers alone."""
    from triton import compile

    constexprs = {"M": size, "N": size, "K": 32, "PRECISION": "ieee"}
    signature = {"a_ptr": "*fp32", "b_ptr": "*fp32", "c_ptr": "*fp32", "size_k": "i32", **dict.fromkeys(constexprs, "constexpr")}
    source, target, options = resources._source(kernels.matmul, "gfx942", signature, constexprs, {"num_warps": 1, "enable_fp_fusion": True}, None)
    text = compile(source, target=target, options=options).asm["amdgcn"]
    figures, said = amdgcn.metadata(text), int(text.split("; Occupancy: ")[1].split()[0])
    waves = occupancy("gfx942", registers=figures["vgpr_count"], scalar_registers=figures["sgpr_count"], shared=0, num_warps=4)
    assert waves.blocks == said


def test_stalls_and_loops_are_decoded():
    """A loop with a poll of a barrier out of line: bits 105 to 108 of each instruction are its stall."""
    listing = [("", "MOV R1, R2", 2), (".L_x_0", "SYNCS.PHASECHK P0, [UR4]", 3), ("", "@!P0 BRA `(.L_x_1)", 5)]
    listing += [(".L_x_3", "HMMA.16816 R4, R8, R12, R4", 8), ("", "BRA.U UP0, `(.L_x_0)", 6), ("", "EXIT", 5)]
    listing += [(".L_x_1", "SYNCS.PHASECHK P0, [UR4]", 4), ("", "@!P0 BRA `(.L_x_1)", 5), ("", "BRA `(.L_x_3)", 7)]
    listing += [(".L_x_2", "BRA `(.L_x_2)", 0)]
    lines = [".text.kernel:"]
    for i, (label, text, stall) in enumerate(listing):
        lines += [f"{label}:"] * bool(label)
        lines += [f"  /*{i * 16:04x}*/   {text} ;   /* 0x{7:016x} */", f"     /* 0x{stall << 41 | 0xFE0:016x} */"]
    [(code, labels)] = sass.functions("\n".join(lines))
    assert [i.cycles for i in code] == [2, 3, 5, 8, 6, 5, 4, 5, 7, 1]
    [loop] = resources.innermost_loops(code, labels, sass.is_poll)
    assert [i.op for i in loop] == ["SYNCS", "BRA", "HMMA", "BRA", "BRA"] and resources._loop(loop).cycles == 3 + 5 + 8 + 6 + 7


def test_a_nested_loop_is_not_innermost():
    from mtkernels.lab.control_flow import Instruction, innermost_loops

    code = [Instruction("outer"), Instruction("inner"), Instruction("b", "in"), Instruction("b", "out"), Instruction("end", None, False)]
    [loop] = innermost_loops(code, {"out": 0, "in": 1})
    assert [i.op for i in loop] == ["inner", "b"]
    assert innermost_loops([], {}) == []


def test_table_is_aligned():
    rows = [("first", matmul("sm_90")), ("a_longer_name", matmul("gfx942"))]
    lines = resources.table(rows).splitlines()
    for column in ("target", "tensor cores", "hot loop"):
        start = lines[0].index(column)
        assert all(line[start] != " " and line[start - 1] == " " for line in lines), column


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match="sm_42.*sm_80"):
        next(iter(matrix.shipped_cases("sm_42")))
    with pytest.raises(ValueError, match="sm_42.*gfx942"):
        matmul("sm_42")


@pytest.mark.parametrize(
    "hip, properties, key",
    [
        ("6.4", dict(gcnArchName="gfx950:sramecc+:xnack-", major=9, minor=5, shared_memory_per_block_optin=160 * 1024), "gfx942"),
        ("6.4", dict(gcnArchName="gfx1100", major=11, minor=0, shared_memory_per_block_optin=64 * 1024), "default"),
        (None, dict(major=12, minor=0, shared_memory_per_block_optin=99 * 1024), "sm_120"),
        (None, dict(major=15, minor=0, shared_memory_per_block_optin=228 * 1024), "sm_90"),
    ],
)
def test_a_device_runs_the_configuration_that_is_compiled_here(monkeypatch, hip, properties, key):
    common = matrix._module("_common")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
    # Answers are kept for each device, so each case is a device of its own.
    assert common.arch_of(torch.device("cuda", 100 + properties["major"])) == key
    if hip and key != "default":
        assert common.config_arch(properties["gcnArchName"].partition(":")[0]) == key


def test_every_kernel_module_lists_its_cases():
    assert {"group_plan", "lora_base", "lora_expand", "lora_shrink", "task_reduce", "task_cross_entropy"} <= set(matrix.shipped_ops())


def test_a_kept_result_is_the_measured_one(tmp_path):
    case = next(matrix.shipped_cases("sm_90", ["task_reduce"]))
    found = matrix.measure_all([(case, "sm_90")], cache=tmp_path)[case.name, "sm_90"]
    assert found == resources.measure_case(case, "sm_90")
    [file] = tmp_path.iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), "registers": 1000}))
    assert matrix.measure_all([(case, "sm_90")], cache=tmp_path)[case.name, "sm_90"].registers == 1000
    assert matrix.measure_all([(case, "sm_90")])[case.name, "sm_90"] == found


def test_the_key_follows_all_that_decides_a_result(monkeypatch):
    case = next(matrix.shipped_cases("sm_90", ["task_reduce"]))
    keys = [matrix.cache_key(case, "sm_90"), matrix.cache_key(case, "sm_80")]
    keys.append(matrix.cache_key(case._replace(options={**case.options, "num_warps": 8}), "sm_90"))
    keys.append(matrix.cache_key(case._replace(aligned=()), "sm_90"))
    keys.append(matrix.cache_key(case._replace(signature={**case.signature, "values_ptr": "*fp32"}), "sm_90"))
    monkeypatch.setattr(matrix, "_measuring_code", lambda: "changed")
    keys.append(matrix.cache_key(case, "sm_90"))
    assert len(set(keys)) == len(keys)


def test_the_key_follows_a_callee(monkeypatch):
    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "BLOCK": "constexpr"}
    case = next(matrix.shipped_cases("sm_90", ["task_reduce"]))
    case = case._replace(kernel=kernels.calls, signature=signature, constexprs={"BLOCK": 64}, aligned=())
    before = matrix.cache_key(case, "sm_90")
    for function in (kernels._apply, kernels.calls):
        monkeypatch.setattr(function, "hash", None)
    kernels._apply._unsafe_update_src(kernels._apply.src.replace("* 2", "* 3"))
    try:
        assert matrix.cache_key(case, "sm_90") != before
    finally:
        kernels._apply._unsafe_update_src(kernels._apply.src.replace("* 3", "* 2"))


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    case = next(matrix.shipped_cases("sm_80", ["task_reduce"]))
    assert matrix.measure_all([(case, "sm_80")], cache=tmp_path / "file" / "below")[case.name, "sm_80"].registers > 0
