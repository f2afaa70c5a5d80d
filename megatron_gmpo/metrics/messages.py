"""Set up the messages that this package and the libraries print in a run."""

from __future__ import annotations

import logging
import os
import sys
import warnings

import datasets
import huggingface_hub
import transformers

from ..errors import printable


def set_up_messages() -> None:
    """Show this package's log lines on rank 0 only, and the libraries' progress bars in its terminal only."""
    first = os.environ.get("RANK", "0") == "0"
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableLines("%(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("megatron_gmpo").setLevel(logging.INFO if first else logging.WARNING)
    # Megatron uses deprecated names of torch.distributed.checkpoint
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron\.core|torch\.distributed")
    if not first or not sys.stderr.isatty():  # a bar in a file is a line for each of its states
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()
        huggingface_hub.utils.disable_progress_bars()


class PrintableLines(logging.Formatter):
    """Format log records without control characters; the lines of a traceback stay apart."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))
