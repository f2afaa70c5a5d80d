"""The page of ``megatron-gmpo view`` in headless Chromium, which playwright drives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_gmpo.metrics.token_records import Record

from ..support.view_runs import (
    MARKUP,
    add_episodes,
    add_heartbeat,
    add_pictures,
    add_samples,
    add_steps,
    write_run,
)

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make install")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium is found: apt-get install --no-install-recommends chromium"
)
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright.expect.set_options(timeout=1000 * TIMEOUT_S)
    with playwright.sync_playwright() as started:
        # Chromium's sandbox does not start for root
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = started.chromium.launch(executable_path=BROWSER, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """Return a tab that fails the test if a script fails, the policy refuses something or a request fails."""
    context = browser.new_context(viewport={"width": 1300, "height": 900})
    context.set_default_timeout(1000 * TIMEOUT_S)
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    yield page
    context.close()
    # a test may end its server while the page still asks for news
    assert [line for line in wrong if "ERR_CONNECTION_REFUSED" not in line] == []


@contextmanager
def viewed(*folders: Path) -> Iterator[str]:
    """Run ``megatron-gmpo view`` on folders and yield the address that it prints."""
    command = [sys.executable, "-m", "megatron_gmpo", "view", *map(str, folders)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        yield server.stdout.readline().strip()
    finally:
        server.terminate()
        server.wait(timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Return the folder of a finished run of 40 steps and the address of its page."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "finished", 40)
    with viewed(folder) as address:
        yield folder, address


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def text_of(page: Any, selector: str) -> str:
    return page.locator(selector).first.inner_text()


def test_a_finished_run(finished: tuple[Path, str], page: Any) -> None:
    folder, address = finished
    page.goto(address)
    playwright.expect(page.locator("header")).to_contain_text("step 40 of 40")
    playwright.expect(page.locator(".panel")).to_have_count(18)
    playwright.expect(page.locator(".panel canvas").first).to_be_visible()
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{last['policy/entropy']:.4g}" in text_of(page, ".panel:has(h3:text('Policy entropy'))")
    assert "math500/pass@1" in text_of(page, ".panel:has(h3:text('Evaluation'))")
    page.get_by_label("Smoothing").fill("50")
    page.get_by_label("log scale").check()
    playwright.expect(page.locator(".panel canvas")).to_have_count(18)
    tab(page, "Machine")
    playwright.expect(page.locator("main")).to_contain_text("exit 0: all steps are done")
    assert page.locator("tr:has-text('node1')").count() == 2


def test_a_curve_is_drawn_in_its_colour(finished: tuple[Path, str], page: Any) -> None:
    """The pixels of a panel have the first colour, #2f6fb2, from its left to its right side."""
    page.goto(finished[1])
    canvas = page.locator(".panel:has(h3:text('Policy entropy')) canvas")
    columns = canvas.evaluate(
        """canvas => {
            const { data, width } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
            const found = new Set();
            for (let i = 0; i < data.length; i += 4)
                if ([0x2f, 0x6f, 0xb2].every((part, j) => data[i + j] === part)) found.add((i / 4) % width);
            return found.size / width;
        }"""
    )
    assert columns > 0.7


def test_a_selected_range_shows_its_steps(finished: tuple[Path, str], page: Any) -> None:
    page.goto(finished[1])
    box = page.locator(".panel .u-over").first.bounding_box()
    with page.expect_response(lambda response: "first=" in response.url) as answer:
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] - 2, box["y"] + 20)
        page.mouse.up()
    steps = answer.value.json()["runs"][0]["loss"]["x"]
    assert 18 <= steps[0] <= 22
    assert steps[-1] == 40


