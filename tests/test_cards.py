"""Model cards are what their evidence says, to the letter."""

import json
import re
import runpy
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from fresh import run_fresh
from huggingface_hub import ModelCard
from packaging.licenses import canonicalize_license_expression
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.pipelines import PIPELINE_REGISTRY

from hf_tokenprune import packaged, prune
from hf_tokenprune.hub.cards import (
    evaluation_results,
    measured_card,
    read_about,
    read_evidence,
    to_baseline,
    unmeasured_card,
)
from hf_tokenprune.viz.plots import comparison_points


ROOT = Path(__file__).parents[1]
RECIPES = [path.parent for path in sorted((ROOT / "recipes").glob("*/card.yaml"))]


def card(recipe: Path) -> tuple[ModelCard, dict, dict]:
    evidence = json.loads((ROOT / "model_cards" / "evidence" / f"{recipe.name}.json").read_text())
    about, template = read_about(recipe), ROOT / "model_cards" / "template.md"
    pictures = {"picture": f"evidence/{recipe.name}.png", "schedule": f"evidence/{recipe.name}-schedule.png"}
    address = f"outputs/{recipe.name}/seed-0/pruned/model"
    made = measured_card(about, evidence, recipe=recipe.name, **pictures, template=template, address=address)
    return made, about, evidence


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
    assert read.to_dict() == made.data.to_dict() and read.base_model == about.get("base_model")
    for name in (f"{recipe.name}.png", f"{recipe.name}-schedule.png"):
        assert f"(evidence/{name})" in written
    assert f"{to_baseline(rows)['points']:+.2f} points" in written.partition("| | |")[0]
    assert f"{rows['baseline']['accuracy']:.2f} %" in written
    (entry,) = evaluation_results(about, evidence)
    assert entry["value"] == result.metric_value and entry["dataset"]["id"] == about["dataset"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_metadata_are_values_that_the_hub_knows(recipe):
    """As far as that can be known offline: a licence of SPDX, and a task that transformers has a pipeline for."""
    data = ModelCard(made_text(recipe)).data
    assert canonicalize_license_expression(data.license).lower() == data.license
    assert data.pipeline_tag in PIPELINE_REGISTRY.get_supported_tasks()
    assert data.library_name == "transformers" and data.metrics == ["accuracy"]


def shown(text: str) -> str:
    """What a reader sees of a card as text: neither metadata nor code."""
    return re.sub(r"^```.*?^```$", "", ModelCard(text).text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_cards_render(recipe):
    text = shown(made_text(recipe))
    assert not re.findall(r"\{['\"{%]|\[['\"]|\bNone\b|\bnan\b|Undefined|\bTrue\b|\bFalse\b", text)
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) >= 4
    for table in tables:
        heading, line, *rows = [row.replace("\\|", "").count("|") for row in table.splitlines()]
        assert {heading, line, *rows} == {heading} and rows
        assert re.fullmatch(r"(\| --- )+\|", table.splitlines()[1])


@pytest.mark.real
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_what_a_card_says_of_its_base_is_so(recipe):
    about, baseline = read_about(recipe), yaml.safe_load((recipe / "baseline.yaml").read_text())
    folder = packaged.model_path(baseline["model_name_or_path"])
    config = json.loads((folder / "config.json").read_text())
    assert about["layers"] == config["num_hidden_layers"]
    assert f"{about['layers']} layers, {config['hidden_size']} wide" in about["base"]
    name, _, version = folder.name.rpartition("-")
    assert f"{name} {version}" in about["base"]


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "card.yaml").write_text("title: a model\nlanguage: en\n")
    with pytest.raises(ValueError, match="must have base, layers, license, pipeline_tag"):
        read_about(tmp_path)


