"""Data as users have them: wrong columns, rows without values, endings, lengths; and files of arguments."""

import gzip
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
from PIL import Image

from hf_tokenprune.command_line import parse_arguments, written_pruning
from hf_tokenprune.data import load_classification, tokenize
from hf_tokenprune.images import in_colour


ROWS = [{"text": f"w{4 + i} w9 w20 w21", "label": i % 2} for i in range(10)]


def write(folder: Path, rows: list[dict], name: str = "data.jsonl") -> str:
    path = folder / name
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def changed(**values: object) -> list[dict]:
    """The rows with another one in the eighth place."""
    return [*ROWS[:7], ROWS[7] | values, *ROWS[8:]]


@pytest.mark.parametrize("name", ["data.JSONL", "data.jsonl.gz"])
def test_endings_in_capitals_and_packed_files(name, tmp_path):
    splits = load_classification(write(tmp_path, ROWS, name))
    read = [text for split in splits.values() for text in split["text"]]
    assert sorted(read) == sorted(row["text"] for row in ROWS)


REFUSED = {
    "a text that is missing": (changed(text=None), {}, "row 7 of train: text (None) must have a value"),
    "a label that is missing": (changed(label=None), {}, "row 7 of train: label (None) must have a value"),
    "one class": ([row | {"label": 3} for row in ROWS], {}, "(only '3') must hold at least two classes"),
    "numbers for texts": ([row | {"text": 5} for row in ROWS], {}, "column 'text' holds Value('int64'); text_column"),
    "texts for images": (ROWS, {"images": True}, "column 'text' holds Value('string'); image_column must hold images"),
    "one column for both": (ROWS, {"label_column": "text"}, "column 'text' must not be both the input and the label"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_learned_from_is_refused(what, tmp_path):
    rows, given, words = REFUSED[what]
    with pytest.raises(ValueError, match=re.escape(words)):
        load_classification(write(tmp_path, rows), **given)


def test_labels_that_are_no_number_are_missing(tmp_path):
    pd.DataFrame({"text": ["a"] * 10, "label": [0.0, 1.0] * 4 + [1.0, float("nan")]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"row 9 of train: label \(None\) must have a value"):
        load_classification(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    "name, words", [("data.tsv", "its ending must be one of .arrow, .csv"), ("no.jsonl", "is none")]
)
def test_files_that_cannot_be_read(name, words, tmp_path):
    write(tmp_path, ROWS, "data.tsv")
    with pytest.raises(ValueError, match=re.escape(words)):
        load_classification(str(tmp_path / name))


def test_texts_are_cut_or_the_length_is_refused(tmp_path):
    splits, tokenizer = load_classification(write(tmp_path, ROWS)), tiny.tokenizer()
    for length, tokens in ((3, 3), (256, 6)):
        assert {len(ids) for ids in tokenize(splits, tokenizer, length)["train"]["input_ids"]} == {tokens}
    tokenizer.model_max_length = 5
    assert {len(ids) for ids in tokenize(splits, tokenizer, 256)["train"]["input_ids"]} == {5}
    for length in (2, 0, -5):
        with pytest.raises(ValueError, match=re.escape(f"max_length ({length}) must be > 2")):
            tokenize(splits, tokenizer, length)


def test_sixteen_bits_a_pixel_are_not_white(tmp_path):
    grey = np.linspace(0, 2**16 - 1, 24 * 24).reshape(24, 24)
    for name, values in (("deep", grey.astype(np.uint16)), ("flat", (grey // 256).astype(np.uint8))):
        Image.fromarray(values).save(tmp_path / f"{name}.png")
    deep, flat = (Image.open(tmp_path / f"{name}.png") for name in ("deep", "flat"))
    assert deep.mode.startswith("I;16") and np.array_equal(in_colour(deep), in_colour(flat))
    assert np.asarray(in_colour(deep)).shape == (24, 24, 3) and np.asarray(in_colour(deep)).min() == 0


@dataclass
class Arguments:
    count: int = 3
    share: float = 0.5
    names: list[str] | None = None
    sizes: list[int] = field(default_factory=lambda: [1])
    quick: bool = False
    name: str | None = None


def read(path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Arguments:
    path.write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["script", str(path)])
    return parse_arguments(Arguments)[0]


def test_a_files_values_have_the_arguments_types(tmp_path, monkeypatch):
    right = read(tmp_path / "a.yaml", "share: 1\nnames: [a, b]\nsizes: [2, 3]\nname: null\nquick: true", monkeypatch)
    assert right == Arguments(3, 1, ["a", "b"], [2, 3], True, None)
    assert read(tmp_path / "a.json", '\ufeff{"count": 5}', monkeypatch).count == 5  # as some editors begin a file
    wrong = {
        "count: '8'": "count ('8')",
        "count: 2.5": "count (2.5)",
        "count: true": "count (True)",
        "names: to be or not": "names ('to be or not')",
        "sizes: 16": "sizes (16)",
        "sizes: [16, a]": "sizes ([16, 'a'])",
        "quick: 'no'": "quick ('no')",
        "share: much": "share ('much')",
    }
    for text, words in wrong.items():
        with pytest.raises(ValueError, match=re.escape(f"{words} in {tmp_path / 'a.yaml'} must be")):
            read(tmp_path / "a.yaml", text, monkeypatch)


@pytest.mark.parametrize("name, text", [("a.json", '{"count": '), ("a.yaml", "count: [1")])
def test_a_file_that_breaks_off_is_named(name, text, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name} cannot be read")):
        read(tmp_path / name, text, monkeypatch)


def test_a_pruning_that_is_no_json_is_quoted(tmp_path):
    with pytest.raises(ValueError, match=re.escape('pruning ({"preset": top_k}) must be JSON: ')):
        written_pruning('{"preset": top_k}', None)
    (tmp_path / "p.json").write_text("[1]")
    with pytest.raises(ValueError, match=re.escape("p.json ([1]) must hold a mapping")):
        written_pruning(str(tmp_path / "p.json"), None)
