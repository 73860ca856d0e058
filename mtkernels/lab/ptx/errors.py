"""What the emulator raises: mistakes of a kernel, and limits of the emulator."""


class Finding(RuntimeError):
    """A mistake of the kernel: what happened, and where in the PTX text and in its source."""

    def __init__(self, kind, kernel, instruction, detail=""):
        self.kind, self.kernel, self.instruction, self.detail = kind, kernel, instruction, detail
        super().__init__(f"{kernel}: {kind}{': ' + detail if detail else ''}\n  at {instruction.where}")


class Unsupported(NotImplementedError):
    """The kernel uses something that the emulator does not model."""

    def __init__(self, instruction, why="the emulator does not know this instruction"):
        self.instruction = instruction
        super().__init__(f"{why}\n  at {instruction.where}")
