"""Batch prediction: what comes out, that no row is lost or doubled, and that mistakes end with one sentence."""

import datetime
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertForSequenceClassification,
    PreTrainedModel,
    ViTForImageClassification,
)

from hf_tokenprune import packaged, prune
from hf_tokenprune.prediction import PredictionArguments, predict_dataset
from hf_tokenprune.prediction.arguments import PredictionError
from hf_tokenprune.prediction.inputs import token_batches
from hf_tokenprune.prediction.rows import open_rows


SCRIPT = Path(__file__).parents[1] / "scripts" / "run_predict.py"
PRUNING = {"preset": "top_k", "layers": [1, 2], "keep_rate": 0.6}
ROWS, SIZE = 150, 8


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its tokenizer, and texts of 0 to 30 words in two files."""
    folder = tmp_path_factory.mktemp("room")
    tiny.save_text_model(folder / "model")
    random = np.random.default_rng(0)
    rows = [
        {
            "text": " ".join(f"w{i}" for i in random.integers(4, 50, random.integers(0, 31))),
            "name": f"n{row}",
            "label": row,
        }
        for row in range(ROWS)
    ]
    assert any(row["text"] == "" for row in rows)
    write_jsonl(folder / "a.jsonl", rows[:70])
    write_jsonl(folder / "b.jsonl", rows[70:])
    return folder


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def wish(room: Path, output: Path, **changes: object) -> PredictionArguments:
    given = {
        "model_name_or_path": str(room / "model"),
        "data_files": [str(room / "a.jsonl"), str(room / "b.jsonl")],
        "output_dir": str(output),
        "id_column": "name",
        "keep_columns": ["label"],
        "logits": True,
        "pruning": json.dumps(PRUNING),
        "rows_per_shard": SIZE,
        "max_tokens_per_batch": 64,
    }
    if changes.get("task") == "embed":
        given["logits"] = False
    return PredictionArguments(**(given | changes))


def result(folder: Path) -> datasets.Dataset:
    return datasets.load_dataset("parquet", data_files=str(folder / "*.parquet"), split="train", cache_dir=folder / "c")


@pytest.fixture(scope="module")
def reference(room: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an undisturbed run in one process."""
    output = tmp_path_factory.mktemp("reference")
    summary = predict_dataset(wish(room, output))
    assert (summary["rows"], summary["shards"]) == (ROWS, -(-ROWS // SIZE))
    return output


def pruned(room: Path) -> PreTrainedModel:
    """With the separator protected, as runs do by themselves."""
    native = BertForSequenceClassification.from_pretrained(room / "model")
    return prune(native, PRUNING | {"protected_token_ids": [3]}).eval()


@torch.no_grad()
def naive(room: Path, compute: Callable, base: bool = False) -> torch.Tensor:
    """The pruned model, a text at a time."""
    tokenizer = AutoTokenizer.from_pretrained(room / "model")
    model = pruned(room)
    texts = [json.loads(line)["text"] for name in "ab" for line in (room / f"{name}.jsonl").read_text().splitlines()]
    model = model.base_model if base else model
    return torch.stack([compute(model, tokenizer(text, return_tensors="pt")) for text in texts])


def test_equals_a_naive_loop(room, reference):
    logits = naive(room, lambda model, inputs: model(**inputs).logits[0])
    data = result(reference)
    assert data["row"][:] == list(range(ROWS)) == data["input_label"][:]  # a kept column gives way to one of results
    assert data["name"][:] == [f"n{row}" for row in range(ROWS)]
    assert data.column_names == ["row", "name", "input_label", "label", "score", "logits"]
    torch.testing.assert_close(torch.tensor(data["logits"][:]), logits, rtol=0, atol=1e-5)
    score, label = logits.softmax(dim=-1).max(dim=-1)
    assert data["label"][:] == [f"LABEL_{i}" for i in label.tolist()]
    torch.testing.assert_close(torch.tensor(data["score"][:]), score, rtol=0, atol=1e-5)


def test_a_pruned_checkpoint_is_pruned_as_it_says(room, tmp_path, reference):
    pruned(room).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(room / "model").save_pretrained(tmp_path / "model")
    changes = {"model_name_or_path": str(tmp_path / "model"), "pruning": None, "trust_remote_code": True}
    predict_dataset(wish(room, tmp_path / "out", **changes))
    np.testing.assert_allclose(result(tmp_path / "out")["logits"][:], result(reference)["logits"][:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "kept_mean", "cls"])
def test_embeddings(room, tmp_path, pooling):
    def compute(model, inputs):
        if pooling == "kept_mean":
            return model(**inputs, restore=False).last_hidden_state[0].mean(dim=0)
        hidden = model(**inputs).last_hidden_state[0]
        return hidden.mean(dim=0) if pooling == "mean" else hidden[0]

    predict_dataset(wish(room, tmp_path, task="embed", pooling=pooling, normalize=pooling == "mean"))
    expected = naive(room, compute, base=True)
    if pooling == "mean":
        expected = torch.nn.functional.normalize(expected, dim=-1)
    data = result(tmp_path)
    assert data.features["embedding"] == datasets.List(datasets.Value("float32"), length=32)
    torch.testing.assert_close(torch.tensor(data["embedding"][:]), expected, rtol=0, atol=1e-5)


def test_killed_and_gone_on_with_by_two_processes(room, tmp_path, reference):
    arguments = wish(room, tmp_path / "out", max_rows_per_batch=1)
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    (tmp_path / "run.json").write_text(json.dumps(given))
    process = subprocess.Popen([sys.executable, str(SCRIPT), str(tmp_path / "run.json")], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "out").glob("*.parquet"))) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    there = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    assert 2 <= len(there) < -(-ROWS // SIZE)
    (tmp_path / "out" / ".part-000099.parquet.abc.tmp").write_bytes(b"half of one")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", str(SCRIPT), str(tmp_path / "run.json")]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"{len(there)} shards are there" in done.stdout and f"{ROWS} rows in" in done.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["this_run"]["processes"] == 2
    assert summary["this_run"]["rows"] == ROWS - SIZE * len(there)
    assert there.items() <= {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}.items()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in reference.iterdir()} - {"c"}
    ours, theirs = result(tmp_path / "out"), result(reference)
    assert ours["row"][:] == list(range(ROWS))
    assert ours.remove_columns(["score", "logits"]).to_dict() == theirs.remove_columns(["score", "logits"]).to_dict()
    np.testing.assert_allclose(ours["logits"][:], theirs["logits"][:], rtol=0, atol=1e-5)


