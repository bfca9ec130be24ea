"""What stands above the models: data, metrics, time, and the stranger's process."""

import json
import platform
import re
import resource
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers import BertForSequenceClassification

from hf_tokenprune import prune
from hf_tokenprune.data import load_classification
from hf_tokenprune.hub import run_in_fresh_process
from hf_tokenprune.metrics import Accuracy, paired_bootstrap
from hf_tokenprune.profiling import Timing, speedup, time_interleaved


SCRIPTS = Path(__file__).parents[1] / "scripts"


def test_accuracy():
    metric = Accuracy()
    metric.add_batch(predictions=[1, 0, 2], references=[1, 1, 2])
    metric.add_batch(predictions=[0], references=[1])
    assert metric.compute() == {"accuracy": 0.5}


def test_paired_bootstrap_is_narrower_than_its_parts():
    generator = np.random.default_rng(0)
    right = generator.random(400) < 0.9
    better = right | (generator.random(400) < 0.05)
    low, high = paired_bootstrap(better, right)
    difference = better.mean() - right.mean()
    assert 0 <= low < difference < high < 0.02
    assert (low, high) == paired_bootstrap(better, right)
    assert paired_bootstrap(right, right) == (0.0, 0.0)
    # One seed in which all is won and one in which nothing is: the seeds are what is unsure.
    low, high = paired_bootstrap([right, right], [right, ~right])
    assert low == 0.0 and high > 0.7
    with pytest.raises(ValueError, match=r"a \(400,\) and b \(3,\)"):
        paired_bootstrap(right, [1, 0, 1])


