"""Local files of two kinds are found at once, and a part of a split is that part."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import tiny
from PIL import Image
from transformers import ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_tokenprune.data import load_classification
from hf_tokenprune.prediction import PredictionArguments, predict_dataset
from hf_tokenprune.prediction.rows import open_rows


ROWS = 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model, `one` with a file of one kind, `two` with files of two, and `saved`."""
    tiny.save_text_model(tmp_path / "model")
    csv = "text,label\n" + "".join(f"w{4 + row},{row % 2}\n" for row in range(ROWS))
    rows = "".join(json.dumps({"text": f"w{4 + row}", "label": row % 2}) + "\n" for row in range(ROWS))
    for name, files in {"one": {"a.csv": csv}, "two": {"a.csv": csv, "b.jsonl": rows, "notes.txt": "notes"}}.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_text(content)
    datasets.Dataset.from_csv(str(tmp_path / "one" / "a.csv")).save_to_disk(tmp_path / "saved")
    return tmp_path


def arguments(folder: Path, **given: object) -> PredictionArguments:
    given = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    model, output = str(folder / "model"), str(folder / "out")
    return PredictionArguments(model_name_or_path=model, output_dir=output, rows_per_shard=4, logits=True, **given)


def mixed(first: Path, first_kind: str, other: Path, kind: str) -> str:
    return re.escape(f"{other} ({kind}) must be {first_kind}, as {first} is: files that are read together are of one")


@pytest.mark.parametrize("order", [("a.csv", "b.jsonl"), ("b.jsonl", "a.csv"), ("a.csv", "notes.txt")])
def test_files_of_two_kinds_are_named(order, folder):
    files, kinds = [folder / "two" / name for name in order], {".csv": "csv", ".jsonl": "json", ".txt": "text"}
    words = mixed(files[0], kinds[files[0].suffix], files[1], kinds[files[1].suffix])
    with pytest.raises(SystemExit, match=words):
        predict_dataset(arguments(folder, data_files=[str(file) for file in files]))
    assert not list((folder / "out").glob("*.parquet"))


def test_patterns_and_folders_of_two_kinds_are_too(folder):
    words = mixed(folder / "two" / "a.csv", "csv", folder / "two" / "b.jsonl", "json")
    with pytest.raises(ValueError, match=words):
        open_rows(arguments(folder, data_files=[str(folder / "two" / "[ab]*")]))
    for name in (folder / "two",):
        with pytest.raises(ValueError, match=words):
            open_rows(arguments(folder, dataset_name=name))
        with pytest.raises(ValueError, match=words):
            open_rows(arguments(folder, dataset_name=name, data_files=["a.csv", "b.jsonl"]))
        with pytest.raises(ValueError, match=words):
            load_classification(str(name))
    with pytest.raises(ValueError, match=r"a\.csv \(csv\) must be json, as it was asked for"):
        open_rows(arguments(folder, dataset_name="json", data_files=[str(folder / "two" / "a.csv")]))


