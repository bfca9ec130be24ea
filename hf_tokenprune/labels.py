"""What a label column holds: one class a row, a number, or several labels; and the form in which models learn it.

The column is brought to one of three features, which say the rest: `ClassLabel`, `Value("float32")`, or
`List(ClassLabel)` with the numbers of the labels that a row has. Names of problems are those of `config.problem_type`.
"""

import ast
import io
import json
import math
import tokenize
from collections.abc import Callable, Sequence
from decimal import Decimal
from itertools import pairwise
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc


REGRESSION = "regression"
MULTI_LABEL = "multi_label_classification"
CLASSES = "single_label_classification"
PROBLEMS = (REGRESSION, MULTI_LABEL, CLASSES)

# Whole numbers are classes where there are few: so many, or one for so many rows.
FEW_CLASSES, ROWS_OF_A_CLASS = 20, 10
NUMBER = datasets.Value("float32")
LISTS = (datasets.List, datasets.LargeList)


def check_problem(name: str | None) -> str | None:
    """Raises a ValueError for a problem that transformers does not name."""
    if name is not None and name not in PROBLEMS:
        raise ValueError(f"problem_type ({name!r}) must be one of {', '.join(PROBLEMS)}")
    return name


def gathered(
    splits: datasets.DatasetDict, column: str, separator: str | None = None, problem_type: str | None = None
) -> datasets.DatasetDict:
    """Labels that lie in several columns or in texts, as lists in one column; all others as they are.

    Args:
        column: its name; or those of several columns, with commas between, each of which holds 0 or 1 for one label. A
            split that has None or -1 in all of these has no labels: None in each row.
        separator: what stands between the labels of a text; a row without a text has none of them. Without a separator,
            texts that are lists in JSON, in Python or as numpy prints them are read as those.
        problem_type: of one class a row, texts stay what they are.

    Raises:
        ValueError: a column twice, columns that hold something else than 0 or 1, a separator for a column without
            texts, or texts in brackets of which some can be read as lists and others cannot.
    """
    several = _parts(column, ",") if "," in column else []
    if len(set(several)) < len(several):
        raise ValueError(f"label_column ({column!r}) must name each column once")
    made = {}
    for name, split in splits.items():
        there = set(split.column_names)
        if several and column not in there and there.issuperset(several):
            split = split.add_column(column, _of_columns(split, several, name), feature=_names(several))
        made[name] = split
    splits = datasets.DatasetDict(made)
    labelled = [each for each in made.values() if column in each.column_names and _any_value(each, column)]
    texts = bool(labelled) and all(_is_text(each.features[column]) for each in labelled)
    if separator is not None:
        if not texts:
            raise ValueError(f"label_separator ({separator!r}) must go with a column of texts, and {column!r} is none")
        return _with_lists(splits, column, lambda text: _parts(text or "", separator))
    if texts and problem_type != CLASSES and _hold_lists(splits, column):
        return _with_lists(splits, column, lambda text: None if text is None else _written_list(text))
    return splits


def _parts(text: str, separator: str) -> list[str]:
    return [part.strip() for part in text.split(separator) if part.strip()]


def _names(names: Sequence[str]) -> Any:
    return datasets.List(datasets.ClassLabel(names=list(names)))


