"""Labels as users have them: classes, numbers and lists are told apart, said in a line, and judged as what they are."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score

from hf_tokenprune.data import load_classification
from hf_tokenprune.labels import CLASSES, MULTI_LABEL, REGRESSION, described, label_names, problem_of_labels, targets
from hf_tokenprune.metrics import JUDGEMENTS, MultiLabel, Regression, answers, bootstrap


def read(folder: Path, labels: list[Any], *, name: str = "data.jsonl", **given: Any) -> datasets.DatasetDict:
    """The splits of a file with these labels, one a row or, of a mapping, columns of them."""
    columns = labels if isinstance(labels, dict) else {"label": labels}
    count = len(next(iter(columns.values())))
    rows = [{"text": f"w{4 + i % 40} w9", **{key: each[i] for key, each in columns.items()}} for i in range(count)]
    path = folder / name
    if name.endswith("csv"):
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_classification(str(path), **given)


def held(splits: datasets.DatasetDict) -> list[Any]:
    return [label for split in splits.values() for label in split["label"]]


TOLD = {
    "numbers with fractions": ([i % 51 / 10 for i in range(300)], REGRESSION, None),
    "texts": (["yes", "no"] * 10, CLASSES, ["no", "yes"]),
    "truth values": ([True, False] * 10, CLASSES, ["False", "True"]),
    "few whole numbers": ([0, 1, 2, 3, 4] * 4, CLASSES, ["0", "1", "2", "3", "4"]),
    "many whole numbers of many rows": ([i % 30 for i in range(300)], CLASSES, [str(i) for i in range(30)]),
    "whole numbers with a point": ([0.0, 1.0] * 10, CLASSES, ["0.0", "1.0"]),
    "lists of names": ([["b"], [], ["a", "c"], ["a"]] * 5, MULTI_LABEL, ["a", "b", "c"]),
    "lists of numbers": ([[4], [], [0, 2], [2]] * 5, MULTI_LABEL, ["0", "2", "4"]),
    "lists of one number": ([[0], [1], [0], [1]] * 5, MULTI_LABEL, ["0", "1"]),
    "lists of 0 and 1": ([[0, 1, 0], [1, 1, 0]] * 5, MULTI_LABEL, ["LABEL_0", "LABEL_1", "LABEL_2"]),
    "lists of 0.0 and 1.0": ([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]] * 5, MULTI_LABEL, ["LABEL_0", "LABEL_1", "LABEL_2"]),
    "lists of truth values": ([[True, False], [True, True]] * 5, MULTI_LABEL, ["LABEL_0", "LABEL_1"]),
}


@pytest.mark.parametrize("kind", TOLD)
def test_labels_are_told_apart(kind, tmp_path):
    labels, problem, names = TOLD[kind]
    splits = read(tmp_path, labels)
    assert problem_of_labels(splits) == problem and label_names(splits) == names
    assert len(splits["train"]) + len(splits["test"]) == len(labels)
    if problem == REGRESSION:
        np.testing.assert_allclose(sorted(held(splits)), sorted(labels), rtol=1e-6)


@pytest.mark.parametrize("text", [str, json.dumps, lambda row: str(np.array(row))], ids=["python", "json", "numpy"])
def test_lists_that_a_csv_holds_as_texts(text, tmp_path):
    rows = [[0, 1, 0], [1, 1, 0], [0, 0, 0]] * 5
    splits = read(tmp_path, [text(row) for row in rows], name="data.csv")
    assert label_names(splits) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert sorted(map(tuple, held(splits))) == sorted([(1,), (0, 1), ()] * 5)
    # A name in brackets is no list.
    assert problem_of_labels(read(tmp_path, ["[POS]", "[NEG]"] * 5, name="names.csv")) == CLASSES


PRINTED = {
    "names": (lambda row: np.array(["sad", "it's", "angry"])[row], ["angry", "it's", "sad"]),
    "objects": (lambda row: np.array(["sad", "it's", "angry"], dtype=object)[row], ["angry", "it's", "sad"]),
    "truth values": (lambda row: np.isin(range(3), row), ["LABEL_0", "LABEL_1", "LABEL_2"]),
}


@pytest.mark.parametrize("kind", PRINTED)
def test_lists_that_numpy_printed_into_a_csv(kind, tmp_path):
    """Python would make one label of the two in `['sad' 'angry']`."""
    made, names = PRINTED[kind]
    rows = [[0, 2], [1], [0, 1, 2], [0]] * 5
    splits = read(tmp_path, [str(made(row)) for row in rows], name="data.csv")
    assert label_names(splits) == names
    held_names = [{names[place] for place in each} for each in held(splits)]
    wanted = [{str(name) for name in made(row)} if kind != "truth values" else {names[i] for i in row} for row in rows]
    assert sorted(map(sorted, held_names)) == sorted(map(sorted, wanted))


@pytest.mark.parametrize("odd", ["['sad', 'angry' 'joy']", "[sad, joy]", "[sad joy]", "[0 1 ... 1]", "['a' b]"])
def test_texts_in_brackets_that_are_no_lists_are_refused(odd, tmp_path):
    for others in (["['sad', 'joy']", "['joy']"], [odd, odd]):
        labels = [others[0], others[1], odd, others[0]] * 5
        words = f"row {labels.index(odd)} of train: label ({odd!r}) must be a list as JSON, Python or numpy writes one"
        with pytest.raises(ValueError, match=re.escape(words)):
            read(tmp_path, labels, name="data.csv")
    splits = read(tmp_path, [odd, "[sad]"] * 5, name="data.csv", problem_type=CLASSES)
    assert label_names(splits) == sorted([odd, "[sad]"])


def test_labels_of_one_text_and_in_several_columns(tmp_path):
    splits = read(tmp_path, ["a; c", "b", "c;a"] * 5, name="a.csv", label_separator=";")
    assert label_names(splits) == ["a", "b", "c"] and {tuple(each) for each in held(splits)} == {(0, 2), (1,)}
    columns = {"toxic": [0, 1, 0, 1] * 5, "rude": [0, 0, 1, 1] * 5, "never": [0] * 20}
    splits = read(tmp_path, columns, name="b.csv", label_column="toxic,rude,never")
    assert label_names(splits) == ["toxic", "rude", "never"]
    assert {tuple(each) for each in held(splits)} == {(), (0,), (1,), (0, 1)}
    assert {tuple(each) for each in held(targets(splits))} == {(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)}


def test_a_row_without_a_text_has_no_label(tmp_path):
    splits = read(tmp_path, ["a;b", None, "b"] * 5, name="a.csv", label_separator=";")
    assert label_names(splits) == ["a", "b"] and {tuple(each) for each in held(splits)} == {(0, 1), (), (1,)}
    path = split_files(tmp_path / "hidden", train=["a;b", None] * 5, test=[None] * 4, validation=["a", "b", None])
    assert load_classification(path, label_separator=";")["test"]["label"][:] == [[0], [1], []]


def test_columns_of_a_split_without_labels(tmp_path):
    """A test split is published with -1 or nothing in all of them; one such row among others is a fault."""

    def files(name: str, **splits: list[tuple]) -> str:
        (tmp_path / name).mkdir()
        for split, rows in splits.items():
            lines = [json.dumps({"text": "w5", "toxic": a, "rude": b}) + "\n" for a, b in rows]
            (tmp_path / name / f"{split}.jsonl").write_text("".join(lines))
        return str(tmp_path / name)

    train = [(0, 1), (1, 1), (0, 0), (1, 0)] * 3
    for number, hidden in enumerate(([(-1, -1)] * 4, [(None, None)] * 4, [(-1, None)] * 4)):
        path = files(f"only{number}", train=train, test=hidden)
        splits = load_classification(path, label_column="toxic,rude")
        assert sum(map(len, splits.values())) == len(train)
        path = files(f"other{number}", train=train, test=hidden, validation=[(0, 1), (1, 1)])
        splits = load_classification(path, label_column="toxic, rude")
        assert splits["test"]["label"][:] == [[1], [0, 1]] and label_names(splits) == ["toxic", "rude"]
    for number, row in enumerate(((-1, -1), (None, None))):
        path = files(f"single{number}", train=train, test=[(0, 1), row])
        with pytest.raises(ValueError, match=re.escape(f"row 1 of test: toxic ({row[0]}) must be 0 or 1")):
            load_classification(path, label_column="toxic,rude")
    path = files("train", train=[(-1, -1)] * 4)
    with pytest.raises(ValueError, match=re.escape("row 0 of train: toxic,rude (None) must have a value")):
        load_classification(path, label_column="toxic,rude")


def test_names_that_a_data_set_has_stay(tmp_path):
    feature = datasets.List(datasets.ClassLabel(names=["joy", "anger", "fear"]))
    features = datasets.Features({"text": datasets.Value("string"), "label": feature})
    rows = {"text": ["w5"] * 10, "label": [[1], [0, 1]] * 5}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    splits = load_classification(str(tmp_path / "a.parquet"))
    assert label_names(splits) == ["joy", "anger", "fear"]  # though nobody fears
    assert sorted(held(targets(splits))) == [[0.0, 1.0, 0.0]] * 5 + [[1.0, 1.0, 0.0]] * 5


ASKED = {
    "whole numbers": ([i % 7 for i in range(40)], REGRESSION),
    "3,000 whole numbers": (list(range(3000)), REGRESSION),
    "texts that are numbers": (["1.5", "2", "3.25", "4"] * 5, REGRESSION),
    "numbers with fractions": ([0.5, 1.0] * 10, CLASSES),
    "many whole numbers": ([i % 51 for i in range(300)], CLASSES),
    "lists": ([["a"], ["b"]] * 5, MULTI_LABEL),
}


@pytest.mark.parametrize("kind", ASKED)
def test_what_is_asked_for_overrules(kind, tmp_path):
    labels, problem = ASKED[kind]
    splits = read(tmp_path, labels, problem_type=problem)
    assert problem_of_labels(splits) == problem
    if problem == REGRESSION:
        assert sorted(held(splits)) == pytest.approx(sorted(map(float, labels)))


def test_a_checkpoint_decides_where_whole_numbers_could_be_either(tmp_path):
    for usual, problem in ((REGRESSION, REGRESSION), (CLASSES, CLASSES), (MULTI_LABEL, CLASSES), (None, CLASSES)):
        assert problem_of_labels(read(tmp_path, [0, 1, 2] * 5, usual_problem=usual)) == problem
    assert problem_of_labels(read(tmp_path, list(range(3000)), usual_problem=REGRESSION)) == REGRESSION
    assert problem_of_labels(read(tmp_path, ["1.5", "2"] * 5, usual_problem=REGRESSION)) == REGRESSION
    assert problem_of_labels(read(tmp_path, ["a", "b"] * 5, usual_problem=REGRESSION)) == CLASSES
    assert problem_of_labels(read(tmp_path, [0.5, 1.5] * 5, usual_problem=CLASSES)) == REGRESSION


WHOLE = "different whole numbers in {} rows) could be classes or numbers; problem_type must say whether"
REFUSED = {
    "3,000 whole numbers": (list(range(3000)), {}, f"(3000 {WHOLE.format(3000)}"),
    "51 of 300": ([i % 51 for i in range(300)], {}, f"(51 {WHOLE.format(300)}"),
    "a class a row": ([f"c{i}" for i in range(30)], {}, "(30 different values in 30 rows) must hold classes that rows"),
    "numbers in texts": (["1.5", "2", "3"] * 5, {}, "holds texts that are numbers ('1.5'); problem_type must say"),
    "no number": (
        [1.5, 2.5, "x"] * 5,
        {"name": "a.csv", "problem_type": REGRESSION},
        "row 2 of train: label ('x') must",
    ),
    "one number": ([2.5] * 10, {}, "(only 2.5) must hold at least two different numbers"),
    "an infinite one": ([1.5, float("inf")] * 5, {"name": "a.csv"}, "row 1 of train: label (inf) must be a finite"),
    "beyond float32": (
        [1.5, 1e39] * 5,
        {},
        "row 1 of train: label (1e+39) must be a finite number, for a regression, and",
    ),
    "beyond any float": (
        ["1.5", "9" * 400] * 5,
        {"problem_type": REGRESSION},
        "must be a finite number, for a regression",
    ),
    "one number in float32": (
        [16777216, 16777217] * 5,
        {"problem_type": REGRESSION},
        "(only 16777216.0 in float32) must hold at least two different numbers",
    ),
    "a missing number": ([1.5, None, 2.5] * 5, {}, "row 1 of train: label (None) must have a value"),
    "a missing list": ([["a"], None, ["b"]] * 5, {}, "row 1 of train: label (None) must have a value"),
    "a hole in a list": (
        [["a"], ["b", None]] * 5,
        {},
        "row 1 of train: label (['b', None]) must have a value in every",
    ),
    "fractions in lists": (
        [[0.5, 1.0], [0.0, 1.0]] * 5,
        {},
        "row 0 of train: label ([0.5, 1.0]) must be names, numbers",
    ),
    "ragged truth": (
        [[True], [True, False]] * 5,
        {},
        "row 0 of train: label ([True]) must be names or numbers of labels",
    ),
    "ragged 0 and 1": (
        [[0, 1, 0], [1, 1]] * 5,
        {},
        "label ([0, 1, 0]) must be names or numbers of labels, none twice; lists",
    ),
    "a label a row": (
        [[f"c{i}"] for i in range(30)],
        {},
        "(30 different labels, 30 in all) must hold labels that rows",
    ),
    "one label": ([["a"], []] * 5, {}, "(only 'a') must hold at least two labels"),
    "no label": ([[], []] * 5, {}, "(no label) must hold at least two labels"),
    "lists as classes": ([["a"], ["b"]] * 5, {"problem_type": CLASSES}, "holds lists, several labels a row"),
    "lists as numbers": ([[1], [2]] * 5, {"problem_type": REGRESSION}, "holds lists, several labels a row"),
    "one class as several": (["a", "b"] * 5, {"problem_type": MULTI_LABEL}, "must hold lists for problem_type 'multi_"),
    "a made-up problem": (
        [1, 2] * 5,
        {"problem_type": "ranking"},
        "problem_type ('ranking') must be one of regression,",
    ),
    "no text to part": ([1, 2] * 5, {"label_separator": ";"}, "label_separator (';') must go with a column of texts"),
    "a column twice": (
        {"x": [0, 1] * 5, "y": [0, 1] * 5},
        {"label_column": "x, y,x"},
        "label_column ('x, y,x') must name each column once",
    ),
    "columns of counts": (
        {"x": [0, 1] * 5, "y": [0, 2] * 5},
        {"label_column": "x,y"},
        "row 1 of train: y (2) must be 0 or 1, for one label of several",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_told_is_refused_in_a_sentence(what, tmp_path):
    labels, given, words = REFUSED[what]
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        read(tmp_path, labels, **given)
    assert "\n" not in str(error.value)


def split_files(folder: Path, **labels: list[Any]) -> str:
    folder.mkdir()
    for split, these in labels.items():
        rows = [json.dumps({"text": "w5", "label": label}) + "\n" for label in these]
        (folder / f"{split}.jsonl").write_text("".join(rows))
    return str(folder)


def test_a_label_that_only_the_test_split_has_counts(tmp_path):
    path = split_files(tmp_path / "several", train=[["a"], ["c"]] * 5, test=[["b", "a"]] * 4)
    splits = load_classification(path)
    assert label_names(splits) == ["a", "b", "c"] and splits["test"]["label"][:] == [[0, 1]] * 4


def test_a_number_of_minus_one_is_a_label_unless_all_are(tmp_path):
    """Some test splits are published with every label -1."""
    path = split_files(tmp_path / "numbers", train=[0.5, -1.0] * 5, test=[-1.0, 0.25, 0.5])
    assert load_classification(path)["test"]["label"][:] == [-1.0, 0.25, 0.5]
    path = split_files(tmp_path / "hidden", train=[0.5, -1.0] * 5, test=[-1.0] * 3, validation=[0.5, 0.75])
    assert load_classification(path)["test"]["label"][:] == [0.5, 0.75]


def test_one_line_says_what_labels_were_taken_for(tmp_path):
    said = described(read(tmp_path, [0.0, 2.5, 5.0] * 5), "score", asked=False, checkpoint=CLASSES)
    assert said == (
        "label column 'score' is read as regression: numbers from 0 to 5 (problem_type can say otherwise; the "
        "checkpoint's head is of single_label_classification)"
    )
    said = described(read(tmp_path, [["b"], ["a"]] * 5), "label", asked=True)
    assert said.endswith("2 labels, any number of them a row: a, b (as problem_type says)")


def test_metrics_are_those_of_the_libraries():
    chance = np.random.default_rng(0)
    a, b = chance.normal(size=40), chance.normal(size=40)
    found = Regression().compute(predictions=a, references=b)
    assert found == pytest.approx(
        {"pearson": pearsonr(a, b)[0], "spearman": spearmanr(a, b)[0], "mse": ((a - b) ** 2).mean()}
    )
    assert Regression().compute(predictions=[1.0, 1.0], references=[1.0, 3.0]) == {
        "pearson": 0.0, "spearman": 0.0, "mse": 2.0
    }  # fmt: skip
    given, there = (chance.integers(0, 2, (40, 3)) for _ in range(2))
    given[:, 2] = there[:, 2] = 0
    found = MultiLabel().compute(predictions=given, references=there)
    for average in ("micro", "macro"):
        assert found[f"f1_{average}"] == pytest.approx(f1_score(there, given, average=average, zero_division=0))
    assert found["exact_match"] == (given == there).all(axis=1).mean()


def test_answers_are_what_logits_say():
    logits = np.array([[0.5, -1.0], [-2.0, 3.0]])
    assert answers(CLASSES, logits).tolist() == [0, 1] and answers(REGRESSION, logits[:, :1]).tolist() == [0.5, -2.0]
    assert answers(MULTI_LABEL, logits).tolist() == [[1, 0], [0, 1]]


CHANCE = np.random.default_rng(1)
GIVEN = {
    CLASSES: (CHANCE.integers(0, 3, (2, 30)), CHANCE.integers(0, 3, 30)),
    REGRESSION: (CHANCE.normal(size=(2, 30)).round(1), CHANCE.normal(size=30).round(1)),
    MULTI_LABEL: (CHANCE.integers(0, 2, (2, 30, 3)), CHANCE.integers(0, 2, (30, 3))),
}


@pytest.mark.parametrize("problem", GIVEN)
def test_intervals_are_of_the_metrics_of_drawn_items(problem):
    """The same draws, with the items written out and the libraries' metrics of them."""
    (own, other), references = GIVEN[problem]
    chance, values = np.random.default_rng(0), []
    for _ in range(60):
        chance.multinomial(1, [1.0], size=1)
        times = chance.multinomial(30, np.full(30, 1 / 30), size=1)[0]
        drawn = np.repeat(np.arange(30), times)
        scores = [JUDGEMENTS[problem](each[drawn], references[drawn]) for each in (own, other)]
        values.append({name: scores[0][name] - scores[1][name] for name in scores[0]})
    for name in JUDGEMENTS[problem].names:
        one_at_a_time = pytest.MonkeyPatch()
        one_at_a_time.setattr("hf_tokenprune.metrics.DRAWN_AT_ONCE", 1)
        found = bootstrap(name, own[None], references, other[None], resamples=60)
        one_at_a_time.undo()
        assert found == pytest.approx(np.quantile([each[name] for each in values], [0.025, 0.975]).tolist(), abs=1e-9)


@pytest.mark.parametrize("problem", GIVEN)
def test_seeds_are_drawn_too(problem):
    runs, references = GIVEN[problem]
    for name in JUDGEMENTS[problem].names:
        assert bootstrap(name, runs, references, runs, resamples=50) == (0.0, 0.0)
        low, high = bootstrap(name, runs, references, runs[[0, 0]], resamples=2000)
        whole = [JUDGEMENTS[problem](run, references)[name] for run in runs]
        assert low <= 0 <= high and low < (whole[1] - whole[0]) / 2 < high
    with pytest.raises(ValueError, match="must be of one shape"):
        bootstrap(name, runs, references, runs[:1])
