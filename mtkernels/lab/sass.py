"""NVIDIA machine code: what a cubin takes, its instructions and how long each holds its warp's issue slot."""

import re
import subprocess
import tempfile
from pathlib import Path

from .control_flow import Instruction

SPILLS = ("LDL", "STL")
TMA = ("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP")

_FUNCTION = re.compile(r"^\.text\.(\S+):")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(\.\S+)?\s*(.*?);\s*/\* 0x[0-9a-f]{16} \*/")
_UPPER_HALF = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
_JUMP = re.compile(r"^(.*?)`\((\.L_x_\d+)\)")
# Bits 105..108 of an instruction's 128: cycles until the warp may issue its next one.
_STALL_SHIFT = 105 - 64
_LONGEST_POLL = 16
_GLOBAL_LOADS = ("LDG", "LDGSTS")
_SHARED_ACCESSES = ("LDS", "LDSM", "STS", "STSM", "LDGSTS")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
# Memory accesses, in part.
_WORK = ("LDG", "LDS", "LDT", "STG", "STS", "STT", "RED", "ATOM", "UTM", "UBLK")


def disassemble(cubin):
    """({"REG", "STACK", ...: largest over the functions}, SASS text) by the binary utilities that come with triton."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if not (tools / "cuobjdump").exists():
        raise RuntimeError(f"cuobjdump is not in {tools}; install a triton wheel with the NVIDIA backend")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, text = (
            subprocess.run([tools / tool, *options, file.name], capture_output=True, text=True, check=True).stdout
            for tool, *options in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-hex", "-c"))
        )
    figures = {}
    for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage):
        figures[key] = max(figures.get(key, 0), int(value))
    return figures, text


def functions(text):
    """[(instructions, {label: index})] of every function in the text of `nvdisasm -hex -c`."""
    found, waiting = [], None
    for line in text.splitlines():
        if _FUNCTION.match(line):
            found.append(([], {}))
        elif not found:
            continue
        elif label := _LABEL.match(line):
            code, labels = found[-1]
            labels[label[1]] = len(code)
        elif match := _INSTRUCTION.match(line):
            waiting = match
        elif waiting and (upper := _UPPER_HALF.match(line)):
            found[-1][0].append(_instruction(waiting, int(upper[1], 16) >> _STALL_SHIFT & 15))
            waiting = None
    return found


def _instruction(match, stall):
    guard, op, modifiers, operands = match.groups()
    jump = _JUMP.match(operands) if op == "BRA" else None
    # A predicate among the operands makes a branch conditional as well; so does divergence.
    conditional = bool(guard) or bool(jump and jump[1].strip()) or "DIV" in (modifiers or "")
    ends = op in ("BRA", "EXIT", "RET") and not conditional
    # ptxas sets loads that never happen between real ones.
    width = 0 if (guard or "").strip() == "@!PT" else _width(op, modifiers or "")
    loaded, shared = width * (op in _GLOBAL_LOADS), width * (op in _SHARED_ACCESSES)
    return Instruction(op, jump[2] if jump else None, not ends, max(stall, 1), loaded, shared)


def _width(op, modifiers):
    """Bytes a lane of a memory access moves; a matrix of LDSM and STSM is 8x8 elements of 16 bits, 4 bytes a lane."""
    parts = modifiers.split(".")
    if op in ("LDSM", "STSM"):
        return 4 * int(parts[-1]) if parts[-1] in ("2", "4") else 4
    return next((_WIDTHS[part] for part in parts if part in _WIDTHS), 4)


def is_poll(body):
    """Whether a loop only waits for a barrier: short, and neither memory nor tensor cores are in it."""
    ops = {instruction.op for instruction in body}
    works = any("MMA" in op or op.startswith(_WORK) for op in ops)
    return len(body) <= _LONGEST_POLL and bool(ops & {"SYNCS", "NANOSLEEP"}) and not works


def threads(ptx):
    """Threads of a block, those of specialised warps included."""
    return int(re.search(r"\.(?:req|max)ntid\s+(\d+)", ptx)[1])