def test_a_newcomer_finds_the_token_with_the_largest_ratio_and_whether_it_was_clipped(
    finished: tuple[Path, str], page: Any
) -> None:
    """Only what the page shows is used: a tab, the field for the step, and the first row of the table."""
    folder, address = finished
    lines = (folder / "tokens" / "step_000039.jsonl").read_bytes().splitlines()[1:]
    records = [Record.from_json(line) for line in lines]
    record = max(records, key=lambda record: record.log_ratio.max())
    at = int(record.log_ratio.argmax())
    page.goto(address)
    tab(page, "Tokens")
    page.get_by_label("Step", exact=True).fill("39")
    page.get_by_label("Step", exact=True).press("Enter")
    playwright.expect(page.locator("main")).to_contain_text("The largest ratio of step 39 is")
    heads = page.locator("#worst th").all_inner_texts()
    cells = dict(
        zip(heads, page.locator("#worst tbody tr").first.locator("td").all_inner_texts(), strict=True)
    )
    assert cells["token"].strip() == record.text[at].replace("\n", "↵").strip()
    assert float(cells["ratio"]) == pytest.approx(np.exp(record.log_ratio[at]), rel=1e-3)
    assert cells["clip"] == ("clipped" if record.clipped[at] else "not clipped")
    assert cells["sample"] == f"{records.index(record)}, token {at}"
    said = "It was clipped." if record.clipped[at] else "It was not clipped."
    assert said in text_of(page, "#step > p")


def test_the_tokens_of_a_sample(finished: tuple[Path, str], page: Any) -> None:
    folder, address = finished
    line = (folder / "tokens" / "step_000040.jsonl").read_bytes().splitlines()[2]
    record = Record.from_json(line)
    page.goto(address)
    tab(page, "Tokens")
    page.locator("tr.pick:has-text('math/40')").nth(1).click()
    tokens = page.locator(".tokens span")
    playwright.expect(tokens).to_have_count(len(record.ids))
    at = int(np.abs(record.log_ratio).argmax())
    tokens.nth(at).hover()
    shown = text_of(page, "#tip")
    assert f"id {record.ids[at]}" in shown
    assert f"log ratio {record.log_ratio[at]:.4g}" in shown
    assert f"{record.layers_rerouted[at]} MoE layers" in shown
    colours = set()
    for measure in ("log_ratio", "clipped", "entropy", "advantage", "rollout_difference", "layers_rerouted"):
        page.get_by_label("Colour by").select_option(measure)
        colours.add(tokens.nth(at).evaluate("token => getComputedStyle(token).backgroundColor"))
    assert len(colours) >= 4
    marked = [i for i in range(len(record.ids)) if "clipped" in (tokens.nth(i).get_attribute("class") or "")]
    assert marked == np.flatnonzero(record.clipped).tolist()
    playwright.expect(page.locator("#step canvas")).to_be_visible()


def test_markup_in_prompts_is_text(finished: tuple[Path, str], page: Any) -> None:
    page.goto(finished[1])
    tab(page, "Samples")
    playwright.expect(page.locator("pre.prompt").nth(1)).to_contain_text(MARKUP)
    for order in ("reward", "length", "advantage", "ratio"):
        page.get_by_label("Sort by").select_option(order)
        playwright.expect(page.locator(".sample")).to_have_count(8)
    lengths = [int(text.split("tokens ")[1].split()[0]) for text in page.locator(".sample").all_inner_texts()]
    assert lengths  # sorted by ratio now
    page.get_by_label("Sort by").select_option("length")
    playwright.expect(page.locator(".sample")).to_have_count(8)
    texts = page.locator(".sample").all_inner_texts()
    lengths = [int(text.split("tokens ")[1].split()[0]) for text in texts]
    assert lengths == sorted(lengths, reverse=True)
    assert page.locator("main b:text('bold'), main img").count() == 0
    page.wait_for_timeout(200)  # an error handler would have run
    assert "owned" not in page.title()


def test_an_episode_is_shown_turn_by_turn(tmp_path: Path, page: Any) -> None:
    folder = write_run(tmp_path / "agents", 12)
    add_episodes(folder, 13)
    with viewed(folder) as address:
        page.goto(address)
        tab(page, "Samples")
        playwright.expect(page.locator(".sample")).to_have_count(2)  # all() does not wait for the page
        done, failed = page.locator(".sample").all()
        roles = [box.inner_text() for box in done.locator(".turn .facts").all()]
        assert roles == ["assistant", "user", "assistant", "tool"]
        assert done.locator(".turn.sampled").count() == 2
        shown = done.locator(".turn pre").nth(1)
        playwright.expect(shown).to_have_text(f"It is open. {MARKUP}")
        facts = done.locator(":scope > .facts").first
        playwright.expect(facts).to_contain_text(
            "turns 2   episode done   of rooms   success yes   tool calls 3   failed 1"
        )
        playwright.expect(failed).to_contain_text(f"The environment failed. ValueError: {MARKUP}")
        page.wait_for_timeout(200)  # an error handler would have run
        assert "owned" not in page.title()


