"""Terminal tables, the summary, long CSV and JSON."""

import csv
import json
from pathlib import Path

from .verify import Check

SCHEMA = 1
METRICS = ("time", "bandwidth", "tflops", "memory")
CHANGE_SHOWN = 1.05  # against an older report, smaller changes are noise
CSV_COLUMNS = (
    *("op", "case", "dtype", "mode", "provider", "kind", "metric", "unit", "value", "p20", "p80", "baseline", "threads"),
    *("device", "processor", "isa_variables", "torch", "mtkernels", "git", "timestamp"),
)


def header(env):
    """Two lines: what runs where, and the ceilings measured there."""
    git = f" ({env['git']})" if env["git"] else ""
    parts = [f"mtkernels {env['mtkernels']}{git}", env["cpu"], f"{env['threads']} threads", f"torch {env['torch']}"]
    if "gpu" in env:
        parts[1:3] = [env["gpu"]["name"], f"CUDA {env['gpu']['cuda']}"]
    parts += [f"triton {env['packages']['triton'] or 'not installed'}", env["timestamp"][:10]]
    limits = " ".join(f"{k}={v}" for k, v in env["isa_variables"].items())
    isa = f"isa: {' '.join(env['cpu_flags']) or env['torch_cpu_capability']}" + (f", limited by {limits}" if limits else "")
    rates = env["measured"]
    measured = f"measured: copy {rates['copy_gb_s']:.1f} GB/s, matmul fp32 {rates['matmul_fp32_gflop_s']:.0f}, bf16 {rates['matmul_bf16_gflop_s']:.0f} GFLOP/s"
    return "  ".join(parts) + f"\n{isa}\n{measured}"


def _times(*values):
    """The values in the unit of the first, joined by two dots."""
    scale, unit, digits = (1, "ms", 2) if values[0] >= 0.1 else (1e3, "us", 1)
    return "..".join(f"{v * scale:.{digits}f}" for v in values) + f" {unit}"


def _mib(n_bytes):
    return f"{n_bytes / 2**20:.2f}"


def _shape(shape):
    def text(value):
        ends = sorted({min(value), max(value)}) if isinstance(value, tuple | list) else [value]
        return "..".join(map(str, ends))

    return " ".join(f"{key}={text(value)}" for key, value in shape.items())


def key_of(record):
    return tuple(record[k] for k in ("op", "case", "dtype", "mode", "provider", "threads"))


def old_times(report):
    """{record key: median ms} of an older report."""
    return {key_of(r): r["time_ms"]["median"] for r in report["results"] if "time_ms" in r}


def _columns(metrics, baseline, old):
    columns = ["mode", "provider", "median", "p20..p80", "min"]
    columns += ["GB/s", "% copy"] if "bandwidth" in metrics else []
    columns += ["TFLOP/s"] if "tflops" in metrics else []
    columns += ["saved MiB", "peak MiB"] if "memory" in metrics else []
    return [*columns, f"x {baseline}", *(["x old"] if old else []), "check"]


def _cells(record, metrics, env, old):
    t = record["time_ms"]
    cells = [record["mode"], record["provider"], _times(t["median"]), _times(t["p20"], t["p80"]) if t["rounds"] > 1 else "once", _times(t["min"])]
    seconds = t["median"] / 1e3
    if "bandwidth" in metrics:
        rate = record["bytes"] and record["bytes"] / seconds / 1e9
        cells += [f"{rate:.1f}", f"{100 * rate / env['measured']['copy_gb_s']:.0f}"] if rate else ["", ""]
    if "tflops" in metrics:
        cells.append(f"{record['flops'] / seconds / 1e12:.3f}" if record["flops"] else "")
    if "memory" in metrics:
        saved = record.get("saved_bytes")
        cells += [_mib(sum(saved.values())), _mib(record["peak_extra_bytes"])] if saved else ["", ""]
    cells.append("" if record["ratio"] is None else f"{record['ratio']:.2f}")
    if old:
        before = old.get(key_of(record))
        cells.append(f"{t['median'] / before:.2f}" if before else "new")
    return [*cells, str(Check(**record["check"])) if record["check"] else "-"]


def print_case(run, metrics, env, old, out):
    """One case: a title, a table of its rows, and why the other providers did not run."""
    case = run.case
    print(f"\n{case.op}  {case.name}  {case.dtype}  {_shape(case.shape)}  threads={run.threads}", file=out)
    rows = [_cells(r, metrics, env, old) for r in run.records if "time_ms" in r]
    if rows:
        _print_table(_columns(metrics, case.baseline, old), rows, out)
    for r in run.records:
        if "time_ms" not in r:
            print(f"  {r['provider']}: {'FAILED' if r['failed'] else 'n/a'} ({r['reason']})", file=out)


def _print_table(columns, rows, out):
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        _print_plain(columns, rows, out)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < 2 or name == "check" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row, style="red" if row[-1].startswith("FAIL") else None)
    # in a file or pipe nothing is cut
    console = Console(file=out, highlight=False, width=None if out.isatty() else 200)
    console.print(table)


