"""The example: its data, its packing, and a run of a few steps."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import tasks as example_tasks

missing = [name for module, name in example_tasks.PACKAGES.items() if find_spec(module) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"the example needs {', '.join(missing)}")


@pytest.fixture(scope="module")
def tasks():
    return example_tasks.load_tasks()


def test_a_text_is_once_in_a_task_and_on_one_side_in_all_tasks(tasks):
    for task in tasks:
        texts = [text.casefold() for text, _ in task.train + task.held_out]
        assert len(texts) == len(set(texts)), task.name
    train = {text.casefold() for task in tasks for text, _ in task.train}
    held_out = {text.casefold() for task in tasks for text, _ in task.held_out}
    assert not train & held_out


def test_tasks_differ_in_classes_and_rank(tasks):
    classification = [task for task in tasks if not task.is_regression]
    assert len(classification) >= 6 and len(tasks) == len(classification) + 1
    assert len({len(task.classes) for task in classification}) == len(classification)
    assert len({task.rank for task in tasks}) >= 4


def test_every_class_is_trained_and_every_task_is_judged(tasks):
    for task in tasks:
        assert len(task.held_out) >= 100, task.name
        if not task.is_regression:
            assert {label for _, label in task.train} == set(range(len(task.classes))), task.name
            assert {label for _, label in task.held_out} <= set(range(len(task.classes))), task.name


def test_loading_is_deterministic(tasks):
    assert example_tasks.load_tasks(["question"]) == [task for task in tasks if task.name == "question"]


def test_missing_package_gives_the_pip_command(monkeypatch):
    monkeypatch.setitem(example_tasks.PACKAGES, "not_a_module", "not-a-package")
    with pytest.raises(SystemExit, match="pip install not-a-package"):
        example_tasks.require_packages()


def test_packed_rows_are_encoded_as_if_alone(tasks):
    from encoder import build_model, encode, pack, tokenize

    few = [example_tasks.Task(t.name, t.rank, t.classes, t.train[:9], t.held_out) for t in tasks[-2:]]
    model, tokenizer = build_model(few)
    rows = [row for rows in tokenize(few, tokenizer, "train") for row in rows]
    batch = pack(rows)
    assert batch.input_ids.shape[0] < len(rows)
    assert batch.task_ids.tolist() == [row.task for row in rows]
    for i, row in enumerate(rows):
        mine = batch.row_of_token == i
        assert batch.input_ids[mine].tolist() == row.tokens
        assert (batch.task_of_token[mine] == row.task).all()
    with torch.no_grad():
        torch.testing.assert_close(encode(model, batch), torch.cat([encode(model, pack([row])) for row in rows]), rtol=1e-4, atol=1e-5)


def test_padded_head_gives_each_task_its_own_classes():
    from encoder import PaddedHead

    head, hidden, task_ids = PaddedHead([3, 1, 5], 8), torch.randn(6, 8), torch.tensor([2, 0, 1, 0, 2, 1])
    logits = head(hidden, task_ids)
    for j, n in enumerate(head.n_outputs):
        mine = task_ids == j
        torch.testing.assert_close(logits[mine, :n], head.of_task(hidden[mine], j))
        assert logits[mine, n:].isneginf().all()


def run_example(out, *options):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, EXAMPLES / "finetune_tasks.py", "--out", out, "--tasks", "topic_nl", "sentiment", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_short_run_compares_both_ways(tmp_path):
    done = run_example(tmp_path, "--steps", "3", "--batch", "3", "--no-check")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    ours, ordinary = results["runs"]["mtkernels"], results["runs"]["ordinary"]
    torch.testing.assert_close(torch.tensor(ours["losses"]), torch.tensor(ordinary["losses"]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.tensor(ours["losses"][0]), torch.tensor(ordinary["losses"][0]), rtol=0, atol=1e-5)
    assert 0 < ours["memory_loaded_mib"] <= ours["memory_peak_mib"]
    assert "topic_nl" in done.stdout and (tmp_path / "curves.png").stat().st_size > 10_000


def test_tasks_that_did_not_learn_and_losses_that_differ_fail(tasks):
    import report

    good = {"losses": [[1.0] * len(tasks)], "metrics": [task.baseline() + 0.5 for task in tasks]}
    bad = {"losses": [[1.0, 1.1, *[1.0] * (len(tasks) - 2)]], "metrics": [task.baseline() for task in tasks]}
    assert report.check(tasks, {"mtkernels": good, "ordinary": good}) == []
    problems = report.check(tasks, {"mtkernels": good, "ordinary": bad})
    assert len(problems) == 1 + len(tasks) and "first losses differ" in problems[0]
    nan = {**good, "losses": [[float("nan")] * len(tasks)]}
    assert "first losses differ" in report.check(tasks, {"mtkernels": nan, "ordinary": good}, learned=False)[0]