def assert_pictures(page: Any, widths: list[int]) -> None:
    """Check that the images of the tab Samples are shown in this order; ``widths`` are of their files."""
    tab(page, "Samples")
    pictures = page.locator("img.picture")
    playwright.expect(pictures).to_have_count(len(widths))
    for number, width in enumerate(widths):
        playwright.expect(pictures.nth(number)).to_have_js_property("naturalWidth", width)


def test_the_images_of_prompts(tmp_path: Path, page: Any) -> None:
    """They stand at their places in a message or an observation, or after a text.

    An exported page has them in it; a line takes the place of one that was missing.
    """
    folder = write_run(tmp_path / "vision", 12)
    names = add_pictures(folder, 13)
    before = sorted((file, file.stat().st_mtime_ns) for file in folder.rglob("*"))
    target = tmp_path / "page.html"
    command = [sys.executable, "-m", "megatron_gmpo", "view", str(folder), "--export", str(target)]
    with viewed(folder) as address:
        page.goto(address)
        assert_pictures(page, [40, 50, 60, 40])
        parts = page.locator(".group").first.locator(".turn > *").all()
        kinds = [part.evaluate("part => part.tagName") for part in parts]
        assert kinds == ["DIV", "PRE", "IMG", "PRE", "IMG"]
        assert "owned" not in page.title()
    assert sorted((file, file.stat().st_mtime_ns) for file in folder.rglob("*")) == before
    (folder / "images" / names[1]).unlink()
    subprocess.run(command, check=True, timeout=TIMEOUT_S)
    page.goto(target.as_uri())
    assert_pictures(page, [40, 60, 40])
    playwright.expect(page.locator("main")).to_contain_text(f"Image {names[1]} cannot be shown")


def test_a_run_in_progress(tmp_path: Path, page: Any) -> None:
    folder = write_run(tmp_path / "live", 12, num_steps=50)
    with viewed(folder) as address:
        page.goto(address)
        header = page.locator("header")
        playwright.expect(header).to_contain_text("step 12 of 50")
        playwright.expect(header).to_contain_text("left")
        focused = page.get_by_role("tab", name="Tokens")
        focused.focus()
        rng = np.random.default_rng(5)
        add_steps(folder, 13, 20, rng)
        add_samples(folder, 20, rng)
        for rank in range(4):
            add_heartbeat(folder, rank, 20, now=time.time())
        playwright.expect(header).to_contain_text("step 20 of 50")
        playwright.expect(focused).to_be_focused()  # a refresh keeps the tabs
        tab(page, "Samples")
        bar, step = page.locator("#bar"), page.get_by_label("Step", exact=True)
        playwright.expect(bar).to_contain_text("10 to 20")
        for name, number in (("Samples", 30), ("Tokens", 40)):  # an open tab offers new steps, and stays
            tab(page, name)
            playwright.expect(step).to_have_value(str(number - 10))
            add_samples(folder, number, rng)
            playwright.expect(bar).to_contain_text(f"10 to {number}")
            playwright.expect(step).to_have_value(str(number - 10))
            page.get_by_role("button", name="Newest").click()
            playwright.expect(step).to_have_value(str(number))
        tab(page, "Machine")
        playwright.expect(page.locator("main")).to_contain_text("running")


