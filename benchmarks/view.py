"""Time until the page of ``megatron-gmpo view`` shows curves in headless Chromium, and the server's memory.

Usage::

    python -m benchmarks.view

One folder has 10,000 steps, the other 90 MB of transcripts beside them. The time is from the request for the
page to its first chart, after the server has printed its address.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from playwright.sync_api import sync_playwright

from megatron_gmpo.batch.samples import Prompt, Sample, SampleGroup
from megatron_gmpo.rollout.replay import append_transcripts
from tests.support.view_runs import write_run

STEPS = 10_000
TRANSCRIPTS_MB = 90


def main() -> None:
    with tempfile.TemporaryDirectory() as made, sync_playwright() as started:
        long = write_run(Path(made) / "long", STEPS)
        large = Path(made) / "large"
        shutil.copytree(long, large)
        add_transcripts(large / "transcripts.jsonl")
        browser = started.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox"]
        )
        for folder in (long, large):
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            command = [sys.executable, "-m", "megatron_gmpo", "view", str(folder)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
                assert server.stdout
                address = server.stdout.readline().strip()
                idle = psutil.Process(server.pid).memory_info().rss
                page = browser.new_page()
                start = time.perf_counter()
                page.goto(address)
                page.wait_for_selector(".panel canvas")
                seconds = time.perf_counter() - start
                grown = psutil.Process(server.pid).memory_info().rss - idle
                page.close()
                server.terminate()
            print(f"{folder.name}: {size / 1e6:.0f} MB, page {seconds:.2f} s, memory +{grown / 1e6:.0f} MB")
        browser.close()


def add_transcripts(path: Path) -> None:
    """Append groups of eight responses of 1500 words until the file has ``TRANSCRIPTS_MB``."""
    samples = [
        Sample.from_response(
            [1], [2], [0.0], text="word " * 1500, finish_reason="stop", policy_version=0, reward=float(i % 2)
        )
        for i in range(8)
    ]
    groups = {n: SampleGroup(Prompt(f"p{n}", "1", "What?"), samples) for n in range(4)}
    step = 0
    while path.stat().st_size < TRANSCRIPTS_MB * 1e6:
        step += 1
        append_transcripts(path, step, groups, 4)


if __name__ == "__main__":
    main()
