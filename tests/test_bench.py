"""The benchmark command: cases, verification, reports and refusals. Speed itself is not tested here."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import mtkernels as mtk
from mtkernels.bench import __main__ as cli
from mtkernels.bench import environment, memory, report, timing, verify
from mtkernels.bench.registry import PRESETS, Call, Provider, select, suites
from mtkernels.ops import STEMS

TINY = {
    "group_plan": dict(T=50, G=4),
    "lora": dict(T=24, D=16, O=12, ranks=(1, 3, 4), p=0.25),
    "lora_shrink": dict(T=24, D=16, ranks=(1, 3, 4), p=0.25),
    "lora_dropout_mask": dict(T=24, D=21, A=3, p=0.25),
    "lora_expand": dict(T=24, O=12, ranks=(1, 3, 4), K=2),
    "lora_embedding": dict(T=24, V=16, O=12, ranks=(1, 3, 4)),
    "dora": dict(T=24, D=16, O=12, ranks=(1, 3, 4)),
    "rmsnorm_lora_shrink": dict(T=24, D=16, ranks=(1, 3, 4), p=0.25),
    "swiglu_lora_shrink": dict(T=24, D=16, ranks=(1, 3, 4), p=0.25),
    "moe_lora_linear": dict(T=24, K=2, E=2, D=16, O=12, ranks=(1, 3), p=0.25),
    "task_reduce": dict(T=40, J=3),
    "task_cross_entropy": dict(T=20, V=11, J=3),
}


@pytest.fixture
def tiny(monkeypatch):
    """Every suite shrunk to its first case, at a tiny shape."""
    monkeypatch.setattr(timing, "EFFORT", dict.fromkeys(PRESETS, timing.Effort(0.002, 2, 1)))
    monkeypatch.setattr(environment, "measured_ceilings", lambda device: dict.fromkeys(("copy_gb_s", "matmul_fp32_gflop_s", "matmul_bf16_gflop_s"), 1.0))
    for stem, suite in suites().items():
        case = replace(suite.cases()[0], shape=TINY[stem], presets=PRESETS)
        monkeypatch.setattr(suite, "cases", lambda case=case: [case])


def run(*arguments):
    threads = torch.get_num_threads()
    try:
        return cli.main([*arguments, "--threads", "1"] if "--threads" not in arguments else [*arguments])
    finally:
        torch.set_num_threads(threads)


def test_list_from_a_checkout():
    done = subprocess.run([sys.executable, "-m", "mtkernels.bench", "--list"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    for name in [*STEMS, "lora_delta", "padded", "liger"]:
        assert name in done.stdout


@pytest.mark.parametrize("stem", STEMS)
def test_every_suite_runs_and_is_right(tiny, stem, capsys, tmp_path):
    path = tmp_path / "r.json"
    assert run(stem, "--peer", "torch,loop,padded,liger,peft", "--metric", "time,memory,tflops,bandwidth", "--json", str(path)) == 0
    written = json.loads(path.read_text())
    ours = [r for r in written["results"] if r["kind"] == "ours" and "time_ms" in r]
    assert ours and all(r["check"]["ok"] for r in ours)
    assert {r["provider"] for r in ours} >= {"reference"}
    peers = [r for r in written["results"] if r["kind"] == "peer" and "time_ms" in r]
    assert peers and all(r["check"]["ok"] for r in peers), "a peer must compute the same thing"
    assert not any(r["failed"] for r in written["results"] if "time_ms" not in r)
    assert "failures: 0" in capsys.readouterr().out


def test_reports_agree_and_compare(tiny, tmp_path, capsys):
    first, table, plots = tmp_path / "old.json", tmp_path / "r.csv", tmp_path / "plots"
    pytest.importorskip("matplotlib")
    assert run("task_reduce", "--json", str(first), "--csv", str(table), "--plot", str(plots)) == 0
    written = json.loads(first.read_text())
    assert written["schema"] == report.SCHEMA
    assert {"torch", "cpu", "threads", "git", "isa_variables", "measured"} <= written["env"].keys()
    timed = [r for r in written["results"] if "time_ms" in r]
    assert all(r["time_ms"]["min"] <= r["time_ms"]["p20"] <= r["time_ms"]["median"] <= r["time_ms"]["p80"] for r in timed)
    assert all(r["ratio"] == 1 for r in timed if r["provider"] == r["baseline"])
    rows = list(csv.DictReader(table.open()))
    times = [float(row["value"]) for row in rows if row["metric"] == "time"]
    assert times == [r["time_ms"]["median"] for r in timed]
    assert (plots / "task_reduce.png").read_bytes().startswith(b"\x89PNG")
    assert run("task_reduce", "--baseline", str(first)) == 0
    assert "x old" in capsys.readouterr().out


def test_plain_table_without_rich(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert run("task_reduce", "--dtype", "fp32", "--mode", "fwd") == 0
    assert "x torch" in capsys.readouterr().out


def test_failed_check_and_crash_exit_non_zero(tiny, monkeypatch, capsys):
    suite = suites()["task_reduce"]

    def wrong(problem):
        call = suite.run(problem, "reference")
        return Call(lambda: call.fn() * 1.01, call.leaves, call.upstream)

    def crash(problem):
        raise ZeroDivisionError("broken kernel")

    broken = Provider("reference", wrong, "ours"), Provider("cpu", crash, "ours"), suite.PROVIDERS[-1]
    monkeypatch.setattr(suite, "PROVIDERS", broken)
    assert run("task_reduce", "--dtype", "fp32") == cli.FAILURE
    out = capsys.readouterr().out
    assert "error of" in out and "ZeroDivisionError: broken kernel" in out
    assert run("task_reduce", "--dtype", "fp32", "--no-check", "--backend", "reference") == 0


def test_missed_bar_exits_non_zero_only_when_asked(tiny, monkeypatch, capsys):
    suite = suites()["task_cross_entropy"]
    never = replace(suite.BARS["fp32"][0], row="reference", limit=0.0)
    case = replace(suite.cases()[0], bars={"fp32": (never,)})
    monkeypatch.setattr(suite, "cases", lambda: [case])
    arguments = "task_cross_entropy", "--preset", "bars", "--peer", "torch", "--backend", "reference"
    assert run(*arguments) == 0
    assert run(*arguments, "--bars") == cli.FAILURE
    assert "MISSED" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["nosuch"], "nosuch"),
        (["--peer", "torch,apex"], "apex"),
        (["--backend", "tpu"], "tpu"),
        (["--mode", "sideways"], "sideways"),
        (["--dtype", "fp8"], "fp8"),
        (["--metric", "joy"], "joy"),
        (["--threads", "0"], "0"),
        (["--baseline", "/nonexistent.json"], "/nonexistent.json"),
        (["group_plan", "--preset", "bars"], "bars"),
    ],
)
def test_unknown_names_are_refused_by_name(arguments, named, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == cli.USAGE_ERROR
    assert named in capsys.readouterr().err


def test_unavailable_backends_give_their_reason(tiny, capsys):
    assert run("task_reduce", "--backend", "cuda,reference", "--dtype", "fp32", "--mode", "fwd") == 0
    assert "cuda: n/a (takes cuda tensors, got cpu)" in capsys.readouterr().out


def test_nan_fails_the_check(tiny):
    suite, case = select(["task_reduce"], "quick", ("fp32",))[0]
    problem = suite.inputs(case, "cpu")
    yardstick = verify.Yardstick(suite, problem)
    results = suite.run(problem, "reference").results()
    assert yardstick.check(results, "ours").ok
    results["out"] = results["out"] * torch.nan
    assert not yardstick.check(results, "ours").ok


def test_saved_and_peak_bytes():
    x, w = torch.randn(64, 32, requires_grad=True), torch.randn(16, 32)
    problem = mtk.bench.registry.Problem(None, {"x": x}, {"w": w}, torch.ones(64, 16), ("x",))
    call = Call(lambda: (x.exp() @ w.T), {"x": x}, problem.upstream)
    assert memory.saved_bytes(call, problem) == {"activations": 0, "made": x.nbytes}
    assert memory.peak_extra_bytes(call, "cpu") >= 2 * x.nbytes


def test_samples_are_paired_by_round():
    assert timing.ratio([2.0, None, 6.0], [1.0, 5.0, 2.0]) == 2.5
    assert timing.ratio([2.0, None, 6.0], [1.0, 5.0, 2.0], minima=True) == 2.0
    assert timing.ratio([3.0, 4.0], [5.0, 9.0], floor=[1.0, 1.0]) == (0.5 + 0.375) / 2
    assert timing.summarize([1e6, None])["rounds"] == 1


def test_a_case_of_several_outputs(tiny, monkeypatch, capsys):
    """Each output is checked, and a bar may be about the time above a part."""
    suite = suites()["lora"]
    shape = dict(T=24, D=16, O=(12, 5), ranks=(3, 2), adapters=3, p=0.25)
    bar = replace(suite.GROUP["fp32"][0], row="reference", base="reference", limit=2.0)
    case = replace(suite.cases()[0], op="lora_linear_group", shape=shape, bars={"fp32": (bar,)})
    monkeypatch.setattr(suite, "cases", lambda: [case])
    assert run("lora", "--bars", "--dtype", "fp32", "--backend", "reference", "--peer", "loop") == 0
    assert "(reference - own base) <= 2.00 x (reference - own base): 1.00" in capsys.readouterr().out


def test_bf16_counts_as_native_only_where_torch_may_use_it(monkeypatch):
    monkeypatch.setattr(environment, "cpu_flags", lambda: ["avx512f", "avx512_bf16"])
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert environment.native_bf16()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")
    assert not environment.native_bf16()


def test_isa_restarts_once(monkeypatch):
    seen = []
    monkeypatch.setattr(os, "execve", lambda path, arguments, env: seen.append((arguments, env)))
    environment.restart_with_isa("avx512", ["lora", "--isa", "avx512"])
    arguments, env = seen.pop()
    assert arguments[1:] == ["-m", "mtkernels.bench", "lora", "--isa", "avx512"] and env["ONEDNN_MAX_CPU_ISA"] == "AVX512_CORE_VNNI"
    for key, value in environment.ISA["avx512"].items():
        monkeypatch.setenv(key, value)
    environment.restart_with_isa("avx512", [])
    assert not seen
