"""Aligned text tables and JSON reports of the lab's commands."""

import json
from pathlib import Path


def table(columns, rows, left=1):
    """Text of rows under columns; a column's name may have several lines. The first `left` columns are flush left."""
    heads = [name.split("\n") for name in columns]
    depth = max(map(len, heads))
    lines = [[head[i - depth + len(head)] if i >= depth - len(head) else "" for head in heads] for i in range(depth)]
    lines += [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    padded = ((c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))) for line in lines)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


def significant(value, digits=3):
    """A number in plain notation: 3 digits, or every digit before the point."""
    if value is None:
        return ""
    if not value:
        return "0"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    text = f"{value:.{max(0, digits - whole)}f}"
    return text if float(text) else f"{value:.1e}"


def write_json(path, command, **content):
    """The report of a command: its name, versions, and `content`."""
    import torch

    from .. import __version__

    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    head = {"schema": 1, "command": command, "mtkernels": __version__, "torch": torch.__version__, "triton": triton}
    Path(path).write_text(json.dumps({**head, **content}, indent=1) + "\n")