def _print_plain(columns, rows, out):
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        cells = [c.ljust(w) if i < 2 or i == len(row) - 1 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        print("  ".join(cells).rstrip(), file=out)


def failures(records):
    """One line per failed check or crashed backend of ours."""
    lines = []
    for r in records:
        where = f"{r['op']} {r['case']} {r['dtype']} {r['provider']}"
        if r.get("failed"):
            lines.append(f"{where}: {r['reason']}")
        check = r.get("check")
        if check and not check["ok"] and r["kind"] == "ours":
            lines.append(f"{where}: error of {check['tensor']} {check['error']:.2e}, allowed {check['limit']:.2e}")
    return list(dict.fromkeys(lines))


def _slower(records):
    """Rows of ours behind their baseline, or behind a peer of the same table."""
    timed = [r for r in records if "time_ms" in r]
    for r in timed:
        if r["kind"] != "ours" or r["provider"] == "reference":
            continue
        if r["ratio"] is not None and r["ratio"] > 1:
            yield f"{r['op']} {r['case']} {r['dtype']} {r['mode']} {r['provider']}: {r['ratio']:.2f} x {r['baseline']}"
        for p in timed:
            if p["kind"] == "peer" and p["provider"] != r["baseline"] and key_of(p)[:4] + key_of(p)[5:] == key_of(r)[:4] + key_of(r)[5:]:
                value = r["time_ms"]["median"] / p["time_ms"]["median"]
                if value > 1:
                    yield f"{r['op']} {r['case']} {r['dtype']} {r['mode']} {r['provider']}: {value:.2f} x {p['provider']}"


def _different_peers(records):
    for r in records:
        if r.get("check") and not r["check"]["ok"] and r["kind"] == "peer":
            yield f"{r['op']} {r['case']} {r['dtype']} {r['provider']}: error of {r['check']['tensor']} {r['check']['error']:.1e}, so its time is no comparison"


def _changes(records, old):
    for r in records:
        before = old.get(key_of(r)) if "time_ms" in r else None
        if before and r["kind"] == "ours":
            value = r["time_ms"]["median"] / before
            if value > CHANGE_SHOWN or value < 1 / CHANGE_SHOWN:
                yield f"{r['op']} {r['case']} {r['dtype']} {r['mode']} {r['provider']}: {before:.3g} -> {r['time_ms']['median']:.3g} ms ({value:.2f} x old)"


def _bar_line(bar):
    verdict = {True: "met   ", False: "MISSED", None: "n/a   "}[bar["met"]]
    value = "" if bar["value"] is None else f": {bar['value']:.2f}"
    if "median_ratio" in bar:
        value += f"  [median {bar['median_ratio']:.2f}, fastest rounds {bar['fastest_ratio']:.2f}]"
    return f"{verdict} {bar['case']}, threads={bar['threads']}: {bar['bar']}{value}" + (f" ({bar['reason']})" if bar.get("reason") else "")


def summary(records, bars, old):
    """The closing lines: failures first, then what is slower, changed or missed."""
    sections = (
        ("FAILED", failures(records)),
        ("slower than baseline or peer", _slower(records)),
        ("peers that compute something else", _different_peers(records)),
        ("changed against the older report", _changes(records, old)),
        ("bars", map(_bar_line, bars)),
    )
    lines = [line for title, items in sections for i, item in enumerate(items) for line in ([f"\n{title}:"] * (i == 0) + [f"  {item}"])]
    checked = {key_of(r) for r in records if r.get("check") and r["kind"] == "ours"}
    return "\n".join([*lines, f"\n{len(checked)} rows of ours checked against float64, failures: {len(failures(records))}"])


def comparable(env, old_env):
    """Why two reports' times do not compare; "" if they do."""
    names = ("cpu", "device", "torch", "isa_variables")
    return "; ".join(f"{n}: {old_env.get(n)} then, {env[n]} now" for n in names if old_env.get(n) != env[n])


def write_json(path, env, records, bars):
    Path(path).write_text(json.dumps({"schema": SCHEMA, "env": env, "results": records, "bars": bars}, indent=1) + "\n")


def read_json(path):
    report = json.loads(Path(path).read_text())
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a report of this version (schema {SCHEMA}); write one with --json")
    return report


def _values(record):
    """(metric, unit, value, p20, p80) of one timed record."""
    t = record["time_ms"]
    yield "time", "ms", t["median"], t["p20"], t["p80"]
    yield "time_min", "ms", t["min"], "", ""
    if record["ratio"] is not None:
        yield "ratio", "x", record["ratio"], "", ""
    for name, unit, scale in (("bytes", "GB/s", 1e6), ("flops", "TFLOP/s", 1e9)):
        if record[name]:
            rates = [record[name] / t[k] / scale for k in ("median", "p80", "p20")]
            yield {"bytes": "bandwidth", "flops": "tflops"}[name], unit, *rates
    if "saved_bytes" in record:
        yield "saved", "B", sum(record["saved_bytes"].values()), "", ""
        yield "peak_extra", "B", record["peak_extra_bytes"], "", ""
    if record["check"]:
        yield "error", "relative", record["check"]["error"], "", ""


def write_csv(path, env, records):
    """One row per (op, case, dtype, mode, provider, metric); a provider that did not run has metric "n/a" and its reason as value."""
    isa = " ".join(f"{k}={v}" for k, v in env["isa_variables"].items())
    common = [env.get("gpu", {}).get("name", env["cpu"]), isa, env["torch"], env["mtkernels"], env["git"], env["timestamp"]]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for r in records:
            values = _values(r) if "time_ms" in r else [("n/a", "", r["reason"], "", "")]
            for metric, unit, value, p20, p80 in values:
                row = [r[k] for k in ("op", "case", "dtype", "mode", "provider", "kind")]
                writer.writerow([*row, metric, unit, value, p20, p80, r["baseline"], r["threads"], r["device"], *common])
