"""An emulator for compiled GPU code: PTX is translated to numpy once per kernel and executed for many blocks at a time."""

from .errors import Finding, Unsupported
from .machine import Program
from .memory import GlobalMemory

__all__ = ["Finding", "GlobalMemory", "Program", "Unsupported"]