def test_the_end_of_a_log_can_be_read_and_copied(tmp_path: Path, page: Any) -> None:
    """A refresh keeps the place in a log, and waits while text is selected."""
    folder = write_run(tmp_path / "live", 12, num_steps=50)
    (folder / "servers").mkdir()
    log = folder / "servers/node0-30000.log"
    log.write_text("\n".join(f"line {i}" for i in range(100)))
    with viewed(folder) as address:
        page.goto(address)
        tab(page, "Machine")
        end = page.locator("pre[data-log]")
        playwright.expect(end).to_contain_text("line 99")
        end.evaluate("(log) => log.scrollTo(0, 300)")
        log.write_text(log.read_text() + "\nline 100")
        playwright.expect(end).to_contain_text("line 100")
        assert end.evaluate("(log) => log.scrollTop") == 300
        end.evaluate("(log) => getSelection().selectAllChildren(log)")
        log.write_text(log.read_text() + "\nline 101")
        for _ in range(3):  # when the third answer comes, the page has dealt with the second one
            with page.expect_response("**/data/state"):
                pass
        assert "line 101" not in end.text_content()
        assert "line 100" in page.evaluate("getSelection().toString()")
        page.evaluate("getSelection().empty()")
        playwright.expect(end).to_contain_text("line 101")


def test_a_long_run_beside_a_short_one(tmp_path: Path, page: Any) -> None:
    long, short = write_run(tmp_path / "long", 10_000), write_run(tmp_path / "short", 200, seed=1)
    with viewed(long, short) as address, page.expect_response("**/data/curves") as answer:
        page.goto(address)
        found = answer.value.json()["runs"]
        assert all(len(points["x"]) <= 1002 for run in found for points in run.values())
        playwright.expect(page.locator(".panel canvas").first).to_be_visible()
        playwright.expect(page.locator("header")).to_contain_text("step 10000 of 10000")
        legend = page.locator(".panel .legend").first
        playwright.expect(legend).to_contain_text("short")
        page.get_by_label("short").uncheck()
        playwright.expect(page.locator(".panel .legend").first).not_to_contain_text("short")


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.mkdir(), "has not logged a step yet"),
        (lambda folder: damage(write_run(folder, 12)), "1 lines of metrics.jsonl are damaged"),
    ],
    ids=["missing", "empty", "damaged"],
)
def test_a_folder_that_is_not_whole(
    make: Callable[[Path], object], line: str, tmp_path: Path, page: Any
) -> None:
    make(tmp_path / "run")
    with viewed(tmp_path / "run") as address:
        page.goto(address)
        playwright.expect(page.locator("#problems")).to_contain_text(line)
        for name in ("Samples", "Tokens", "Machine", "Curves"):
            tab(page, name)
            playwright.expect(page.locator("main")).not_to_be_empty()


def damage(folder: Path) -> None:
    """Overwrite the middle of every file of a run folder."""
    for file in folder.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            half = len(content) // 2
            file.write_bytes(content[:half] + b"\xff\x00{" * 20 + content[half + 60 :])


def test_an_exported_page_needs_no_server(finished: tuple[Path, str], tmp_path: Path, page: Any) -> None:
    target = tmp_path / "page.html"
    command = [sys.executable, "-m", "megatron_gmpo", "view", str(finished[0]), "--export", str(target)]
    subprocess.run(command, check=True, timeout=TIMEOUT_S)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(target.as_uri())
    playwright.expect(page.locator(".panel canvas").first).to_be_visible()
    tab(page, "Tokens")
    playwright.expect(page.locator("main")).to_contain_text("The largest ratio of step 40 is")
    page.locator("tr.pick").first.click()
    playwright.expect(page.locator(".tokens span").first).to_be_visible()
    tab(page, "Samples")
    playwright.expect(page.locator(".sample")).to_have_count(8)
    assert [url for url in requests if not url.startswith("data:")] == [target.as_uri()]


def test_a_server_that_ended(tmp_path: Path, browser: Any) -> None:
    page = browser.new_page()
    try:
        with viewed(write_run(tmp_path / "run", 12)) as address:
            page.goto(address)
            playwright.expect(page.locator(".panel canvas").first).to_be_visible()
        playwright.expect(page.locator("#problems")).to_contain_text("The server does not answer")
        playwright.expect(page.locator(".panel canvas").first).to_be_visible()
    finally:
        page.close()
