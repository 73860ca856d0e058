"""Each op forward and backward, without a GPU: right against float64, no findings, and what every launch did.

interpret runs Triton's interpreter under the probe; virtual-sm80 and virtual-sm90 execute the compiled PTX; cuda-emulated
runs the .cu files under the emulator and its sanitizers. Exit status 1 for a wrong result or a finding.
"""

from contextlib import contextmanager
from dataclasses import asdict

from . import tables

WAYS = ("interpret", "virtual-sm80", "virtual-sm90", "cuda-emulated")


def add_arguments(parser):
    from .problems import DTYPES

    parser.add_argument("names", nargs="*", metavar="stem-or-op", help="what to run (default: everything)")
    parser.add_argument("--on", choices=WAYS, default="interpret", help="default interpret")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default bf16")
    parser.add_argument("--seed", type=int, default=0, help="of the order of programs or threads (default 0)")
    parser.add_argument("--lines", action="store_true", help="virtual-*: memory requests per source line of each launch")
    parser.add_argument("--json", metavar="FILE", help="write results and counters")


def needs_interpreter(args):
    return args.on == "interpret"


def run(args):
    from .problems import DTYPES, chosen

    stems = None
    if args.on == "cuda-emulated":
        from . import emulated

        if why := emulated.refusal():
            raise ValueError(why)
        stems = emulated.stems()
    records = []
    for op in chosen(args.names, stems):
        records.append(run_op(op, args.on, DTYPES[args.dtype], args.seed, args.lines))
        _print(records[-1], args)
    if args.json:
        tables.write_json(args.json, "run", on=args.on, dtype=args.dtype, seed=args.seed, results=records)
    return 0 if all(r["right"] and not r["findings"] for r in records) else 1


def run_op(op, on, dtype, seed=0, lines=False):
    """Record of one op: verdict, findings, and a row of counters per launch."""
    from . import problems

    launches, findings, found = [], [], None
    backend = "cuda" if on == "cuda-emulated" else "triton"
    with _open(on, seed, launches, findings, lines):
        found = problems.results(op, dtype, backend)
    worst = problems.checks(op, dtype, backend, found)[0] if found else None
    record = {"op": op, "right": worst is not None and worst.ok, "worst": worst and asdict(worst)}
    return {**record, "findings": findings, "launches": launches}


@contextmanager
def _open(on, seed, launches, findings, lines):
    """The tool; on leaving, its launches and findings are in the lists, a finding that stops the op included."""
    if on == "interpret":
        from .probe import Probe

        with Probe(seed) as probe:
            yield
        launches += map(_probe_row, probe.launches)
        findings += map(str, probe.findings)
    elif on == "cuda-emulated":
        yield from _emulated(seed, launches, findings)
    else:
        from .ptx import Finding
        from .virtual_gpu import VirtualGPU

        with VirtualGPU(int(on.removeprefix("virtual-sm")), counters=True) as gpu:
            try:
                yield
            except Finding as finding:
                findings.append(str(finding))
        launches += (_virtual_row(launch, lines) for launch in gpu.launches)


def _emulated(seed, launches, findings):
    from . import emulated
    from .cuda_emulator import KernelMistake

    class Counting(emulated.EmulatedCuda):
        def launch(self, stem, entry, args):
            super().launch(stem, entry, args)
            traffic = emulated._emulator(stem).traffic(entry, *map(emulated._as_array, args))
            launches.append(_emulated_row(entry, traffic))

    with Counting(seed, tools=("asan", "tsan", "plain")):
        try:
            yield
        except KernelMistake as mistake:
            findings += map(str, mistake.findings)


def _probe_row(launch):
    load, store, atomic = (launch.traffic[kind] for kind in ("load", "store", "atomic"))
    row = {"kernel": launch.kernel, "grid": list(launch.grid), "load MB": load.bytes / 1e6, "store MB": store.bytes / 1e6, "atomic MB": atomic.bytes / 1e6}
    row |= {"distinct MB": launch.dram_floor_bytes / 1e6, "sectors/load": load.sectors_per_request, "sectors/store": store.sectors_per_request}
    return {**row, "dot MFLOP": sum(launch.dot_flops.values()) / 1e6}


def _virtual_row(launch, lines):
    mix = launch.instructions
    row = {"kernel": launch.kernel, "grid": list(launch.grid), "warps": launch.num_warps, "shared B": launch.shared_bytes}
    row |= {"instructions": sum(mix.values()), "tensor core": mix.get("tensor core", 0)}
    for space in _COSTS:
        accesses = [a for a in launch.counters.accesses.values() if a.space == space]
        row |= _memory_cells(space, [(a.requests, a.cost, a.ideal * a.requests) for a in accesses])
    if lines:
        row["lines"] = launch.report()
    return row


# What a request of this memory costs, and the name of what goes beyond the least that its bytes need.
_COSTS = {"global": ("sectors/request", "excess sectors"), "shared": ("passes/request", "bank conflicts")}


def _memory_cells(space, accesses):
    """accesses: (requests, cost, least cost) of each instruction or line; broadcasts cost less than their bytes would."""
    per_request, excess = _COSTS[space]
    requests, cost = sum(a[0] for a in accesses), sum(a[1] for a in accesses)
    beyond = round(sum(max(0.0, a[1] - a[2]) for a in accesses))
    return {f"{space} requests": requests, per_request: cost / max(1, requests), excess: beyond}


def _emulated_row(entry, traffic):
    row = {"kernel": entry.rsplit("::", 1)[-1]}
    for space, unit in (("global", "sectors"), ("shared", "passes")):
        row |= _memory_cells(space, [(t.requests, getattr(t, unit), getattr(t, f"ideal_{unit}")) for t in traffic if t.space == space])
    return row


def _print(record, args):
    worst = record["worst"]
    verdict = "did not finish" if worst is None else f"{'right' if record['right'] else 'WRONG'}, {worst['tensor']} closest to its limit: error {worst['error']:.1e}, allowed {worst['limit']:.1e}"
    print(f"\n{record['op']}  {args.dtype}  {args.on}  {verdict}")
    launches = record["launches"]
    if launches:
        columns = [name for name in launches[0] if name != "lines"]
        print(tables.table(columns, [[_cell(launch[name]) for name in columns] for launch in launches]))
    for launch in launches:
        if "lines" in launch:
            print(f"\n{launch['kernel']}\n{launch['lines']}")
    for finding in record["findings"]:
        print(f"  FINDING {finding}")
    if not record["findings"]:
        print("  no findings")


def _cell(value):
    if isinstance(value, list):
        return "x".join(map(str, value))
    return tables.significant(value) if isinstance(value, float) else value
