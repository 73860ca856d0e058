"""Launches, bytes and FLOPs of each op against what it needs at least, and of its peers, counted launch by launch.

Triton kernels run in the interpreter under the probe; torch's own operations are counted by their operands (docs/lab.md).
Counts hold for exactly the shapes shown; bounds are rooflines on published peaks.
"""

import sys
from contextlib import contextmanager
from dataclasses import asdict, replace
from unittest import mock

from . import tables
from .roofline import CARDS, LABEL, bound_us

PASSES = {"forward": ("fwd",), "backward": ("bwd",), "total": ("fwd", "bwd")}
TILES = ("sm_80", "sm_86", "sm_90", "sm_100")
KINDS = ("triton", "vendor GEMM", "torch")
NOTES = f"""distinct: bytes of the different 32-byte sectors a launch touches, summed over launches; requested: bytes its programs ask for.
x least: distinct against operands read once and results written once; x split: against the least of separate launches
(LoRA forward 2TD+TO+DO, backward 2TD+2TO+DO elements). useful/issued: matrix FLOPs beside the frozen base, and those of the base.
Torch operations count once each, a lower bound. All ratios hold for exactly this shape. A100, H100, B200: {LABEL}."""


def add_arguments(parser):
    from ..bench.registry import DTYPES

    parser.add_argument("names", nargs="*", metavar="stem-or-op", help="what to count (default: everything)")
    parser.add_argument("--case", metavar="TEXT", default="", help="only cases whose name contains TEXT")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="instead of each case's own; may be repeated")
    parser.add_argument("--shape", nargs="+", metavar="KEY=VALUE", default=[], help="other sizes, such as T=512 ranks=4,8,16 shares=0.5,0.25,0.25")
    parser.add_argument("--tiles", choices=TILES, default="sm_90", help="count our kernels as configured for this GPU (default sm_90)")
    parser.add_argument("--provider", metavar="NAME", action="append", help="only these, such as triton or liger; may be repeated")
    parser.add_argument("--launches", action="store_true", help="also list every launch")
    parser.add_argument("--json", metavar="FILE", help="write everything counted")


def needs_interpreter(args):
    return True


def run(args):
    from ..bench.registry import provider_names, select

    known = provider_names(("ours", "peer", "part"))
    for name in args.provider or ():
        if name not in known:
            raise ValueError(f"no provider {name!r}; there are {', '.join(known)}")
    selected = [(suite, case) for suite, case in select(args.names, "cost", args.dtype) if args.case in case.name]
    if not selected:
        raise ValueError(f"no case of {' '.join(args.names) or 'any op'} has {args.case!r} in its name")
    selected = [(suite, replace(case, shape=with_sizes(case.shape, args.shape))) for suite, case in selected]
    results = []
    for suite, case in selected:
        with configured_for(args.tiles):
            records = list(count_case(suite, case, args.provider))
        _print(case, records, args)
        results += records
    print(f"\n{NOTES}")
    if args.json:
        tables.write_json(args.json, "cost", label=LABEL, tiles=args.tiles, cards={name: asdict(card) for name, card in CARDS.items()}, results=results)
    wrong = [r for r in results if r.get("failed") or r.get("findings")]
    for record in wrong:
        print(f"{record['op']} {record['case']} {record['provider']}: {record.get('reason') or record['findings']}", file=sys.stderr)
    return 1 if wrong else 0


@contextmanager
def configured_for(target):
    """Our launchers take the tiles of this GPU in the block, "sm_90" for example."""
    from . import driver

    with mock.patch.object(driver, "arch", lambda: int(target.removeprefix("sm_"))):
        yield


def with_sizes(shape, sizes):
    """The shape with "KEY=VALUE" sizes put in; a comma makes a tuple. Other ranks are shared evenly unless shares are given."""
    new = {}
    for text in sizes:
        key, _, value = text.partition("=")
        if key not in (*shape, *(("shares",) if "ranks" in shape else ())):
            raise ValueError(f"--shape {text}: this case has {', '.join(f'{k}={v}' for k, v in shape.items())}")
        try:
            numbers = tuple(float(v) if "." in v else int(v) for v in value.split(",") if v)
        except ValueError:
            numbers = ()
        if not numbers:
            raise ValueError(f"--shape {text}: give numbers, as in T=512 or ranks=4,8,16")
        new[key] = numbers if "," in value or isinstance(shape.get(key, ()), tuple) else numbers[0]
    if len(new.get("ranks", ())) not in (0, len(shape.get("ranks", ()))):
        shape = {k: v for k, v in shape.items() if k != "shares"}
    return {**shape, **new}


def count_case(suite, case, names=None):
    """Records, as in the JSON report: "least" and each provider, in every pass; one with a reason for a provider that cannot run."""
    from ..bench.registry import work

    modes = [m for m in ("fwd", "bwd") if m in case.modes and (m == "fwd" or case.training)]
    passes = {p: ms for p, ms in PASSES.items() if set(ms) <= set(modes)} if "bwd" in modes else {"forward": ("fwd",)}
    least = {p: work(suite, case, "full" if len(ms) > 1 else ms[0]) for p, ms in passes.items()}
    common = dict(op=case.op, case=case.name, dtype=case.dtype, shape=case.shape)
    for p, w in least.items():
        yield {**common, "provider": "least", "kind": "least", "pass": p, **asdict(w), "bound_us": _least_bounds(w, case.dtype)}
    problem = suite.inputs(case, "cpu")
    for provider in suite.PROVIDERS:
        if _wanted(provider, case, names):
            yield from _count_provider(provider, problem, passes, least, {**common, "provider": provider.name, "kind": provider.kind})


