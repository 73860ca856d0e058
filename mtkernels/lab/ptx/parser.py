"""PTX text -> Kernel: instructions with their source lines, labels, parameters and memory symbols."""

import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import PurePath

_TYPE = re.compile(r"[usb](?:8|16|32|64|128)|f(?:16|32|64)|f16x2|bf16x2|bf16|tf32|pred|e4m3x2|e5m2x2|e4m3|e5m2")
_INSTRUCTION = re.compile(r"^(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_LABEL = re.compile(r"^([$%\w]+):(?!:)\s*")
_SYMBOL = re.compile(
    r"\.(shared|local|global|const)\s+(?:\.align\s+(\d+)\s+)?\.[busf](\d+)\s+([\w$]+)\s*(\[\s*\d*\s*\])?\s*(?:=\s*\{?([^;}]*)\}?)?\s*;"
)
_WIDTHS = {"pred": 1, "bf16": 16, "bf16x2": 32, "f16x2": 32, "tf32": 32, "e4m3x2": 16, "e5m2x2": 16, "e4m3": 8, "e5m2": 8}


def bits(ptx_type):
    """Width of a PTX type; a predicate has 1."""
    return _WIDTHS.get(ptx_type) or int(ptx_type[1:])


def unbrace(operand):
    """["%r1", "%r2"] for "{%r1, %r2}", ["%r1"] for "%r1"."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


@dataclass(frozen=True)
class Instruction:
    index: int
    op: str
    args: tuple
    guard: str | None
    negated: bool
    ptx_line: int
    source: tuple  # (file, line)
    text: str

    @cached_property
    def parts(self):
        return tuple(self.op.replace("::", ".").split("."))

    @cached_property
    def name(self):
        return self.parts[0]

    @cached_property
    def types(self):
        return tuple(p for p in self.op.split(".")[1:] if _TYPE.fullmatch(p))

    @cached_property
    def where(self):
        file, line = self.source
        text = self.text if len(self.text) <= 120 else f"{self.text[:117]}..."
        return f"{PurePath(file).name}:{line}, PTX line {self.ptx_line}: {text}"


@dataclass
class Kernel:
    name: str
    params: dict  # name -> (type, elements)
    threads: int | None
    instructions: list = field(default_factory=list)
    labels: dict = field(default_factory=dict)
    # register name without its number, e.g. "%rd" -> "b64"
    registers: dict = field(default_factory=dict)
    shared: dict = field(default_factory=dict)
    shared_bytes: int = 0
    local: dict = field(default_factory=dict)
    local_bytes: int = 0
    # .global and .const symbols -> initial bytes
    data: dict = field(default_factory=dict)

    def register_type(self, name):
        return self.registers.get(name) or self.registers.get(name.rstrip("0123456789"))


def parse(text):
    """The kernels of a PTX module, by name."""
    # Only comments outside strings matter; .file paths are kept whole.
    clean = re.sub(r"/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), text, flags=re.DOTALL)
    files = {int(n): path for n, path in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', clean, re.MULTILINE)}
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", clean))
    if not entries:
        raise ValueError("no .entry in the PTX text")
    kernels = {}
    for entry, following in zip(entries, [*entries[1:], None]):
        end = _body_end(clean, entry.end())
        limit = following.start() if following else len(clean)
        module = clean[: entries[0].start()] + clean[end:limit]
        kernels[entry.group(1)] = _kernel(entry, clean, end, module, files)
    return kernels


def _body_end(text, start):
    depth = 1
    for match in re.finditer(r"[{}]", text[start:]):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return start + match.start()
    raise ValueError("unbalanced braces in the PTX text")


def _kernel(entry, text, end, module, files):
    name, params, directives = entry.groups()
    kernel = Kernel(name, _params(params), _threads(directives))
    body = text[entry.end() : end]
    _symbols(kernel, module + body)
    for kind, names in re.findall(r"\.reg\s+\.(\w+)\s+([^;]+);", body):
        for register in names.split(","):
            kernel.registers[re.sub(r"<\d+>", "", register.strip())] = kind
    _instructions(kernel, body, 1 + text.count("\n", 0, entry.end()), files)
    return kernel


def _params(text):
    found = {}
    for param in filter(None, (p.strip() for p in text.split(","))):
        kind = re.search(r"\.([busf]\d+)", param).group(1)
        name, elements = re.search(r"([\w$]+)(?:\[(\d+)\])?$", param).groups()
        found[name] = (kind, int(elements or 1))
    return found


def _threads(directives):
    match = re.search(r"\.(?:req|max)ntid\s+([\d,\s]+)", directives)
    if not match:
        return None
    product = 1
    for n in match.group(1).split(","):
        product *= int(n)
    return product


def _symbols(kernel, text):
    # Extern (unsized) shared memory starts after all sized symbols.
    for space, align, width, name, size, init in sorted(_SYMBOL.findall(text), key=lambda s: s[4].strip("[] ") == "" and s[4] != ""):
        align, elements = int(align or 1), int(size.strip("[] ") or 0) if size else 1
        if space in ("global", "const"):
            values = [int(v, 0) for v in re.findall(r"-?\w+", init)] if init else []
            step = int(width) // 8
            raw = b"".join((v % (1 << int(width))).to_bytes(step, "little") for v in values)
            kernel.data[name] = raw.ljust(max(1, elements) * step, b"\0")
            continue
        table = kernel.shared if space == "shared" else kernel.local
        total = kernel.shared_bytes if space == "shared" else kernel.local_bytes
        table[name] = -(-total // align) * align
        total = table[name] + elements * int(width) // 8
        if space == "shared":
            kernel.shared_bytes = total
        else:
            kernel.local_bytes = total


def _statements(body, first_line):
    """(PTX line, statement): instructions, directives, labels, braces of nested scopes and marks around inline asm."""
    pending, start = "", first_line
    for number, line in enumerate(body.split("\n"), first_line):
        line, _, comment = line.partition("//")
        if "inline asm" in comment:
            yield number, "//" + comment.split()[0]
        line = line.strip()
        if re.match(r"\.(loc|file|pragma)\s", line):
            yield number, line.rstrip(";")
            continue
        for piece in re.findall(r"[^;]+;|[^;]+$", line):
            if not pending:
                start = number
            pending = f"{pending} {piece}".strip()
            while match := _LABEL.match(pending) or re.match(r"[{}]\s*", pending):
                yield number, match.group().strip()
                pending = pending[match.end() :]
            if pending.endswith(";"):
                yield start, pending[:-1].strip()
                pending = ""


def _instructions(kernel, body, first_line, files):
    source, in_asm, scopes, opened, branches = ("", 0), False, (), 0, []
    for number, statement in _statements(body, first_line):
        if statement.startswith("//"):
            in_asm = statement == "//begin"
        elif statement in "{}":
            # Inline asm may reuse a label name in every scope.
            opened += 1
            scopes = (*scopes, opened) if statement == "{" else scopes[:-1]
        elif statement.startswith((".loc ", ".loc\t")):
            file, line = statement.split()[1:3]
            # LLVM counts the lines inside an asm block as if they were source lines; line 0 is code of no line.
            if not in_asm and line != "0":
                source = files.get(int(file), ""), int(line)
        elif label := _LABEL.match(statement):
            kernel.labels[(*scopes, label.group(1))] = len(kernel.instructions)
        elif match := _INSTRUCTION.match(statement):
            negated, guard, op, args = match.groups()
            if op.startswith("bra") and op.split(".")[0] == "bra":
                branches.append((len(kernel.instructions), scopes))
            text = " ".join(statement.split())
            kernel.instructions.append(
                Instruction(len(kernel.instructions), op, tuple(_split(args)), guard, negated == "!", number, source, text)
            )
    for index, scopes in branches:
        i = kernel.instructions[index]
        visible = ((*scopes[:depth], i.args[-1]) for depth in range(len(scopes), -1, -1))
        kernel.instructions[index] = replace(i, args=(next(v for v in visible if v in kernel.labels),))


def _split(args):
    """Operands at the outer level of braces, brackets and parentheses."""
    found, depth, current = [], 0, ""
    for c in args:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            found.append(current.strip())
            current = ""
        else:
            current += c
    return [*found, current.strip()] if current.strip() else found