@pytest.mark.parametrize("limits", ["\n- plain\n- So small: it gains nothing.", " one", "\n- 5", " 7", ""])
def test_limits_are_sentences(limits, tmp_path):
    whole = (RECIPES[0] / "card.yaml").read_text().split("limits:")[0]
    (tmp_path / "card.yaml").write_text(f"{whole}limits:{limits}\n")
    with pytest.raises(ValueError, match=r"limits \(.*\) of .*card.yaml must be a list of strings: quote one"):
        read_about(tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('layers: "2"', r"layers \('2'\) of .*card.yaml must be a whole number >= 1"),
        ("license:", r"license \(None\) of .*card.yaml must be a string that is not empty"),
        ("title: 7", r"title \(7\) of .*card.yaml must be a string"),
        ("base_model:", r"base_model \(None\) of .*card.yaml must be a string"),
        ("language: no", r"language \(False\) of .*card.yaml must be a code in quotes"),
    ],
)
def test_what_a_recipe_says_of_its_card_has_types(line, said, tmp_path):
    whole = (ROOT / "recipes" / "minilm-reuters-r8" / "card.yaml").read_text()
    name = line.partition(":")[0]
    (tmp_path / "card.yaml").write_text(re.sub(rf"^{name}:.*$", line, whole, flags=re.MULTILINE))
    with pytest.raises(ValueError, match=said):
        read_about(tmp_path)


EVIDENCE = ROOT / "model_cards" / "evidence"