def test_a_hole_and_a_broken_shard_are_computed_again(room, tmp_path, capsys):
    arguments = wish(room, tmp_path)
    predict_dataset(arguments)
    before = result(tmp_path).to_dict()
    (tmp_path / "part-000003.parquet").unlink()
    (tmp_path / "part-000011.parquet").write_bytes((tmp_path / "part-000011.parquet").read_bytes()[:-20])
    (tmp_path / "part-000012.parquet").write_bytes((tmp_path / "part-000000.parquet").read_bytes())
    # The batches may differ from the first run's, for want of memory.
    assert predict_dataset(replace(arguments, max_tokens_per_batch=100))["this_run"]["rows"] == 3 * SIZE
    said = capsys.readouterr().out
    assert "part-000011.parquet is computed again" in said and "part-000012.parquet is computed again: its rows" in said
    after = datasets.Dataset.from_parquet(str(tmp_path / "*.parquet"), cache_dir=tmp_path / "again").to_dict()
    assert after["row"] == before["row"] and after["name"] == before["name"]
    np.testing.assert_allclose(after["logits"], before["logits"], rtol=0, atol=1e-5)
    assert predict_dataset(arguments)["this_run"]["rows"] == 0


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"max_length": 20}, "a run with max_length null, now 20 is asked for"),
        ({"pruning": "none"}, "a run with pruning {"),
        ({"problem_type": "regression"}, 'a run with problem_type null, now "regression" is asked for'),
        ({"rows_per_shard": 16}, "a run with rows_per_shard 8, now 16 is asked for"),
        ({"model_name_or_path": "other"}, "a run with model "),
    ],
    ids=["max_length", "pruning", "problem_type", "rows_per_shard", "model"],
)
def test_changed_arguments_are_refused(room, reference, tmp_path, changes, words):
    if "model_name_or_path" in changes:  # another checkpoint in the same place is another model, too
        (tmp_path / "model").symlink_to(room / "model")
        changes = {"model_name_or_path": str(tmp_path / "model")}
    with pytest.raises(SystemExit) as error:
        predict_dataset(wish(room, reference, **changes))
    assert words in error.value.code and "\n" not in error.value.code