def test_what_is_no_mixture_is_read(folder, tmp_path):
    (folder / "one" / "notes.txt").write_text("notes")
    (folder / "one" / "dataset_info.json").write_text("{}")
    assert sum(map(len, load_classification(str(folder / "one")).values())) == ROWS
    (folder / "two" / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_files: a.csv\n---\n")
    assert sum(map(len, load_classification(str(folder / "two")).values())) == ROWS
    (folder / "two" / "a.csv").rename(folder / "two" / "a.txt")
    named = arguments(folder, dataset_name="csv", data_files=[str(folder / "two" / "a.txt"), str(folder / "one/a.csv")])
    assert sum(len(table) for table, _ in open_rows(named).tables(7)) == 2 * ROWS
    for index in range(6):
        place = tmp_path / "pics" / "train" / "ab"[index % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(place / f"{index}.png")
    (tmp_path / "pics" / "train" / "metadata.csv").write_text(
        "file_name,label\n" + "".join(f"{'ab'[i % 2]}/{i}.png,{'ab'[i % 2]}\n" for i in range(6))
    )
    (tmp_path / "pics" / "shapes.json").write_text("{}")
    assert sum(map(len, load_classification(str(tmp_path / "pics"), input_column="image", images=True).values())) == 6


@pytest.mark.parametrize("places", [("cat", "dog"), ("train/cat", "train/dog")])
def test_tables_beside_pictures_are_no_mixture(places, folder, tmp_path):
    """`datasets` takes such a folder for pictures, and the tables for no part of it."""
    pictures = tmp_path / "pictures"
    for index in range(10):
        (pictures / places[index % 2]).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(pictures / places[index % 2] / f"{index}.png")
    (pictures / "stats.csv").write_text("a,b\n1,2\n")
    (pictures / "info.json").write_text("{}")
    splits = load_classification(str(pictures), input_column="image", images=True)
    assert splits["train"].features["label"].names == ["cat", "dog"] and sum(map(len, splits.values())) == 10
    rows = open_rows(arguments(folder, dataset_name=pictures, image_column="image"))
    assert sum(len(table) for table, _ in rows.tables(7)) == 10


def test_splits_of_two_kinds_are_named(folder, tmp_path):
    (tmp_path / "mixed").mkdir()
    for source, name in (("one/a.csv", "train.csv"), ("two/b.jsonl", "test.jsonl")):
        (tmp_path / "mixed" / name).write_bytes((folder / source).read_bytes())
    with pytest.raises(ValueError, match="files that are read together are of one kind"):
        load_classification(str(tmp_path / "mixed"))


def test_a_folder_of_save_to_disk_is_read(folder, tmp_path):
    splits = load_classification(str(folder / "saved"))
    assert sum(map(len, splits.values())) == ROWS and len(splits["test"]) == 4
    whole = datasets.Dataset.from_csv(str(folder / "one" / "a.csv"))
    parts = datasets.DatasetDict(train=whole.select(range(12)), validation=whole.select(range(12, 20)))
    parts.with_format("torch").save_to_disk(tmp_path / "parts")
    splits = load_classification(str(tmp_path / "parts"))
    assert splits["test"]["text"][:] == [f"w{4 + row}" for row in range(12, 20)]


SOURCES = {
    "file": lambda folder: {"data_files": [str(folder / "one" / "a.csv")]},
    "name of a file": lambda folder: {"dataset_name": folder / "two" / "b.jsonl"},
    "folder": lambda folder: {"dataset_name": folder / "one"},
    "saved": lambda folder: {"dataset_name": folder / "saved"},
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("part", "rows"), [("[:10]", range(10)), ("[5:]", range(5, 20)), ("[7:13]", range(7, 13))])
def test_a_part_of_a_split_is_that_part(source, part, rows, folder):
    asked = arguments(folder, split=f"train{part}", keep_columns=["text"], **SOURCES[source](folder))
    assert predict_dataset(asked)["rows"] == len(rows)
    read = datasets.load_dataset("parquet", data_files=str(folder / "out" / "*.parquet"), split="train")
    assert read["text"][:] == [f"w{4 + row}" for row in rows] and read["row"][:] == list(rows)


def test_a_part_is_gone_on_with(folder):
    asked = arguments(folder, split="train[3:17]", keep_columns=["text"], **SOURCES["file"](folder))
    predict_dataset(asked)
    shards = sorted((folder / "out").glob("part-*.parquet"))
    whole = [pq.read_table(path) for path in shards]
    for path in shards[-2:]:
        path.unlink()
    assert predict_dataset(asked)["this_run"]["rows"] == 6
    assert all(pq.read_table(path).equals(table) for path, table in zip(shards, whole))
    assert whole[1]["row"].to_pylist() == [7, 8, 9, 10]


def test_an_error_in_a_part_counts_from_the_beginning_of_the_data(folder):
    path = folder / "gaps.jsonl"
    path.write_text("".join(json.dumps({"text": None if row == 12 else f"w{4 + row}"}) + "\n" for row in range(ROWS)))
    with pytest.raises(SystemExit, match=r"row 12: text \(None\) must have a value"):
        predict_dataset(arguments(folder, dataset_name=path, split="train[3:17]"))
    picture = io.BytesIO()
    Image.new("RGB", (24, 24)).save(picture, "PNG")
    pictures = [picture.getvalue() if row != 12 else b"no picture" for row in range(ROWS)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": pictures}, features=features).to_parquet(folder / "pictures.parquet")
    ViTForImageClassification(tiny.VIT).save_pretrained(folder / "images")
    ViTImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(folder / "images")
    asked = {"dataset_name": folder / "pictures.parquet", "image_column": "image", "split": "train[3:17]"}
    with pytest.raises(SystemExit) as error:
        predict_dataset(replace(arguments(folder, **asked), model_name_or_path=str(folder / "images"),
                                output_dir=str(folder / "seen")))  # fmt: skip
    assert "row 12: the image cannot be read" in str(error.value) and " object at 0x" not in str(error.value)


def test_rows_that_changed_since_are_named_by_their_place(folder):
    rows = [f"w{4 + row}" for row in range(ROWS)]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    asked = arguments(folder, dataset_name=path, split="train[3:17]")
    predict_dataset(asked)
    sorted((folder / "out").glob("part-*.parquet"))[0].unlink()
    rows[8] = "w9"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    with pytest.raises(SystemExit, match="the rows from 7 on have changed since shard 1 was computed"):
        predict_dataset(asked)


@pytest.mark.parametrize("split", ["train[:50%]", "train[-5:]", "train+test", "train[5]", "train[:10"])
@pytest.mark.parametrize("source", SOURCES)
def test_other_parts_are_refused(source, split, folder):
    words = re.escape(f"split ({split!r}) must be a split's name, or rows of it by number as in 'train[10:20]'")
    with pytest.raises(ValueError, match=words):
        open_rows(arguments(folder, split=split, **SOURCES[source](folder)))


def test_a_part_without_rows_is_refused(folder):
    for part in ("[5:5]", "[9:5]", "[40:]"):
        with pytest.raises(ValueError, match="has no rows at its beginning"):
            open_rows(arguments(folder, split=f"train{part}", **SOURCES["file"](folder)))
