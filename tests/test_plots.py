"""Plots: accuracy over arithmetic, and schedules."""

import json
import os
import sys
from dataclasses import asdict
from itertools import combinations

import pytest

from hf_tokenprune import PruningConfig, PruningStage
from hf_tokenprune.viz import (
    OperatingPoint,
    accuracy_over_macs,
    comparison_picture,
    draw_tokens,
    plots,
    schedule_picture,
    schedule_plot,
)


def crowded_points() -> list[OperatingPoint]:
    return [
        OperatingPoint("unpruned", 4.1, 0.916, 0.894, 0.935),
        OperatingPoint("top_k 0.7", 2.5, 0.911, 0.889, 0.931),
        OperatingPoint("evit 0.7", 2.56, 0.9135, 0.891, 0.933),
        OperatingPoint("power_bert", 2.52, 0.905, 0.881, 0.925),
        OperatingPoint("tome $r=8$", 2.52, 0.905),
        OperatingPoint("top_k 0.5", 1.8, 0.896, 0.872, 0.917),
    ]


@pytest.mark.parametrize("points", [crowded_points(), [OperatingPoint("alone", 1e-3, 1.0)]], ids=["crowded", "alone"])
def test_plot_is_an_image(tmp_path, points):
    pytest.importorskip("matplotlib")
    image_module = pytest.importorskip("PIL.Image")
    path = accuracy_over_macs(points, tmp_path / "plot.png", title="a $title")
    with image_module.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 400
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 10
    assert os.listdir(tmp_path) == ["plot.png"]


def test_plot_labels_do_not_overlap():
    pytest.importorskip("matplotlib")
    from matplotlib.text import Annotation, Text

    points = crowded_points()
    figure = plots._draw(points, "t")
    figure.canvas.draw()
    axes = figure.axes[0]
    labels = [text for text in axes.texts if isinstance(text, Annotation)]
    assert sorted(label.get_text() for label in labels) == sorted(point.name for point in points)
    frame = axes.get_window_extent()
    boxes = [Text.get_window_extent(label) for label in labels]
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    for box in boxes:
        assert frame.x0 <= box.x0 <= box.x1 <= frame.x1
        assert frame.y0 <= box.y0 <= box.y1 <= frame.y1
        for point in points:
            assert not box.contains(*axes.transData.transform((point.macs, point.accuracy)))


def test_plot_leaves_the_callers_matplotlib_alone(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    accuracy_over_macs(crowded_points()[:1], tmp_path / "plot.png", title="t")
    assert pyplot.get_fignums() == before


def test_plot_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"hf_tokenprune\[viz\]"):
        accuracy_over_macs(crowded_points(), tmp_path / "plot.png", title="t")
    assert not os.listdir(tmp_path)


def test_plot_needs_points(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        accuracy_over_macs([], tmp_path / "plot.png", title="t")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.0, 0.5), r"macs \(0.0\)"),
        ((1.0, 91.6), r"accuracy \(91.6\)"),
        ((1.0, 0.5, 0.4), "given together"),
        ((1.0, 0.5, 0.6, 0.7), r"interval \(0.6, 0.7\)"),
    ],
)
def test_operating_points_check_themselves(values, message):
    with pytest.raises(ValueError, match=message):
        OperatingPoint("name", *values)


def compared() -> dict:
    rows = [("control", 80.0, [0.0, 0.0], 2.0), ("pruned", 79.0, [-2.5, 0.5], 1.0), ("perfect", 100.0, [19, 21], 1.5)]
    names = ("run", "accuracy", "interval", "gmacs")
    return {"quality": [dict(zip(names, row)) for row in rows]}


