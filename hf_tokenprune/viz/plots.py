"""Plots of what pruning costs and saves. matplotlib is an extra and is imported only when something is drawn."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ..files import write_atomically
from ..training.comparison import scores_of


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.path import Path as Line
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

CORRELATIONS = ("pearson", "spearman")
INK, SOFT, ACCENT = "#1f2328", "#8c959f", "#0b6e8f"
_MARKER_POINTS = 7.0
_LABEL_DISTANCES = (9, 22, 36, 52, 70, 90)  # points
_LABEL_DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0), (0.8, 0.7), (-0.8, 0.7), (0.8, -0.7), (-0.8, -0.7))
_NEVER = 1e6


@dataclass(frozen=True)
class OperatingPoint:
    """One model at one budget."""

    name: str
    macs: float
    """Giga multiply-accumulates per input."""
    accuracy: float
    """0..1."""
    low: float | None = None
    """Lower end of the interval of `accuracy`; both ends or neither."""
    high: float | None = None
    least: ClassVar[float] = 0.0
    """What `accuracy` can come to."""

    def __post_init__(self) -> None:
        if not self.macs > 0:
            raise ValueError(f"macs ({self.macs}) must be above 0")
        if not self.least <= self.accuracy <= 1:
            raise ValueError(f"accuracy ({self.accuracy}) must be in [{self.least:g}, 1]")
        if (self.low is None) != (self.high is None):
            raise ValueError(f"low ({self.low}) and high ({self.high}) must be given together")
        if self.low is not None and not self.least <= self.low <= self.accuracy <= self.high <= 1:
            raise ValueError(
                f"the interval ({self.low}, {self.high}) must hold accuracy ({self.accuracy}), in [{self.least:g}, 1]"
            )


class CorrelationPoint(OperatingPoint):
    """One model at one budget, judged by a correlation."""

    least = -1.0


class _Place(NamedTuple):
    offset: tuple[float, float]
    """Points from the marker."""
    box: Bbox
    """Pixels of the text."""
    line: Line
    """Pixels from the marker to the middle of the text."""


def accuracy_over_macs(
    points: Sequence[OperatingPoint], path: str | os.PathLike[str], *, title: str, score: str = "accuracy"
) -> Path:
    """Draw accuracy over arithmetic, one labelled point per operating point, and write it as a PNG.

    Args:
        score: what stands in its place, in words.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: no points.
    """
    if not points:
        raise ValueError("points is empty: a plot needs at least one")
    drawn = {"points": [asdict(point) for point in points]}
    return write_atomically(path, as_png(_draw(points, title, score), drawn))


def comparison_picture(evidence: Mapping[str, Any], path: str | os.PathLike[str], *, title: str) -> Path:
    """The runs of a comparison, as `run_comparison.py` wrote it down, over their arithmetic.

    A run's bar is the 95 % interval of its difference to the control, set upon the control's accuracy, or whatever else
    the runs are compared by.
    """
    points, score = comparison_points(evidence["quality"]), scores_of(evidence["quality"][0])[0].words["title"]
    figure = _draw(points, title, score)
    figure.axes[0].set_ylabel(f"{score}; bars: 95 % interval of the difference to control", color=INK)
    return write_atomically(path, as_png(figure, {"points": [asdict(point) for point in points]}))


def comparison_points(quality: Sequence[Mapping[str, Any]]) -> list[OperatingPoint]:
    scores = {row["run"]: scores_of(row)[0] for row in quality}
    kind = CorrelationPoint if scores["control"].metric in CORRELATIONS else OperatingPoint
    points = []
    for row in quality:
        score = scores[row["run"]]
        value, scale = score.value, score.words["scale"]
        ends = [scores["control"].value + end for end in score.interval]
        # Sums of floats may miss a value that is an end itself.
        low, high = max(scale * kind.least, min(value, *ends)), min(1.0 * scale, max(value, *ends))
        points.append(kind(row["run"], row["gmacs"], value / scale, low / scale, high / scale))
    return points


def as_png(figure: Figure, drawn: Mapping[str, Any] | None = None) -> bytes:
    """The figure, with the numbers that it was drawn from as the PNG's "Description", so that they can be checked."""
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata=None if drawn is None else {"Description": json.dumps(drawn)})
    return content.getvalue()


def _draw(points: Sequence[OperatingPoint], title: str, score: str = "accuracy") -> Figure:
    figure, axes = _new_figure(title, score)
    for point in points:
        _draw_point(axes, point)
    _set_limits(axes, points)
    _place_labels(figure, axes, points)
    return figure


def _new_figure(title: str, score: str) -> tuple[Figure, Axes]:
    from matplotlib.ticker import PercentFormatter

    figure, axes = empty_figure(title)
    axes.set_xlabel("giga multiply-accumulates per input", color=INK)
    axes.set_ylabel(score, color=INK)
    if score == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    return figure, axes


