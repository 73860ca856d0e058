"""python -m mtkernels.lab COMMAND: run, check and count the package's kernels on a machine without a GPU."""

import argparse
import os
import subprocess
import sys
from importlib import import_module

# Each module has add_arguments(parser) and run(args) -> exit status; needs_interpreter(args) where it may need Triton's.
COMMANDS = {
    "resources": ("cli_resources", "registers, spills, shared memory and tensor-core instructions of each kernel, per GPU"),
    "tune": ("cli_tune", "tile configurations of a kernel, ranked by their machine code; --write keeps the best"),
    "cost": ("cli_cost", "launches, bytes and FLOPs of each op against what it needs at least, beside its peers"),
    "run": ("cli_run", "each op forward and backward against float64, with the counters of every launch"),
    "races": ("cli_races", "each op in several orders of programs or threads: findings, and the same bits"),
}
NOTE = "Nothing here is a time."


def parser(command):
    """The parser of one command; without one, that of the list of commands."""
    p = argparse.ArgumentParser(f"python -m mtkernels.lab {command or ''}".strip(), formatter_class=argparse.RawDescriptionHelpFormatter)
    if command:
        module = _module(command)
        p.description, p.epilog = module.__doc__, NOTE
        module.add_arguments(p)
    else:
        width = max(map(len, COMMANDS))
        p.description = __doc__
        p.epilog = "\n".join(["commands:", *(f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()), "", NOTE])
        p.add_argument("command", choices=COMMANDS, help="see below; COMMAND --help for its options")
    return p


def _module(command):
    return import_module(f".{COMMANDS[command][0]}", __package__)


def _in_other_process(arguments, interpret):
    """Triton reads TRITON_INTERPRET when it is imported, so a command that needs the other value gets its own process."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    return subprocess.run([sys.executable, "-m", "mtkernels.lab", *arguments], env=environment).returncode


def main(arguments=None):
    """Run a command; returns the exit status: 0, 1 for findings or wrong results, 2 for a call that makes no sense."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command = arguments[0] if arguments and arguments[0] in COMMANDS else None
    if command is None:
        parser(None).parse_args(arguments)
    p, module = parser(command), _module(command)
    args = p.parse_args(arguments[1:])
    interpret = getattr(module, "needs_interpreter", lambda args: False)(args)
    if interpret != (os.environ.get("TRITON_INTERPRET", "0") == "1"):
        return _in_other_process(arguments, interpret)
    try:
        return module.run(args)
    except ValueError as error:
        p.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
