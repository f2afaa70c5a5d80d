"""Make the pictures of docs/view.md and docs/tutorial.md with headless Chromium.

Usage::

    python docs/pictures.py RUN_DIR [view|tutorial]

RUN_DIR is a run with ``log.tokens_per_step`` above 0. The pictures are written to docs/pictures/.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from megatron_gmpo.commands.view import main as view

FOLDER = Path(__file__).with_name("pictures")
SIZE = {"width": 1200, "height": 720}


def main(run_dir: str, page_of: str = "view") -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as made, sync_playwright() as started:
        exported = Path(made) / "page.html"
        view([run_dir, "--export", str(exported)])
        browser = started.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox"]
        )
        page = browser.new_page(viewport=SIZE)
        page.goto(exported.as_uri())
        page.wait_for_selector(".panel canvas")
        take(page, page_of, "curves")
        for name in ("Samples", "Machine", "Tokens"):
            page.get_by_role("tab", name=name).click()
            if name != "Machine":  # the first step has right and wrong responses, and large ratios
                page.get_by_label("Step", exact=True).fill("1")
                page.get_by_label("Step", exact=True).press("Enter")
            page.wait_for_timeout(300)
            take(page, page_of, name.lower())
        page.locator("#worst tr.pick").first.click()
        page.locator(".tokens span.pinned").hover()
        take(page, page_of, "sample_tokens")
        browser.close()


def take(page: Any, page_of: str, name: str) -> None:
    """Write a picture with 64 colours, which is a third of the size."""
    file = FOLDER / f"{page_of}_{name}.png"
    page.screenshot(path=file)
    Image.open(file).convert("RGB").quantize(64).save(file, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