def empty_figure(title: str) -> tuple[Figure, Axes]:
    """A titled pair of axes in this package's look.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = _canvas(8, 5)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=12, parse_math=False, wrap=True)
    axes.grid(color="#d1d9e0", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SOFT)
    axes.tick_params(colors=INK, length=0)
    return figure, axes


def empty_panels(title: str, panels: int, columns: int) -> tuple[Figure, list[Axes]]:
    """A titled figure with so many axes, row by row.

    Raises:
        ImportError: matplotlib is missing.
    """
    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure = _canvas(2.5 * columns, 2.7 * rows + 0.5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK, parse_math=False)
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(panels)]


def _canvas(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'hf_tokenprune[viz]'") from error

    # A canvas of its own, not pyplot: the caller's backend and open figures stay as they are.
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_point(axes: Axes, point: OperatingPoint) -> None:
    error = None
    if point.low is not None and point.high is not None:
        error = [[point.accuracy - point.low], [point.high - point.accuracy]]
    axes.errorbar(
        point.macs,
        point.accuracy,
        yerr=error,
        fmt="o",
        markersize=_MARKER_POINTS,
        color=f"{ACCENT}80",  # half seen through: points of nearly equal models lie upon each other
        ecolor=SOFT,
        elinewidth=1.2,
        capsize=3,
        markeredgecolor=ACCENT,
    )


def _set_limits(axes: Axes, points: Sequence[OperatingPoint]) -> None:
    low = min(point.accuracy if point.low is None else point.low for point in points)
    high = max(point.accuracy if point.high is None else point.high for point in points)
    margin = max(0.2 * (high - low), 0.005)
    # Hardly above 1: a tick at 102 % would mean nothing.
    axes.set_ylim(low - margin, min(high + margin, 1 + 0.3 * margin))
    # From zero, so that half the arithmetic is half the way.
    axes.set_xlim(0, 1.15 * max(point.macs for point in points))


def _place_labels(figure: Figure, axes: Axes, points: Sequence[OperatingPoint]) -> None:
    """Give each name the nearest free place around its point, with a leader line where that is further away."""
    figure.canvas.draw()
    # The layout is final now; solving it again for the labels would move the points under them.
    figure.set_layout_engine("none")
    marks = [box for point in points for box in _obstacles(figure, axes, point)]
    placed: list[_Place] = []
    # From the top down: of two that are close the upper one's name stands above.
    for point in sorted(points, key=lambda point: (-point.accuracy, point.macs)):
        place = _best_place(figure, axes, point, marks, placed)
        _label(axes, point, place.offset)
        placed.append(place)


def _obstacles(figure: Figure, axes: Axes, point: OperatingPoint) -> list[Bbox]:
    """The pixels of a point's marker and of its error bar."""
    from matplotlib.transforms import Bbox

    radius = _MARKER_POINTS / 2 * figure.dpi / 72
    x, y = axes.transData.transform((point.macs, point.accuracy))
    boxes = [Bbox.from_extents(x - radius, y - radius, x + radius, y + radius)]
    if point.low is not None:
        _, bottom = axes.transData.transform((point.macs, point.low))
        _, top = axes.transData.transform((point.macs, point.high))
        boxes.append(Bbox.from_extents(x - radius, bottom, x + radius, top))
    return boxes


def _best_place(
    figure: Figure, axes: Axes, point: OperatingPoint, marks: Sequence[Bbox], placed: Sequence[_Place]
) -> _Place:
    """The first place that covers nothing, else the one that covers least."""
    frame = axes.get_window_extent()
    best, least = None, math.inf
    for offset in _offsets():
        place = _try_place(figure, axes, point, offset)
        cost = _cost(place, frame, marks, placed)
        if cost < least:
            best, least = place, cost
        if cost == 0:
            break
    return best


def _try_place(figure: Figure, axes: Axes, point: OperatingPoint, offset: tuple[float, float]) -> _Place:
    from matplotlib.path import Path as Line
    from matplotlib.text import Text

    label = _label(axes, point, offset)
    label.update_positions(figure.canvas.get_renderer())
    # The extent of the annotation itself would take in its leader line, which always touches the point.
    box = Text.get_window_extent(label).padded(2)
    label.remove()
    middle = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
    return _Place(offset, box, Line([axes.transData.transform((point.macs, point.accuracy)), middle]))


def _cost(place: _Place, frame: Bbox, marks: Sequence[Bbox], placed: Sequence[_Place]) -> float:
    """Pixels that the label would cover; leaving the frame or tangling with another label costs more than any bar."""
    from matplotlib.transforms import Bbox

    box = place.box
    outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
    tangled = sum(
        other.line.intersects_bbox(box) + place.line.intersects_bbox(other.box) + box.overlaps(other.box)
        for other in placed
    )
    overlaps = (Bbox.intersection(box, mark) for mark in marks)
    covered = sum(overlap.width * overlap.height for overlap in overlaps if overlap is not None)
    return covered + _NEVER * (outside + tangled)


def _offsets() -> Iterator[tuple[float, float]]:
    for distance in _LABEL_DISTANCES:
        for x, y in _LABEL_DIRECTIONS:
            yield x * distance, y * distance


def _label(axes: Axes, point: OperatingPoint, offset: tuple[float, float]) -> Annotation:
    from matplotlib.patheffects import withStroke

    x, y = offset
    far = max(abs(x), abs(y)) > 1.5 * _LABEL_DISTANCES[0]
    return axes.annotate(
        point.name,
        (point.macs, point.accuracy),
        offset,
        textcoords="offset points",
        ha="center" if abs(x) < 1 else "left" if x > 0 else "right",
        va="center" if abs(y) < 1 else "bottom" if y > 0 else "top",
        fontsize=9,
        color=INK,
        path_effects=[withStroke(linewidth=2.5, foreground="white")],
        parse_math=False,  # a name is text: "$" in it is no formula
        arrowprops={"arrowstyle": "-", "color": SOFT, "linewidth": 0.7, "shrinkB": 4} if far else None,
    )
