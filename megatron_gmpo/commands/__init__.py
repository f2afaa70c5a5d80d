"""The commands: ``megatron-gmpo NAME``, ``python -m megatron_gmpo NAME`` or ``python tools/NAME.py``.

Each command is a module of this package with a function ``main(argv)``. ``megatron-gmpo --help`` shows the
first line of its docstring. No command is imported for the list, so the list appears immediately.
"""

from __future__ import annotations

import ast
import difflib
import runpy
import sys
from importlib import import_module
from pathlib import Path

NAMES = (
    "train",
    "torchrun",
    "evaluate",
    "lab",
    "plan",
    "watch",
    "view",
    "plot_metrics",
    "mismatch",
    "serve",
    "slurm_attempt",
    "convert_hf_to_megatron",
    "convert_megatron_to_hf",
    "inspect_checkpoint",
    "export_quantized",
    "push",
    "demo",
    "make_tiny_model",
    "alfworld",
    "arithmetic",
    "countdown",
    "geometry",
    "household",
    "textworld",
    "warm_up",
)


def main() -> None:
    """Run the command that ``sys.argv`` names, or list the commands."""
    name, *argv = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
    else:
        run(name, argv)


def run(name: str, argv: list[str] | None = None) -> None:
    """Run a command. A ``RunError`` ends the process with one line and its exit code.

    Args:
        name: name of the command, with dashes or underscores.
        argv: arguments after the name; None means ``sys.argv[1:]``.
    """
    from ..command_line import one_line_errors
    from ..errors import InputError

    with one_line_errors():
        command = name.replace("-", "_")
        if command not in NAMES:
            nearest = difflib.get_close_matches(command, NAMES, n=1, cutoff=0.0)[0]
            raise InputError(f"unknown command {name!r}: did you mean {nearest!r}? --help lists all")
        import_module(f".{command}", __package__).main(sys.argv[1:] if argv is None else argv)


def run_module(module: str, argv: list[str]) -> None:
    """Run ``python -m module argv ...`` in this process."""
    sys.argv[1:] = argv
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _help() -> str:
    width = max(map(len, NAMES))
    lines = [f"  {name:<{width}}  {_about(name)}" for name in NAMES]
    return "\n".join(
        [
            "usage: megatron-gmpo COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "megatron-gmpo COMMAND --help explains a command. Under torchrun: torchrun ... -m megatron_gmpo "
            "COMMAND [OPTIONS]",
        ]
    )


def _about(name: str) -> str:
    """Return the first line of a command's docstring without importing the command."""
    source = Path(__file__).with_name(f"{name}.py").read_text()
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0].rstrip(".")
