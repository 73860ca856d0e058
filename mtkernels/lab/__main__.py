"""python -m mtkernels.lab TOOL: the lab's tools from the command line."""

import argparse
import sys
from importlib import import_module

# Tool -> module with SUMMARY, add_arguments(parser) and run(args) -> exit status.
TOOLS = {"resources": "cli_resources"}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m mtkernels.lab", description="GPU kernels on a machine without a GPU: see docs/lab.md")
    tools = parser.add_subparsers(dest="tool", required=True)
    for name, home in TOOLS.items():
        module = import_module(f".{home}", __package__)
        tool = tools.add_parser(name, help=module.SUMMARY, description=module.__doc__)
        module.add_arguments(tool)
        tool.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
