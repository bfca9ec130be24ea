"""An image at the input and after each pruning site: dropped patches dark, patches that are one token outlined."""

from __future__ import annotations

import colorsys
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_atomically
from .kept_words import DocumentView
from .plots import as_png, empty_panels


if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANELS = 4  # side by side
_LIGHTNESS, _SATURATION = 0.55, 0.9  # as on the page


def draw_patches(view: DocumentView, path: str | os.PathLike[str], *, title: str) -> Path:
    """Writes a PNG of an image's view, one panel for the input and one for each site.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: a view without a picture.
    """
    if view.picture is None or view.carriers is None:
        raise ValueError("the view must be of an image, with its trace")
    from matplotlib.image import imread

    image, first, columns = imread(io.BytesIO(view.picture.png)), view.picture.first, view.picture.columns
    figure, panels = empty_panels(title, len(view.layers) + 1, _PANELS)
    names = ["input", *(f"layer {layer}" for layer in view.layers)]
    states = zip([list(range(len(view.words))), *view.carriers], [{}, *view.colours()], strict=True)
    for axes, name, alive, (carriers, colours) in zip(panels, names, view.alive(), states, strict=True):
        patches = carriers[first:]
        rows = len(patches) // columns
        axes.imshow(image, extent=(0, columns, rows, 0), interpolation="nearest")
        axes.set_title(f"{name}: {alive} tokens", loc="left", fontsize=9)
        axes.set_axis_off()
        _draw_groups(axes, patches, columns, colours)
    return write_atomically(path, as_png(figure))


def _draw_groups(axes: Axes, patches: list[int], columns: int, colours: Mapping[int, tuple[float, int]]) -> None:
    from matplotlib.collections import LineCollection, PatchCollection
    from matplotlib.patches import Rectangle

    gone = [Rectangle((i % columns, i // columns), 1, 1) for i, carrier in enumerate(patches) if carrier < 0]
    axes.add_collection(PatchCollection(gone, facecolor="black", alpha=0.72, linewidth=0))
    for carrier, (hue, shade) in colours.items():
        own = {(i // columns, i % columns) for i, each in enumerate(patches) if each == carrier}
        colour = colorsys.hls_to_rgb(hue / 360, _LIGHTNESS + shade / 100, _SATURATION)
        axes.add_collection(LineCollection(list(_outline(own)), colors=[colour], linewidths=2))


def _outline(own: set[tuple[int, int]], inset: float = 0.06) -> Iterator[list[tuple[float, float]]]:
    """The borders of a set of patches (row, column), a little inside, as lines of (x, y)."""
    for row, column in own:
        # Lines go through to a neighbour that is in the set.
        left = column if (row, column - 1) in own else column + inset
        right = column + 1 if (row, column + 1) in own else column + 1 - inset
        top = row if (row - 1, column) in own else row + inset
        bottom = row + 1 if (row + 1, column) in own else row + 1 - inset
        sides = {
            (row - 1, column): [(left, top), (right, top)],
            (row + 1, column): [(left, bottom), (right, bottom)],
            (row, column - 1): [(left, top), (left, bottom)],
            (row, column + 1): [(right, top), (right, bottom)],
        }
        yield from (line for neighbour, line in sides.items() if neighbour not in own)