SETTINGS = {
    "labels": ("config.json", {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}),
    "activation": ("config.json", {"problem_type": "multi_label_classification"}),
    "length": ("tokenizer_config.json", {"model_max_length": 20}),
    "side": ("tokenizer_config.json", {"truncation_side": "left"}),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_model_whose_settings_have_changed_is_another(room, tmp_path, setting):
    shutil.copytree(room / "model", tmp_path / "model")
    arguments = wish(room, tmp_path / "out", model_name_or_path=str(tmp_path / "model"), max_rows=9)
    predict_dataset(arguments)
    name, fields = SETTINGS[setting]
    path = tmp_path / "model" / name
    held = json.loads(path.read_text())
    path.write_text(json.dumps(held | {"transformers_version": "5.99.0"}))  # as saved by another release
    assert predict_dataset(arguments)["this_run"]["rows"] == 0
    path.write_text(json.dumps(held | fields))
    with pytest.raises(SystemExit, match=r"a run with model .*, sha256 .*, now .* is asked for"):
        predict_dataset(arguments)


LEARNED = {
    "dynamicvit": {"preset": "dynamicvit", "layers": [1, 2], "base_rate": 0.7},
    "adaptive": {"preset": "adaptive", "layers": [1, 2], "threshold": 0.3, "saliency": "learned"},
}


@pytest.mark.parametrize("name", LEARNED)
def test_predictors_must_be_trained(room, tmp_path, name):
    changes = {"pruning": json.dumps(LEARNED[name]), "max_rows": 9}
    words = r"pruning \(.*\) must find a trained predictor at each site .*: the checkpoint has none in layer "
    with pytest.raises(SystemExit, match=words + "1"):
        predict_dataset(wish(room, tmp_path / "native", **changes))
    native = BertForSequenceClassification.from_pretrained(room / "model")
    prune(native, LEARNED[name] | {"layers": [1]}).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    changes["model_name_or_path"] = str(tmp_path / "model")
    with pytest.raises(SystemExit, match=words + "2"):
        predict_dataset(wish(room, tmp_path / "fewer", **changes))
    changes["pruning"] = json.dumps(LEARNED[name] | {"layers": [1]})
    assert predict_dataset(wish(room, tmp_path / "trained", **changes))["rows"] == 9


def test_changed_data_is_refused(room, tmp_path):
    rows = [{"text": f"w{row % 40 + 4}"} for row in range(40)]
    write_jsonl(tmp_path / "data.jsonl", rows)
    changes = {"data_files": [str(tmp_path / "data.jsonl")], "id_column": None, "keep_columns": None}
    arguments = wish(room, tmp_path / "out", **changes)
    predict_dataset(arguments)
    for number in (2, 4):
        (tmp_path / "out" / f"part-{number:06d}.parquet").unlink()
    write_jsonl(tmp_path / "data.jsonl", [{"text": "w4"}, *rows])  # all move by one
    with pytest.raises(SystemExit, match="the rows from 0 on have changed since shard 0 was computed"):
        predict_dataset(arguments)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"text_column": "body"}, "column 'body' is not in"),
        ({"text_column": "label"}, "text_column must hold text"),
        ({"keep_columns": ["nothing"]}, "column 'nothing' is not in"),
        ({"image_column": "text"}, "image_column must hold images"),
        ({"model_name_or_path": "/no/such/model"}, "/no/such/model"),
        ({"data_files": ["/no/such/data.jsonl"]}, "/no/such/data.jsonl"),
        ({"data_files": ["data.xyz"]}, "data.xyz: its ending must be one of"),
        pytest.param(
            {"dataset_name": "20newsgroups-religion", "data_files": None, "split": "dev"},
            "has no split 'dev'",
            marks=pytest.mark.real,
        ),
        ({"pruning": '{"preset": "top_k", "keep_rate": 1.3}'}, "keep_rate (1.3) must be in (0, 1]"),
        ({"pruning": '{"preset'}, "must be JSON"),
        ({"max_length": 65}, "max_length (65) must be at most max_position_embeddings (64)"),
        ({"output_dir": __file__}, Path(__file__).name),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_end_with_one_sentence(room, tmp_path, changes, words):
    with pytest.raises(SystemExit) as error:
        predict_dataset(wish(room, tmp_path, **changes))
    assert words in error.value.code and "\n" not in error.value.code
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rows, words", [([], "no rows"), (["w4", "w5", None, "w6"], "row 2: text (None) must have")])
def test_rows_without_text(room, tmp_path, rows, words):
    write_jsonl(tmp_path / "data.jsonl", [{"text": text} for text in rows])
    changes = {"data_files": [str(tmp_path / "data.jsonl")], "id_column": None, "keep_columns": None}
    with pytest.raises(SystemExit, match=rf"{words}".replace("(", r"\(").replace(")", r"\)")):
        predict_dataset(wish(room, tmp_path / "out", rows_per_shard=2, **changes))
    # What was computed before the bad row stays.
    assert [path.name for path in (tmp_path / "out").glob("*part*")] == (["part-000000.parquet"] if rows else [])