def test_candidates_run_in_turn():
    order = []
    timings = time_interleaved({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3, warmup=1)
    assert "".join(order) == "ab" * 4
    assert {name: len(timing.seconds) for name, timing in timings.items()} == {"a": 3, "b": 3}
    # The median of the pairs: 2, 1 and 6, not the ratio of the medians.
    assert speedup(Timing((4.0, 3.0, 6.0)), Timing((2.0, 3.0, 1.0))) == 2.0
    with pytest.raises(ValueError, match=r"rounds \(0\)"):
        time_interleaved({}, rounds=0)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_candidates_find_the_memory_that_others_gave_back():
    """Blocks so large are mapped anew at each call by glibc itself, page by page."""

    def pages_taken() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    taken = []
    pages_taken()
    assert pages_taken() > 1000
    time_interleaved({"a": lambda: taken.append(pages_taken())}, rounds=30, device="cpu")
    assert max(taken[-3:]) < 10  # once it has been at every gap that what ran before left in the heap
    pages_taken()
    assert pages_taken() > 1000  # what the user's process does afterwards is as before


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_local_files_with_columns_of_their_own(kind, tmp_path):
    rows = [{"body": f"text {i}", "kind": "rare" if i == 0 else "often", "note": i} for i in range(20)]
    path = tmp_path / f"data.{kind}"
    if kind == "csv":
        path.write_text("body,kind,note\n" + "".join(f"{r['body']},{r['kind']},{r['note']}\n" for r in rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = load_classification(str(path), input_column="body", label_column="kind")
    names = {row["body"]: row["kind"] for row in rows}
    for split in splits.values():
        assert sorted(split.column_names) == ["label", "text"]
        # One numbering, though one split has no rare row.
        assert split.features["label"].names == ["often", "rare"]
        assert all(split.features["label"].int2str(row["label"]) == names[row["text"]] for row in split)
    assert len(splits["train"]) + len(splits["test"]) == 20
    with pytest.raises(ValueError, match=r"column 'label' is not in .*'kind'"):
        load_classification(str(path), input_column="body")


UNREADABLE = {
    "empty.jsonl": ("", "must have at least one row in every split"),
    "empty.json": ("[]", "must have at least one row in every split"),
    "empty.csv": ("", "must have at least one row in every split"),
    "header.csv": ("text,label\n", "must have at least one row in every split"),
    "one.jsonl": ('{"text": "w4", "label": "a"}\n', "(1 row) must have at least two rows: one to train"),
    "torn.jsonl": ('{"text": "w4"', "cannot be read: JSON parse error"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_data_that_cannot_be_read_are_named_with_the_rule(name, tmp_path):
    content, words = UNREADABLE[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / name} {words}")):
        load_classification(str(tmp_path / name))


def test_no_split_may_be_without_rows(tmp_path):
    rows = "".join(json.dumps({"text": "w4", "label": label}) + "\n" for label in "ab")
    for split, content in {"train": rows, "test": ""}.items():
        (tmp_path / f"{split}.jsonl").write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} must have at least one row in every split")):
        load_classification(str(tmp_path))


def test_a_stranger_computes_the_same(tmp_path):
    model = prune(tiny.build(tiny.Case(BertForSequenceClassification, tiny.BERT)), "top_k")
    model.save_pretrained(tmp_path)
    inputs = tiny.text_inputs([9, 4])
    lists = {name: value.tolist() for name, value in inputs.items()}
    answer = run_in_fresh_process(tmp_path, lists, ["AutoModelForSequenceClassification"])
    with torch.no_grad():
        ours = model(**inputs, output_token_trace=True)
    theirs = answer["AutoModelForSequenceClassification"]
    torch.testing.assert_close(torch.tensor(theirs["output"]), ours.logits, rtol=0, atol=1e-6)
    assert theirs["counts"] == ours.token_trace.counts.tolist()
    with pytest.raises(RuntimeError, match="does not load without the package"):
        run_in_fresh_process(tmp_path / "nothing", lists, ["AutoModel"])


def test_the_fast_quickstart_keeps_what_was_asked_for():
    arguments = runpy.run_path(str(SCRIPTS / "run_quickstart.py"))["QuickstartArguments"]
    fast = arguments(fast=True)
    assert (fast.model_name_or_path, fast.max_length, fast.max_train_samples) == ("bert-tiny", 64, 320)
    asked = arguments(fast=True, model_name_or_path="minilm-l6", pruning="evit", max_train_samples=32)
    assert (asked.model_name_or_path, asked.pruning, asked.max_train_samples) == ("minilm-l6", "evit", 32)
    assert asked.max_length == 64


LEARNED = '{"preset": "ltp", "final_token_threshold": 0.01, "objective": "ltp"}'


@pytest.mark.real
@pytest.mark.parametrize(
    "wish, words",
    [
        (["--pruning", '{"preset": "top_k", "keep_rate": 1.3}'], "keep_rate (1.3) must be in (0, 1]"),
        (["--pruning", '{"preset": "adaptive", "layers": [1], "prior_threshold": 1}'], "needs a table, which"),
        (["--pruning", LEARNED], "objective ('ltp') learns values, as run_finetune.py does and this does not"),
        (["--dataset_name", "reuters-r8", "--label_column", "topic"], "column 'topic' is not in reuters-r8"),
        (["--model_name_or_path", "/no/such/model"], "/no/such/model"),
        (["--timed_rounds", "0"], "timed_rounds (0) must be >= 1"),
        (["--shown_documents", "0"], "shown_documents (0) must be >= 1"),
        (["--max_test_samples", "-3"], "max_test_samples (-3) must be >= 1"),
        (["--learning_rate", "-1"], "learning_rate (-1.0) must be > 0"),
        (["--output_dir", f"{__file__}/out", "--pruning", "top_k"], "NotADirectoryError"),
    ],
    ids=["pruning", "table", "learned", "column", "model", "rounds", "shown", "tested", "rate", "folder"],
)
def test_quickstart_ends_with_one_sentence(wish, words, tmp_path, monkeypatch):
    script = str(SCRIPTS / "run_quickstart.py")
    model = [] if "--model_name_or_path" in wish else ["--model_name_or_path", "bert-tiny"]
    monkeypatch.setattr(sys, "argv", [script, "--output_dir", str(tmp_path), *model, *wish])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    assert isinstance(end.value.code, str) and words in end.value.code and "\n" not in end.value.code


@pytest.mark.real
def test_quickstart_is_of_classes(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"w{i},{i / 4}\n" for i in range(20)))
    given = [
        "--model_name_or_path",
        "bert-tiny",
        "--dataset_name",
        str(tmp_path / "a.csv"),
        "--output_dir",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", ["run_quickstart.py", *given])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPTS / "run_quickstart.py"), run_name="__main__")
    assert (
        "label_column ('label') must hold one class a row here; run_finetune.py trains a regression" in end.value.code
    )


def test_the_quickstart_has_the_argument_that_its_errors_name(tmp_path):
    names = runpy.run_path(str(SCRIPTS / "run_quickstart.py"))
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"w{4 + i % 40},{i % 51}\n" for i in range(204)))
    given = {"dataset_name": str(tmp_path / "a.csv"), "output_dir": str(tmp_path / "out"), "max_length": 16}
    quickstart = names["Quickstart"](names["QuickstartArguments"](**given))
    quickstart.tokenizer = tiny.tokenizer()
    with pytest.raises(ValueError, match="problem_type must say whether"):
        quickstart.load_data()
    asked = names["QuickstartArguments"](**given, problem_type="single_label_classification")
    quickstart = names["Quickstart"](asked)
    quickstart.tokenizer = tiny.tokenizer()
    assert len(quickstart.load_data()["train"].features["label"].names) == 51
    with pytest.raises(ValueError, match=r"problem_type \('regression'\) must be 'single_label_classification'"):
        names["QuickstartArguments"](**given, problem_type="regression")