def _wanted(provider, case, names):
    if not provider.applies(case) or not provider.countable or (names and provider.name not in names):
        return False
    # beside our kernels and peers, the part that ratios are taken against
    return {"ours": provider.name == "triton", "peer": True, "part": provider.name == case.baseline}[provider.kind]


def _count_provider(provider, problem, passes, least, common):
    from ..bench.registry import Unavailable
    from .counting import count

    try:
        counted = count(provider.make(problem))
    except Unavailable as reason:
        yield {**common, "reason": str(reason), "failed": False}
        return
    except Exception as error:  # one provider's failure is its result; the others are still counted
        first = (str(error).strip().splitlines() or [""])[0]
        yield {**common, "reason": f"{type(error).__name__}: {first}", "failed": provider.kind == "ours"}
        return
    for p, modes in passes.items():
        if set(modes) <= set(counted.passes):
            launches = [launch for mode in modes for launch in counted.passes[mode]]
            yield {**common, "pass": p, **_figures(launches, least[p], provider.kind), "findings": list(map(str, counted.findings)) if provider.kind == "ours" else []}


def _figures(launches, least, kind):
    distinct, issued = sum(launch.distinct_bytes for launch in launches), sum(sum(launch.flops.values()) for launch in launches)
    # A vendor's GEMM pads nothing that is counted here; ours pads each adapter's last row tile.
    base = sum(launch.functions.get(least.base_function, 0) for launch in launches) or least.base_flops
    issued -= base
    whole = kind != "part"
    return {
        "launches": {k: sum(launch.kind == k for launch in launches) for k in KINDS},
        "distinct_bytes": distinct,
        "requested_bytes": sum(launch.requested_bytes for launch in launches),
        "over_least": distinct / least.bytes if whole else None,
        "over_split": distinct / least.split_bytes if whole and least.split_bytes else None,
        "issued_flops": issued,
        "useful_over_issued": least.tensor_flops / issued if whole and issued else None,
        "base_useful_over_issued": least.base_flops / base if base else None,
        "bound_us": {card: bound_us(launches, card) for card in CARDS},
        "kernels": [asdict(launch) for launch in launches],
    }


def _least_bounds(least, dtype):
    from .torch_ops import Launch

    flops = {dtype: least.tensor_flops + least.base_flops} if least.tensor_flops + least.base_flops else {}
    return {card: bound_us([Launch("", "", least.bytes, least.bytes, flops)], card) for card in CARDS}


def _print(case, records, args):
    columns = ["pass", "provider", *(k.replace(" ", "\n") for k in KINDS), "distinct\nMB", "requested\nMB", "x least", "x split"]
    columns += ["issued\nGFLOP", "useful/\nissued", "base\nuseful/\nissued", *(f"{card} us\n{LABEL.replace(', ', ',' + chr(10))}" for card in CARDS)]
    counted = [r for r in records if "pass" in r]
    rows = [_row(r) for p in PASSES for r in counted if r["pass"] == p]
    kept = [i for i in range(len(columns)) if i < 2 or any(row[i] for row in rows)]
    shape = " ".join(f"{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in case.shape.items())
    print(f"\n{case.op}  {case.name}  {case.dtype}  {shape}  tiles of {args.tiles}")
    print(tables.table([columns[i] for i in kept], [[row[i] for i in kept] for row in rows], left=2))
    for r in records:
        if "pass" not in r:
            print(f"  {r['provider']}: {r['reason']}")
    if args.launches:
        _print_launches(counted)
    sys.stdout.flush()


def _row(r):
    text = tables.significant
    if r["kind"] == "least":
        middle = ["", "", "", text(r["bytes"] / 1e6), "", "", "", text(r["tensor_flops"] / 1e9) if r["tensor_flops"] else "", "", ""]
    else:
        middle = [*r["launches"].values(), text(r["distinct_bytes"] / 1e6), text(r["requested_bytes"] / 1e6), text(r["over_least"]), text(r["over_split"])]
        middle += [text(r["issued_flops"] / 1e9) if r["issued_flops"] else "", text(r["useful_over_issued"]), text(r["base_useful_over_issued"])]
    return [r["pass"], r["provider"], *map(str, middle), *(text(us) for us in r["bound_us"].values())]


def _print_launches(records):
    rows = [
        [r["pass"], r["provider"], k["name"], k["kind"], tables.significant(k["distinct_bytes"] / 1e6), tables.significant(k["requested_bytes"] / 1e6), tables.significant(sum(k["flops"].values()) / 1e9)]
        for r in records
        if r["pass"] != "total"
        for k in r.get("kernels", ())
    ]
    print("\n" + tables.table(["pass", "provider", "launch", "kind", "distinct MB", "requested MB", "GFLOP"], rows, left=4))