def test_arguments_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"task \('rank'\) must be one of predict, embed"):
        PredictionArguments(dataset_name="x", task="rank")
    with pytest.raises(ValueError, match=r"rows_per_shard \(0\) must be at least 1"):
        PredictionArguments(dataset_name="x", rows_per_shard=0)
    with pytest.raises(ValueError, match=r"dataset_name \(None\) must be given"):
        PredictionArguments()


def test_a_checkpoint_without_a_head_is_refused(room, tmp_path):
    BertForSequenceClassification.from_pretrained(room / "model").base_model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(room / "model").save_pretrained(tmp_path / "base")
    with pytest.raises(SystemExit, match=r"has no weights for classifier\.bias, classifier\.weight"):
        predict_dataset(wish(room, tmp_path / "out", model_name_or_path=str(tmp_path / "base")))


def test_batches_keep_to_the_budget():
    lengths = np.random.default_rng(0).integers(1, 60, 200).tolist() + [500]
    batches = token_batches(lengths, 128, 10)
    assert sorted(row for batch in batches for row in batch) == list(range(201))
    assert batches[0] == [200]  # longer than the budget: alone
    assert all(len(b) <= 10 and sum(lengths[row] for row in b) <= 128 for b in batches[1:])


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "disk"])
@pytest.mark.parametrize("size", [7, 40])
def test_a_stream_goes_on_from_every_position(tmp_path, kind, size):
    for part in range(3):
        data = datasets.Dataset.from_dict({"text": [f"{part} {row}" for row in range(45)], "other": list(range(45))})
        path = str(tmp_path / f"{part}.{kind}")
        {"jsonl": data.to_json, "csv": data.to_csv, "parquet": data.to_parquet, "disk": data.save_to_disk}[kind](path)
    files = [str(tmp_path / f"{part}.{kind}") for part in range(3)]
    source = {"dataset_name": files[0]} if kind == "disk" else {"data_files": files}
    if kind == "jsonl":
        source["max_rows"] = 131
    rows = open_rows(PredictionArguments(**source))
    found = [(table.to_pydict(), position) for table, position in rows.tables(size)]
    assert sum(len(table["text"]) for table, _ in found) == {"disk": 45, "jsonl": 131}.get(kind, 135)
    for number, (_, position) in enumerate(found):
        rest = rows.tables(size, json.loads(json.dumps(position)))
        assert [table.to_pydict() for table, _ in rest] == [table for table, _ in found[number:]]


