"""Fine-tune seven LoRA adapters together: seven tasks in every batch, each with its own adapter, rank and head.

    python examples/finetune_tasks.py

The same training runs twice on the same batches from the same state, each time in its own process: with mtkernels, one
forward and one backward over the mixed batch; and the ordinary way, stock PEFT with one adapter at a time. Then a table,
curves.png and results.json compare losses, held-out metrics, time per step and memory. Exits with 1 if the first losses
differ or a task did not learn.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
from tasks import TASKS, load_tasks, require_packages

require_packages()
import report
import torch
import torch.nn.functional as F
from encoder import PaddedHead, build_model, encode, pack, tokenize

import mtkernels as mtk


class Mixed:
    """mtkernels: all tasks in one forward and one backward."""

    def __init__(self, model, head, tasks, device):
        self.model, self.head, self.device = model, head, device
        mtk.enable(model, train=[task.name for task in tasks])

    def logits(self, batch):
        with mtk.adapters(batch.task_of_token):
            hidden = encode(self.model, batch)
        return self.head(hidden, batch.task_ids)

    def backward(self, rows):
        """Accumulate the gradients of sum_j L_j, L_j the mean loss over task j's rows; returns L [J]."""
        batch, n_tasks = pack(rows, self.device), len(self.head.n_outputs)
        plan = mtk.group_plan(batch.task_ids, n_tasks)
        logits = self.logits(batch)
        # regression rows carry no class: their cross entropy is 0, and the reverse for the squared errors
        losses = mtk.task_cross_entropy(logits, batch.classes, batch.task_ids, n_tasks, plan=plan).losses
        is_value = batch.classes < 0
        squared_error = (logits[:, 0] - batch.values) ** 2
        losses = losses + mtk.task_reduce(squared_error, batch.task_ids, n_tasks, is_value / plan.counts[batch.task_ids], plan=plan)
        losses.sum().backward()
        return losses.detach()


class Ordinary:
    """Stock PEFT: one adapter at a time, a forward and a backward for each, gradients accumulated."""

    def __init__(self, model, head, tasks, device):
        self.model, self.head, self.tasks, self.device = model, head, tasks, device

    def logits(self, batch):
        j = int(batch.task_ids[0])
        self.model.set_adapter(self.tasks[j].name)
        return self.head.of_task(encode(self.model, batch), j)

    def backward(self, rows):
        losses = []
        for j, task in enumerate(self.tasks):
            batch = pack([row for row in rows if row.task == j], self.device)
            logits = self.logits(batch)
            loss = F.mse_loss(logits[:, 0], batch.values) if task.is_regression else F.cross_entropy(logits, batch.classes)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses)


WAYS = {"mtkernels": Mixed, "ordinary": Ordinary}


def train(args):
    """One run in this process; writes its results to args.out/<way>.json."""
    torch.manual_seed(args.seed)
    tasks = load_tasks(args.tasks)
    model, tokenizer = build_model(tasks)
    head = PaddedHead([task.n_outputs for task in tasks], model.config.hidden_size)
    model.to(args.device), head.to(args.device)
    way = WAYS[args.way](model, head, tasks, args.device)
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW([{"params": adapters, "lr": args.lr}, {"params": head.parameters(), "lr": 10 * args.lr}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / (0.1 * args.steps)) * (1 - step / args.steps))
    train_rows, loaded = tokenize(tasks, tokenizer, "train"), memory(args.device)
    losses, seconds = [], []
    with report.progress(args.way, [task.name for task in tasks], args.steps) as show:
        for rows in batches(train_rows, args.steps, args.batch, args.seed):
            start = clock(args.device)
            losses.append(way.backward(rows))
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(clock(args.device) - start)
            schedule.step()
            losses[-1] = losses[-1].tolist()
            show(losses[-1], seconds[-1])
    peak = memory(args.device, peak=True)
    metrics = [held_out_metric(way, task, rows) for task, rows in zip(tasks, tokenize(tasks, tokenizer, "held_out"))]
    result = {"losses": losses, "seconds": seconds, "memory_loaded_mib": loaded, "memory_peak_mib": peak, "metrics": metrics}
    (args.out / f"{args.way}.json").write_text(json.dumps(result))


def batches(rows_of_task, steps, per_task, seed):
    """`steps` lists of rows, per_task of each task, shuffled together; a task starts over when it has been seen whole."""
    rng = random.Random(seed)
    queues = [[] for _ in rows_of_task]
    for _ in range(steps):
        batch = []
        for rows, queue in zip(rows_of_task, queues):
            while len(queue) < per_task:
                queue += rng.sample(rows, len(rows))
            batch += queue[:per_task]
            del queue[:per_task]
        rng.shuffle(batch)
        yield batch


@torch.no_grad()
def held_out_metric(way, task, rows, chunk=128):
    """Accuracy, or R2 for regression."""
    logits = torch.cat([way.logits(pack(rows[i : i + chunk], way.device)) for i in range(0, len(rows), chunk)])
    labels = torch.tensor([row.label for row in rows], device=logits.device)
    if task.is_regression:
        return 1 - float((logits[:, 0] - labels).square().sum() / (labels - labels.mean()).square().sum())
    return float((logits.argmax(1) == labels).float().mean())


def clock(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def memory(device, peak=False):
    """MiB in use now, or at most so far: of the GPU, or resident in this process."""
    if device.startswith("cuda"):
        return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**20
    # not getrusage: Linux starts a child's ru_maxrss at its parent's size
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM" if peak else "VmRSS"].split()[0]) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=16, help="rows of each task in every batch (default 16)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, metavar="TASK", help=f"some of: {' '.join(TASKS)} (default all)")
    parser.add_argument("--lr", type=float, default=2e-3, help="of the adapters; the head takes ten times as much")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for results.json and curves.png")
    parser.add_argument("--no-check", action="store_true", help="do not fail when a task has not learned, e.g. after few steps")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.steps < 1 or args.batch < 1:
        parser.error(f"--steps {args.steps} --batch {args.batch}: both are at least 1")
    return args


def main():
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.way:
        return train(args)
    for way in WAYS:
        run = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--way", way])
        if run.returncode:
            sys.exit(f"the {way} run failed (exit status {run.returncode})")
    runs = {way: json.loads((args.out / f"{way}.json").read_text()) for way in WAYS}
    for way in WAYS:
        (args.out / f"{way}.json").unlink()  # all of it goes into results.json
    problems = report.write(args, load_tasks(args.tasks), runs)
    sys.exit("\n".join(problems) if problems else 0)


if __name__ == "__main__":
    main()