def _is_text(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _any_value(split: datasets.Dataset, column: str) -> bool:
    return split.data.column(column).null_count < len(split)


def _of_columns(split: datasets.Dataset, columns: Sequence[str], name: str) -> list[list[int] | None]:
    held = [split[column][:] for column in columns]
    if all(value in (-1, None) for values in held for value in values):
        return [None] * len(split)
    for column, values in zip(columns, held):
        for row, value in enumerate(values):
            if value not in (0, 1):
                raise ValueError(f"row {row} of {name}: {column} ({value!r}) must be 0 or 1, for one label of several")
    return [[place for place, value in enumerate(row) if value] for row in zip(*held)]


def _hold_lists(splits: datasets.DatasetDict, column: str) -> bool:
    """Whether the texts of a column are lists.

    Raises:
        ValueError: all are in brackets, and one cannot be read though it or another looks like a list.
    """
    held = [(name, split.unique(column)) for name, split in splits.items() if column in split.column_names]
    texts = {text for _, each in held for text in each if text is not None}
    if not all(text.strip().startswith("[") and text.strip().endswith("]") for text in texts):
        return False
    unread = {text for text in texts if _written_list(text) is None}
    if unread == texts and all(len(_parts(text.replace(",", " "), " ")) == 1 for text in texts):
        return False  # [POS] and [NEG] are names
    for name, split in splits.items():
        for row, text in enumerate(split[column][:] if unread and column in split.column_names else ()):
            if text in unread:
                raise ValueError(
                    f"row {row} of {name}: {column} ({text!r}) must be a list as JSON, Python or numpy writes one; "
                    f"problem_type {CLASSES!r} takes texts as they are"
                )
    return True


def _written_list(text: str) -> list | None:
    """The list that a text is in JSON, in Python or as numpy prints one; None: it is none."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    for read in (json.loads, _of_python, _printed_names, _printed_values):
        try:
            value = read(text)
        except (ValueError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError):
            continue
        return value if isinstance(value, list) else None
    return None


def _of_python(text: str) -> Any:
    """Not where two texts stand side by side, which Python would make one of."""
    if any(first.type == second.type == tokenize.STRING for first, second in pairwise(_tokens(text))):
        raise ValueError(f"{text} must have commas")
    return ast.literal_eval(text)


def _printed_names(text: str) -> list[str]:
    """As numpy prints names: in quotes, without commas."""
    tokens = _tokens(text)[1:-1]
    if any(token.type != tokenize.STRING for token in tokens):
        raise ValueError(f"{text} must hold names")
    return [ast.literal_eval(token.string) for token in tokens]


def _tokens(text: str) -> list[tokenize.TokenInfo]:
    skipped = (tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER)
    return [each for each in tokenize.generate_tokens(io.StringIO(text).readline) if each.type not in skipped]


def _printed_values(text: str) -> list[float | bool]:
    """As numpy prints numbers or truth values: without commas."""
    parts = text[1:-1].split()
    truth = {"True": True, "False": False}
    return [truth[part] for part in parts] if parts and truth.keys() >= set(parts) else [float(part) for part in parts]


def _with_lists(splits: datasets.DatasetDict, column: str, read: Callable[[Any], list | None]) -> datasets.DatasetDict:
    """A split without any value stays without."""
    made = {}
    for name, split in splits.items():
        if column in split.column_names and _any_value(split, column):
            lists = [read(text) for text in split[column][:]]
            try:
                split = split.remove_columns(column).add_column(column, lists)
            except (TypeError, ValueError) as error:  # lists of unlike things
                raise ValueError(f"column {column!r} must hold lists of one kind of value: {error}") from error
        made[name] = split
    return datasets.DatasetDict(made)


def encode_labels(
    splits: datasets.DatasetDict, *, column: str, name: str, problem_type: str | None = None, usual: str | None = None
) -> datasets.DatasetDict:
    """Brings `label` to one of the three features. One numbering holds for all splits, though a class may be missing in
    one of them.

    Lists are several labels: names, numbers of labels, or 0 and 1 where all lists have one length of two or more. Texts
    and truth values are classes. Numbers with fractions are a regression; whole ones are classes where there are few,
    at most 20 or one for ten rows, and at most one for two rows.

    Args:
        column, name: of the data, for errors.
        problem_type: how the column is to be read, whatever it looks like.
        usual: the checkpoint's, which decides where whole numbers or texts could be either: a regression stays one.

    Raises:
        ValueError: a column that holds neither, or not what is asked for; one that could be read in two ways; a value
            that is missing, infinite or no number; fewer than two classes, labels or numbers.
    """
    feature, where = splits["train"].features["label"], f"column {column!r} of {name}"
    check_problem(problem_type)
    if isinstance(feature, LISTS):
        if problem_type not in (None, MULTI_LABEL):
            raise ValueError(
                f"{where} holds lists, several labels a row; problem_type ({problem_type!r}) must be {MULTI_LABEL!r}"
            )
        return _several(splits, where, told=problem_type is not None)
    if not isinstance(feature, datasets.ClassLabel | datasets.Value):
        raise ValueError(f"{where} ({feature}) must hold one class, one number or one list of labels a row")
    if problem_type == MULTI_LABEL:
        raise ValueError(
            f"{where} ({feature}) must hold lists for problem_type {MULTI_LABEL!r}, or texts with a label_separator; "
            "or label_column must be the names of several columns of 0 and 1, with commas between"
        )
    if (problem_type or _problem(splits, where, usual)) == REGRESSION:
        return _numbers(splits, where)
    return _classes(splits, where)


def _problem(splits: datasets.DatasetDict, where: str, usual: str | None) -> str:
    """Whether values of one a row are classes or numbers, by what they are."""
    feature = splits["train"].features["label"]
    if isinstance(feature, datasets.ClassLabel) or feature.dtype == "bool":
        return CLASSES
    distinct = {value for split in splits.values() for value in split.unique("label")}
    count, rows = len(distinct), sum(map(len, splits.values()))
    shared = count <= 2 or 2 * count <= rows
    if _is_text(feature) or not all(isinstance(value, int | float | Decimal) for value in distinct):
        fractions = [text for text in distinct if _fraction(text)]
        if fractions and all(number_of(text) is not None for text in distinct):
            if usual == REGRESSION:
                return REGRESSION
            raise ValueError(
                f"{where} holds texts that are numbers ({min(fractions)!r}); problem_type must say whether they are "
                f"{REGRESSION!r} or {CLASSES!r}"
            )
        if not shared:
            raise ValueError(
                f"{where} ({count} different values in {rows} rows) must hold classes that rows share; problem_type "
                f"{CLASSES!r} takes them as they are"
            )
        return CLASSES
    if any(map(_fraction, distinct)) or usual == REGRESSION:
        return REGRESSION
    if not shared or count > max(FEW_CLASSES, rows / ROWS_OF_A_CLASS):
        raise ValueError(
            f"{where} ({count} different whole numbers in {rows} rows) could be classes or numbers; problem_type must "
            f"say whether they are {CLASSES!r} or {REGRESSION!r}"
        )
    return CLASSES


def number_of(value: Any) -> float | None:
    """What is meant by a value or a text; None: no number, or none that is finite as models learn it."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(_stored_number(number)) else None


def _stored_number(value: Any) -> np.float32:
    """As `NUMBER` holds it."""
    with np.errstate(over="ignore"):
        return np.float32(float(value))


def _fraction(value: Any) -> bool:
    """Whether it is a number with a fraction, or an infinite one, which no class is."""
    try:
        return not float(value).is_integer()
    except (TypeError, ValueError, OverflowError):
        return False


def _classes(splits: datasets.DatasetDict, where: str) -> datasets.DatasetDict:
    if not isinstance(splits["train"].features["label"], datasets.ClassLabel):
        values = {value for split in splits.values() for value in split.unique("label")}
        numbers = {value: number for number, value in enumerate(sorted(values))}
        feature = datasets.ClassLabel(names=[str(value) for value in numbers])
        splits = _replaced(splits, lambda value: numbers[value], feature)
    names = splits["train"].features["label"].names
    if len(names) < 2:
        raise ValueError(f"{where} (only {names[0]!r}) must hold at least two classes")
    return splits


def _numbers(splits: datasets.DatasetDict, where: str) -> datasets.DatasetDict:
    distinct = {value for split in splits.values() for value in split.unique("label")}
    for value in distinct:
        if number_of(value) is None:
            large = f", and float32 ends at {np.finfo(np.float32).max:.3g}" if _too_large(value) else ""
            raise ValueError(
                f"{_place(splits, value)}: label ({value!r}) must be a finite number, for a {REGRESSION}{large}"
            )
    if len(set(map(_stored_number, distinct))) < 2:
        held = repr(distinct.pop()) if len(distinct) == 1 else f"{float(_stored_number(distinct.pop()))!r} in float32"
        raise ValueError(f"{where} (only {held}) must hold at least two different numbers")
    return _replaced(splits, float, NUMBER)


def _too_large(value: Any) -> bool:
    """Whether it is a number that is infinite only as models learn it."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False
    except OverflowError:
        return True


def _several(splits: datasets.DatasetDict, where: str, *, told: bool) -> datasets.DatasetDict:
    """Lists of labels as the numbers of those that are there, in order and each once.

    Args:
        told: whether `problem_type` says so: then labels that no two rows share are taken, too.
    """
    inner = splits["train"].features["label"].feature
    rows = [(f"row {row} of {name}", each) for name, split in splits.items() for row, each in enumerate(_stored(split))]
    _check_lists(rows)
    lists = [values for _, values in rows]
    if are_flags(lists, inner):
        names = [f"LABEL_{place}" for place in range(len(lists[0]))]
        splits = _replaced(splits, lambda row: [place for place, there in enumerate(row) if there], _names(names))
    elif not isinstance(inner, datasets.ClassLabel):
        _check_no_flags(rows)
        splits = _numbered(splits, where, told=told)
    names = splits["train"].features["label"].feature.names
    if len(names) < 2:
        raise ValueError(f"{where} ({'only ' + repr(names[0]) if names else 'no label'}) must hold at least two labels")
    return splits


def _check_lists(rows: Sequence[tuple[str, list]]) -> None:
    for place, values in rows:
        if any(value is None or value != value for value in values):
            raise ValueError(f"{place}: label ({values!r}) must have a value in every place")
        if any(isinstance(value, list | dict) or _fraction(value) for value in values if not isinstance(value, str)):
            raise ValueError(f"{place}: label ({values!r}) must be names, numbers of labels, or 0 and 1")


def _check_no_flags(rows: Sequence[tuple[str, list]]) -> None:
    """Raises a ValueError for 0 and 1, or truth values, that would be taken for the numbers of labels."""
    for place, values in rows:
        twice = len(set(values)) < len(values) and not isinstance(values[0], str)
        if twice or any(isinstance(value, bool) for value in values):
            raise ValueError(
                f"{place}: label ({values!r}) must be names or numbers of labels, none twice; lists that say of each "
                "label whether it is there must be of one length"
            )


def _numbered(splits: datasets.DatasetDict, where: str, *, told: bool) -> datasets.DatasetDict:
    held = [value for split in splits.values() for each in split["label"] for value in each]
    numbers = {value: number for number, value in enumerate(sorted(set(held)))}
    if not told and len(numbers) > 2 and 2 * len(numbers) > len(held):
        raise ValueError(
            f"{where} ({len(numbers)} different labels, {len(held)} in all) must hold labels that rows share; "
            f"problem_type {MULTI_LABEL!r} takes them as they are"
        )
    names = [str(int(value) if isinstance(value, float) else value) for value in numbers]
    return _replaced(splits, lambda row: sorted({numbers[value] for value in row}), _names(names))


def are_flags(lists: Sequence[Sequence[Any]], inner: Any) -> bool:
    """Whether lists say of each label whether it is there, by 0 and 1: all of one length, two or more."""
    if isinstance(inner, datasets.ClassLabel) or not lists:
        return False
    width = len(lists[0])
    return width > 1 and all(len(row) == width and all(value in (0, 1) for value in row) for row in lists)


def _stored(split: datasets.Dataset) -> list:
    """The rows as the file has them, so that an error counts as its reader does."""
    return split.data.column("label").to_pylist()


def _place(splits: datasets.DatasetDict, value: Any) -> str:
    """The first row that has a value."""
    for name, split in splits.items():
        column = split.data.column("label")
        row = pc.index(column, value).as_py()
        if row >= 0:
            return f"row {row} of {name}"
    return "a row"


def _replaced(splits: datasets.DatasetDict, read: Any, feature: Any) -> datasets.DatasetDict:
    return datasets.DatasetDict(
        {
            name: split.remove_columns("label").add_column(
                "label", [read(value) for value in split["label"]], feature=feature
            )
            for name, split in splits.items()
        }
    )


def problem_of_labels(splits: datasets.DatasetDict) -> str:
    """Which problem the labels that `encode_labels` made are of."""
    feature = splits["train"].features["label"]
    return CLASSES if isinstance(feature, datasets.ClassLabel) else REGRESSION if feature == NUMBER else MULTI_LABEL


def label_names(splits: datasets.DatasetDict) -> list[str] | None:
    """Of classes or labels; None: numbers have none."""
    feature = splits["train"].features["label"]
    if isinstance(feature, datasets.ClassLabel):
        return feature.names
    return None if feature == NUMBER else feature.feature.names


def targets(splits: datasets.DatasetDict) -> datasets.DatasetDict:
    """Labels as losses take them: several labels as 0.0 and 1.0, one for each name."""
    if problem_of_labels(splits) != MULTI_LABEL:
        return splits
    width = len(label_names(splits))
    return _replaced(splits, lambda row: flags(row, width), datasets.List(NUMBER, length=width))


def flags(numbers: Sequence[int], width: int) -> list[float]:
    """1.0 at each of these places, of so many."""
    there = set(numbers)
    return [float(place in there) for place in range(width)]


def described(splits: datasets.DatasetDict, column: str, *, asked: bool, checkpoint: str | None = None) -> str:
    """One line on what the labels were taken for, and why.

    Args:
        asked: whether `problem_type` said so. checkpoint: the checkpoint's own problem, if it says one.
    """
    problem, names = problem_of_labels(splits), label_names(splits)
    if problem == REGRESSION:
        values = [value for split in splits.values() for value in split.unique("label")]
        held = f"numbers from {min(values):g} to {max(values):g}"
    else:
        kind = "classes" if problem == CLASSES else "labels, any number of them a row"
        held = f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
    why = "as problem_type says" if asked else "problem_type can say otherwise"
    other = f"; the checkpoint's head is of {checkpoint}" if checkpoint not in (None, problem) else ""
    return f"label column {column!r} is read as {problem}: {held} ({why}{other})"