def test_a_type_that_only_later_blocks_have(room, tmp_path):
    write_jsonl(tmp_path / "0.jsonl", [{"text": "w4", "note": None}] * 5)
    write_jsonl(tmp_path / "1.jsonl", [{"text": "w5", "note": "late"}] * 5)
    files = [str(tmp_path / f"{i}.jsonl") for i in range(2)]
    predict_dataset(wish(room, tmp_path / "out", data_files=files, id_column="note", keep_columns=None))
    assert result(tmp_path / "out")["note"][:] == [None] * 5 + ["late"] * 5
    (tmp_path / "1.jsonl").write_text('{"text": "w5"}\n{"text": ')
    with pytest.raises(SystemExit, match="the data cannot be read on"):
        predict_dataset(wish(room, tmp_path / "out2", data_files=files, id_column=None, keep_columns=None))


DAY = datetime.date(2020, 1, 2)
NOON = datetime.datetime(2020, 1, 2, 12)
DATES = {
    "timestamp": (pa.timestamp("s"), NOON),
    "time": (pa.time32("s"), datetime.time(12)),
    "date": (pa.date32(), DAY),
    "date64": (pa.date64(), DAY),
    "list": (pa.list_(pa.timestamp("s")), [NOON, None]),
    "struct": (pa.struct({"at": pa.time32("s")}), {"at": datetime.time(12)}),
    "numbers": (pa.list_(pa.int32()), [1, 2]),
}


def test_types_that_parquet_has_not_are_gone_on_with(room, tmp_path):
    dates = {name: pa.array([value] * 3, kind) for name, (kind, value) in DATES.items()}
    table = pa.table({"text": ["w4", "w5", "w6"]} | dates)
    with pa.ipc.new_stream(tmp_path / "data.arrow", table.schema) as stream:
        stream.write_table(table)
    changes = {"id_column": None, "keep_columns": list(DATES), "rows_per_shard": 2}
    arguments = wish(room, tmp_path / "out", data_files=[str(tmp_path / "data.arrow")], **changes)
    assert predict_dataset(arguments)["shards"] == 2
    data = result(tmp_path / "out")
    for name, (_, value) in DATES.items():
        assert data[name][:] == [value] * 3, name
    assert predict_dataset(arguments)["this_run"]["rows"] == 0


def test_dates_in_json_are_gone_on_with(room, tmp_path):
    write_jsonl(tmp_path / "data.jsonl", [{"text": "w4", "on": "2020-01-02"}] * 3)
    changes = {"data_files": [str(tmp_path / "data.jsonl")], "id_column": "on", "keep_columns": None}
    predict_dataset(wish(room, tmp_path / "out", **changes))
    assert predict_dataset(wish(room, tmp_path / "out", **changes))["this_run"]["rows"] == 0
    assert result(tmp_path / "out")["on"][:] == [datetime.datetime(2020, 1, 2)] * 3