def test_intervals_of_a_comparison_stand_on_its_control(tmp_path):
    pytest.importorskip("matplotlib")
    image_module = pytest.importorskip("PIL.Image")
    points = plots.comparison_points(compared()["quality"])
    assert [(point.name, point.low, point.high) for point in points] == [
        ("control", 0.8, 0.8),
        ("pruned", 0.775, 0.805),
        ("perfect", 0.99, 1.0),
    ]
    axes = plots._draw(points, "t").axes[0]
    drawn = [bars[0].get_segments()[0][:, 1].tolist() for _, _, bars in axes.containers]
    assert drawn == [pytest.approx([point.low, point.high]) for point in points]
    assert [bars[0].get_xdata()[0] for bars in axes.containers] == [2.0, 1.0, 1.5]
    with image_module.open(comparison_picture(compared(), tmp_path / "plot.png", title="t")) as image:
        assert json.loads(image.text["Description"]) == {"points": [asdict(point) for point in points]}


@pytest.mark.parametrize(
    ("stages", "bars", "label"),
    [
        ([("keep_rate", [1, 2], [0.4, 0.16])], {0: 1, 1: 0.4, 2: 0.16, 3: 0.16}, "share of tokens"),
        ([("site_keep_rate", [0, 2], [0.5, 0.5])], {0: 0.5, 1: 0.5, 2: 0.25, 3: 0.25}, "share of tokens"),
        ([("median_threshold", [1, 3], [0.9, 1.2])], {1: 0.9, 3: 1.2}, "median_threshold"),
        ([("keep_rate", [0], [0.5]), ("top_p", [2], [0.9])], {0: 0.5, 2: 0.9}, "keep_rate or top_p"),
    ],
)
def test_a_schedule_is_drawn_as_its_values_say(stages, bars, label, tmp_path):
    pytest.importorskip("matplotlib")
    image_module = pytest.importorskip("PIL.Image")
    made = [PruningStage(layers=own, saliency="key_norm", rule=rule, values=values) for rule, own, values in stages]
    pruning = PruningConfig(stages=made)
    axes = schedule_plot._draw(pruning, 4, "t", 0.5).axes[0]
    drawn = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axes.patches}
    assert drawn == pytest.approx(bars)
    assert axes.get_ylabel().startswith(label) and "0.500 of the unpadded" in axes.get_xlabel()
    path = schedule_picture(pruning, tmp_path / "schedule.png", layers=4, title="a $title", mac_ratio=0.5)
    with image_module.open(path) as image:
        assert json.loads(image.text["Description"])["values"] == [value for *_, own in stages for value in own]
        assert min(image.size) > 400 and len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 10
    with pytest.raises(ValueError, match=r"must be in \[0, 0\]"):
        schedule_picture(pruning, path, layers=1, title="t", mac_ratio=0.5)


def test_a_schedule_that_awaits_the_depth_is_drawn_at_it(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn, draw = [], schedule_plot._draw
    monkeypatch.setattr(schedule_plot, "_draw", lambda *given: drawn.append(draw(*given)) or drawn[-1])
    pruning = PruningConfig.coerce({"preset": "ltp", "final_token_threshold": 0.01})
    schedule_picture(pruning, tmp_path / "schedule.png", layers=4, title="t", mac_ratio=0.5)
    bars = [bar.get_height() for bar in drawn[0].axes[0].patches]
    assert bars == pytest.approx(pruning.resolve(4).values) and len(bars) == 4


def test_tokens_are_drawn_for_models_of_any_name(tmp_path):
    pytest.importorskip("matplotlib")
    image_module = pytest.importorskip("PIL.Image")
    alive = {"unpruned": [9.0, 9.0], "pruned": [9.0, 4.0], "another": [9.0, 6.0], "one more": [9.0, 7.0]}
    with image_module.open(draw_tokens(alive, tmp_path / "tokens.png", title="t")) as image:
        colours = {colour: count for count, colour in image.convert("RGB").getcolors(maxcolors=1 << 24)}
    large = [colour for colour, count in colours.items() if count > 2_000]
    assert len(large) >= 5  # one for each, and the ground
