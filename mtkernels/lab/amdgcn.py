"""AMD machine code, from the assembly text that Triton's HIP backend keeps."""

import re

from .control_flow import Instruction

_LABEL = re.compile(r"^(\.LBB\w+):")
_INSTRUCTION = re.compile(r"^\s+((?:s|v|ds|global|buffer|scratch|flat)_\w+)\s*([^;\n]*)")
_FIGURES = (
    *("vgpr_count", "agpr_count", "sgpr_count", "vgpr_spill_count", "sgpr_spill_count"),
    *("private_segment_fixed_size", "max_flat_workgroup_size"),
)
_ENDS = ("s_branch", "s_endpgm", "s_setpc_b64")


def metadata(text):
    """Figures of the kernel's code object metadata by name, the largest over its functions.

    vgpr_count holds the accumulation registers (agpr_count) too; private_segment_fixed_size is scratch memory, in bytes a lane.
    """
    found = {key: [int(n) for n in re.findall(rf"^\s+(?:- )?\.{key}:\s+(\d+)", text, re.MULTILINE)] for key in _FIGURES}
    missing = [key for key, values in found.items() if not values]
    if missing:
        raise ValueError(f"the assembly text has no metadata {', '.join(missing)}; it must be whole, as triton leaves it in asm['amdgcn']")
    return {key: max(values) for key, values in found.items()}


def function(text):
    """(instructions, {label: index}); matrix instructions go by their class, "v_mfma" or "v_smfmac"."""
    code, labels = [], {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif match := _INSTRUCTION.match(line):
            op, operands = match.groups()
            target = operands.strip() if op == "s_branch" or op.startswith("s_cbranch") else None
            kind = next((k for k in ("v_mfma", "v_smfmac") if op.startswith(k)), op)
            code.append(Instruction(kind, target, op not in _ENDS))
    return code, labels
