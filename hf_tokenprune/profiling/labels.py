"""Which of a model's classes the labels of a data set are."""

from typing import Any

import datasets
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoints import CLASSIFY, problem_of, task_of
from ..labels import CLASSES, LISTS, MULTI_LABEL, REGRESSION, are_flags, flags, number_of


SHOWN = 8  # names of classes that an error lists


def why_unlabelled(model: PreTrainedModel, rows: datasets.Dataset, column: str) -> str | None:
    """Why no answer of this model can be right or wrong on these rows, in words; None: each can.

    Args:
        rows: with labels, if there are any, in `label`.
        column: what the data call it.
    """
    name, config = type(model).__name__, model.config
    if task_of(name).pipeline_tag not in CLASSIFY:
        return f"{name} gives an input no class"
    problem, kind = problem_of(config), f"num_labels {config.num_labels}, problem_type {config.problem_type}"
    if problem == CLASSES and config.num_labels < 2:
        return f"{name} ({kind}) does not choose one class of several"
    if problem == REGRESSION and config.num_labels > 1:
        return f"{name} ({kind}) gives several numbers, and a row has one"
    if "label" not in rows.column_names:
        return f"the data have no column {column!r}"
    feature = rows.features["label"]
    if isinstance(feature, LISTS) != (problem == MULTI_LABEL):
        held = "several labels" if problem == MULTI_LABEL else "one class" if problem == CLASSES else "one number"
        return f"column {column!r} does not hold {held} a row, as {name} ({kind}) gives; problem_type may say otherwise"
    missing = (None, -1) if isinstance(feature, datasets.ClassLabel) else (None,)
    if any(label in missing for label in rows["label"]):
        return f"column {column!r} is empty in some rows"
    wrong = [label for label in rows["label"] if problem == REGRESSION and number_of(label) is None]
    return f"{name} ({kind}) gives numbers, and column {column!r} holds {wrong[0]!r}" if wrong else None


def model_labels(splits: datasets.DatasetDict, rows: datasets.Dataset, config: PreTrainedConfig) -> list[Any]:
    """What a model's answers to these rows are compared with: `model_classes`, numbers, or 0 and 1 for each label.

    Raises:
        ValueError: a label that the model does not have.
    """
    problem = problem_of(config)
    if problem == CLASSES:
        return model_classes(splits, rows, config)
    if problem == REGRESSION:
        return [number_of(label) for label in rows["label"]]
    lists, inner = rows["label"][:], rows.features["label"].feature
    if are_flags([label for split in splits.values() for label in split["label"] if label is not None], inner):
        if len(lists[0]) != config.num_labels:
            raise ValueError(f"label ({lists[0]}) must have {config.num_labels} places, one for each of the model's")
        return [[int(there) for there in row] for row in lists]
    single = {
        name: datasets.Dataset.from_dict(
            {"label": [label for row in split["label"] for label in row or ()]},
            features=datasets.Features({"label": inner}),
        )
        for name, split in (splits | {"": rows}).items()
    }
    numbers = iter(model_classes(datasets.DatasetDict(single), single[""], config))
    return [list(map(int, flags([next(numbers) for _ in row], config.num_labels))) for row in lists]


def model_classes(splits: datasets.DatasetDict, rows: datasets.Dataset, config: PreTrainedConfig) -> list[int]:
    """The class of each row, as the model numbers its classes.

    Labels whose names the model knows are those classes, whatever numbers the data have for them. Where it knows none
    of them, integers are the classes' numbers; and where its own names are the usual LABEL_0, LABEL_1 ..., so are those
    of a `ClassLabel`, and the ranks of other values if there are just as many of them as classes.

    Args:
        splits: all of the data, which `rows` are of. Labels are in `label`.

    Raises:
        ValueError: a label that is no class of the model.
    """
    feature, named = rows.features["label"], _classes_by_name(config)
    values = {value for split in splits.values() for value in split.unique("label")}
    classes = {value: named[name] for value in values if (name := _name(value, feature)) in named}
    classes = classes or _numbered(values, feature, config)
    for value in set(rows["label"]):
        if value not in classes:
            listed = [*config.id2label.values()][:SHOWN] + (["..."] if config.num_labels > SHOWN else [])
            rule = f"must be one of the model's classes {', '.join(listed)}: config_overrides can rename its id2label"
            raise ValueError(f"label ({_name(value, feature)!r}) {rule}")
        if not 0 <= classes[value] < config.num_labels:
            raise ValueError(f"label ({value!r}) must be in 0 ... {config.num_labels - 1}, the model's classes")
    return [classes[value] for value in rows["label"]]


def _classes_by_name(config: PreTrainedConfig) -> dict[str, int]:
    """By both of the config's tables, of which some checkpoints fill one alone."""
    return {name: number for number, name in config.id2label.items()} | config.label2id


def _name(value: Any, feature: datasets.ClassLabel | datasets.Value) -> str:
    if isinstance(feature, datasets.ClassLabel) and value not in (None, -1):
        return feature.names[value]
    return str(value)


def _numbered(values: set, feature: datasets.ClassLabel | datasets.Value, config: PreTrainedConfig) -> dict[Any, int]:
    """The classes of values whose names the model does not know; none of those that cannot be told."""
    usual = all(name == f"LABEL_{number}" for number, name in config.id2label.items())
    values = values - {None}
    if isinstance(feature, datasets.ClassLabel):
        return {value: value for value in values} if usual else {}
    if all(isinstance(value, int | float) and float(value).is_integer() for value in values):
        return {value: int(value) for value in values}
    if usual and len(values) == config.num_labels:
        return {value: rank for rank, value in enumerate(sorted(values))}
    return {}
