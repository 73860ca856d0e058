"""Choosing tile configurations by machine code: the model by hand, obviously bad ones last, what may be chosen, what is written."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

import resource_kernels as kernels

from mtkernels.lab import __main__ as cli
from mtkernels.lab import matrix, resources, tune, tune_model, tune_space
from mtkernels.lab.interpreter import interpreting
from mtkernels.lab.tune_model import CARDS, LATENCY, Pass, estimate
from mtkernels.triton_kernels import _common

pytestmark = pytest.mark.skipif(interpreting(), reason="TRITON_INTERPRET=1 turns kernels into Python; run in the ordinary process")

OPTIONS = {"M": 64, "K": 64, "num_warps": 4, "num_stages": 4}
KEYS = [(stem, kernel, bits) for stem, listed in tune_space.KERNELS.items() for kernel, k in listed.items() for bits in k.bits]


def made(target="sm_90", **changes):
    """Resources of which four blocks fit a multiprocessor of sm_90, limited by registers."""
    loop = resources.Loop(instructions=400, cycles=800, tensor_cores=8, loaded=128, shared=256)
    values = dict(scalar_registers=0, accumulation_registers=0, stack=0, spills=0, scalar_spills=0, shared=1024, instructions=1000)
    values |= dict(tensor_cores={"HGMMA": 8}, tma={}, tensor_memory=0, accumulators=0, doubled_accumulators=0, loops=(loop,))
    return resources.Resources(target=target, registers=128, num_warps=4, **{**values, **changes})


def rows_pass(programs, length=4096, memory=0, **rest):
    return Pass(memory, lambda options: programs, ("M", "K"), "K", length, **rest)


def test_terms_by_hand():
    card, found = CARDS["sm_90"], made()
    assert found.occupancy.blocks == 4
    programs, iterations = 4 * card.multiprocessors, 64
    made_estimate = estimate(found, [rows_pass(programs, memory=10**9, factors=((16, 1),), gemm=True)], OPTIONS, 2)
    # Four blocks of four warps on four schedulers; 128 bytes a lane of 128 threads.
    expected = {
        "issue": iterations * 4 * 4 * 400 / 4 / card.clock,
        "warp": iterations * 800 / card.clock,
        "latency": iterations * LATENCY / 3,
        "memory": 10**9 / card.bandwidth,
        "L2": iterations * 4 * 128 * 128 / 64 / card.clock,
        "shared": iterations * 4 * 256 * 128 / 128 / card.clock,
        "tensor": programs * iterations * 2 * 64 * 64 * 16 / card.flops,
    }
    assert made_estimate.terms == pytest.approx(expected)
    assert max(expected.values()) < made_estimate.score - made_estimate.start < sum(expected.values())
    assert made_estimate.limit == "memory"


def test_without_pipelining_a_block_waits_and_then_works():
    one = estimate(made(), [rows_pass(100)], {**OPTIONS, "num_stages": 1}, 2)
    assert one.terms["latency"] == pytest.approx(64 * (LATENCY + 800 / CARDS["sm_90"].clock))


def test_one_program_more_than_a_wave_holds_takes_another():
    whole = 4 * CARDS["sm_90"].multiprocessors
    full, more, half = (estimate(made(), [rows_pass(n)], OPTIONS, 2) for n in (whole, whole + 1, whole // 2))
    assert more.start == 2 * full.start and 1.2 * full.score < more.score < 2 * full.score
    assert half.score < full.score and half.start == full.start


def test_a_pass_is_the_mean_of_its_loops_and_a_kernel_the_sum_of_its_passes():
    # [64, 64] of rows with [16, 64] of the factor, then [64, 32] with [128, 32]; 2 bytes an element, 128 threads.
    narrow = replace(made().loops[0], loaded=64 * (64 + 16) * 2 // 128)
    wide = replace(narrow, instructions=4000, cycles=9000, loaded=32 * (64 + 128) * 2 // 128)
    found = made(loops=(narrow, wide))
    parts = [rows_pass(500, factors=(f,)) for f in ((16, 1), (128, 2))]
    each = [estimate(found, [part], OPTIONS, 2) for part in parts]
    both = estimate(found, [rows_pass(500, factors=((16, 1), (128, 2)))], OPTIONS, 2)
    assert both.score == pytest.approx(sum(e.score for e in each) / 2) and each[1].terms["issue"] == pytest.approx(20 * each[0].terms["issue"])
    # Both kinds of programs share the waves of one launch: 1000 of them take two.
    assert each[0].start == 1.6e-6 and estimate(found, parts, OPTIONS, 2).start == pytest.approx(3.2e-6)
    assert estimate(found, [rows_pass(250, factors=p.factors) for p in parts], OPTIONS, 2).score == pytest.approx(both.score)


def test_loops_that_load_alike_are_told_apart_by_their_order():
    first = replace(made().loops[0], loaded=64 * (64 + 16) * 2 // 128)
    found = made(loops=(first, replace(first, instructions=4000)))
    both = [rows_pass(250, factors=((16, 1),)), rows_pass(250, factors=((16, 1),))]
    alone = estimate(made(loops=(first,)), [rows_pass(500, factors=((16, 1),))], OPTIONS, 2)
    assert estimate(found, both, OPTIONS, 2).terms["issue"] == pytest.approx((1 + 10) / 2 * alone.terms["issue"])


def matmul(warps, stages, M, N, K, target="sm_80"):
    signature = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "size_k": "i32"}
    constexprs = {"M": M, "N": N, "K": K, "PRECISION": "tf32"}
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    signature |= dict.fromkeys(constexprs, "constexpr")
    return resources.measure(kernels.matmul, target, signature, constexprs, options, ["a_ptr", "b_ptr", "c_ptr", "size_k"])


def test_loads_are_read_from_the_machine_code():
    loop = matmul(4, 3, 128, 64, 64).hot_loop
    assert loop.loaded * 128 == 2 * 64 * (128 + 64)
    # The copies go in as they are loaded, and each of 4 warps reads its rows of the first operand and all of the second.
    assert loop.shared * 128 == 2 * 64 * (128 + 64) + 2 * 64 * (128 + 4 * 64)


def test_bad_configurations_of_a_matrix_product_come_last():
    """8192 x 4096 x 4096 on sm_80; the last of them keeps its sums in local memory."""
    size = 4096

    def score(found, M, N, K):
        part = Pass(2 * (3 * size * size + size * size), lambda o: 2 * size // M * (size // N), ("M", "K"), "K", size, ((N, 1),), True)
        return estimate(found, [part], {"M": M, "K": K, "num_warps": found.num_warps, "num_stages": stages[found]}, 2).score

    stages, scores = {}, {}
    for warps, n_stages, *tile in ((8, 3, 128, 128, 32), (4, 3, 64, 64, 32), (4, 1, 128, 128, 32), (4, 3, 16, 16, 16)):
        found = Hashable(matmul(warps, n_stages, *tile))
        stages[found] = n_stages
        scores[warps, n_stages, *tile] = score(found, *tile)
    assert list(scores) == sorted(scores, key=scores.get), scores
    assert scores[4, 3, 16, 16, 16] > 3 * scores[8, 3, 128, 128, 32]
    spilled = matmul(4, 3, 128, 256, 64)
    assert any("spill" in text for text in resources.problems(spilled, True))


class Hashable:
    """Resources by identity: they hold dictionaries."""

    def __init__(self, found):
        self._found = found

    def __getattr__(self, name):
        return getattr(self._found, name)


@pytest.mark.parametrize("stem, kernel, bits", KEYS)
def test_spaces_fit_the_configurations(stem, kernel, bits):
    space = tune_space.KERNELS[stem][kernel].space
    for target in CARDS:
        now = tune.present(stem, kernel, bits, target)
        assert set(space) <= set(now), "a space may only have options that the configuration has"
        near = list(tune_space.neighbours(now, space))
        assert near and all(sum(o[k] != now[k] for k in now) == 1 and o.keys() == now.keys() for o in near)
        for options in near:
            assert all(v & (v - 1) == 0 for k, v in options.items() if not k.endswith("_stages")) and options["num_stages"] >= 1
            # A chunk is cut in row tiles of any height; elsewhere the plan has tile tables of these only.
            assert kernel == "bwd" or options.get("BLOCK_M", 16) in _common.TILE_ROWS


def test_every_config_of_the_frozen_layer_sums_in_the_same_order():
    for name in ("fwd", "dx"):
        for suffix in ("", "_small", "_mixed"):
            space = tune_space.KERNELS["lora_base"][name + suffix].space
            assert "BLOCK_K" not in space and (suffix != "_small" or "BLOCK_M" not in space)
        for arch in CARDS:
            blocks = {_common.launch_options("lora_base", name + suffix, arch)["BLOCK_K"] for suffix in ("", "_small")}
            assert len(blocks) == 1


def test_only_the_cases_of_a_configuration_are_compiled():
    names = {bits: [c.name for c in tune.cases("lora_shrink", "grad_a", bits, "sm_90", tune.present("lora_shrink", "grad_a", bits, "sm_90"))] for bits in (16, 32)}
    assert names[16] == [f"lora_shrink.grad_a.bf16{suffix}" for suffix in ("", ".ragged", ".bits")] and names[32][0] == "lora_shrink.grad_a.fp32"
    assert not set(names[16]) & set(names[32])
    before = {c.name: c.options for c in matrix.shipped_cases("sm_90", ["lora_shrink"])}
    tune.cases("lora_shrink", "grad_a", 16, "sm_90", {"BLOCK_J": 16, "BLOCK_W": 16, "num_warps": 1, "num_stages": 1})
    assert before == {c.name: c.options for c in matrix.shipped_cases("sm_90", ["lora_shrink"])}


def test_a_shipped_kernel_with_bad_candidates():
    now = tune.present("lora_shrink", "grad_a", 16, "sm_80")
    tiny, large = {**now, "BLOCK_J": 16, "BLOCK_W": 32, "num_stages": 1}, {**now, "BLOCK_J": 128, "BLOCK_W": 256, "num_stages": 6}
    search = tune.Search("lora_shrink", "grad_a", 16, "sm_80", [tiny, large])
    tune.run([search], rounds=0, cache=matrix.default_cache())
    assert [c.options for c in search.ranked()] == [now, tiny] and search.best.verified and search.gain == 0
    assert search.ranked()[1].score > 1.5 * search.best.score
    assert [c.options for c in search.discarded()] == [large] and "shared memory" in search.discarded()[0].problems[0]


def test_the_best_must_hold_for_all_its_cases(monkeypatch):
    """The winner of the first case spills in the second, so the next one is taken."""
    now = tune.present("lora_shrink", "grad_a", 16, "sm_90")
    better, middle = {**now, "num_stages": 6}, {**now, "num_stages": 5}

    def compiled(wanted, jobs, cache, progress):
        def found(name, options):
            return made(stack=8, spills=2) if name.endswith("ragged") and dict(options) == better else made()

        case = tune.cases("lora_shrink", "grad_a", 16, "sm_90", now)[0]
        return {job: (found(job[0], job[5]), case) for job in wanted}

    monkeypatch.setattr(tune, "_compile", compiled)
    search = tune.Search("lora_shrink", "grad_a", 16, "sm_90", [better, middle])
    tune.run([search], rounds=0)
    assert search.best.options == middle and search.best.verified and 0 < search.gain < 1
    assert "lora_shrink.grad_a.bf16.ragged: 8 bytes of stack" in search.discarded()[0].problems[0]


@pytest.fixture
def configs(tmp_path):
    source = Path(_common.__file__).parent / "configs" / "lora_base.json"
    (tmp_path / "lora_base.json").write_text(source.read_text())
    return tmp_path


@pytest.mark.parametrize("kernel", ("fwd", "fwd_small"))
def test_write_changes_one_entry_and_keeps_the_fallbacks(configs, kernel):
    search = tune.Search("lora_base", kernel, 16, "sm_86")
    better = {**search.present, "BLOCK_N": 256}
    for options, score in ((search.present, 1.0), (better, 0.9)):
        terms = dict.fromkeys(tune_model.TERMS, score)
        search.candidates[tune.key_of(options)] = tune.Candidate(options, estimate=tune_model.Estimate(terms, 0.0, score))
    path = configs / "lora_base.json"
    before, text = json.loads(path.read_text()), path.read_text()
    assert tune.write([search], 0.2, configs) == [] and path.read_text() == text
    assert tune.write([search], 0.05, configs) == [search]
    after = json.loads(path.read_text())
    table = after[kernel].get("16", after[kernel])
    assert table["sm_86"] == better
    table["sm_86"] = search.present
    assert after == before and max(map(len, path.read_text().splitlines())) < 140


def test_refusals(capsys):
    for arguments, said in (
        (("no_stem",), "stems are lora_shrink"), (("lora_shrink", "no_kernel"), "kernels are shrink, grad_a, finish"),
        (("lora_base", "fwd_small", "--bits", "32"), "no configuration for 32 bits"), (("lora_shrink", "--jobs", "0"), "--jobs"),
        (("lora_shrink", "--target", "gfx942"), "sm_120"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            cli.main(["tune", *arguments])
        assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_the_command_line(tmp_path):
    path = tmp_path / "tune.json"
    command = [sys.executable, "-m", "mtkernels.lab", "tune", "lora_shrink", "grad_a", "--target", "sm_80", "--rounds", "0", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 candidates, 0 discarded; the present one is number 1" in done.stdout and "not measured" in done.stdout
    report = json.loads(path.read_text())
    assert (report["command"], report["kind"], report["label"]) == ("tune", "static", "bound, not measured")
    (result,) = report["results"]
    assert (result["kernel"], result["bits"], result["target"], result["written"]) == ("lora_shrink.grad_a", 16, "sm_80", False)
    (candidate,) = result["candidates"]
    assert candidate["present"] and candidate["score_us"] > max(candidate["terms_us"].values()) and candidate["occupancy"]["blocks"]
