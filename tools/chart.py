"""Draw docs/images/size.svg, perplexity against file size, from results/budget.json, tune.json and peers.json.

`python tools/chart.py` writes the picture; `make docs` calls it. Every figure comes from those files. Other packages
were measured by the tensors they store for the block matrices; their file is counted as those bytes plus what one of
ours has besides (embedding in 8 bits, norms, tokenizer, headers), which is less than their own files take.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "size.svg"
WIDTH, HEIGHT = 760, 430
LEFT, RIGHT, TOP, BOTTOM = 62, 20, 46, 52
SIZES = (35.0, 114.0)  # MB
PERPLEXITIES = (18.5, 220.0)  # logarithmic; what lies above is named under the chart
LEFT_OF_POINT = ("AutoRound 3 bit g64", "llama.cpp IQ3_S")  # where a label on the right would meet another point
# How far labels of close points are moved down.
DOWN = {"llama.cpp IQ2_S": -6, "HQQ 4 bit g64": 4, "HQQ 4 bit g64 axis 0": -7, "AutoRound 4 bit g64": 3}
COLORS = {"reallm": "#0b57d0", "fine-tuned": "#b3261e", "other": "#5f6368"}


class Point(NamedTuple):
    """One model: its file in MB and its perplexity."""

    name: str
    megabytes: float
    perplexity: float


def results(name: str) -> dict:
    """Return one file of results/."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def sized() -> list[Point]:
    """Return what `--size` reached, the smallest file first."""
    arms = [arm for arm in results("budget")["arms"] if arm["key"].endswith("MB | chosen by matrix")]
    return sorted(
        (Point(arm["group"], arm["nbytes"] / 1e6, arm["perplexity"]) for arm in arms), key=lambda point: point.megabytes
    )


def fine_tuned() -> Point:
    """Return the 60 MB model after fine-tuning end to end."""
    (arm,) = [arm for arm in results("tune")["arms"] if arm["key"] == "target | 60 MB, end-to-end"]
    return Point("fine-tuned", arm["nbytes"] / 1e6, arm["perplexity"])


def peers() -> list[Point]:
    """Return the other packages, in the order of the results."""
    arms = results("peers")["arms"]
    weights = 8 * sum(arms[0]["stored"].values()) / arms[0]["bits"]
    besides = min(
        arm["nbytes"] - arm["bits"] * weights / 8
        for arm in results("budget")["arms"]
        if arm["key"].endswith("bits | chosen by matrix")
    )
    return [Point(arm["name"], (arm["bits"] * weights / 8 + besides) / 1e6, arm["perplexity"]) for arm in arms]


def across(megabytes: float) -> float:
    """Return the x of a file size."""
    return LEFT + (megabytes - SIZES[0]) / (SIZES[1] - SIZES[0]) * (WIDTH - LEFT - RIGHT)


def down(perplexity: float) -> float:
    """Return the y of a perplexity."""
    low, high = map(math.log, PERPLEXITIES)
    return HEIGHT - BOTTOM - (math.log(perplexity) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def text(x: float, y: float, words: str, color: str = "#3c4043", anchor: str = "start", size: int = 12) -> str:
    """Return a label."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f'<text {place} fill="{color}">{escape(words)}</text>'


def line(points: Iterable[tuple[float, float]], color: str, style: str = "") -> str:
    """Return a line through points."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{color}" {style}/>'


def dot(point: Point, color: str, label: str, dx: float = 8, dy: float = 4, anchor: str = "start") -> list[str]:
    """Return a point and its label."""
    x, y = across(point.megabytes), down(point.perplexity)
    return [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{color}"/>', text(x + dx, y + dy, label, color, anchor)]


def axes(original: float) -> list[str]:
    """Return grid, ticks, names of the axes and the line of the original model."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [line([(LEFT, TOP), (LEFT, bottom), (right, bottom)], "#80868b")]
    for value in range(40, 111, 10):
        parts += [text(across(value), bottom + 18, str(value), anchor="middle")]
    for value in (25, 30, 40, 60, 100, 200):
        parts += [line([(LEFT, down(value)), (right, down(value))], "#e8eaed")]
        parts += [text(LEFT - 8, down(value) + 4, str(value), anchor="end")]
    parts += [line([(LEFT, down(original)), (right, down(original))], "#3c4043", 'stroke-dasharray="5 4"')]
    parts += [text(LEFT + 8, down(original) + 14, f"original model, 16 bits: {original:.2f}")]
    return [*parts, text((LEFT + right) / 2, HEIGHT - 14, "size of the artifact, MB", anchor="middle")]


def picture() -> str:
    """Return the chart as SVG."""
    parts = axes(results("budget")["original"]["perplexity"])
    ours = sized()
    parts += [line([(across(p.megabytes), down(p.perplexity)) for p in ours], COLORS["reallm"], 'stroke-width="2"')]
    for point in ours:
        parts += dot(point, COLORS["reallm"], f"{point.perplexity:.1f}", dx=7, dy=-6 if point != ours[-1] else 16)
    tuned = fine_tuned()
    parts += dot(tuned, COLORS["fine-tuned"], f"fine-tuned {tuned.perplexity:.1f}", dx=-8, dy=6, anchor="end")
    shown = [point for point in peers() if point.perplexity < PERPLEXITIES[1]]
    for point in shown:
        label = f"{point.name.replace(' bit', '-bit')} {point.perplexity:.1f}"
        left = point.name in LEFT_OF_POINT
        place = {"dx": -8 if left else 8, "dy": 4 + DOWN.get(point.name, 0), "anchor": "end" if left else "start"}
        parts += dot(point, COLORS["other"], label, **place)
    hidden = ", ".join(point.name for point in peers() if point not in shown)
    parts += [text(LEFT, 20, "SmolLM2-135M-Instruct: WikiText-2 perplexity (log scale)", size=15)]
    parts += [text(WIDTH - RIGHT, 38, f"above 10⁵: {hidden}", COLORS["other"], "end", 11)]
    parts += [text(across(42), down(62), "reallm --size", COLORS["reallm"], size=13)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>', *parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(picture(), encoding="utf-8")
