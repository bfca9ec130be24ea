"""What a search of schedules found, as a picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_atomically
from .plots import ACCENT, SOFT, as_png, empty_figure


if TYPE_CHECKING:
    from ..planning.search import Search


def pareto_front(search: Search, path: str | os.PathLike[str], *, title: str, score: str = "accuracy") -> Path:
    """Draws all points, the front of those that no other beats, and the chosen one, and writes a PNG.

    Args:
        score: what the metric is called.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure, axes = empty_figure(title)
    axes.scatter([p.macs for p in search.points], [p.score for p in search.points], s=18, color=SOFT, label="schedules")
    front = search.front
    axes.step([p.macs for p in front], [p.score for p in front], where="post", color=ACCENT, label="front")
    chosen = search.chosen
    stages = search.pruning.stages if search.pruning else ()
    layers = [layer for stage in stages for layer in stage.layers]
    name = f"chosen: {stages[0].saliency}, layers {layers}" if stages else "chosen: nothing pruned"
    axes.scatter([chosen.macs], [chosen.score], s=110, marker="*", color="#bf3989", zorder=3, label=name)
    axes.set_xlabel("multiply-accumulates, of the stock encoder's")
    axes.set_ylabel(score)
    axes.set_xlim(0, 1.02)
    axes.legend(frameon=False, loc="lower right")
    return write_atomically(path, as_png(figure))
