"""Pictures of a profile: time and tokens by layer, memory, latency over batch size, accuracy over MACs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_atomically
from ..metrics import TITLES
from ..profiling.report import ALLOCATED, LAYER_TIME, LAYER_TOKENS
from .plots import (
    ACCENT,
    CORRELATIONS,
    SOFT,
    CorrelationPoint,
    OperatingPoint,
    accuracy_over_macs,
    as_png,
    empty_figure,
)


if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..profiling.report import Report

# Of any other name matplotlib chooses.
COLOURS = {
    "baseline": SOFT,
    "padded": SOFT,
    "stock": SOFT,
    "unpruned": SOFT,
    "unpadded": "#57606a",
    "pruned": ACCENT,
}


def draw_profile(report: Report, folder: str | os.PathLike[str]) -> list[Path]:
    """Draws what the report holds, one PNG each.

    Raises:
        ImportError: matplotlib is missing.
    """
    folder, model = Path(folder), Path(report.subject["model"]).name
    milliseconds = {name: [1e3 * second for second in row] for name, row in report.values(LAYER_TIME).items()}
    memory = {name: value / 2**20 for name, value in report.values(ALLOCATED).items()}
    tokens = report.values(LAYER_TOKENS)
    sizes = {
        name: [(size, 1e3 * timings[name].median / size) for size, timings in report.by_batch_size.items()]
        for name in next(iter(report.by_batch_size.values()))
    }
    drawn = [
        _picture(folder / "time_per_layer.png", f"Time inside each layer: {model}", "layer", "ms", _bars(milliseconds)),
        draw_tokens(tokens, folder / "tokens_per_layer.png", title=f"Tokens that leave each layer: {model}"),
        _picture(folder / "memory.png", f"Peak memory of the first batch: {model}", "", "MiB", _named_bars(memory)),
        _picture(
            folder / "latency_over_batch_size.png", f"Latency over batch size: {model}", "inputs a batch",
            "ms per input", _lines(sizes),
        ),
    ]  # fmt: skip
    if report.curve:
        name = report.curve[0].score.what
        kind = CorrelationPoint if name in CORRELATIONS else OperatingPoint
        points = [
            kind(f"{100 * point.progress:.0f} % pruned", point.macs.value / 1e9, point.score.value)
            for point in report.curve
        ]
        path, title = folder / "accuracy_over_macs.png", f"Training-free: {model}"
        drawn.append(accuracy_over_macs(points, path, title=title, score=TITLES[name]))
    return drawn


def draw_tokens(alive: Mapping[str, Sequence[float]], path: str | os.PathLike[str], *, title: str) -> Path:
    """Draws how many tokens leave each layer, for models by name: "unpruned", "pruned", or any other."""
    return _picture(Path(path), title, "layer", "mean tokens", _bars(alive))


def _picture(path: Path, title: str, x: str, y: str, draw: Callable[[Axes], None]) -> Path:
    figure, axes = empty_figure(title)
    draw(axes)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    return write_atomically(path, as_png(figure))


def _bars(rows: Mapping[str, Sequence[float]]) -> Callable[[Axes], None]:
    """Groups of bars, one group for each place in the rows."""

    def draw(axes: Axes) -> None:
        width, groups = 0.8 / len(rows), len(next(iter(rows.values())))
        for index, (name, values) in enumerate(rows.items()):
            places = [group - 0.4 + (index + 0.5) * width for group in range(groups)]
            axes.bar(places, values, width, label=name, color=COLOURS.get(name))
        axes.set_xticks(range(groups))

    return draw


def _named_bars(values: Mapping[str, float]) -> Callable[[Axes], None]:
    return lambda axes: axes.bar(list(values), list(values.values()), 0.5, color=[COLOURS[name] for name in values])


def _lines(rows: Mapping[str, Sequence[tuple[float, float]]]) -> Callable[[Axes], None]:
    """Lines over sizes; on a logarithmic scale where they span more than tenfold."""

    def draw(axes: Axes) -> None:
        for name, points in rows.items():
            axes.plot(*zip(*points), marker="o", label=name, color=COLOURS.get(name))
        axes.set_xscale("log", base=2)
        axes.set_xticks([size for size, _ in points], [str(size) for size, _ in points])
        heights = [height for points in rows.values() for _, height in points]
        if max(heights) > 10 * min(heights):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(which="minor", axis="y", alpha=0.4)

    return draw
