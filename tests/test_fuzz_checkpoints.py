"""Broken folders of checkpoints: each loads as it was saved, or not at all, with the fault in one sentence."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from fresh import run_fresh
from safetensors.torch import load_file, save_file
from test_fuzz_configs import LONGEST_MESSAGE
from transformers import AutoModel, AutoModelForSequenceClassification, BertForSequenceClassification, BertModel

from hf_tokenprune import (
    PruningConfig,
    TokenPruneBertConfig,
    TokenPruneBertForSequenceClassification,
    TokenPruneBertModel,
    prune,
)
from hf_tokenprune.checkpoints import load_model


HEAD, BASE = TokenPruneBertForSequenceClassification, TokenPruneBertModel
CASE = tiny.Case(BertForSequenceClassification, tiny.BERT)
TOP_K = PruningConfig.preset("top_k", layers=[1, 2], keep_rate=0.5)
QUERY = "bert.encoder.layer.1.attention.self.query.weight"
INDEX = "model.safetensors.index.json"
Break = Callable[[Path], Any]

# How a file is broken

WAYS: dict[str, Break] = {
    "missing": lambda file: file.unlink(),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_text("\0 {garbage"),
    "bytes": lambda file: file.write_bytes(b"\xff\xfe\0\x80" * 9),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a loop": lambda file: (file.unlink(), file.symlink_to(file.name)),
    "a link to nothing": lambda file: (file.unlink(), file.symlink_to("nowhere")),
}


def in_json(name: str, change: Callable[[Any], Any]) -> Break:
    """change: returns another value, or None where it changes the one it gets."""

    def do(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        other = change(value)
        (folder / name).write_text(json.dumps(value if other is None else other))

    return do


def in_config(**values: Any) -> Break:
    return in_json("config.json", lambda config: config.update(values))


def without(*names: str) -> Break:
    return in_json("config.json", lambda config: {name: config[name] for name in config if name not in names})


def in_stage(**values: Any) -> Break:
    return in_json("config.json", lambda config: config["pruning"]["stages"][0].update(values))


def in_weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Break:
    def do(folder: Path) -> None:
        file = folder / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return do


def less(part: str) -> Break:
    """Without the weights that have this in their names."""
    return in_weights(lambda weights: {name: value for name, value in weights.items() if part not in name})


def shard(way: Break) -> Break:
    return lambda folder: way(sorted(folder.glob("model-*.safetensors"))[1])


def omit_a_shard(index: dict[str, Any]) -> None:
    second = sorted(set(index["weight_map"].values()))[1]
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != second}


# What is broken, the words of the error: of our classes, and of Auto classes where those are others.
UNRECOGNISED = "Unrecognized model in .* Should have a `model_type` key"
NO_WEIGHTS, TORN, NO_CONFIG = (
    "must hold its weights as safetensors",
    "model.* must be whole",
    "config.json of .* must be",
)
RANDOM = "must hold all that config.json asks for, and .* would be random"
FAULTS: dict[str, tuple[Break, str, str | None]] = {
    **{
        f"config.json: {name}": (lambda folder, way=way: way(folder / "config.json"), NO_CONFIG, UNRECOGNISED)
        for name, way in WAYS.items()
        if name in ("missing", "a folder", "a loop", "a link to nothing")
    },
    **{
        f"config.json: {name}": (
            lambda folder, way=way: way(folder / "config.json"),
            "config.json' is not a valid",
            None,
        )
        for name, way in WAYS.items()
        if name in ("half", "empty", "text", "bytes")
    },
    **{
        f"model.safetensors: {name}": (lambda folder, way=way: way(folder / "model.safetensors"), NO_WEIGHTS, None)
        for name, way in WAYS.items()
        if name in ("missing", "a folder", "a loop", "a link to nothing")
    },
    **{
        f"model.safetensors: {name}": (lambda folder, way=way: way(folder / "model.safetensors"), TORN, None)
        for name, way in WAYS.items()
        if name in ("half", "empty", "text", "bytes")
    },
    "an empty folder": (lambda folder: [file.unlink() for file in folder.iterdir()], NO_CONFIG, UNRECOGNISED),
    "a config of nothing": (in_json("config.json", lambda _: {}), NO_CONFIG, UNRECOGNISED),
    "no pruning": (without("pruning"), "model_type .'tokenprune_bert'. must have 'pruning'", None),
    "a later format": (
        in_json("config.json", lambda config: config["pruning"].update(format_version=2)),
        r"format_version \(2\)",
        None,
    ),
    "a pruning of a deeper model": (in_stage(layers=[1, 9]), r"layer \(9\) must be in \[0, 3\]", None),
    "more layers": (in_config(num_hidden_layers=6), RANDOM, None),
    "fewer layers than sites": (in_config(num_hidden_layers=2), r"layer \(2\) must be in \[0, 1\]", None),
    "wider": (in_config(hidden_size=64), r"must fit its config: .* is \[32\] .* and \[64\] by config", None),
    "more words": (in_config(vocab_size=60), r"word_embeddings.weight is \[50, 32\] in .* and \[60, 32\]", None),
    "predictors that were not saved": (in_stage(saliency="learned"), f"{RANDOM[:-16]}.*token_predictor", None),
    "a weight missing": (less(QUERY.removeprefix("bert.")), RANDOM, None),
    "a layer missing": (less(".layer.3."), RANDOM, None),
    "embeddings missing": (less("word_embeddings"), RANDOM, None),
    "no weights": (in_weights(lambda _: {}), RANDOM, None),
    "weights of another model": (
        in_weights(lambda weights: {f"x.{name}": value for name, value in weights.items()}),
        RANDOM,
        None,
    ),
    "another shape": (
        in_weights(lambda weights: weights | {QUERY: torch.zeros(3, 3)}),
        r"query.weight is \[3, 3\] in the weights and \[32, 32\] by config.json$",
        None,
    ),
    "integers": (
        in_weights(lambda weights: weights | {QUERY: weights[QUERY].to(torch.int8)}),
        "model.safetensors must hold floats .* is torch.int8",
        None,
    ),
    "booleans": (
        in_weights(lambda weights: weights | {QUERY: weights[QUERY] > 0}),
        "must hold floats .*torch.bool",
        None,
    ),
    "complex numbers": (
        in_weights(lambda weights: weights | {QUERY: weights[QUERY].to(torch.complex64)}),
        f"{TORN}.*C64",
        None,
    ),
}
NO_SHARD = "No such file or directory: .*safetensors"
INDEX_WORDS = f"{INDEX} of .* must be JSON with 'metadata' and 'weight_map'"
SHARDED: dict[str, tuple[Break, str]] = {
    "a shard missing": (shard(WAYS["missing"]), NO_SHARD),
    "a shard in a loop": (shard(WAYS["a loop"]), "safetensors"),
    "half a shard": (shard(WAYS["half"]), TORN),
    "an empty shard": (shard(WAYS["empty"]), TORN),
    "a shard twice": (
        lambda folder: shutil.copy(*sorted(folder.glob("model-*.safetensors"))[:2]),
        RANDOM,
    ),
    "no index": (lambda folder: (folder / INDEX).unlink(), NO_WEIGHTS),
    "half an index": (lambda folder: WAYS["half"](folder / INDEX), INDEX_WORDS),
    "an empty index": (lambda folder: WAYS["empty"](folder / INDEX), INDEX_WORDS),
    "an index that is a list": (in_json(INDEX, lambda _: [1]), INDEX_WORDS),
    "an index without names": (in_json(INDEX, lambda index: {"metadata": index["metadata"]}), INDEX_WORDS),
    "an index of a list": (in_json(INDEX, lambda index: index.update(weight_map=[1])), INDEX_WORDS),
    "an index without metadata": (
        in_json(INDEX, lambda index: {"weight_map": index["weight_map"]}),
        INDEX_WORDS,
    ),
    "an index of numbers": (in_json(INDEX, lambda index: index["weight_map"].update({QUERY: 5})), INDEX_WORDS),
    "an index that names nothing": (
        in_json(INDEX, lambda index: index["weight_map"].update({QUERY: "nowhere.safetensors"})),
        "No such file or directory: .*nowhere.safetensors",
    ),
    "an index that names a pickle": (
        in_json(INDEX, lambda index: index["weight_map"].update({QUERY: "x.bin"})),
        "x.bin must be safetensors",
    ),
    "an index without a shard": (in_json(INDEX, omit_a_shard), RANDOM),
}
# Changes that leave everything as it was.
HARMLESS: dict[str, Break] = {
    "no card": lambda folder: None,
    "of an older transformers": in_config(transformers_version="4.0.0"),
    "of a newer transformers": in_config(transformers_version="99.0.0"),
    "a weight more": in_weights(lambda weights: weights | {"bert.more": torch.zeros(2)}),
    "in double precision": in_weights(lambda weights: {name: value.double() for name, value in weights.items()}),
    "of no dtype": without("dtype"),
    "positions that are integers": in_weights(
        lambda weights: weights | {"bert.embeddings.position_ids": torch.arange(64)[None]}
    ),
    "no code": lambda folder: [file.unlink() for file in folder.glob("*.py")],
    "half of the code": lambda folder: [WAYS["half"](file) for file in folder.glob("*.py")],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model = prune(tiny.build(CASE), TOP_K)
    model.save_pretrained(folder / "whole")
    model.save_pretrained(folder / "shards", max_shard_size="20KB")
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved / "whole", tmp_path / "broken"))


def assert_refused(load: Callable[[Path], Any], folder: Path, words: str) -> None:
    with pytest.raises((OSError, ValueError, RuntimeError), match=words) as error:
        load(folder)
    assert type(error.value).__module__ == "builtins"
    assert not isinstance(error.value, json.JSONDecodeError)
    assert len(str(error.value)) < LONGEST_MESSAGE and "\n" not in str(error.value).strip()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_checkpoint_is_refused_in_one_sentence(fault, folder):
    do, words, by_auto = FAULTS[fault]
    do(folder)
    for load in (HEAD.from_pretrained, BASE.from_pretrained):
        assert_refused(load, folder, words)
    for load in (AutoModel.from_pretrained, AutoModelForSequenceClassification.from_pretrained, load_model):
        assert_refused(load, folder, by_auto or words)


@pytest.mark.parametrize("value", [[1], None, 7, "bert", {"_commit_hash": None}], ids=str)
def test_a_config_that_says_nothing(value, folder):
    (folder / "config.json").write_text(json.dumps(value))
    for load in (HEAD.from_pretrained, BASE.from_pretrained, TokenPruneBertConfig.from_pretrained):
        assert_refused(load, folder, NO_CONFIG)


@pytest.mark.parametrize("fault", SHARDED)
def test_broken_shards_are_refused_in_one_sentence(fault, saved, tmp_path):
    folder = Path(shutil.copytree(saved / "shards", tmp_path / "broken"))
    do, words = SHARDED[fault]
    do(folder)
    for load in (HEAD.from_pretrained, BASE.from_pretrained, AutoModel.from_pretrained):
        assert_refused(load, folder, words)


@pytest.mark.parametrize("change", HARMLESS)
def test_what_is_not_broken_loads_as_it_was_saved(change, folder):
    expected = HEAD.from_pretrained(folder)
    HARMLESS[change](folder)
    for load in (HEAD.from_pretrained, AutoModelForSequenceClassification.from_pretrained, load_model):
        model = load(folder, dtype=torch.float32)
        assert model.config.pruning == TOP_K
        with torch.no_grad():
            inputs = tiny.inputs_for(CASE)
            torch.testing.assert_close(model(**inputs).logits, expected(**inputs).logits, rtol=0, atol=0)


def test_half_of_the_weights_without_a_dtype(folder):
    without("dtype")(folder)
    WAYS["half"](folder / "model.safetensors")
    assert_refused(HEAD.from_pretrained, folder, "the weights of .*broken' must be whole")


def test_a_head_that_was_saved_is_not_made_anew(folder):
    less("classifier")(folder)
    assert_refused(HEAD.from_pretrained, folder, "classifier.bias and 1 more would be random")
    assert BASE.from_pretrained(folder).config.pruning == TOP_K
    without("architectures")(folder)  # of whoever put the weights there for a new task
    assert HEAD.from_pretrained(folder).config.pruning == TOP_K


def test_predictors_of_a_pruning_that_is_asked_for_are_new(folder):
    model = HEAD.from_pretrained(folder, pruning={"preset": "dynamicvit", "layers": [1]})
    assert model.config.pruning.preset_name == "dynamicvit"
    model.save_pretrained(folder)
    less("token_predictor")(folder)
    assert_refused(HEAD.from_pretrained, folder, RANDOM)
    assert HEAD.from_pretrained(folder, pruning=None).config.pruning is None


def test_weights_that_a_caller_gives_may_be_few(folder):
    weights = load_file(folder / "model.safetensors")
    del weights[QUERY]
    config = TokenPruneBertConfig.from_pretrained(folder)
    assert HEAD.from_pretrained(None, config=config, state_dict=weights).config.pruning == TOP_K


def test_a_stock_checkpoint_lacks_no_weights_either(tmp_path):
    tiny.build(tiny.Case(BertModel, tiny.BERT)).save_pretrained(tmp_path)
    save_file(
        {name: value for name, value in load_file(tmp_path / "model.safetensors").items() if "layer.2" not in name},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert_refused(BASE.from_pretrained, tmp_path, RANDOM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert prune(BertModel.from_pretrained(tmp_path), TOP_K).config.pruning == TOP_K


LOAD = """
import transformers

