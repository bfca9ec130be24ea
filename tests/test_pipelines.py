"""Stock pipelines on a saved folder: no word of complaint, and the same answers one by one and in batches."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from fresh import run_fresh
from PIL import Image
from transformers import AutoTokenizer, BertConfig, pipeline

from hf_tokenprune import PruningConfig, prune
from hf_tokenprune.packaged import model_path


pytestmark = pytest.mark.real  # the tokenizer comes from a pinned package

TOP_K = PruningConfig.preset("top_k", layers=[1, 2], keep_rate=0.5)
TASKS = {
    "BertForSequenceClassification": "text-classification",
    "BertForTokenClassification": "token-classification",
    "ViTForImageClassification": "image-classification",
    "DeiTForImageClassification": "image-classification",
    "DeiTForImageClassificationWithTeacher": "image-classification",
    "Dinov2ForImageClassification": "image-classification",
    "Dinov2WithRegistersForImageClassification": "image-classification",
}
LABELS = {0: "dull", 1: "bright", 2: "neither"}
TEXTS = [
    "Token pruning drops the tokens that do not matter.",
    "Yes",
    "",
    "A much longer text, which goes on and on about nothing in particular, so that the batch has to be padded " * 2,
    "Why not?",
    "The quick brown fox jumps over the lazy dog while nobody is looking",
    "one two three",
    "naïve café 漢字 🙂",
    "The end.",
]
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 24, "width": 24},
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def images() -> list[Image.Image]:
    """Of several sizes."""
    shapes = [(30, 40), (24, 24), (100, 20), (17, 63), (50, 50), (24, 80), (33, 31), (90, 90), (25, 26)]
    return [
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8))
        for seed, shape in enumerate(shapes)
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A saved pruned model of every class, with its tokenizer or image processor."""
    home = tmp_path_factory.mktemp("pipelines")
    text = BertConfig(**{**tiny.BERT.to_dict(), "vocab_size": 30522, "max_position_embeddings": 128})
    found = {}
    for parameter in tiny.ALL:
        case = parameter.values[0]
        if parameter.marks[0].args[0]:
            continue
        case = tiny.Case(case.native, text if case.text else case.config)
        pruned = prune(tiny.build(case), TOP_K)
        pruned.config.id2label, pruned.config.label2id = LABELS, {name: i for i, name in LABELS.items()}
        folder = found[str(case)] = home / str(case)
        pruned.save_pretrained(folder)
        if case.config is text:
            AutoTokenizer.from_pretrained(model_path("bert-tiny")).save_pretrained(folder)
        else:
            (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return found


@pytest.fixture
def complaints() -> Any:
    """What Transformers logs as a warning or an error."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


def inputs_for(name: str) -> list[Any]:
    return TEXTS if name.startswith("Bert") else images()


def assert_same(found: Any, expected: Any) -> None:
    """Equal but for the last digits of the numbers."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for left, right in zip(found, expected):
            assert_same(left, right)
    else:
        assert found == (pytest.approx(expected, abs=1e-5) if isinstance(expected, (float, np.floating)) else expected)


heads = pytest.mark.parametrize("name", [pytest.param(str(c.values[0]), marks=c.marks) for c in tiny.HEADS])


@heads
def test_batches_answer_like_single_inputs(name, folders, complaints):
    pipe = pipeline(TASKS[name], model=str(folders[name]), trust_remote_code=True)
    inputs = inputs_for(name)
    options = {} if "Token" in name else {"top_k": None}
    single = [pipe(one, **options) for one in inputs]
    batched = pipe(inputs, batch_size=8, **options)

    assert type(pipe.model).__name__ == f"TokenPrune{name}"
    assert not complaints
    assert_same(batched, single)
    if "Token" not in name:
        assert all({answer["label"] for answer in answers} == set(LABELS.values()) for answers in single)
        assert len({round(answers[0]["score"], 4) for answers in single}) > 4


@heads
def test_answers_are_those_of_the_model(name, folders):
    pipe = pipeline(TASKS[name], model=str(folders[name]), trust_remote_code=True)
    one = inputs_for(name)[0]
    encoded = (pipe.tokenizer if name.startswith("Bert") else pipe.image_processor)(one, return_tensors="pt")
    with torch.no_grad():
        out = pipe.model(**encoded, output_token_trace=True)
    probabilities = out.logits[0].softmax(-1)
    if "Token" in name:
        answers = pipe(one)
        best = probabilities[1:-1].max(-1)
        assert [answer["entity"] for answer in answers] == [LABELS[i] for i in best.indices.tolist()]
        assert [answer["score"] for answer in answers] == pytest.approx(best.values.tolist(), abs=1e-5)
        words = [answer["word"].removeprefix("##") for answer in answers]
        assert words == [one[answer["start"] : answer["end"]].lower() for answer in answers]
        assert pipe(one, aggregation_strategy="simple")[0]["entity_group"] in LABELS.values()
    else:
        answers = {answer["label"]: answer["score"] for answer in pipe(one, top_k=None)}
        assert [answers[label] for label in LABELS.values()] == pytest.approx(probabilities.tolist(), abs=1e-5)
    assert out.token_trace.counts[-1] < out.token_trace.counts[0] < next(iter(encoded.values())).numel()


TOKENS = {str(param.values[0]): param.values[0].tokens for param in tiny.ALL}


@pytest.mark.parametrize("name", [pytest.param(str(c.values[0]), marks=c.marks) for c in tiny.ALL])
def test_features_are_full_length_sequences(name, folders, complaints):
    task = "feature-extraction" if name.startswith("Bert") else "image-feature-extraction"
    pipe = pipeline(task, model=str(folders[name]), trust_remote_code=True)
    inputs = inputs_for(name)
    single = [np.array(pipe(one)) for one in inputs]
    batched = pipe(inputs, batch_size=4)
    batched = [np.array(features) for features in batched]

    assert type(pipe.model).__name__ == "TokenPrune" + name.partition("For")[0].removesuffix("Model") + "Model"
    assert not [line for line in complaints if "is not supported for" in line]
    lengths = [len(pipe.tokenizer(one).input_ids) if name.startswith("Bert") else TOKENS[name] for one in inputs]
    for one, many, length in zip(single, batched, lengths):
        assert one.shape == (1, length, 32)
        np.testing.assert_allclose(many[:, :length], one, atol=1e-5)


FRESH = """
import logging
from PIL import Image
from transformers import pipeline

for name, (task, folder, inputs) in ARGUMENTS["runs"].items():
    inputs = inputs if name.startswith("Bert") else [Image.open(path) for path in inputs]
    pipe = pipeline(task, model=folder, trust_remote_code=True)
    answers = [pipe(inputs[0]), pipe(inputs, batch_size=8)]
    RESULT[name] = json.loads(json.dumps(answers, default=float))
"""


def test_pipelines_run_without_the_package(folders, tmp_path):
    paths = []
    for index, image in enumerate(images()):
        paths.append(str(tmp_path / f"{index}.png"))
        image.save(paths[-1])
    names = [name for name in TASKS if name in folders]
    runs = {n: (TASKS[n], str(folders[n]), TEXTS if n.startswith("Bert") else paths) for n in names}
    runs["BertModel"] = ("feature-extraction", str(folders["BertModel"]), TEXTS)
    finished = run_fresh(FRESH, tmp_path / "fresh", runs=runs)

    assert "is not supported for" not in finished.printed
    for name, (task, folder, _) in runs.items():
        pipe = pipeline(task, model=folder, trust_remote_code=True)
        inputs = inputs_for(name)
        assert_same(finished.result[name], [pipe(inputs[0]), pipe(inputs, batch_size=8)])
