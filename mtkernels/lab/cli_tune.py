"""python -m mtkernels.lab tune: rank tile configurations of a kernel by their machine code, and keep the best."""

from dataclasses import asdict

from . import tune
from .cli_resources import Progress
from .matrix import default_cache
from .roofline import LABEL
from .tables import significant, table, write_json
from .tune_model import CARDS, TERMS
from .tune_space import KERNELS, REFERENCE


def add_arguments(parser):
    parser.add_argument("stem", metavar="STEM", help=f"one of {', '.join(KERNELS)}")
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="its kernels, by their names in configs/STEM.json; all when none is named")
    parser.add_argument("--target", action="append", choices=CARDS, help="column of configs/STEM.json, repeatable; all when none is named")
    parser.add_argument("--bits", type=int, action="append", choices=(16, 32), help="element bits, repeatable (16)")
    parser.add_argument("--rounds", type=int, default=3, help="steps away from the present configuration, each half or double of one option (3)")
    parser.add_argument("--top", type=int, default=4, help="candidates shown (4)")
    parser.add_argument("--write", action="store_true", help="put the best into configs/STEM.json where it gains more than the margin")
    parser.add_argument("--margin", type=float, default=tune.MARGIN, help=f"share of the present score that a new entry must save ({tune.MARGIN})")
    parser.add_argument("--json", metavar="FILE", help="write all candidates as JSON too")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (2)")
    parser.add_argument("--no-cache", action="store_true", help=f"compile again what is kept in {default_cache()}")


def run(args):
    """0; 1 where a kernel has no candidate without problems."""
    if args.jobs < 1 or args.rounds < 0 or not 0 <= args.margin < 1:
        raise ValueError("--jobs must be at least 1, --rounds at least 0 and --margin from 0 to 1")
    searches = _searches(args)
    cache = None if args.no_cache else default_cache()
    tune.run(searches, rounds=args.rounds, jobs=args.jobs, cache=cache, progress=Progress())
    for search in searches:
        _show(search, args.top)
    written = tune.write(searches, args.margin) if args.write else []
    if args.json:
        write_json(args.json, "tune", kind="static", label=LABEL, reference=REFERENCE, results=[_record(s, s in written) for s in searches])
    print(_said(args, searches, written))
    return 0 if all(search.best for search in searches) else 1


def _searches(args):
    if args.stem not in KERNELS:
        raise ValueError(f"no tile space for {args.stem!r}; stems are {', '.join(KERNELS)}")
    kernels, targets, sizes = args.kernels or list(KERNELS[args.stem]), args.target or list(CARDS), args.bits or [16]
    # An element size that only some of the kernels have is no mistake unless nothing is left.
    found = [
        (kernel, bits, target)
        for kernel in kernels
        for bits in sizes
        for target in targets
        if kernel not in KERNELS[args.stem] or bits in KERNELS[args.stem][kernel].bits or len(kernels) == 1
    ]
    return [tune.Search(args.stem, kernel, bits, target) for kernel, bits, target in found]


def _show(search, top):
    ranked, now = search.ranked(), search.candidates[tune.key_of(search.present)]
    print(f"\n{search}: {len(search.candidates)} candidates, {len(search.discarded())} discarded", end="")
    if now in ranked:
        print(f"; the present one is number {ranked.index(now) + 1}", end="")
    print(f", the best saves {search.gain:.1%}" if ranked else "; none is left")
    shown = ranked[:top] + [now] * (now not in ranked[:top] and now in ranked)
    names = list(search.present)
    columns = ["", *(name.replace("_", "_\n", 1) for name in names), "regs", "blocks", "score us,\nbound,\nnot measured", "limited by", *(f"{t}\nus" for t in (*TERMS, "start"))]
    rows = [
        (ranked.index(c) + 1 if c is not now else f"{ranked.index(c) + 1} now", *(c.options[n] for n in names), c.found.registers, c.found.occupancy.blocks)
        + (significant(c.estimate.score * 1e6), c.estimate.limit, *(significant(t * 1e6) for t in (*c.estimate.terms.values(), c.estimate.start)))
        for c in shown
    ]
    if rows:
        print(table(columns, rows))
    for c in [now] * bool(now.problems) + [c for c in search.discarded() if c is not now][:top]:
        print(f"discarded{' (present)' if c is now else ''}: {_words(c.options)}: {'; '.join(c.problems)}")


def _words(options):
    return " ".join(f"{name}={value}" for name, value in options.items())


def _record(search, written):
    def candidate(c):
        terms = c.estimate and {**c.estimate.terms, "start": c.estimate.start}
        resources = c.found and hasattr(c.found, "registers") and {k: v for k, v in asdict(c.found).items() if k != "loops"}
        return {
            "options": c.options, "present": c.options == search.present, "problems": c.problems, "resources": resources or None,
            "occupancy": asdict(c.found.occupancy) if resources else None,
            "score_us": c.estimate and c.estimate.score * 1e6, "limit": c.estimate and c.estimate.limit,
            "terms_us": terms and {name: seconds * 1e6 for name, seconds in terms.items()},
        }  # fmt: skip

    return {
        "kernel": f"{search.stem}.{search.kernel}", "bits": search.bits, "target": search.target, "gain": search.gain, "written": written,
        "candidates": [candidate(c) for c in [*search.ranked(), *search.discarded()]],
    }  # fmt: skip


def _said(args, searches, written):
    lines = [f"\nScores are static: {LABEL}. They rank configurations of one kernel on one GPU, at {REFERENCE}."]
    better = [s for s in searches if s.gain > args.margin]
    if args.write and written:
        lines += [f"written: {s}: {_words(s.best.options)}" for s in written]
        lines.append(f"budgets are those of the old entries now: python -m mtkernels.lab resources {args.stem} --write")
    elif args.write:
        lines.append(f"nothing written: no configuration saves more than {args.margin:.0%}")
    elif better:
        lines.append(f"--write would replace {len(better)} of {len(searches)} entries, those that save more than {args.margin:.0%}")
    return "\n".join(lines)
