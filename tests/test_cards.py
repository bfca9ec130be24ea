"""Model cards are what their evidence says, to the letter."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_tokenprune.hub.cards import evaluation_results, measured_card, read_about, to_baseline
from hf_tokenprune.viz.plots import comparison_points


ROOT = Path(__file__).parents[1]
RECIPES = [path.parent for path in sorted((ROOT / "recipes").glob("*/card.yaml"))]


def card(recipe: Path) -> tuple[ModelCard, dict, dict]:
    evidence = json.loads((ROOT / "model_cards" / "evidence" / f"{recipe.name}.json").read_text())
    about, template = read_about(recipe), ROOT / "model_cards" / "template.md"
    pictures = {"picture": f"evidence/{recipe.name}.png", "schedule": f"evidence/{recipe.name}-schedule.png"}
    return measured_card(about, evidence, recipe=recipe.name, **pictures, template=template), about, evidence


@pytest.mark.parametrize(
    "name",
    [
        "minilm-20newsgroups",
        "minilm-20newsgroups-half",
        "minilm-20newsgroups-religion",
        "minilm-reuters-r8",
        "dinov2-mnist",
        "bert-tiny-20newsgroups-religion",
    ],
)
def test_every_model_has_its_card(name):
    kept = ROOT / "model_cards"
    for path in (f"{name}.md", f"evidence/{name}.json", f"evidence/{name}.png", f"evidence/{name}-schedule.png"):
        assert (kept / path).stat().st_size > 1000
    assert ROOT / "recipes" / name in RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_pictures_are_of_their_evidence(recipe):
    image_module = pytest.importorskip("PIL.Image")
    _, about, evidence = card(recipe)
    pruned = next(row for row in evidence["quality"] if row["run"] == "pruned")
    values = [value for stage in evidence["prunings"][0]["stages"] for value in stage["values"]]
    schedule = {"values": values, "layers": about["layers"], "mac_ratio": pruned["mac_ratio_to_unpadded"]}
    accuracy = {"points": [asdict(point) for point in comparison_points(evidence["quality"])]}
    for name, numbers in ((f"{recipe.name}.png", accuracy), (f"{recipe.name}-schedule.png", schedule)):
        with image_module.open(ROOT / "model_cards" / "evidence" / name) as image:
            assert json.loads(image.text["Description"]) == numbers
            assert min(image.size) > 700
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 50  # not blank


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_card_is_its_evidence(recipe):
    made, about, evidence = card(recipe)
    written = (ROOT / "model_cards" / f"{recipe.name}.md").read_text()
    assert written == f"{str(made).rstrip()}\n"
    read = ModelCard(written).data
    rows = {row["run"]: row for row in evidence["quality"]}
    pruned = rows["pruned"]
    (result,) = read.eval_results
    assert result.metric_value == pytest.approx(pruned["accuracy"] / 100, abs=1e-4)
    assert read.to_dict() == made.data.to_dict() and read.base_model and read.license
    for name in (f"{recipe.name}.png", f"{recipe.name}-schedule.png"):
        assert f"(evidence/{name})" in written
    assert f"{to_baseline(rows)['points']:+.2f} points" in written.partition("| | |")[0]
    assert f"{rows['baseline']['accuracy']:.2f} %" in written
    (entry,) = evaluation_results(about, evidence)
    assert entry["value"] == result.metric_value and entry["dataset"]["id"] == about["dataset"]


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "card.yaml").write_text("title: a model\nlanguage: en\n")
    with pytest.raises(ValueError, match="must have base_model, layers, license, pipeline_tag"):
        read_about(tmp_path)


@pytest.mark.parametrize("limits", ["\n- plain\n- So small: it gains nothing.", " one", "\n- 5", " 7", ""])
def test_limits_are_sentences(limits, tmp_path):
    whole = (RECIPES[0] / "card.yaml").read_text().split("limits:")[0]
    (tmp_path / "card.yaml").write_text(f"{whole}limits:{limits}\n")
    with pytest.raises(ValueError, match=r"limits \(.*\) of .*card.yaml must be a list of strings: quote one"):
        read_about(tmp_path)


def test_a_baseline_that_was_better_is_not_hidden():
    _, about, evidence = card(ROOT / "recipes" / "bert-tiny-20newsgroups-religion")
    given = {"recipe": "any", "picture": "a.png", "template": ROOT / "model_cards" / "template.md"}
    said = measured_card(about, evidence, **given).text
    assert "-0.42 points of accuracy to the baseline that it started from" in said
    assert "Training on cost accuracy by itself: without pruning 1.67 points" in said
    quality = [row | {"interval_to_baseline": [-1.5, 0.5]} for row in evidence["quality"]]
    said = measured_card(about, evidence | {"quality": quality}, **given).text
    assert "-0.42 points of accuracy (95 % interval -1.50 to +0.50) to the baseline" in said


def test_the_difference_to_the_baseline_is_seed_by_seed():
    rows = {"baseline": {"accuracies": [90.0, 92.0]}, "pruned": {"accuracies": [91.0, 90.0]}}
    assert to_baseline(rows) == {"points": -0.5, "of_each_seed": [1.0, -2.0], "interval": None}


def test_figures_that_arguments_were_chosen_by_make_no_card():
    _, about, evidence = card(RECIPES[0])
    given = {"recipe": "any", "picture": "a.png", "template": ROOT / "model_cards" / "template.md"}
    with pytest.raises(ValueError, match=r"held_out_samples \(500\) must be null"):
        measured_card(about, evidence | {"held_out_samples": 500}, **given)