def card_command(recipe: Path, evidence: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `run_card.py` ends with; nothing is written."""
    before = sorted(evidence.parent.iterdir())
    script = str(ROOT / "scripts" / "run_card.py")
    given = ["--recipe", str(recipe), "--evidence", str(evidence), "--output", str(evidence.parent / "card.md")]
    monkeypatch.setattr(sys, "argv", [script, *given])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    assert sorted(evidence.parent.iterdir()) == before
    return end.value.code


WRONG = {
    "minilm-reuters-r8": "dataset_name ('reuters-r8') of {}, baseline, must be '20newsgroups-religion', which",
    "bert-tiny-20newsgroups-religion": "model_name_or_path ('bert-tiny') of {}, baseline, must be 'minilm-l6', which",
}


@pytest.mark.parametrize("name", WRONG)
def test_evidence_is_of_the_recipe_whose_card_it_makes(name, tmp_path, monkeypatch):
    evidence, recipe = tmp_path / "comparison.json", ROOT / "recipes" / name
    evidence.write_bytes((EVIDENCE / "minilm-20newsgroups-religion.json").read_bytes())
    assert WRONG[name].format(recipe) in card_command(recipe, evidence, monkeypatch)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_evidence_fits_its_own_recipe_alone(recipe, tmp_path, monkeypatch):
    """Two recipes may share data and model. What older comparisons told is their prunings alone."""
    for other in RECIPES:
        evidence = EVIDENCE / f"{other.name}.json"
        old = {name: value for name, value in json.loads(evidence.read_text()).items() if name != "recipe"}
        (tmp_path / "old.json").write_text(json.dumps(old))
        if other == recipe:
            assert read_evidence(evidence, recipe) and read_evidence(tmp_path / "old.json", recipe) == old
        else:
            with pytest.raises(ValueError, match=r"must be .*(which .* was measured with|those of)"):
                read_evidence(evidence, recipe)
    assert "must be" in card_command(recipe, other_evidence(recipe, tmp_path), monkeypatch)


def other_evidence(recipe: Path, folder: Path) -> Path:
    """Of another recipe, in a folder of its own."""
    other = next(each for each in RECIPES if each != recipe)
    (folder / "other").mkdir()
    (folder / "other" / "comparison.json").write_bytes((EVIDENCE / f"{other.name}.json").read_bytes())
    return folder / "other" / "comparison.json"


def test_runs_that_were_not_measured_are_named(tmp_path):
    source = ROOT / "recipes" / "minilm-20newsgroups-religion"
    recipe = Path(shutil.copytree(source, tmp_path / "recipe"))
    content = yaml.safe_load((recipe / "controls.yaml").read_text()) | {"another": {"max_length": 9}}
    (recipe / "controls.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"^the runs of .*recipe must be those of .*: one alone has another$"):
        read_evidence(EVIDENCE / f"{source.name}.json", recipe)


CHANGES = {
    "pruning": ("pruned", {"pruning": '{"preset": "top_k", "layers": [1], "keep_rate": 0.5}'}),
    "learning_rate": ("pruned", {"learning_rate": 7e-5}),
    "distillation_weight": ("pruned", {"distillation_weight": None}),
    "num_train_epochs": ("baseline", {"num_train_epochs": 1}),
    "max_length": ("controls", {"truncated": {"pruning": None, "max_length": 7}}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_a_recipe_says_else_is_another_recipe(name, tmp_path):
    source = ROOT / "recipes" / "minilm-20newsgroups-religion"
    recipe = Path(shutil.copytree(source, tmp_path / "recipe"))
    evidence = EVIDENCE / f"{source.name}.json"
    assert read_evidence(evidence, recipe)
    file, change = CHANGES[name]
    content = yaml.safe_load((recipe / f"{file}.yaml").read_text()) | change
    (recipe / f"{file}.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(
        ValueError, match=rf"^{name} \(.*\) of .*recipe, {'truncated' if file == 'controls' else file}, must"
    ):
        read_evidence(evidence, recipe)


def test_a_pruning_may_be_written_either_way(tmp_path):
    source = ROOT / "recipes" / "minilm-20newsgroups-religion"
    recipe = Path(shutil.copytree(source, tmp_path / "recipe"))
    content = yaml.safe_load((recipe / "pruned.yaml").read_text())
    other = json.dumps(content["pruning"]) if isinstance(content["pruning"], dict) else json.loads(content["pruning"])
    (recipe / "pruned.yaml").write_text(yaml.safe_dump(content | {"pruning": other}))
    assert read_evidence(EVIDENCE / f"{source.name}.json", recipe)


def test_older_evidence_of_other_sites_is_refused(tmp_path):
    old = json.loads((EVIDENCE / "minilm-20newsgroups.json").read_text())
    del old["recipe"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    with pytest.raises(
        ValueError, match=r"^pruning \(sites \['0: token_prior, .*\) of .* must be \['1: cls_value_norm"
    ):
        read_evidence(tmp_path / "old.json", ROOT / "recipes" / "minilm-20newsgroups-half")


def test_a_card_says_of_which_seed_its_times_are():
    _, about, evidence = card(RECIPES[0])
    assert evidence["speed"] and "\nTimes are of the models of seed 0.\n" in made_text(RECIPES[0])
    given = {"recipe": "any", "picture": "a.png", "template": ROOT / "model_cards" / "template.md"}
    other = evidence | {"seeds": [4, 5, 6], "prunings": evidence["prunings"][:1] * 3}
    assert "\nTimes are of the models of seed 4.\n" in measured_card(about, other, seed=2, **given).text


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


RUN_BLOCKS = """
for block, saved in ARGUMENTS["blocks"]:
    known = {}
    exec(block, known)
    assert known["model"].config.pruning.to_dict() == saved, known["model"].config.pruning
    RESULT[block] = list(known["outputs"].logits.shape)
"""


def test_use_is_as_the_card_says(tmp_path):
    """In a process without this package, where tiny models lie at the addresses that the cards name."""
    cases = {case.native.__name__: case for case in tiny.cases(tiny.HEADS)}
    blocks, shapes = [], []
    for recipe in RECIPES:
        _, about, evidence = card(recipe)
        images = about["pipeline_tag"] == "image-classification"
        native = "Dinov2ForImageClassification" if images else "BertForSequenceClassification"
        if native not in cases:  # the model of this card needs a later transformers
            continue
        (block,) = re.findall(r"^```python\n(.*?)^```$", made_text(recipe), flags=re.MULTILINE | re.DOTALL)
        (folder,) = re.findall(r'^name = "(.*)"$', block, flags=re.MULTILINE)
        model = prune(tiny.build(cases[native]), evidence["prunings"][0])
        if "token_prior" in {site.saliency for site in model.config.pruning.sites.values()}:
            model.base_model.set_token_prior(torch.linspace(1, 2, tiny.VOCABULARY))  # training fills it
        model.save_pretrained(tmp_path / folder)
        sides = {"height": 24, "width": 24}
        processing = ViTImageProcessorPil(size=sides) if images else tiny.tokenizer()
        processing.save_pretrained(tmp_path / folder)
        blocks.append((block, model.config.pruning.to_dict()))
        shapes.append([1, 3])
    assert list(run_fresh(RUN_BLOCKS, tmp_path, blocks=blocks).result.values()) == shapes


def made_text(recipe: Path) -> str:
    return (ROOT / "model_cards" / f"{recipe.name}.md").read_text()


@pytest.mark.parametrize("pruning", [None, {"preset": "top_k", "layers": [1, 3], "keep_rate": 0.5}])
def test_a_card_names_the_repository_that_it_is_for(pruning):
    model = prune(tiny.build(tiny.cases(tiny.HEADS)[0]), pruning)
    given = {"title": "t", "base_model": None, "license": "mit", "template": ROOT / "model_cards" / "template.md"}
    for address in ("you/your-model", "this/repository"):
        text = unmeasured_card(model, **given, **({"address": address} if address.startswith("you") else {})).text
        assert f'\nname = "{address}"\n' in text and text.count(".from_pretrained(name") == 2
        assert ("with_values(saved.values)" in text) == (pruning is not None)


def test_budgets_that_were_measured_are_told():
    _, about, evidence = card(ROOT / "recipes" / "bert-tiny-20newsgroups-religion")
    measured = [[{"budget": 0.3, "mac_ratio_to_stock": ratio, "accuracy": 0.9}] for ratio in (0.30, 0.32)]
    quality = [row | {"at_budgets": measured} for row in evidence["quality"]]
    given = {"recipe": "any", "picture": "a.png", "template": ROOT / "model_cards" / "template.md"}
    told = "with the saved pruning and no other"
    assert told in measured_card(about, evidence, **given).text
    text = measured_card(about, evidence | {"quality": quality}, **given).text
    assert "| 0.3 | 0.310 | 90.00 |" in text and told not in text


def test_figures_that_arguments_were_chosen_by_make_no_card():
    _, about, evidence = card(RECIPES[0])
    given = {"recipe": "any", "picture": "a.png", "template": ROOT / "model_cards" / "template.md"}
    with pytest.raises(ValueError, match=r"held_out_samples \(500\) must be null"):
        measured_card(about, evidence | {"held_out_samples": 500}, **given)


def test_a_card_elsewhere_finds_its_pictures(tmp_path, monkeypatch):
    recipe = RECIPES[0]
    (tmp_path / "measured").mkdir()
    evidence = tmp_path / "measured" / "comparison.json"
    evidence.write_bytes((ROOT / "model_cards" / "evidence" / f"{recipe.name}.json").read_bytes())
    script, output = str(ROOT / "scripts" / "run_card.py"), tmp_path / "cards" / "mine.md"
    given = ["--recipe", str(recipe), "--evidence", str(evidence), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", [script, *given])
    runpy.run_path(script, run_name="__main__")
    pictures = re.findall(r"!\[.*?\]\((.+?)\)", output.read_text())
    assert len(pictures) == 2 and all((output.parent / picture).is_file() for picture in pictures)
    evidence.write_text('{"seeds": [0]}')
    with pytest.raises(SystemExit, match="wrote, and has no quality, prunings, machine"):
        runpy.run_path(script, run_name="__main__")
