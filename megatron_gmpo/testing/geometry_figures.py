"""Draw the figures of the geometry task with Pillow."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from io import BytesIO

from PIL import Image, ImageDraw, ImageFont

FONT_SIZE = 0.19
"""Height of the letters, as a share of the picture's side."""

Point = tuple[float, float]


class Figure:
    """A white picture, drawn in black. Points are shares of its side, from the upper left corner."""

    def __init__(self, side: int) -> None:
        self.picture = Image.new("L", (side, side), 255)
        self._draw = ImageDraw.Draw(self.picture)
        self._font = ImageFont.load_default(FONT_SIZE * side)
        self._width = max(1, side // 80)

    def path(self, *points: Point) -> None:
        self._draw.line([self._pixel(point) for point in points], 0, self._width)

    def circle(self, centre: Point, radius: float) -> None:
        x, y = centre
        corners = [self._pixel((x - radius, y - radius)), self._pixel((x + radius, y + radius))]
        self._draw.ellipse(corners, outline=0, width=self._width)

    def label(self, centre: Point, text: str) -> None:
        self._draw.text(self._pixel(centre), text, 0, self._font, "mm")

    def png(self) -> bytes:
        file = BytesIO()
        self.picture.save(file, "PNG")
        return file.getvalue()

    def _pixel(self, point: Point) -> Point:
        x, y = point
        return x * self.picture.width, y * self.picture.width


def draw(kind: str, labels: Sequence[str], side: int, generator: random.Random) -> bytes:
    """Return the figure of a problem as a PNG file. Figures are not to scale.

    Args:
        kind: a key of ``FIGURES``.
        labels: texts at the figure's angles or sides, in the order of the function in ``FIGURES``.
        side: width and height in pixels.
        generator: moves the figure's lines a little.
    """
    figure = Figure(side)
    FIGURES[kind](figure, labels, generator)
    return figure.png()


def _angle_sum(figure: Figure, labels: Sequence[str], generator: random.Random) -> None:
    """Draw a triangle; the labels are its angles at the left, at the right and at the top."""
    left, right, top = (0.06, 0.92), (0.94, 0.92), (generator.uniform(0.4, 0.6), 0.07)
    figure.path(left, right, top, left)
    for centre, label in zip([(0.31, 0.8), (0.71, 0.8), (0.51, 0.44)], labels, strict=True):
        figure.label(centre, label)


def _straight_angle(figure: Figure, labels: Sequence[str], generator: random.Random) -> None:
    """Draw two rays that start on a line; the labels are the angles at the left, between and at the right."""
    foot = (0.5, 0.85)
    figure.path((0.04, 0.85), (0.96, 0.85))
    for tip in (generator.uniform(0.12, 0.2), generator.uniform(0.8, 0.88)):
        figure.path(foot, (tip, 0.08))
    for centre, label in zip([(0.17, 0.7), (0.5, 0.25), (0.82, 0.7)], labels, strict=True):
        figure.label(centre, label)


def _right_triangle(figure: Figure, labels: Sequence[str], generator: random.Random) -> None:
    """Draw a right triangle; the labels are the vertical leg, the horizontal leg and the hypotenuse."""
    corner = (0.3, 0.73)
    top, right = (0.3, generator.uniform(0.08, 0.14)), (generator.uniform(0.88, 0.94), 0.73)
    figure.path(top, corner, right, top)
    figure.path((0.4, 0.73), (0.4, 0.63), (0.3, 0.63))
    for centre, label in zip([(0.15, 0.45), (0.6, 0.86), (0.76, 0.32)], labels, strict=True):
        figure.label(centre, label)


def _rectangle(figure: Figure, labels: Sequence[str], generator: random.Random) -> None:
    """Draw a rectangle; the labels are its height and its width."""
    left, upper, right, lower = 0.3, generator.uniform(0.1, 0.2), generator.uniform(0.85, 0.95), 0.72
    figure.path((left, upper), (right, upper), (right, lower), (left, lower), (left, upper))
    for centre, label in zip([(0.15, 0.45), (0.6, 0.86)], labels, strict=True):
        figure.label(centre, label)


def _circles(figure: Figure, labels: Sequence[str], generator: random.Random) -> None:
    """Draw two circles that touch; the labels are the radii of the left and of the right one."""
    size = generator.uniform(0.2, 0.24)
    for middle, place, label in zip((0.5 - size, 0.5 + size), (-1, 1), labels, strict=True):
        figure.circle((middle, 0.55), size)
        figure.path((middle, 0.55), (middle + place * size, 0.55))
        figure.label((0.5 + place * 0.3, 0.43), label)


FIGURES: dict[str, Callable[[Figure, Sequence[str], random.Random], None]] = {
    "angle_sum": _angle_sum,
    "straight_angle": _straight_angle,
    "right_triangle": _right_triangle,
    "rectangle": _rectangle,
    "circles": _circles,
}
"""Kind of problem -> function that draws its figure."""
