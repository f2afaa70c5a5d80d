"""Open a page for one or several runs in a browser: curves, samples, tokens and the machine.

Usage::

    megatron-gmpo view RUN_DIR [RUN_DIR ...] [--export page.html]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from ..command_line import Options, Positional, parse_options
from ..errors import InputError


class View(Options):
    """Serve a page for running or finished runs from the files in their run folders, until Ctrl-C.

    The command prints the page's address, which contains a secret token. Nothing in the folders is changed.
    """

    run_dirs: Annotated[tuple[Path, ...], Positional]
    """Run folders; the curves of several runs are overlaid."""
    export: Path | None = None
    """Write the page with its data to this file, which needs no server, and end."""
    host: str = "127.0.0.1"
    """Address to listen on. Others than 127.0.0.1 can be reached by whoever reaches the machine."""
    port: Annotated[int, Field(ge=0, lt=2**16)] = 0
    """Port to listen on; 0 chooses a free one."""


def main(argv: list[str]) -> None:
    options = parse_options(View, argv, "megatron-gmpo view")

    from ..view.folder import named_runs
    from ..view.page import export
    from ..view.server import serve

    runs = named_runs(options.run_dirs)
    if options.export is None:
        serve(runs, options.host, options.port)
        return
    page = export(runs)
    try:
        options.export.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"--export {options.export} cannot be written ({error.strerror}): choose another file"
        ) from None
    print(options.export)
