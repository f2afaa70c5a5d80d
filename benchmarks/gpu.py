"""The GPU data sheets, the timing and the reports of the GPU benchmarks.

A report is a JSON file with ``tables``, which map a title to rows, and ``not_run``, the names of the parts
that did not run and why. A row maps a column's heading to a value.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_gmpo.planning.hardware import HARDWARE, Hardware

Row = dict[str, Any]

NEEDS_GPU = "needs a GPU: not run"
FAILED = "was not measured"
WARM_UP = 2


class Report:
    """The figures of one benchmark. Every change is written at once, so that a killed process keeps its rows.

    Args:
        benchmark: name of the file, without ``.json``.
        out: folder of the file; created if it does not exist.
    """

    def __init__(self, benchmark: str, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._file = out / f"{benchmark}.json"
        self.figures: dict[str, Any] = {"benchmark": benchmark, "tables": {}, "not_run": {}}

    def add(self, table: str, row: Row) -> None:
        self.figures["tables"].setdefault(table, []).append(row)
        self.write()

    def skip(self, name: str, why: str = NEEDS_GPU) -> None:
        """Record and print that the part called ``name`` does not run."""
        self.figures["not_run"][name] = why
        print(f"{name}: {why}", flush=True)
        self.write()

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Record an error of the block, so that the other parts are measured."""
        try:
            yield
        except Exception as error:
            self.skip(name, f"{FAILED}: {type(error).__name__}: {error}")

    def write(self) -> None:
        self._file.write_text(json.dumps(self.figures, indent=1))


def hardware_of(device: torch.device | str) -> Hardware:
    """Return the data sheet of the device; for a CPU or an unknown GPU, return that of an H100."""
    name = device_name(device).upper()
    return next((hardware for key, hardware in HARDWARE.items() if key.upper() in name), HARDWARE["h100"])


def device_name(device: torch.device | str) -> str:
    return torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "CPU"


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def median_seconds(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Return the median time of ``work`` over ``rounds``, after ``WARM_UP`` calls that do not count."""
    times = []
    for index in range(WARM_UP + rounds):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        if index >= WARM_UP:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Return the peak of the GPU memory that ``work`` allocates, in bytes; 0 on a CPU."""
    if device.type != "cuda":
        work()
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    wait(device)
    return torch.cuda.max_memory_allocated() - before


def markdown(rows: list[Row]) -> str:
    """Return a Markdown table of the rows, which may have different columns."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row.get(column)) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
