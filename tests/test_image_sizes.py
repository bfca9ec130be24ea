"""Images that are not of the model's size: every script does what the native model does when it is told so."""

import copy
import json
import logging
import re
import runpy
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny
import torch
import transformers
from fresh import run_fresh
from transformers import (
    AutoModelForImageClassification,
    DeiTForImageClassification,
    Dinov2ForImageClassification,
    HfArgumentParser,
    PreTrainedModel,
    ViTForImageClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_tokenprune import TokenPruneTrainingArguments, images, prune
from hf_tokenprune.families import supported_natives
from hf_tokenprune.hub.cards import measured_card, read_about
from hf_tokenprune.prediction import PredictionArguments, predict_dataset
from hf_tokenprune.profiling.arguments import ProfileArguments
from hf_tokenprune.profiling.run import run_profile
from hf_tokenprune.training.finetune import FinetuneArguments, finetune
from hf_tokenprune.training.timed_runs import time_runs


SCRIPTS = Path(__file__).parents[1] / "scripts"
FAMILIES = {
    "ViT": (ViTForImageClassification, tiny.VIT),
    "DeiT": (DeiTForImageClassification, tiny.DEIT),
    "DINOv2": (Dinov2ForImageClassification, tiny.DINOV2),
}
FAMILIES = {name: pair for name, pair in FAMILIES.items() if pair[0].__name__ in supported_natives()}
TOP_K = '{"preset": "top_k", "layers": [1, 2], "keep_rate": 0.5}'
SIZES = [(32, 32), (16, 40), (20, 24)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    shades = np.random.default_rng(0).integers(0, 256, (24, 30, 20, 3), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = {"image": list(shades), "label": [index % 3 for index in range(24)]}
    path = tmp_path_factory.mktemp("data") / "pics.parquet"
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return str(path)


def save(folder: Path, family: str, size: tuple[int, int]) -> PreTrainedModel:
    native, config = FAMILIES[family]
    config = copy.deepcopy(config)
    config.id2label, config.label2id = dict(enumerate("abc")), {name: place for place, name in enumerate("abc")}
    model = tiny.build(tiny.Case(native, config))
    model.save_pretrained(folder)
    ViTImageProcessorPil(size=dict(zip(("height", "width"), size))).save_pretrained(folder)
    return model


def native_logits(model: PreTrainedModel, data: str, size: tuple[int, int]) -> torch.Tensor:
    """Of the native model, told so."""
    processor = ViTImageProcessorPil(size=dict(zip(("height", "width"), size)))
    rows = datasets.load_dataset("parquet", data_files=data, split="train")
    told = {} if isinstance(model, Dinov2ForImageClassification) else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        return model(processor(list(rows["image"]), return_tensors="pt")["pixel_values"], **told).logits


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_are_the_native_models(family, size, data, tmp_path, caplog):
    images._say_once.cache_clear()
    model = save(tmp_path / "model", family, size)
    given = {"model_name_or_path": str(tmp_path / "model"), "dataset_name": data, "image_column": "image"}
    with caplog.at_level(logging.WARNING, logger="hf_tokenprune.images"):
        predict_dataset(PredictionArguments(**given, output_dir=str(tmp_path / "out"), logits=True))
    said = [f"images of {size[0]} x {size[1]}: position embeddings of 24 x 24 are interpolated"]
    assert [each.getMessage() for each in caplog.records] == ([] if family == "DINOv2" else said)
    read = datasets.load_dataset("parquet", data_files=str(tmp_path / "out" / "*.parquet"), split="train")
    expected = native_logits(model, data, size)
    torch.testing.assert_close(torch.tensor(read["logits"][:]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", ["predict", "embed"])
def test_a_pruned_model_predicts_at_any_size(family, task, data, tmp_path):
    save(tmp_path / "model", family, (16, 40))
    given = {"model_name_or_path": str(tmp_path / "model"), "dataset_name": data, "image_column": "image", "task": task}
    done = predict_dataset(PredictionArguments(**given, output_dir=str(tmp_path / "out"), pruning=TOP_K))
    assert done["rows"] == 24 and done["tokens"] == 24 * (40 + (2 if family == "DeiT" else 1))


def train(model: Path, data: str, output: Path, **more: object) -> dict:
    given = {"model_name_or_path": str(model), "dataset_name": data, "image_column": "image", "max_steps": 3}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "output_dir": str(output)}
    parser = HfArgumentParser([FinetuneArguments, TokenPruneTrainingArguments])
    return finetune(*parser.parse_dict({**quiet, **given, **more}))


@pytest.mark.parametrize("family", FAMILIES)
def test_training_and_its_timing(family, data, tmp_path):
    """With a teacher, as a comparison has it; the processor is saved with its size, so that prediction goes on."""
    save(tmp_path / "model", family, (24, 24))
    train(tmp_path / "model", data, tmp_path / "seed-0" / "baseline", image_size=32)
    start = tmp_path / "seed-0" / "baseline" / "model"
    taught = {"teacher_name_or_path": str(start), "distillation_weight": 1.0, "pruning": TOP_K}
    report = train(start, data, tmp_path / "seed-0" / "pruned", **taught, dataloader_num_workers=1)
    assert report["test"]["test_mac_ratio"] < 0.9 and report["interpolated"] is (family != "DINOv2")
    rows = time_runs(tmp_path / "seed-0", [], inputs=4, rounds=3)
    assert [row["model"] for row in rows] == ["padded", "padded, sorted by length", "unpadded", "pruned"]
    trained = AutoModelForImageClassification.from_pretrained(start)
    given = {"dataset_name": data, "image_column": "image", "logits": True, "output_dir": str(tmp_path / "out")}
    predict_dataset(PredictionArguments(model_name_or_path=str(start), **given))
    read = datasets.load_dataset("parquet", data_files=str(tmp_path / "out" / "*.parquet"), split="train")
    told = {} if family == "DINOv2" else {"interpolate_pos_encoding": True}
    processor = ViTImageProcessorPil.from_pretrained(start)
    with torch.no_grad():
        pictures = list(datasets.load_dataset("parquet", data_files=data, split="train")["image"])
        expected = trained(processor(pictures, return_tensors="pt")["pixel_values"], **told).logits
    torch.testing.assert_close(torch.tensor(read["logits"][:]), expected, rtol=0, atol=1e-5)


@pytest.mark.skipif("DINOv2" not in FAMILIES, reason="needs a later transformers")
@pytest.mark.parametrize(("student", "teacher"), [("ViT", "DINOv2"), ("DINOv2", "ViT")])
def test_a_teacher_of_another_family_is_told_for_itself(student, teacher, data, tmp_path):
    for family in (student, teacher):
        save(tmp_path / family, family, (24, 24))
    taught = {"teacher_name_or_path": str(tmp_path / teacher), "distillation_weight": 1.0, "pruning": TOP_K}
    assert train(tmp_path / student, data, tmp_path / "out", image_size=32, **taught)["train"]["train_loss"] > 0


def test_a_profile(data, tmp_path):
    save(tmp_path / "model", "ViT", (16, 40))
    few = {"rounds": 3, "batch_rounds": 3, "batch_size": 4, "batch_sizes": [2], "max_inputs": 6, "device": "cpu"}
    given = {"model_name_or_path": str(tmp_path / "model"), "output_dir": str(tmp_path / "out"), "pruning": TOP_K}
    report = run_profile(ProfileArguments(**given, **few, dataset_name=data, image_column="image"), lambda *_: None)
    assert len(report.curve) > 1
    made_up = ProfileArguments(**given, **few, image_size=32)
    assert run_profile(made_up, lambda *_: None).by_batch_size


def run(script: str, monkeypatch: pytest.MonkeyPatch, **given: object) -> None:
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", [script, *words])
    runpy.run_path(str(SCRIPTS / script), run_name="__main__")


@pytest.mark.parametrize("how", ["plan", "calibrate", "search"])
def test_a_plan(how, data, tmp_path, monkeypatch):
    save(tmp_path / "model", "ViT", (16, 40))
    given = {"model_name_or_path": tmp_path / "model", "dataset_name": data, "image_column": "image", "device": "cpu"}
    few = {"max_inputs": 4, "batch_size": 4, "target_macs": 0.6, "held_back": 8, "split": "test"}
    run("run_plan.py", monkeypatch, **given, **few, how=how, output_dir=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["stages"]


def test_a_plan_by_the_clock(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKENPRUNE_CACHE", str(tmp_path / "cache"))
    save(tmp_path / "model", "ViT", (16, 40))
    given = {"model_name_or_path": tmp_path / "model", "dataset_name": data, "image_column": "image", "device": "cpu"}
    few = {"max_inputs": 4, "batch_size": 4, "target_speedup": 1.01, "layers": 1, "rounds": 3}
    run("run_plan.py", monkeypatch, **given, **few, output_dir=tmp_path / "out")
    assert (tmp_path / "out" / "plan.json").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_explanation(family, data, tmp_path, monkeypatch):
    save(tmp_path / "model", family, (16, 40))
    given = {"model_name_or_path": tmp_path / "model", "dataset_name": data, "image_column": "image", "inputs": 2}
    run("run_explain.py", monkeypatch, **given, pruning=TOP_K, output_dir=tmp_path / "seen")
    assert (tmp_path / "seen" / "patches-1.png").exists()


def test_what_a_model_is_told_is_of_the_batch():
    model = prune(tiny.build(tiny.Case(*FAMILIES["ViT"])), "top_k")
    for size, told in (((24, 24), False), ((32, 24), True), ((24, 24), False)):
        batch = images.sized(model, {"pixel_values": torch.zeros(1, 3, *size), "interpolate_pos_encoding": True})
        assert batch.get("interpolate_pos_encoding", False) is told and model(**batch).logits.shape == (1, 3)


RUN_BLOCK = """
known = {}
exec(ARGUMENTS["block"], known)
RESULT["shape"] = list(known["outputs"].logits.shape)
"""


@pytest.mark.parametrize(("size", "told"), [((24, 24), False), ((16, 40), True)], ids=str)
def test_the_code_of_a_pushed_card_runs(size, told, tmp_path, monkeypatch):
    save(tmp_path / "model", "DeiT", size)
    run("run_push.py", monkeypatch, model_name_or_path=tmp_path / "model", pruning=TOP_K, stage_dir=tmp_path / "staged")
    card = (tmp_path / "staged" / "README.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)
    assert ("model(**inputs, interpolate_pos_encoding=True)" in block) is told
    if not told:  # the other tests' case
        return
    try:
        transformers.AutoImageProcessor.from_pretrained  # noqa: B018
    except ImportError:
        pytest.skip("this transformers gives the name only with torchvision")
    block = re.sub(r'^name = ".*"$', f'name = "{tmp_path / "staged"}"', block, flags=re.MULTILINE)
    assert run_fresh(RUN_BLOCK, tmp_path, block=block).result["shape"] == [1, 3]


def test_a_measured_card_says_what_the_comparison_told_it():
    root = SCRIPTS.parent
    about = read_about(root / "recipes" / "dinov2-mnist")
    evidence = json.loads((root / "model_cards" / "evidence" / "dinov2-mnist.json").read_text())
    for told in (True, False):
        given = {"recipe": "any", "picture": "a.png", "template": root / "model_cards" / "template.md"}
        card = measured_card(about, evidence | {"interpolated": told}, **given)
        assert ("interpolate_pos_encoding=True" in card.text) is told


def test_a_processor_that_leaves_images_as_they_are(data, tmp_path):
    """One by one they have one size each; together they have not."""
    save(tmp_path / "model", "ViT", (24, 24))
    ViTImageProcessorPil(do_resize=False, size={"height": 24, "width": 24}).save_pretrained(tmp_path / "model")
    features = datasets.Features({"image": datasets.Image()})
    pictures = [np.full((24, 24 + 4 * index, 3), 40 * index, dtype=np.uint8) for index in range(4)]
    datasets.Dataset.from_dict({"image": pictures}, features=features).to_parquet(tmp_path / "pics.parquet")
    given = {"model_name_or_path": str(tmp_path / "model"), "dataset_name": str(tmp_path / "pics.parquet")}
    given |= {"image_column": "image", "output_dir": str(tmp_path / "out")}
    with pytest.raises(SystemExit, match="the images of a batch must have one size, and the image processor makes 24"):
        predict_dataset(PredictionArguments(**given))
    assert predict_dataset(PredictionArguments(**given, max_rows_per_batch=1))["rows"] == 4
