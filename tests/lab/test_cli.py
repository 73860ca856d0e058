"""python -m mtkernels.lab: what each command counts and finds, its exit status, its table and its report."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from mtkernels.bench import registry
from mtkernels.lab import __main__ as cli
from mtkernels.lab import cli_cost, cli_run, interpreter
from mtkernels.lab.roofline import CARDS, LABEL
from mtkernels.lab.torch_ops import GEMM

INTERPRETING = interpreter.interpreting()
ordinary = pytest.mark.skipif(INTERPRETING, reason="runs commands, which start their own interpreter")


def interpreted(test):
    return pytest.mark.interpret(pytest.mark.skipif(not INTERPRETING, reason="needs TRITON_INTERPRET=1")(test))


def run(*arguments):
    """(exit status, output) of a command in a process of its own, as a user starts it."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "mtkernels.lab", *arguments], capture_output=True, text=True, env=environment)
    return done.returncode, done.stdout + done.stderr


def suite_case(op, **shape):
    suite, case = registry.select([op], "cost", ("bf16",))[0]
    return suite, replace(case, shape={**case.shape, **shape})


# cost


@interpreted
def test_counts_of_task_reduce_by_hand():
    T, J = 4096, 4
    suite, case = suite_case("task_reduce", T=T, J=J)
    records = {(r["provider"], r["pass"]): r for r in cli_cost.count_case(suite, case)}
    forward, backward, total = (records["triton", p] for p in ("forward", "backward", "total"))
    assert forward["launches"] == {"triton": 2, "vendor GEMM": 0, "torch": 0} and backward["launches"]["triton"] == 1
    # values, coef, perm; then the gradients: values, coef and ids read, two written
    rows = {"forward": T * (2 + 4 + 4), "backward": T * (2 + 4 + 4 + 2 + 4)}
    for name, record in (("forward", forward), ("backward", backward)):
        assert records["least", name]["bytes"] == rows[name] + 4 * J
        assert rows[name] <= record["distinct_bytes"] <= rows[name] + 2048
        assert record["over_least"] == record["distinct_bytes"] / records["least", name]["bytes"]
        assert not record["findings"]
    assert total["distinct_bytes"] == forward["distinct_bytes"] + backward["distinct_bytes"]


@interpreted
def test_tiles_are_those_of_the_gpu_named():
    from mtkernels.triton_kernels._common import arch_of

    device = torch.device("cpu")
    with cli_cost.configured_for("sm_100"):
        assert arch_of(device) == "sm_100"
    assert arch_of(device) == "default"


@interpreted
def test_counts_of_lora_by_hand():
    suite, case = suite_case("lora_linear", T=128, D=128, O=128, ranks=(16, 16), shares=(0.5, 0.5))
    records = {(r["provider"], r["pass"]): r for r in cli_cost.count_case(suite, case, ["triton", "loop", "base"])}
    forward = records["triton", "forward"]
    assert forward["launches"]["vendor GEMM"] == 1 and forward["launches"]["torch"] == 0
    base = next(k for k in forward["kernels"] if k["kind"] == GEMM)
    assert base["distinct_bytes"] == 2 * 3 * 128 * 128 == records["base", "forward"]["distinct_bytes"]
    # ranks and rows fill their tiles, so nothing issued is wasted
    assert forward["issued_flops"] == records["least", "forward"]["tensor_flops"] and forward["useful_over_issued"] == 1.0
    loop = records["loop", "forward"]
    assert loop["launches"]["vendor GEMM"] == 1 + 2 * 2 and loop["useful_over_issued"] == 1.0
    assert records["base", "forward"]["over_least"] is None


@ordinary
def test_cost_prints_and_writes(tmp_path):
    path = tmp_path / "cost.json"
    status, said = run("cost", "task_reduce", "group_plan", "--shape", "T=256", "--launches", "--json", str(path))
    assert status == 0, said
    heads = said.split("group_plan")[1]
    assert heads.count("not measured") >= 3 and LABEL in said and "_task_reduce_bwd_kernel" in said
    report = json.loads(path.read_text())
    assert (report["schema"], report["command"], report["label"]) == (1, "cost", LABEL) and set(report["cards"]) == set(CARDS)
    shown = {(r["op"], r["provider"], r["pass"]) for r in report["results"]}
    assert {("group_plan", "triton", "forward"), ("task_reduce", "triton", "total"), ("task_reduce", "torch", "backward"), ("task_reduce", "least", "total")} <= shown
    ours = [r for r in report["results"] if r["provider"] == "triton"]
    assert all(r["findings"] == [] and set(r["bound_us"]) == set(CARDS) and r["shape"]["T"] == 256 for r in ours)


