"""Run everything that needs a GPU, in order of worth, in less than nine minutes on one H200.

Run: benchmarks/gpu_campaign.sh OUT [--dry-run]

Each part is a process with its own time limit. A part that fails or is too slow does not stop the others, and
its finished rows are kept. OUT receives, after every part:

campaign.json   all figures, and the outcome and time of every part
tables.md       the same as tables; they are also printed at the end
log.txt         everything that the parts printed
kernels.txt     torch.profiler's tables of a training step

The dry run uses tiny sizes on the CPU, where time limits are those of a loaded machine. What needs a GPU then
prints "needs a GPU: not run". The exit code is 1 if a part failed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

from benchmarks.gpu import FAILED, Row, markdown
from megatron_gmpo.command_line import Options, Positional, one_line_errors, parse_options

ROOT = Path(__file__).parents[1]
TESTS = " ".join(f"tests/gpu/test_{name}.py" for name in ("logprobs", "policy", "fp8", "rollouts"))
DRY_RUN_S = 200
"""Time limit of a part in a dry run."""
TINY_MODEL = (
    "--layers 1 --hidden 64 --experts 4 --vocab 128 --length 16 --sequences 2 --max_tokens 32 --steps 1"
)


@dataclass(frozen=True)
class Part:
    """A process of the campaign.

    Attributes:
        name: heading of its tables.
        seconds: time limit.
        command: module and arguments after ``python -m``.
        tiny: arguments added in a dry run; None for pytest, whose tests skip themselves without a GPU.
    """

    name: str
    seconds: int
    command: str
    tiny: str | None

    def argv(self, folder: Path, dry_run: bool) -> list[str]:
        argv = [sys.executable, "-m", *self.command.split()]
        if self.tiny is None:
            return argv
        return argv + ["--out", str(folder)] + (["--device", "cpu", *self.tiny.split()] if dry_run else [])


PARTS = (
    Part("machine", 25, "benchmarks.gpu_machine", "--copied 1000 --width 64 --rounds 1"),
    Part("tests", 150, f"pytest -v -m gpu -o timeout=60 -p no:cacheprovider --tb=short {TESTS}", None),
    Part(
        "training step",
        180,
        "benchmarks.gpu_step --recipes bf16 blockwise tensorwise delayed",
        TINY_MODEL,
    ),
    Part(
        "log probabilities",
        60,
        "benchmarks.gpu_logprobs",
        "--tokens 40 --hidden 32 --vocab 100 --chunks 8 32 --checked 16 --rounds 1",
    ),
    Part(
        "weight sync",
        40,
        "benchmarks.gpu_sync",
        "--tensors 3 --rows 4 --columns 8 --bucket_bytes 100 --rounds 1",
    ),
    Part("memory", 60, "benchmarks.gpu_memory", TINY_MODEL),
)


class Campaign(Options):
    """Run everything that needs a GPU, in less than nine minutes; see the module's docstring."""

    out: Annotated[Path, Positional]
    """Folder that receives tables, figures and the log."""
    dry_run: bool = False
    """Run every part with tiny sizes on the CPU."""


def run(part: Part, folder: Path, log: IO[str], dry_run: bool) -> Row:
    """Run a part and return its row of the summary; its process group ends with it."""
    log.write(f"\n===== {part.name}: {part.command}\n")
    log.flush()
    limit = DRY_RUN_S if dry_run else part.seconds
    started = time.monotonic()
    process = subprocess.Popen(
        part.argv(folder, dry_run),
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        code = process.wait(limit)
        outcome = "done" if code == 0 else f"failed, exit code {code}"
    except subprocess.TimeoutExpired:
        outcome = f"stopped after {limit} s"
    finally:
        _kill(process)
    return {"part": part.name, "outcome": outcome, "s": time.monotonic() - started, "limit s": limit}


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the process and of its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def outcomes_of_tests(output: str) -> list[Row]:
    """Return one row for every outcome of pytest's ``-v`` lines, with the tests that did not pass."""
    found = re.findall(r"^(tests/\S+?\.py)::(.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", output, re.MULTILINE)
    counts = Counter((file, outcome) for file, _, outcome in found)
    rows = [{"tests": file, "outcome": outcome, "count": count} for (file, outcome), count in counts.items()]
    rows += [
        {"tests": f"{file}::{name}", "outcome": outcome}
        for file, name, outcome in found
        if outcome in ("FAILED", "ERROR")
    ]
    return rows


def figures_of(part: Part, folder: Path, output: str) -> dict[str, Any]:
    """Return the tables of a part, also of one that was stopped."""
    if part.tiny is None:
        skipped = re.findall(r"^SKIPPED \[(\d+)\] (\S+): (.+)$", output, re.MULTILINE)
        return {
            "tables": {part.name: outcomes_of_tests(output)},
            "not_run": {f"{count} tests, {place}": why for count, place, why in skipped},
        }
    files = list(folder.glob("*.json"))
    return json.loads(files[0].read_text()) if files else {"tables": {}, "not_run": {}}


def tables_of(campaign: dict[str, Any]) -> str:
    sections = [f"# GPU campaign\n\n{markdown(campaign['parts'])}"]
    not_run: dict[str, str] = {}
    for figures in campaign["figures"].values():
        for title, rows in figures["tables"].items():
            sections.append(f"## {title}\n\n{markdown(rows)}")
        not_run |= figures["not_run"]
    if not_run:
        lines = "\n".join(f"- {name}: {why}" for name, why in not_run.items())
        sections.append(f"## Not run\n\n{lines}")
    return "\n\n".join(sections) + "\n"


def main(options: Campaign) -> int:
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    campaign: dict[str, Any] = {"dry_run": options.dry_run, "parts": [], "figures": {}}
    kernels = ""
    with tempfile.TemporaryDirectory() as work, (out / "log.txt").open("w+") as log:
        for index, part in enumerate(PARTS):
            folder, start = Path(work) / str(index), log.tell()
            row = run(part, folder, log, options.dry_run)
            log.seek(start)
            output = log.read()
            figures = figures_of(part, folder, output)
            failures = sum(FAILED in why for why in figures["not_run"].values())
            if row["outcome"] == "done" and failures:
                row["outcome"] = f"done, but {failures} of its measurements failed"
            campaign["parts"].append(row)
            campaign["figures"][part.name] = figures
            print(f"{row['part']}: {row['outcome']}, {row['s']:.0f} s", flush=True)
            (out / "campaign.json").write_text(json.dumps(campaign, indent=1))
            (out / "tables.md").write_text(tables_of(campaign))
            for file in sorted(folder.glob("kernels_*.txt")):
                kernels += f"{file.stem}\n{file.read_text()}\n"
            (out / "kernels.txt").write_text(kernels)
    print(tables_of(campaign))
    return int(any(row["outcome"] != "done" for row in campaign["parts"]))


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(parse_options(Campaign, sys.argv[1:], "benchmarks/gpu_campaign.sh")))
