"""Make the picture of docs/vision.md: a problem of each question in a run, with a sampled answer.

Usage::

    python docs/geometry_picture.py RUN_DIR

RUN_DIR is a run of examples/vision/geometry_tiny_cpu.toml. The picture shows the last group of each question
in transcripts.jsonl, and its first sample: green if it is right, red if not. It is written to
docs/pictures/geometry.png.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

PICTURE = Path(__file__).with_name("pictures") / "geometry.png"
SIDE, TEXT, GAP = 236, 22, 12


def main(run_dir: str) -> None:
    folder = Path(run_dir)
    groups = [json.loads(line) for line in (folder / "transcripts.jsonl").read_text().splitlines()]
    last = {group["prompt"][-1]["content"][-1]["text"]: group for group in groups}
    cell = SIDE + GAP, SIDE + 2 * TEXT + GAP
    sheet = Image.new("RGB", (len(last) * cell[0] + GAP, cell[1] + GAP), "#e8e8e8")
    drawing, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for place, (question, group) in enumerate(sorted(last.items())):
        left = GAP + place * cell[0]
        figure = Image.open(folder / "images" / group["images"][0])
        sheet.paste(figure.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, GAP + TEXT))
        sample = group["samples"][0]
        colour = "#12762b" if sample["reward"] else "#b3261e"
        drawing.text((left, GAP), question, "black", font)
        drawing.text((left, GAP + TEXT + SIDE + 3), sample["text"], colour, font)
    sheet.save(PICTURE, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