@interpreted
def test_a_peer_that_is_not_there_is_named(monkeypatch, capsys):
    from mtkernels.bench import isolated

    monkeypatch.setattr(isolated, "find_spec", lambda name: None)
    arguments = "cost", "lora_linear", "--case", "skewed", "--shape", "T=64", "D=32", "O=32"
    assert cli.main([*arguments, *(f"--provider={name}" for name in ("triton", "sglang", "vllm", "lorafusion"))]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name}: not installed" in said for name in ("sglang", "vllm", "lorafusion"))
    assert "loop" not in said, "only those asked for"


@interpreted
def test_a_kernel_that_fails_fails_the_command(monkeypatch, capsys):
    suite, case = suite_case("task_reduce", T=32)

    def crash(problem):
        raise ZeroDivisionError("broken kernel")

    monkeypatch.setattr(suite, "PROVIDERS", (registry.Provider("triton", crash, "ours"),))
    monkeypatch.setattr(suite, "cases", lambda: [case])
    assert cli.main(["cost", "task_reduce"]) == 1
    assert "ZeroDivisionError: broken kernel" in capsys.readouterr().err


@pytest.mark.parametrize(
    "sizes, shape",
    [
        (["T=5"], {"T": 5, "ranks": (1, 2), "shares": (0.5, 0.5)}),
        (["ranks=3,4,5"], {"T": 9, "ranks": (3, 4, 5)}),
        (["ranks=7,8", "shares=0.25,0.75"], {"T": 9, "ranks": (7, 8), "shares": (0.25, 0.75)}),
    ],
)
def test_sizes(sizes, shape):
    assert cli_cost.with_sizes({"T": 9, "ranks": (1, 2), "shares": (0.5, 0.5)}, sizes) == shape


# run


@interpreted
@pytest.mark.parametrize("op", ["group_plan", "task_reduce"])
def test_run_under_the_probe(op):
    record = cli_run.run_op(op, "interpret", torch.bfloat16)
    assert record["right"] and not record["findings"]
    assert all(launch["load MB"] > 0 for launch in record["launches"])


@ordinary
def test_run_on_the_virtual_gpu(tmp_path):
    pytest.importorskip("triton", minversion="3.8")
    path = tmp_path / "run.json"
    status, said = run("run", "task_reduce", "--on", "virtual-sm80", "--dtype", "fp32", "--lines", "--json", str(path))
    assert status == 0 and "no findings" in said and "right" in said, said
    (record,) = json.loads(path.read_text())["results"]
    assert record["right"] and all(launch["instructions"] > 0 and launch["warps"] for launch in record["launches"])
    assert {"_task_reduce_chunks_kernel", "_task_reduce_bwd_kernel"} <= {launch["kernel"] for launch in record["launches"]}


@interpreted
def test_a_wrong_result_and_a_finding_fail_the_command(monkeypatch, capsys):
    from mtkernels.triton_kernels import task_reduce

    right = task_reduce.task_reduce_fwd
    monkeypatch.setattr(task_reduce, "task_reduce_fwd", lambda *args: right(*args) * 1.01)
    assert cli.main(["run", "task_reduce"]) == 1
    assert "WRONG, out" in capsys.readouterr().out
    monkeypatch.setattr(task_reduce, "task_reduce_fwd", lambda values, coef, offsets, *rest: right(values[:-9], coef, offsets, *rest))
    assert cli.main(["run", "task_reduce"]) == 1
    assert "FINDING out of bounds" in capsys.readouterr().out


@ordinary
def test_what_the_virtual_gpu_finds_is_recorded(monkeypatch):
    pytest.importorskip("triton", minversion="3.8")
    import feature_kernels as k

    from mtkernels.lab import problems

    def stray(op, dtype, backend):
        x = torch.zeros(100)
        k.affine_kernel[(4,)](x, x.clone(), 1000, BLOCK=256)

    monkeypatch.setattr(problems, "results", stray)
    record = cli_run.run_op("task_reduce", "virtual-sm80", torch.float32)
    assert not record["right"] and "out of bounds" in record["findings"][0]


@pytest.fixture
def emulated():
    from mtkernels.lab import emulated

    if why := emulated.refusal():
        pytest.skip(why)
    return emulated


