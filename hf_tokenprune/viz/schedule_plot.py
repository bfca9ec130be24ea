"""A picture of a schedule: what share of the tokens each layer leaves, or what its threshold is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_atomically
from ..modeling.pruning_config import PruningConfig
from .plots import ACCENT, INK, as_png, empty_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LABELLED_LAYERS = 24


def kept_shares(pruning: PruningConfig, layers: int) -> list[float] | None:
    """The share of an input's tokens that leaves each layer, structural ones not counted.

    Returns:
        None where the values do not say it: what reaches a threshold depends on the input.
    """
    shares, share = [], 1.0
    for layer in range(layers):
        site = pruning.sites.get(layer)
        if site is not None and site.rule not in ("keep_rate", "site_keep_rate"):
            return None
        if site is not None:
            share = share * site.value if site.rule == "site_keep_rate" else site.value
        shares.append(share)
    return shares


def schedule_picture(
    pruning: PruningConfig, path: str | os.PathLike[str], *, layers: int, title: str, mac_ratio: float
) -> Path:
    """Draws the schedule as a PNG, whose "Description" holds the numbers that it was drawn from.

    Args:
        layers: of the model. mac_ratio: what was measured of the unpadded model's multiply-accumulates.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: a site beyond the model's layers.
    """
    pruning = pruning.resolve(layers)
    figure = _draw(pruning, layers, title, mac_ratio)
    return write_atomically(path, as_png(figure, {"values": pruning.values, "layers": layers, "mac_ratio": mac_ratio}))


def _draw(pruning: PruningConfig, layers: int, title: str, mac_ratio: float) -> Figure:
    figure, axes = empty_figure(title)
    shares = kept_shares(pruning, layers)
    if shares is None:
        bars = {layer: site.value for layer, site in sorted(pruning.sites.items())}
        rules = " or ".join(sorted({site.rule for site in pruning.sites.values()}))
        axes.set_ylabel(f"{rules} (no bar: nothing is pruned)", color=INK)
    else:
        bars = dict(enumerate(shares))
        axes.set_ylabel("share of tokens that leaves the layer, by the rates", color=INK)
        axes.set_ylim(0, 1.08)
    drawn = axes.bar(list(bars), list(bars.values()), width=0.7, color=ACCENT)
    if len(bars) <= _LABELLED_LAYERS:
        axes.bar_label(drawn, labels=[f"{value:.3g}" for value in bars.values()], padding=2, fontsize=9, color=INK)
    axes.set_xlim(-0.6, layers - 0.4)
    axes.set_xticks(range(layers))
    axes.set_xlabel(f"layer\nmeasured: {mac_ratio:.3f} of the unpadded model's multiply-accumulates", color=INK)
    return figure
