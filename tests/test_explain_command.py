"""`run_explain.py` as a user runs it."""

import copy
import io
import json
import runpy
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers import BertForSequenceClassification, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_tokenprune import prune
from hf_tokenprune.viz import explain


SCRIPT = Path(__file__).parents[1] / "scripts" / "run_explain.py"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output_dir", str(tmp_path / "seen"), *arguments])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_texts_of_ones_own(run, tmp_path):
    tiny.save_text_model(tmp_path / "model")
    given = ["--model_name_or_path", str(tmp_path / "model"), "--pruning", "top_k"]
    assert "explain.html" in run(*given, "--texts", "w20 w9 <b>w4</b>", "w5")
    page = (tmp_path / "seen" / "explain.html").read_text()
    assert page.count("<article") == 2 and "keep_rate 0.7" in page
    assert {path.name for path in (tmp_path / "seen").iterdir()} == {"explain.html", "tokens_per_layer.png"}


@pytest.mark.parametrize("label", [["cat", "dog"], [0, 1, 1], "cat"])
def test_images_and_their_labels(run, tmp_path, label):
    ViTForImageClassification(tiny.VIT).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(tmp_path / "model")
    shades = np.random.default_rng(0).integers(0, 80, (10, 9, 9), dtype=np.uint8)
    kind = datasets.Value("int64" if label == [0, 1, 1] else "string")
    features = {"image": datasets.Image(mode="L"), "label": kind if label == "cat" else datasets.List(kind)}
    rows = datasets.Dataset.from_dict(
        {"image": list(shades), "label": [label] * 10}, features=datasets.Features(features)
    )
    rows.to_parquet(tmp_path / "pictures.parquet")
    run("--model_name_or_path", str(tmp_path / "model"), "--pruning", "top_k", "--dataset_name",
        str(tmp_path / "pictures.parquet"), "--image_column", "image", "--inputs", "2")  # fmt: skip
    page = (tmp_path / "seen" / "explain.html").read_text()
    shown = {"cat": "cat", "[0, 1, 1]": "LABEL_1, LABEL_2"}.get(str(label), "cat, dog")
    assert page.count("<article") == 2 and f">{shown}<" in page


def test_rows_of_a_data_set(run, tmp_path):
    tiny.save_text_model(tmp_path / "model")
    rows = [json.dumps({"text": "w20 " * (3 + i % 20), "label": "abc"[i % 3]}) + "\n" for i in range(20)]
    (tmp_path / "data.jsonl").write_text("".join(rows))
    run("--model_name_or_path", str(tmp_path / "model"), "--pruning", "top_k", "--inputs", "3", "--dataset_name",
        str(tmp_path / "data.jsonl"))  # fmt: skip
    assert (tmp_path / "seen" / "explain.html").read_text().count("<article") == 3
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps({"text": "w20 w9"}) + "\n" for _ in range(20)))
    run("--model_name_or_path", str(tmp_path / "model"), "--pruning", "top_k", "--inputs", "2", "--dataset_name",
        str(tmp_path / "bare.jsonl"))  # fmt: skip
    assert (tmp_path / "seen" / "explain.html").read_text().count("<article") == 2


@pytest.mark.parametrize("problem, labels", [("regression", 1), ("multi_label_classification", 3)])
def test_what_is_no_class_is_shown_as_it_is(problem, labels):
    torch.manual_seed(0)
    config = copy.deepcopy(tiny.BERT)
    config.update({"problem_type": problem, "num_labels": labels})
    model = prune(BertForSequenceClassification(config).eval(), "top_k")
    inputs = tiny.text_inputs([9, 5])
    logits = model(**inputs).logits
    for view, own in zip(explain(model, inputs, tiny.tokenizer()), logits):
        named = ", ".join(f"LABEL_{place}" for place in range(labels) if own[place] > 0) or "none"
        assert view.prediction == (f"{own.item():.3g}" if labels == 1 else named) and view.confidence is None


def test_pixels_beyond_the_last_whole_patch_are_not_shown():
    model = prune(tiny.build(tiny.Case(ViTForImageClassification, tiny.VIT)), "top_k")
    pixels = torch.nn.functional.pad(tiny.image_inputs(1)["pixel_values"], (0, 3, 0, 2))  # 26 x 27, patches of 4
    (view,) = explain(model, {"pixel_values": pixels, "interpolate_pos_encoding": True}, ViTImageProcessorPil())
    assert Image.open(io.BytesIO(view.picture.png)).size == (24, 24)


@pytest.mark.parametrize("wish", [{"do_normalize": False}, {"image_mean": None}], ids=["not", "unknown"])
def test_a_normalisation_that_was_not_done_is_not_undone(wish):
    model = prune(tiny.build(tiny.Case(ViTForImageClassification, tiny.VIT)), "top_k")
    processor = ViTImageProcessorPil()
    vars(processor).update(wish)
    pixels = torch.linspace(0, 1, 24 * 24).view(1, 1, 24, 24).expand(1, 3, 24, 24)
    (view,) = explain(model, {"pixel_values": pixels}, processor)
    shown = np.asarray(Image.open(io.BytesIO(view.picture.png)))
    assert np.array_equal(shown[:, :, 0], (pixels[0, 0] * 255).round().byte().numpy())


@pytest.mark.real
def test_images(run, tmp_path):
    ViTForImageClassification(tiny.VIT).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(tmp_path / "model")
    merging = '{"preset": "tome", "r": [6, 4]}'
    run("--model_name_or_path", str(tmp_path / "model"), "--pruning", merging, "--dataset_name",
        "mnist-5k", "--image_column", "image", "--inputs", "2")  # fmt: skip
    page = (tmp_path / "seen" / "explain.html").read_text()
    assert page.count("data:image/png;base64,") == page.count("<article") == 2
    assert page.count("<option") == 3  # the input and two sites: those that nobody leaves are not shown
    assert (tmp_path / "seen" / "patches-1.png").exists()
    run("--model_name_or_path", str(tmp_path / "model"), "--pruning", merging, "--dataset_name",
        "mnist-5k", "--image_column", "image", "--inputs", "1")  # fmt: skip
    assert [path.name for path in (tmp_path / "seen").glob("patches-*")] == ["patches-0.png"]  # no older ones


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--texts", "w5"], "pruning (None) must have sites"),
        (["--texts", "w5", "--pruning", "top_k", "--image_column", "image"], "takes texts"),
        (["--pruning", "top_k", "--dataset_name", "a", "--split", "validation"], "split ('validation') must be"),
        (["--pruning", "top_k", "--texts", "w5", "--max_length", "1"], "max_length (1) must be > 2"),
        (["--pruning", "top_k"], "one of texts (None) and dataset_name (None) must be given"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(run, tmp_path, arguments, said):
    tiny.save_text_model(tmp_path / "model")
    with pytest.raises(SystemExit) as stopped:
        run("--model_name_or_path", str(tmp_path / "model"), *arguments)
    assert said in str(stopped.value)
    assert not (tmp_path / "seen").exists()