@ordinary
def test_run_in_the_cuda_emulator(emulated, tmp_path, capsys):
    path = tmp_path / "run.json"
    assert cli.main(["run", "--on", "cuda-emulated", "--dtype", "fp32", "--json", str(path)]) == 0
    records = {record["op"]: record for record in json.loads(path.read_text())["results"]}
    assert set(records) == {"lora_dropout_mask", "task_reduce"} and all(record["right"] for record in records.values())
    record = records["task_reduce"]
    forward, backward = record["launches"]
    assert "fwd" in forward["kernel"] and forward["shared requests"] > 0 and backward["sectors/request"] >= 1
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "lora", "--on", "cuda-emulated"])
    assert stop.value.code == 2 and "lora_fan_out cannot run there; lora_dropout_mask, task_reduce can" in capsys.readouterr().err


@ordinary
def test_a_cuda_mistake_fails_run_and_races(emulated, monkeypatch):
    from mtkernels.lab import cli_races
    from mtkernels.lab.cuda_emulator import Finding, KernelMistake

    def mistaken(self, stem, entry, args):
        raise KernelMistake([Finding("data-race", "x.cu", 3, "write against write", "tsan")])

    monkeypatch.setattr(emulated.EmulatedCuda, "launch", mistaken)
    record = cli_run.run_op("task_reduce", "cuda-emulated", torch.float32)
    assert not record["right"] and record["worst"] is None and "x.cu:3: data-race" in record["findings"][0]
    outcome = cli_races.in_orders("task_reduce", "cuda", torch.float32, range(2))
    assert outcome.bad and [seed for seed, _ in outcome.findings] == [0, 1]


# races


@ordinary
def test_races_runs_cuda_kernels_too(emulated, tmp_path):
    path = tmp_path / "races.json"
    status, said = run("races", "task_reduce", "--orders", "2", "--dtype", "fp32", "--json", str(path))
    assert status == 0, said
    assert [(r["backend"], r["orders"], r["bad"]) for r in json.loads(path.read_text())["results"]] == [("triton", 2, False), ("cuda", 2, False)]


@interpreted
def test_races_compares_bits_and_reports_findings(monkeypatch, capsys, tmp_path):
    from mtkernels.lab import cli_races, problems

    path = tmp_path / "races.json"
    assert cli.main(["races", "group_plan", "--orders", "2", "--json", str(path)]) == 0
    (result,) = json.loads(path.read_text())["results"]
    assert result["orders"] == 2 and not result["bad"]
    capsys.readouterr()
    results, calls = problems.results, []

    def drifting(op, dtype, backend):
        calls.append(op)
        found = results(op, dtype, backend)
        return {**found, "perm": found["perm"] + len(calls)}

    monkeypatch.setattr(problems, "results", drifting)
    assert cli.main(["races", "group_plan"]) == 1 and "differ: perm" in capsys.readouterr().out
    outcome = cli_races.in_orders("group_plan", "triton", torch.bfloat16, range(2))
    assert outcome.bad and outcome.different == ["perm"]


@interpreted
def test_a_race_is_found(monkeypatch):
    import broken_kernels as k

    from mtkernels.lab import cli_races, problems

    def racy(op, dtype, backend):
        out = torch.zeros(16)
        k.split_sum_kernel[(4,)](torch.ones(8, 16), out, ROWS=2, N=16, BUG="no atomic")
        return {"out": out}

    monkeypatch.setattr(problems, "results", racy)
    outcome = cli_races.in_orders("task_reduce", "triton", torch.float32, range(2))
    assert outcome.bad and any("race" in text for _, text in outcome.findings)


# Calls that make no sense


@interpreted
@pytest.mark.parametrize(
    "arguments, named",
    [
        ([], "command"),
        (["nosuch"], "nosuch"),
        (["cost", "nosuch"], "nosuch"),
        (["cost", "lora", "--case", "nosuch"], "nosuch"),
        (["cost", "--provider", "nosuch"], "nosuch"),
        (["cost", "task_reduce", "--shape", "K=3"], "K=3"),
        (["cost", "task_reduce", "--shape", "T=x"], "T=x"),
        (["run", "nosuch"], "nosuch"),
        (["run", "--on", "tpu"], "tpu"),
        (["races", "--orders", "1"], "at least 2"),
    ],
)
def test_refusals_by_name(arguments, named, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and named in capsys.readouterr().err


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in cli.COMMANDS)
