"""What `run_profile` and `run_plan` read: labels become the model's classes, or it is said why there are none."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import torch
from scipy.stats import pearsonr
from sklearn.metrics import f1_score
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_tokenprune.profiling.arguments import ProfileArguments
from hf_tokenprune.profiling.run import run_profile
from hf_tokenprune.profiling.subject import Subject, load_subject
from hf_tokenprune.viz.profile_plots import draw_profile


TOP_K = '{"preset": "top_k", "layers": [1, 2], "keep_rate": 0.5}'
SEVERAL = {"problem_type": "multi_label_classification"}
NAMES = {0: "a", 1: "b", 2: "c"}


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Saves a tiny text model with changes to its config, and its tokenizer."""

    def call(native: type[PreTrainedModel] = BertForSequenceClassification, **changes: Any) -> Path:
        config = BertConfig.from_dict(copy.deepcopy(tiny.BERT).to_dict() | changes)
        tiny.build(tiny.Case(native, config)).save_pretrained(tmp_path / "model")
        tiny.tokenizer().save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return call


def names(*these: str) -> dict[str, dict]:
    return {"id2label": dict(enumerate(these)), "label2id": {name: number for number, name in enumerate(these)}}


def texts(path: Path, labels: list[Any] | None, length: int = 5) -> Path:
    rows = [{"text": f"w{4 + i % 40} " * length} for i in range(40)]
    if labels is not None:
        rows = [row | {"label": labels[i % len(labels)]} for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(model: Path, data: Path, **more: Any) -> Subject:
    arguments = ProfileArguments(model_name_or_path=str(model), dataset_name=str(data), pruning=TOP_K, **more)
    return load_subject(arguments, torch.device("cpu"))


def profile(model: Path, data: Path, output: Path, **more: Any) -> Any:
    given = {"rounds": 1, "batch_rounds": 1, "batch_sizes": [2], "max_inputs": 4, "device": "cpu", "pruning": TOP_K}
    given |= {"model_name_or_path": str(model), "dataset_name": str(data), "output_dir": str(output)}
    return run_profile(ProfileArguments(**given | more), lambda *_: None)


@pytest.mark.parametrize(
    "named, written, classes",
    [
        (NAMES.values(), ["b", "c"], {1, 2}),
        (["1", "2", "3"], [2, 3], {1, 2}),
        (["no", "yes", "maybe"], [1, 2], {1, 2}),
        (["LABEL_0", "LABEL_1", "LABEL_2"], [1, 2], {1, 2}),
        (["LABEL_0", "LABEL_1", "LABEL_2"], [1.0, 2.0], {1, 2}),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["LABEL_2"], {2}),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["x", "y", "z"], {0, 1, 2}),
    ],
    ids=["names", "names of digits", "numbers beside names", "numbers", "whole floats", "usual names", "ranks"],
)
def test_a_file_without_some_class_shifts_no_other(save, tmp_path, named, written, classes):
    subject = load(save(**names(*named)), texts(tmp_path / "data.jsonl", written))
    assert set(subject.labels) == classes and subject.unlabelled is None


@pytest.mark.parametrize("named", [["a", "b", "c"], ["LABEL_0", "LABEL_1", "LABEL_2"]])
def test_the_numbers_of_a_class_label_are_the_models_where_it_has_no_names(save, tmp_path, named):
    feature = datasets.ClassLabel(names=["c", "b", "a"])
    features = datasets.Features({"text": datasets.Value("string"), "label": feature})
    rows = {"text": ["w5 w6"] * 20, "label": [0, 1] * 10}  # c and b
    data = datasets.Dataset.from_dict(rows, features=features)
    data.to_parquet(tmp_path / "data.parquet")
    labels = load(save(**names(*named)), tmp_path / "data.parquet").labels
    assert set(labels) == ({2, 1} if named[0] == "a" else {0, 1})


