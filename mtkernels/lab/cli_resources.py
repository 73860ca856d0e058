"""python -m mtkernels.lab resources: what every shipped kernel takes on every GPU, checked against its budget."""

import json
import sys
import time
from dataclasses import asdict

from . import budgets
from .interpreter import interpreting
from .matrix import CompileError, default_cache, default_cases, measure_all, shipped_cases, shipped_ops
from .occupancy import FAMILIES, TARGETS
from .resources import problems, table

SUMMARY = "compile the shipped kernels for GPUs that are not there and check registers, spills and memory against budgets"


def add_arguments(parser):
    parser.add_argument("ops", nargs="*", metavar="OP", help="ops to look at, such as lora; all when none is named")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="compare with triton_kernels/budgets/OP.json, exit 1 on a regression (default)")
    action.add_argument("--write", action="store_true", help="make what is measured the budget; refused for spills and other plain mistakes")
    parser.add_argument("--target", action="append", choices=TARGETS, help="GPU to compile for, repeatable; all when none is named")
    parser.add_argument("--quick", action="store_true", help=f"one case of each kernel for one GPU per family ({', '.join(FAMILIES)})")
    parser.add_argument("--json", metavar="FILE", help="write all figures as JSON too; - is standard output, instead of the table")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (2)")
    parser.add_argument("--no-cache", action="store_true", help=f"measure again what is kept in {default_cache()}")


def run(args):
    """0, or 1 after listing every regression; 2 for a call that makes no sense."""
    known = shipped_ops()
    refusal = _refusal(args, known)
    if refusal:
        print(f"resources: {refusal}", file=sys.stderr)
        return 2
    ops, targets = args.ops or known, args.target or (FAMILIES if args.quick else list(TARGETS))
    pairs = [(case, t) for op in ops for t in targets for case in (default_cases if args.quick else shipped_cases)(t, [op])]
    results = measure_all(pairs, jobs=args.jobs, cache=None if args.no_cache else default_cache(), progress=Progress())
    said = _write(ops, targets, pairs, results) if args.write else _check(ops, targets, pairs, results, whole=not args.ops)
    _show(pairs, results, args.json)
    out = sys.stderr if args.json == "-" else sys.stdout
    what = "not written" if args.write else "regressions"
    print("\n".join([f"\n{len(said)} {what}:", *said]) if said else _done(args, pairs), file=out)
    return 1 if said else 0


def _refusal(args, known):
    unknown = [op for op in args.ops if op not in known]
    if unknown:
        return f"no compile cases for {', '.join(unknown)}; ops are {', '.join(known)}"
    if interpreting():
        return "TRITON_INTERPRET=1 turns kernels into Python; unset it to compile them"
    if args.write and args.quick:
        return "--write takes every case; leave out --quick"
    return "--jobs must be at least 1" if args.jobs < 1 else None


def _done(args, pairs):
    if args.write:
        return f"\nwritten: {len(pairs)} budgets in {budgets.folder()}"
    return f"\n{len(pairs)} compilations within their budgets. Static figures of compiled code; nothing here is a time."


def _check(ops, targets, pairs, results, whole):
    cases = {op: {t: list(shipped_cases(t, [op])) for t in targets} for op in ops}
    said = budgets.unmatched(cases, targets)
    if whole:
        said += [f"{path}: budgets of no op; delete it" for path in budgets.orphans(ops)]
    loaded = {op: budgets.load(op) for op in ops}
    for case, target in pairs:
        found, budget = results[case.name, target], loaded[case.name.split(".")[0]]
        ceilings = budget["cases"].get(case.name, {}).get(target)
        if isinstance(found, CompileError):
            worse = [f"does not compile: {found}"]
        elif ceilings is None:
            worse = problems(found, case.tensor_cores)
        else:
            worse = budgets.regressions(found, ceilings, budget["triton"] == budgets.triton_version(), case.tensor_cores)
        said += [f"{case.name} {target}: {text}" for text in worse]
    if said:
        said.append("(python -m mtkernels.lab resources --write makes what is measured the budget)")
    return said


def _write(ops, targets, pairs, results):
    """Write the ops that have no plain mistake; what keeps the others from it, in words."""
    said = []
    for op in ops:
        mine = [(case, t) for case, t in pairs if case.name.split(".")[0] == op]
        wrong = [f"{case.name} {t}: {text}" for case, t in mine for text in _mistakes(results[case.name, t], case)]
        try:
            if not wrong:
                budgets.write(op, {(case.name, t): results[case.name, t] for case, t in mine}, targets)
        except ValueError as error:
            wrong = [str(error)]
        said += wrong
    return said


def _mistakes(found, case):
    return [f"does not compile: {found}"] if isinstance(found, CompileError) else problems(found, case.tensor_cores)


def _show(pairs, results, where):
    compiled = [(case.name, results[case.name, t]) for case, t in pairs if not isinstance(results[case.name, t], CompileError)]
    if where:
        import triton

        rows = [
            {"case": name, **asdict(found), "occupancy": asdict(found.occupancy), "hot_loop": found.hot_loop and asdict(found.hot_loop)}
            for name, found in compiled
        ]
        text = json.dumps({"triton": triton.__version__, "kind": "static", "results": rows}, indent=1)
        if where == "-":
            return print(text)
        with open(where, "w") as file:
            file.write(text + "\n")
    print(table(compiled))


class Progress:
    """On stderr: one line that is written over on a terminal, elsewhere a line every half minute."""

    def __init__(self):
        self.last = time.monotonic()

    def __call__(self, done, total, name):
        if sys.stderr.isatty():
            print(f"\r\033[K{done}/{total} {name}" if done < total else "\r\033[K", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self.last > 30:
            self.last = time.monotonic()
            print(f"{done}/{total} compiled", file=sys.stderr, flush=True)
