"""What the example shows: a progress bar while it trains, then a table, results.json and curves.png."""

import json
import os
import platform
import statistics
from contextlib import contextmanager

import torch

import mtkernels

FIRST_LOSS_TOLERANCE = 1e-5
MIN_ACCURACY_OVER_BASELINE = 0.15
MIN_R2 = 0.4
TITLES = {"mtkernels": "mtkernels: all adapters in one batch", "ordinary": "stock PEFT: one adapter at a time"}


@contextmanager
def progress(way, names, steps):
    """Gives show(losses, seconds), to be called after each step: a live bar on a terminal, else a line now and then."""
    done = []

    def summary(losses, seconds):
        return f"{seconds:5.2f} s/step  " + "  ".join(f"{name} {loss:.2f}" for name, loss in zip(names, losses))

    def show_line(losses, seconds):
        done.append(seconds)
        if len(done) in (1, steps) or len(done) % max(steps // 10, 1) == 0:
            print(f"step {len(done):4d}/{steps}  {summary(losses, statistics.median(done))}", flush=True)

    live = _live_bar(TITLES[way], steps)
    if live is None:
        print(TITLES[way], flush=True)
        yield show_line
        return
    screen, bar_and_text = live
    with screen:
        yield lambda losses, seconds: screen.update(bar_and_text(summary(losses, seconds)))


def _live_bar(title, steps):
    """A rich.Live, and a function that advances the bar and gives it with a text below; None without rich or a terminal."""
    try:
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import Progress
    except ImportError:
        return None
    if not Console().is_terminal:
        return None
    bar = Progress()
    task = bar.add_task(title, total=steps)

    def bar_and_text(text):
        bar.advance(task)
        return Group(bar, text)

    return Live(bar, refresh_per_second=4), bar_and_text


def write(args, tasks, runs):
    """Print the table, write results.json and curves.png into args.out; returns the list of what went wrong."""
    text = f"{table(tasks, runs)}\n\n{totals(runs)}"
    print(f"\n{text}\n")
    problems = check(tasks, runs, learned=not args.no_check)
    results = {
        "environment": environment(),
        "arguments": {k: str(v) if k == "out" else v for k, v in vars(args).items() if k != "way"},
        "tasks": [
            {"name": t.name, "classes": t.classes, "rank": t.rank, "train": len(t.train), "held_out": len(t.held_out), "baseline": t.baseline()} for t in tasks
        ],
        "runs": runs,
        "problems": problems,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    (args.out / "table.txt").write_text(text + "\n")
    plot(tasks, runs, args.out / "curves.png")
    print(f"wrote {args.out}/results.json, table.txt and curves.png")
    return problems


def environment():
    versions = {"python": platform.python_version(), "torch": torch.__version__, "mtkernels": mtkernels.__version__}
    return {**versions, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "machine": platform.machine()}


def first_and_last(run, j):
    """First loss of task j, and the mean of its last ten."""
    losses = [step[j] for step in run["losses"]]
    return losses[0], statistics.fmean(losses[-10:])


def table(tasks, runs):
    header = ["task", "classes", "rank", "train rows", *(f"{way} loss" for way in runs), *(f"{way} held out" for way in runs), "baseline"]
    lines = []
    for j, task in enumerate(tasks):
        losses = ["{:.3f} -> {:.3f}".format(*first_and_last(run, j)) for run in runs.values()]
        metric = "R2 " if task.is_regression else ""
        metrics = [f"{metric}{run['metrics'][j]:.3f}" for run in runs.values()]
        lines.append([task.name, str(len(task.classes) or "score"), str(task.rank), str(len(task.train)), *losses, *metrics, f"{metric}{task.baseline():.3f}"])
    return aligned([header, *lines])


def totals(runs):
    lines = [["", "s/step: median", "p20..p80", "training", "peak memory", "above the loaded model"]]
    for way, run in runs.items():
        peak, loaded = run["memory_peak_mib"], run["memory_loaded_mib"]
        low, _, _, high = statistics.quantiles(warm(run) * 2, n=5)
        lines.append([way, f"{step_time(run):.3f}", f"{low:.3f}..{high:.3f}", f"{sum(run['seconds']):.1f} s", f"{peak:.0f} MiB", f"{peak - loaded:.0f} MiB"])
    ours, ordinary = runs["mtkernels"], runs["ordinary"]
    first, largest = loss_difference(runs, 1), loss_difference(runs)
    return "\n".join(
        [
            aligned(lines),
            "",
            f"time per step: ordinary / mtkernels = {step_time(ordinary) / step_time(ours):.2f}",
            f"difference of per-task losses: {first:.1e} at the first step, at most {largest:.1e} over all {len(ours['losses'])}",
        ]
    )


def aligned(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def warm(run):
    """Step times without the first, which allocate and warm up, unless there are no others."""
    return run["seconds"][3:] or run["seconds"]


def step_time(run):
    return statistics.median(warm(run))


def loss_difference(runs, steps=None):
    ours, ordinary = (torch.tensor(run["losses"][:steps]) for run in runs.values())
    return float((ours - ordinary).abs().max())  # torch's max passes a NaN on, Python's may not


def check(tasks, runs, learned=True):
    problems = []
    if not loss_difference(runs, 1) <= FIRST_LOSS_TOLERANCE:
        problems.append(f"the first losses differ by {loss_difference(runs, 1):.1e}, more than {FIRST_LOSS_TOLERANCE:.0e}")
    for way, run in runs.items() if learned else ():
        for task, metric in zip(tasks, run["metrics"]):
            bar = MIN_R2 if task.is_regression else task.baseline() + MIN_ACCURACY_OVER_BASELINE
            if not metric >= bar:
                problems.append(f"{way}: {task.name} did not learn: held out {metric:.3f}, at least {bar:.3f} expected")
    return problems


STYLES = {"mtkernels": {"color": "tab:blue", "lw": 2}, "ordinary": {"color": "tab:orange", "lw": 1.2, "ls": (0, (3, 3))}}


def plot(tasks, runs, path):
    """Loss curves of each task, both runs overlaid; seconds per step; held-out metrics beside the baseline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 4
    rows = len(tasks) // columns + 1
    figure = pyplot.figure(figsize=(3.4 * columns, 2.4 * rows + 3.2), layout="constrained")
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[1] * rows + [1.3])
    cells = [figure.add_subplot(grid[j // columns, j % columns]) for j in range(len(tasks) + 1)]
    for j, task in enumerate(tasks):
        _plot_losses(cells[j], task, {way: [step[j] for step in run["losses"]] for way, run in runs.items()})
    _plot_step_times(cells[-1], runs)
    held_out = figure.add_subplot(grid[rows, :])
    _plot_held_out(held_out, tasks, runs)
    figure.legend(*held_out.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _plot_losses(axes, task, losses):
    for way, curve in losses.items():
        axes.plot(range(1, len(curve) + 1), curve, **STYLES[way])
    kind = "squared error" if task.is_regression else f"cross entropy, {len(task.classes)} classes"
    axes.set_title(f"{task.name}: {kind}, rank {task.rank}", fontsize=8)
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.tick_params(labelsize=8)


def _plot_step_times(axes, runs):
    drawn = axes.bar(list(runs), [step_time(run) for run in runs.values()], 0.5, color=[STYLES[way]["color"] for way in runs])
    axes.bar_label(drawn, fmt="%.2f", fontsize=8)
    axes.margins(x=0.4, y=0.2)
    axes.set_title("seconds per step (median)", fontsize=8)
    axes.tick_params(labelsize=8)


def _plot_held_out(axes, tasks, runs):
    bars = [*((TITLES[way], run["metrics"], STYLES[way]["color"]) for way, run in runs.items()), ("baseline", [t.baseline() for t in tasks], "lightgrey")]
    for i, (label, heights, color) in enumerate(bars):
        drawn = axes.bar([j + 0.27 * (i - 1) for j in range(len(tasks))], heights, 0.25, label=label, color=color)
        axes.bar_label(drawn, fmt="%.2f", fontsize=7)
    axes.set_xticks(range(len(tasks)), [f"{t.name}\n{'R2' if t.is_regression else 'accuracy'}" for t in tasks], fontsize=8)
    axes.set_ylim(top=1.1)
    axes.set_title("held out", fontsize=9)
