"""PNG from a report: one figure per op, one panel per case, dtype and mode. The slow reference is left out."""

from pathlib import Path

COLORS = {"ours": "#2a6fbb", "peer": "#b8b8b8", "part": "#e0c080"}
LABELS = {"ours": "mtkernels", "peer": "peer", "part": "part or floor"}


def plot(records, env, folder):
    """Write <folder>/<op>.png for every op with timed records; returns the paths. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    records = [r for r in records if "time_ms" in r and (r["provider"] != "reference" or not _has_kernel(r, records))]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for op in dict.fromkeys(r["op"] for r in records):
        panels = {}
        for r in records:
            if r["op"] == op:
                panels.setdefault((r["case"], r["dtype"], r["mode"]), []).append(r)
        n_columns = min(len(panels), 2)
        n_rows = -(-len(panels) // n_columns)
        tallest = max(map(len, panels.values()))
        figure = Figure(figsize=(6.2 * n_columns, (0.9 + 0.34 * tallest) * n_rows + 0.6), layout="constrained")
        axes = figure.subplots(n_rows, n_columns, squeeze=False).flat
        for axis, (panel, rows) in zip(axes, panels.items()):
            _panel(axis, panel, rows)
        for axis in list(axes)[len(panels) :]:
            axis.set_visible(False)
        figure.suptitle(f"{op}: median, p20..p80 ({env.get('gpu', {}).get('name', env['cpu'])}, torch {env['torch']})", fontsize=10)
        figure.legend(handles=[Patch(color=COLORS[k], label=LABELS[k]) for k in COLORS], loc="outside lower center", ncols=3, fontsize=8, frameon=False)
        paths.append(folder / f"{op}.png")
        FigureCanvasAgg(figure).print_png(paths[-1])
    return paths


def _has_kernel(record, records):
    return any(r["kind"] == "ours" and r["provider"] != "reference" and r["op"] == record["op"] and "time_ms" in r for r in records)


def _panel(axis, panel, rows):
    times = [r["time_ms"] for r in rows]
    medians = [t["median"] for t in times]
    spread = [[t["median"] - t["p20"] for t in times], [t["p80"] - t["median"] for t in times]]
    positions = range(len(rows))
    axis.barh(positions, medians, xerr=spread, color=[COLORS[r["kind"]] for r in rows], ecolor="#444444", capsize=2, height=0.7)
    axis.set_yticks(positions, [r["provider"] for r in rows], fontsize=8)
    axis.invert_yaxis()
    for y, r in zip(positions, rows):
        ratio = "" if r["ratio"] is None else f"  {r['ratio']:.2f} x {r['baseline']}"
        axis.annotate(f"{r['time_ms']['median']:.3g} ms{ratio}", (r["time_ms"]["p80"], y), (4, 0), textcoords="offset points", va="center", fontsize=7)
    axis.set_xlim(0, 1.5 * max(t["p80"] for t in times))
    axis.set_title(", ".join(panel) + f", {rows[0]['threads']} threads", fontsize=9)
    axis.set_xlabel("ms", fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
