"""python -m mtkernels.bench: verify every backend, then time it beside its peers."""

import argparse
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec

import torch

from mtkernels._backends import NAMES as BACKENDS

from . import environment, report, runner
from .registry import DEFAULT_MODES, DTYPES, MODES, PRESETS, provider_names, select, suites

USAGE_ERROR, FAILURE = 2, 1
EXAMPLES = """examples:
  python -m mtkernels.bench                                   the quick suite, about a minute
  python -m mtkernels.bench lora --mode full --dtype bf16 --metric time,memory
  python -m mtkernels.bench --bars --isa avx512               the speeds to reach, as on a CPU without bf16 instructions
  python -m mtkernels.bench --json new.json --baseline old.json --plot out/"""


def _list_of(what, choices):
    def parse(text):
        names = tuple(name for name in text.split(",") if name)
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"no {what} {name!r}; there are {', '.join(choices)}")
        return names

    return parse


def _positive(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} threads; give a whole number, at least 1")
    return int(text)


def parser():
    p = argparse.ArgumentParser("python -m mtkernels.bench", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    peers = provider_names(("peer",))
    p.add_argument("names", nargs="*", metavar="stem-or-op", help="what to run (default: everything); see --list")
    p.add_argument("--preset", choices=PRESETS, help="quick: about a minute; bars: the cases with a speed to reach; full: all; cost: those that mtkernels.lab cost counts (default quick)")
    p.add_argument("--bars", action="store_true", help="preset bars, and exit non-zero if a bar is missed")
    p.add_argument("--mode", type=_list_of("mode", MODES), help="fwd,bwd,full")
    p.add_argument("--dtype", type=_list_of("dtype", tuple(DTYPES)), help="fp32,bf16,fp16 (default: each case's own)")
    p.add_argument("--backend", type=_list_of("backend", BACKENDS), help=f"{','.join(BACKENDS)} (default: those of the device)")
    p.add_argument("--peer", type=_list_of("peer", peers), help=f"{','.join(peers)} (default: all but the slow ones)")
    p.add_argument("--metric", type=_list_of("metric", report.METRICS), default=("time", "bandwidth"), help=f"{','.join(report.METRICS)} (default time,bandwidth)")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    p.add_argument("--threads", type=_positive, help="CPU threads (default: torch's; preset bars: 2)")
    p.add_argument("--isa", choices=tuple(environment.ISA), help="restart limited to this instruction set")
    p.add_argument("--check", action=argparse.BooleanOptionalAction, default=True, help="verify before timing (default on)")
    p.add_argument("--json", metavar="FILE", help="write the report")
    p.add_argument("--csv", metavar="FILE", help="write one row per metric")
    p.add_argument("--plot", metavar="DIR", help="write one PNG per op (needs matplotlib)")
    p.add_argument("--baseline", metavar="FILE", help="compare with an older --json report")
    p.add_argument("--list", action="store_true", help="print cases and providers and stop")
    return p


class Progress:
    """A bar on stderr: rich's on a terminal, otherwise one line per case."""

    def __init__(self, total):
        self.total, self.done, self.bar, self.last = total, 0, None, ""
        if sys.stderr.isatty() and find_spec("rich"):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False)
            self.task = self.bar.add_task("", total=total)
            self.bar.start()

    def step(self, text):
        if self.bar:
            self.bar.update(self.task, description=text)

    def case(self, text):
        if self.bar is None:
            print(f"[{self.done + 1}/{self.total}] {text}", file=sys.stderr, flush=True)

    @contextmanager
    def finished_case(self):
        """Hides the bar while the case's table is printed."""
        self.done += 1
        if self.bar:
            self.bar.update(self.task, completed=self.done)
            self.bar.stop()
        yield
        sys.stdout.flush()
        if self.bar and self.done < self.total:
            self.bar.start()

    def close(self):
        if self.bar:
            self.bar.stop()


def print_list():
    for stem, suite in suites().items():
        print(stem)
        for case in suite.cases():
            print(f"  {case.op:<20} {case.name:<22} {','.join(case.dtypes):<10} {','.join(case.modes):<13} presets {','.join(case.presets)}")
        for kind, title in (("ours", "backends"), ("peer", "peers"), ("part", "parts")):
            names = [p.name for p in suite.PROVIDERS if p.kind == kind]
            if names:
                print(f"  {title}: {', '.join(names)}")


def run_cases(selected, options, env, old):
    """(records, bars) of every case, each table printed as it is done."""
    records, bars = [], []
    progress = Progress(len(selected))
    try:
        for suite, case in selected:
            progress.case(str(case))
            run = runner.CaseRun(suite, case, options, progress).run()
            with progress.finished_case():
                report.print_case(run, options.metrics, env, old, sys.stdout)
            records += run.records
            bars += run.bars
    finally:
        progress.close()
    return records, bars


def main(arguments=None):
    """Run the command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    p = parser()
    args = p.parse_args(arguments)
    if args.list:
        print_list()
        return 0
    if args.isa:
        environment.restart_with_isa(args.isa, arguments)
    preset = args.preset or ("bars" if args.bars else "quick")
    try:
        selected = select(args.names, preset, args.dtype)
        device = runner.torch_device(args.device)
        older = report.read_json(args.baseline) if args.baseline else None
    except (ValueError, OSError) as error:
        p.error(str(error))
    if args.plot and find_spec("matplotlib") is None:
        p.error("--plot needs matplotlib: pip install matplotlib")
    modes = args.mode or DEFAULT_MODES[preset]
    selected = [(suite, case) for suite, case in selected if set(modes) & set(case.modes)]
    if not selected:
        p.error(f"preset {preset!r} has no case for this choice; see --list, or give --preset full")
    threads = args.threads or (2 if preset == "bars" else torch.get_num_threads())
    metrics = (*args.metric, "memory") if preset == "bars" and "memory" not in args.metric else args.metric
    options = runner.Options(preset, modes, device, threads, args.backend, args.peer, metrics, args.check)
    return _measure(args, options, selected, older)


def _measure(args, options, selected, older):
    start = time.monotonic()
    torch.set_num_threads(options.threads)
    env = environment.describe(options.device, options.threads)
    print(report.header(env))
    why_not = report.comparable(env, older["env"]) if older else ""
    if why_not:
        print(f"{args.baseline} was measured elsewhere, so times differ for other reasons too: {why_not}")
    old = report.old_times(older) if older else {}
    records, bars = run_cases(selected, options, env, old)
    print(report.summary(records, bars, old) + f", {time.monotonic() - start:.0f} s")
    if args.json:
        report.write_json(args.json, env, records, bars)
    if args.csv:
        report.write_csv(args.csv, env, records)
    if args.plot:
        from .plots import plot

        for path in plot(records, env, args.plot):
            print(path)
    missed = args.bars and any(bar["met"] is False for bar in bars)
    return FAILURE if missed or report.failures(records) else 0


if __name__ == "__main__":
    sys.exit(main())