WRONG = {
    "a name": (["a", "d"], NAMES.values(), "label ('d') must be one of the model's classes a, b, c:"),
    "a number": ([1, 3], ["LABEL_0", "LABEL_1", "LABEL_2"], "label (3) must be in 0 ... 2, the model's classes"),
    "too few to rank": (["x", "x"], ["LABEL_0", "LABEL_1", "LABEL_2"], "label ('x') must be one of the model's"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_labels_that_are_no_class_of_the_model(save, tmp_path, wrong):
    written, named, words = WRONG[wrong]
    with pytest.raises(ValueError) as error:
        load(save(**names(*named)), texts(tmp_path / "data.jsonl", written))
    assert words in str(error.value)


def test_a_model_that_is_right_gets_it_all_right(save, tmp_path):
    """Though the file has no row of class a."""
    model = save(**names("a", "b", "c"))
    subject = load(model, texts(tmp_path / "any.jsonl", None), split="train")
    with torch.no_grad():
        answers = torch.cat([subject.models["baseline"](**batch).logits for batch in subject.batches(8)])
    bias = answers[:, 0].max() - answers[:, 1:].min() + 1
    weights = BertForSequenceClassification.from_pretrained(model)
    weights.classifier.bias.data[0] -= bias
    weights.save_pretrained(model)
    rows = []
    for i in range(40):
        text = f"w{4 + i} w{43 - i % 30}"
        given = tiny.tokenizer()(text, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            rows.append({"text": text, "label": NAMES[int(weights.eval()(**given).logits.argmax())]})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = profile(model, tmp_path / "data.jsonl", tmp_path / "out", max_inputs=8)
    assert "a" not in {row["label"] for row in rows} and report.curve[0].score.value == 1.0


NO_CLASSES = {
    "embedder": (BertModel, {}, ["a", "b"], "BertModel gives an input no class"),
    "tokens": (BertForTokenClassification, {}, ["a", "b"], "BertForTokenClassification gives an input no class"),
    "words for numbers": (
        BertForSequenceClassification,
        names("score"),
        ["low", "high"],
        "(num_labels 1, problem_type None) gives numbers, and column 'label' holds 'low'",
    ),
    "several numbers": (
        BertForSequenceClassification,
        {"problem_type": "regression"},
        [0.5, 1.5],
        "(num_labels 3, problem_type regression) gives several numbers, and a row has one",
    ),
    "a list for a number": (
        BertForSequenceClassification,
        names("score"),
        [[0.3], [1.5]],
        "column 'label' does not hold one number a row",
    ),
    "a class for several labels": (
        BertForSequenceClassification,
        {"problem_type": "multi_label_classification"},
        ["a", "b"],
        "column 'label' does not hold several labels a row",
    ),
    "lists": (BertForSequenceClassification, {}, [[0, 2], [1]], "column 'label' does not hold one class a row"),
    "no column": (BertForSequenceClassification, {}, None, "the data have no column 'label'"),
    "holes": (BertForSequenceClassification, {}, ["a", None], "column 'label' is empty in some rows"),
}


@pytest.mark.parametrize("case", NO_CLASSES)
def test_without_classes_there_are_no_labels(save, tmp_path, case):
    native, changes, labels, words = NO_CLASSES[case]
    subject = load(save(native, **changes), texts(tmp_path / "data.jsonl", labels))
    assert subject.labels is None and words in subject.unlabelled and len(subject.inputs) == 8


NAMED = SEVERAL | names("a", "b", "c")
SCORED = {
    "a number": (names("score"), [0.3, 1.5, -1.0], {}, [[0.3], [1.5], [-1.0]], "pearson"),
    "names": (NAMED, [["c"], [], ["b", "a"]], {}, [[0, 0, 1], [0, 0, 0], [1, 1, 0]], "f1_micro"),
    "places": (SEVERAL, [[1, 0, 1], [0, 1, 0]], {}, [[1, 0, 1], [0, 1, 0]], "f1_micro"),
    "numbers": (SEVERAL, [[2], [], [0, 1]], {}, [[0, 0, 1], [0, 0, 0], [1, 1, 0]], "f1_micro"),
    "a problem that is asked for": (
        {}, [[2], [0, 1]], {"problem_type": "multi_label_classification"}, [[0, 0, 1], [1, 1, 0]], "f1_micro"
    ),
    "texts": (NAMED, ["c", "b|a"], {"label_separator": "|"}, [[0, 0, 1], [1, 1, 0]], "f1_micro"),
}  # fmt: skip
PROFILED = ("a number", "a problem that is asked for")


@pytest.mark.parametrize("case", SCORED)
def test_numbers_and_several_labels_have_a_curve_of_their_own(save, tmp_path, case):
    changes, written, more, expected, metric = SCORED[case]
    model, data = save(**changes), texts(tmp_path / "data.jsonl", written)
    subject = load(model, data, **more)
    found = {tuple(np.ravel(label)) for label in subject.labels}
    assert found == set(map(tuple, expected)) and subject.unlabelled is None
    if case not in PROFILED:
        return
    report = profile(model, data, tmp_path / "out", max_inputs=8, **more)
    first = report.curve[0].score
    assert first.what == metric and first.n == 8 and first.spread.low <= first.value <= first.spread.high
    logits = np.concatenate([subject.models["unpadded"](**b).logits.detach().numpy() for b in subject.batches(8)])
    if metric == "pearson":
        assert first.value == pytest.approx(pearsonr(logits[:, 0], subject.labels)[0], abs=1e-4)
    else:
        assert first.value == pytest.approx(f1_score(np.array(subject.labels), logits > 0, average="micro"), abs=1e-6)
    curve = json.loads((tmp_path / "out" / "report.json").read_text())["curve"]
    assert metric in curve[0] and "accuracy" not in curve[0]
    assert any("the curve is of" in note for note in report.notes)
    draw_profile(report, tmp_path / "out")


@pytest.mark.parametrize(
    "labels, words",
    [
        ([["a"], ["d"]], "label ('d') must be one of the model's classes a, b, c"),
        ([[0, 1], [1, 1]], "label ([0, 1]) must have 3 places, one for each of the model's"),
    ],
)
def test_labels_that_a_head_of_several_does_not_have(save, tmp_path, labels, words):
    with pytest.raises(ValueError) as error:
        load(save(**SEVERAL, **names("a", "b", "c")), texts(tmp_path / "data.jsonl", labels))
    assert words in str(error.value)


def test_what_is_missing_is_said_and_all_the_rest_is_there(save, tmp_path):
    given = {"max_inputs": 4, "batch_size": 6, "batch_sizes": [2, 5, 9]}
    report = profile(save(BertModel), texts(tmp_path / "data.jsonl", ["a", "b"]), tmp_path / "out", **given)
    sizes = [
        "Too few inputs (4) for batches of 6: they are of 4.",
        "Too few inputs (4) for latency over batch size at 5 and 9.",
    ]
    assert set(sizes) <= set(report.notes) and list(report.by_batch_size) == [2, 4]
    assert report.curve == [] and report.values("MACs of an input")["pruned"] > 0
    assert "No accuracy: BertModel gives an input no class." in (tmp_path / "out" / "report.md").read_text()


def test_a_test_split_without_labels_is_read_where_none_has_any(save, tmp_path):
    for split, word in {"train": "w5", "test": "w6"}.items():
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.jsonl").write_text(json.dumps({"text": word}) + "\n")
    subject = load(save(), tmp_path / "data")
    assert [row["input_ids"] for row in subject.inputs] == [[2, 6, 3]] and subject.labels is None


def test_texts_are_cut_to_what_the_model_takes(save, tmp_path):
    subject = load(save(), texts(tmp_path / "data.jsonl", None, length=100))
    assert set(subject.lengths()) == {tiny.BERT.max_position_embeddings}
    subject.models["pruned"](**subject.batch([0]))


@pytest.mark.parametrize("size", [24, [16, 24]], ids=str)
def test_made_up_images_have_the_models_sides(tmp_path, size):
    config = ViTConfig.from_dict(tiny.VIT.to_dict() | {"image_size": size})
    tiny.build(tiny.Case(ViTForImageClassification, config)).save_pretrained(tmp_path)
    subject = load_subject(ProfileArguments(model_name_or_path=str(tmp_path), pruning=TOP_K), torch.device("cpu"))
    height, width = subject.batch([0])["pixel_values"].shape[-2:]
    assert [height, width] == ([24, 24] if size == 24 else size)
    subject.models["pruned"](**subject.batch([0]))
