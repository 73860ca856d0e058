"""What the emulator and the sanitizers said, as findings with source lines."""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """A mistake in a kernel. file and line are None where no line is to blame; related: other lines involved."""

    kind: str
    file: str | None
    line: int | None
    message: str
    tool: str
    related: tuple = ()

    def __str__(self):
        where = f"{self.file}:{self.line}: " if self.file else ""
        also = f" (also {', '.join(self.related)})" if self.related else ""
        return f"{where}{self.kind}: {self.message}{also} [{self.tool}]"


class Lines:
    """Source lines of addresses in one kernel library; the emulator's own lines count as none."""

    def __init__(self, library):
        self.library = str(library.path)
        self.sources = {s for s in library.sources if "/csrc/emulator/" not in s and not s.endswith("/csrc/cuda/gpu.h")}
        self.known = {}

    def look_up(self, places):
        """Resolve many (library, offset) at once; TSan gives the library's name without its folder."""
        ours = {offset for library, offset in places if Path(library).name == Path(self.library).name}
        new = sorted(ours - self.known.keys())
        if not new:
            return
        command = ["addr2line", "-a", "-i", "-e", self.library, *map(hex, new)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        chunks = re.split(r"^0x[0-9a-f]+\n", text, flags=re.M)[1:]
        self.known.update({offset: self._first_of_ours(chunk) for offset, chunk in zip(new, chunks)})

    def _first_of_ours(self, inlined):
        for frame in inlined.splitlines():
            file, _, line = frame.split(" (")[0].rpartition(":")
            file = os.path.realpath(file)
            if file in self.sources and line.isdigit():
                return file, int(line)
        return None

    def first(self, places):
        """(file, line) of the first of `places` that is in the user's sources, or None."""
        self.look_up(places)
        ours = (offset for library, offset in places if Path(library).name == Path(self.library).name)
        return next((self.known[offset] for offset in ours if self.known[offset]), None)


def emulator_findings(reports, lines, tool):
    """reports: (kind, message, [(library, offset), ...]), the guilty address first."""
    for kind, message, places in reports:
        at = [place for p in places if (place := lines.first([p]))]
        yield _finding(kind, message, at, tool)


def sanitizer_findings(text, lines, tool):
    """Findings in the standard error of a sanitized run; each place once."""
    parse = {"asan": _parse_asan, "tsan": _parse_tsan}[tool]
    seen = {}
    for kind, message, at in parse(text, lines):
        finding = _finding(kind, message, at, tool)
        seen.setdefault((finding.kind, finding.file, finding.line, finding.related), finding)
    return list(seen.values())


def _finding(kind, message, at, tool):
    file, line = at[0] if at else (None, None)
    related = dict.fromkeys(f"{f}:{n}" for f, n in at[1:] if (f, n) != (file, line))
    return Finding(kind, file, line, message, tool, tuple(related))


def _frames(text):
    return [(library, int(offset, 16)) for library, offset in re.findall(r"^\s+#\d+ .*\((\S+?)\+(0x[0-9a-f]+)\)", text, re.M)]


ASAN_KINDS = {"heap-buffer-overflow": "out-of-bounds", "SEGV": "out-of-bounds", "heap-use-after-free": "out-of-bounds"}
UBSAN_KINDS = (
    ("misaligned address", "misaligned-access"),
    ("integer overflow", "integer-overflow"),
    ("out of bounds", "out-of-bounds"),
)


def _parse_asan(text, lines):
    ubsan = r"^(\S+?):(\d+):\d+: runtime error: (.+)\n((?:(?!.*runtime error:)\s+#\d+.*\n)*)"
    for file, line, message, stack in re.findall(ubsan, text, re.M):
        kind = next((kind for words, kind in UBSAN_KINDS if words in message), "undefined-behaviour")
        place = lines.first(_frames(stack)) or (file, int(line))
        yield kind, message, [place]
    for kind, rest in re.findall(r"ERROR: AddressSanitizer: (\S+)(.*)", text, re.S)[:1]:
        access = re.search(r"^(READ|WRITE) of size (\d+)", rest, re.M)
        region = re.search(r"is located (\d+ bytes .+? of \d+-byte region)", rest)
        said = [f"{access[1].lower()} of {access[2]} bytes" if access else kind, region[1] if region else ""]
        stack = rest.split("\n\n")[0]
        place = lines.first(_frames(stack))
        yield ASAN_KINDS.get(kind, kind), ", ".join(filter(None, said)), [place] if place else []


def _parse_tsan(text, lines):
    for report in re.findall(r"WARNING: ThreadSanitizer: (.+?)={10}", text, re.S):
        kind = report.split(" (")[0].strip().replace(" ", "-")
        sections = re.findall(r"^  (?i:(?:previous )?(?:atomic )?(read|write) of size (\d+)).*\n((?:    #.*\n)*)", report, re.M)
        at = [place for *_, stack in sections if (place := lines.first(_frames(stack)))]
        message = " against ".join(f"{access.lower()} of {size} bytes" for access, size, _ in sections)
        yield kind, message or report.splitlines()[0], at