for name, folder in ARGUMENTS["folders"].items():
    try:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
        with torch.no_grad():
            RESULT[name] = model(torch.arange(1, 20)[None]).logits[0].tolist()
    except Exception as error:  # half a file of code may say anything
        RESULT[name] = f"{type(error).__name__}: {error}"
"""


def test_a_stranger_gets_what_was_saved_or_a_sentence(saved, tmp_path):
    code = sorted(file.name for file in (saved / "whole").glob("*.py"))
    faults: dict[str, Break] = {name: FAULTS[name][0] for name in ("no pruning", "a weight missing", "integers")}
    faults["model.safetensors: half"] = FAULTS["model.safetensors: half"][0]
    for name in code:
        faults[f"{name} missing"] = lambda folder, name=name: (folder / name).unlink()
        faults[f"{name} half"] = lambda folder, name=name: WAYS["half"](folder / name)
    for number, do in enumerate(faults.values()):
        do(Path(shutil.copytree(saved / "whole", tmp_path / f"broken{number}")))
    folders = {name: str(tmp_path / f"broken{number}") for number, name in enumerate(faults)}
    said = run_fresh(LOAD, tmp_path / "stranger", folders={**folders, "whole": str(saved / "whole")}).result

    whole = said.pop("whole")
    assert isinstance(whole, list)
    for name, words in (("no pruning", "must have 'pruning'"), ("a weight missing", "would be random")):
        assert words in said[name]
    assert "must hold floats" in said["integers"] and "must be whole" in said["model.safetensors: half"]
    for name in code:
        missing, half = said[f"{name} missing"], said[f"{name} half"]
        assert name in missing, missing
        assert half == whole or isinstance(half, str), (name, half)