@pytest.mark.parametrize("size", [ROWS, ROWS // 2, SIZE])
def test_datasets_reads_the_folder_however_many_shards_it_has(room, tmp_path, size):
    predict_dataset(wish(room, tmp_path / "out", rows_per_shard=size))
    assert len(list((tmp_path / "out").glob("part-*"))) == -(-ROWS // size)
    data = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=tmp_path / "cache")
    assert data["row"][:] == list(range(ROWS)) and data.column_names[0] == "row"


def test_a_card_of_its_user_stays(room, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    predict_dataset(wish(room, tmp_path, max_rows=2))
    assert (tmp_path / "README.md").read_text() == "mine"


def late(tmp_path: Path, first: list[str], then: list[str]) -> Path:
    """CSV whose columns change in the second block that pandas reads, after 10,000 rows."""
    path = tmp_path / "late.csv"
    path.write_text("text,id,score,seen\n" + "".join(f"w4,{row}\n" for row in [*first, *then]))
    return path


def test_csv_has_one_type_for_each_column(tmp_path):
    large = 2**62 + 1  # a float would round it
    first = [f"{large + row},,True" for row in range(9999)] + ["-7,,false"]
    path = late(tmp_path, first, [f"{large},3,True", ",,", " +5,4,", "007,,TRUE"] * 5)
    keep = ["id", "score", "seen"]
    rows = open_rows(PredictionArguments(data_files=[str(path)], keep_columns=keep))
    found = list(rows.tables(4095))
    assert [[str(field.type) for field in table.schema][1:] for table, _ in found] == [["int64", "double", "bool"]] * 3
    values = datasets.concatenate_datasets([datasets.Dataset(table) for table, _ in found])
    assert values["id"][:10000] == [large + row for row in range(9999)] + [-7]
    assert values["id"][10000:] == [large, None, 5, 7] * 5
    assert values["seen"][9998:10004] == [True, False, True, None, None, True]
    for number, (_, position) in enumerate(found):
        rest = [table.to_pydict() for table, _ in rows.tables(4095, json.loads(json.dumps(position)))]
        assert rest == [table.to_pydict() for table, _ in found[number:]]


def test_csv_with_a_missing_number_at_its_beginning(tmp_path):
    path = late(tmp_path, [f"{row or ''},0.5,True" for row in range(10000)], ["8,1,True"] * 20)
    rows = open_rows(PredictionArguments(data_files=[str(path)], keep_columns=["id", "score"]))
    (table, _), *_ = rows.tables(10020)
    assert table["id"][-1].as_py() == 8.0 and table["id"][0].as_py() is None and len(table) == 10020


def test_csv_with_another_type_later_is_refused(tmp_path):
    path = late(tmp_path, ["1,0.5,True"] * 10000, ["1.5,1,True"])
    rows = open_rows(PredictionArguments(data_files=[str(path)], keep_columns=["id"]))
    with pytest.raises(
        PredictionError, match=r"column 'id' must be int64 in every row.*'1\.5'.*Leave it out, or write"
    ):
        list(rows.tables(5000))
    rows = open_rows(PredictionArguments(data_files=[str(path)]))
    assert sum(len(table) for table, _ in rows.tables(5000)) == 10001  # only what is copied matters


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_an_empty_parquet_file_among_others(tmp_path, empty):
    (tmp_path / "data").mkdir()
    for part in range(3):
        values = [] if part == empty else [f"{part} {row}" for row in range(5)]
        pq.write_table(pa.table({"text": pa.array(values, pa.string())}), tmp_path / "data" / f"{part}.parquet")
    files = [str(tmp_path / "data" / f"{part}.parquet") for part in range(3)]
    for source in ({"data_files": files}, {"dataset_name": str(tmp_path / "data")}):
        rows = open_rows(PredictionArguments(**source))
        texts = [text for table, _ in rows.tables(4) for text in table["text"].to_pylist()]
        assert texts == [f"{part} {row}" for part in range(3) if part != empty for row in range(5)]


def test_a_missing_text_in_csv(room, tmp_path):
    (tmp_path / "data.csv").write_text('text,other\nw4,1\n"",2\n')
    changes = {"data_files": [str(tmp_path / "data.csv")], "id_column": None, "keep_columns": None}
    with pytest.raises(SystemExit, match=r"row 1: text \(None\) must have a value.* write JSON lines or Parquet"):
        predict_dataset(wish(room, tmp_path / "out", **changes))


def save_image_model(folder: Path, processor: dict) -> ViTForImageClassification:
    torch.manual_seed(0)
    model = ViTForImageClassification(tiny.VIT).eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


SQUARE = {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}}


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    save_image_model(tmp_path / "model", SQUARE)
    good = datasets.Image().encode_example(np.zeros((24, 24, 3), dtype=np.uint8))["bytes"]
    features = datasets.Features({"image": datasets.Image()})
    given = {"model_name_or_path": str(tmp_path / "model"), "image_column": "image", "rows_per_shard": 3}
    for name, bad in {"none": b"no image", "torn": good[: len(good) // 2]}.items():
        values = [{"bytes": each, "path": None} for each in [good] * 4 + [bad]]
        rows = datasets.Dataset.from_dict({"image": values}, features=features)
        rows.save_to_disk(tmp_path / name)
        output = tmp_path / f"{name}-out"
        with pytest.raises(SystemExit, match="row 4: the image cannot be read: "):
            predict_dataset(PredictionArguments(dataset_name=str(tmp_path / name), output_dir=str(output), **given))
        assert (output / "part-000000.parquet").exists()


def test_a_processor_without_one_size_is_refused(tmp_path):
    processor = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 24}, "do_center_crop": False}
    save_image_model(tmp_path / "model", processor)
    features = datasets.Features({"image": datasets.Image()})
    pixels = [np.zeros((24, 30, 3), dtype=np.uint8)]
    datasets.Dataset.from_dict({"image": pixels}, features=features).save_to_disk(tmp_path / "data")
    arguments = PredictionArguments(
        model_name_or_path=str(tmp_path / "model"),
        dataset_name=str(tmp_path / "data"),
        image_column="image",
        output_dir=str(tmp_path / "out"),
    )
    with pytest.raises(
        SystemExit, match=r"ValueError: size \({'shortest_edge': 24}\) of the image processor must be a height"
    ):
        predict_dataset(arguments)


def test_images(tmp_path):
    model = save_image_model(tmp_path / "model", SQUARE)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 24, 24, 3), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": list(pixels)}, features=features).save_to_disk(tmp_path / "data")
    arguments = PredictionArguments(
        model_name_or_path=str(tmp_path / "model"),
        dataset_name=str(tmp_path / "data"),
        image_column="image",
        output_dir=str(tmp_path / "out"),
        logits=True,
        max_tokens_per_batch=80,
    )
    assert predict_dataset(arguments)["tokens"] == 5 * 37
    with torch.no_grad():
        expected = model(torch.tensor(pixels).permute(0, 3, 1, 2) / 127.5 - 1).logits
    torch.testing.assert_close(torch.tensor(result(tmp_path / "out")["logits"][:]), expected, rtol=0, atol=1e-5)


@pytest.mark.real
def test_minilm(tmp_path):
    arguments = PredictionArguments(
        dataset_name="20newsgroups-religion", split="test", task="embed", output_dir=str(tmp_path / "out"), max_rows=6
    )
    predict_dataset(replace(arguments, max_length=64))
    model = prune(AutoModel.from_pretrained(packaged.model_path("minilm-l6")), None).eval()
    tokenizer = AutoTokenizer.from_pretrained(packaged.model_path("minilm-l6"))
    texts = packaged.load_dataset("20newsgroups-religion")["test"]["text"][:6]
    for text, found in zip(texts, result(tmp_path / "out")["embedding"][:]):
        with torch.no_grad():
            hidden = model(**tokenizer(text, truncation=True, max_length=64, return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(torch.tensor(found), hidden[0].mean(dim=0), rtol=0, atol=1e-5)
