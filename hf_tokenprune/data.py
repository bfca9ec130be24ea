"""Classification data, texts or images, from the packaged sets, the Hub or local files, in one form."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from . import packaged
from .file_kinds import FILE_KINDS, check_folder, file_kind, is_saved
from .images import ROW, decoded, number_rows, pixels
from .labels import PROBLEMS, encode_labels, gathered


def load_classification(
    name: str,
    *,
    config: str | None = None,
    input_column: str = "text",
    label_column: str = "label",
    images: bool = False,
    labelled: bool = True,
    problem_type: str | None = None,
    usual_problem: str | None = None,
    label_separator: str | None = None,
) -> datasets.DatasetDict:
    """Loads a data set and brings it to the columns `text` (str) or `image` (Image), and `label` (as `encode_labels`).

    The splits are `train` and `test`: the first of `test` and `validation` that has labels, else a fifth of `train`.
    Images have a further column, `images.ROW`, that says of each where it was.

    Args:
        name: a packaged set's short name, a Hub id, a folder that `datasets` reads or `save_to_disk` wrote, or a file
            with one of the endings of `FILE_KINDS`.
        config: the data set's configuration, where it has several.
        images: whether `input_column` must hold images; otherwise it must hold text.
        labelled: whether `label` must be there; if not, it is as the file has it, and is missing where that has none.
        problem_type, usual_problem: as `encode_labels` takes them.
        label_separator: as `gathered` takes it; so does `label_column`, of several columns.

    Raises:
        ValueError: data that cannot be read or have no rows, files of two kinds, columns that are not there or hold
            something else, rows without a value, labels that `gathered` or `encode_labels` refuses, or no split to
            train on.
    """
    if input_column == label_column:
        raise ValueError(f"column {input_column!r} must not be both the input and the label")
    splits = _load(
        name,
        config,
        label_column,
        lambda splits: gathered(number_rows(splits) if images else splits, label_column, label_separator, problem_type),
    )
    if not all(map(len, splits.values())):
        raise ValueError(_no_rows(name))
    columns = [input_column]
    if labelled or all(label_column in split.column_names for split in splits.values()):
        columns.append(label_column)
    for column in columns:
        if column not in splits["train"].column_names:
            raise ValueError(f"column {column!r} is not in {name}; it has {splits['train'].column_names}")
    splits = splits.select_columns([*columns, ROW] if images else columns)
    check_column(input_column, splits["train"].features[input_column], images=images)
    for column in columns if labelled else [input_column]:
        _check_values(splits, column)
    splits = splits.rename_columns({a: b for a, b in zip(columns, ("image" if images else "text", "label")) if a != b})
    if not labelled:
        return splits
    return encode_labels(splits, column=label_column, name=name, problem_type=problem_type, usual=usual_problem)


def check_column(name: str, feature: Any, *, images: bool) -> None:
    """Raises a ValueError unless a column holds images, or text."""
    if images and not isinstance(feature, datasets.Image):
        raise ValueError(f"column {name!r} holds {feature}; image_column must hold images")
    text = isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
    if not images and not text:
        raise ValueError(f"column {name!r} holds {feature}; text_column must hold text")


def _check_values(splits: datasets.DatasetDict, column: str) -> None:
    """Raises a ValueError that names the first row without a value."""
    for name, split in splits.items():
        missing = pc.is_null(split.data.column(column), nan_is_null=True)
        if pc.any(missing).as_py():
            raise ValueError(f"row {pc.index(missing, True).as_py()} of {name}: {column} (None) must have a value")


def check_max_length(max_length: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises a ValueError for a length that a tokenizer does not cut to: it leaves texts whole then."""
    special = tokenizer.num_special_tokens_to_add()
    if max_length <= special:
        raise ValueError(f"max_length ({max_length}) must be > {special}, which the special tokens take")


NAMED = {"help": f"Hub id, folder, file, or one of {', '.join(packaged.available_datasets())}."}


@dataclass(kw_only=True)
class DataArguments:
    """Which data, and what of it: what fine-tuning, profiling, planning and explaining ask alike."""

    dataset_name: str | None = field(default=None, metadata=NAMED)
    dataset_config: str | None = field(default=None, metadata={"help": "The data set's configuration."})
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    image_column: str | None = field(default=None, metadata={"help": "Column with images, in place of text."})
    label_column: str = field(
        default="label",
        metadata={
            "help": "Column with the class, the number or the labels; or columns of 0 and 1: 'toxic,rude,threat'."
        },
    )
    label_separator: str | None = field(
        default=None, metadata={"help": "What stands between the labels of one text, where a row has several."}
    )
    problem_type: str | None = field(
        default=None, metadata={"help": f"One of {', '.join(PROBLEMS)}; told from the labels if not given."}
    )
    max_length: int = field(default=256, metadata={"help": "Tokens that a text is cut to."})
    image_size: int | None = field(
        default=None,
        metadata={"help": "Pixels of the side that images are brought to; the processor's own if not given."},
    )

    def load(self, *, labelled: bool = True, usual_problem: str | None = None) -> datasets.DatasetDict:
        """As `load_classification`."""
        return load_classification(
            self.dataset_name,
            config=self.dataset_config,
            input_column=self.image_column or self.text_column,
            label_column=self.label_column,
            images=self.image_column is not None,
            labelled=labelled,
            problem_type=self.problem_type,
            usual_problem=usual_problem,
            label_separator=self.label_separator,
        )


def _load(name: str, config: str | None, label_column: str, prepare: Callable) -> datasets.DatasetDict:
    """prepare: what is done to the splits before rows change their places."""
    if name in packaged.available_datasets():
        return prepare(packaged.load_dataset(name))
    path = Path(name)
    if path.is_file():
        return _set_a_fifth_aside(prepare(_read(name, file_kind(path), data_files=str(path)))["train"], name)
    if path.suffix.lower() in FILE_KINDS:
        raise ValueError(f"{name} must be a file, and there is none")
    if is_saved(path):
        read = datasets.load_from_disk(name).with_format(None)
        if isinstance(read, datasets.Dataset):
            return _set_a_fifth_aside(prepare(datasets.DatasetDict(train=read))["train"], name)
    else:
        if path.is_dir():
            check_folder(path)
        read = _read(name, name, config)
    splits = prepare(read)
    if "train" not in splits:
        raise ValueError(f"{name} has no split 'train'; it has {sorted(splits)}")
    unlabelled = label_column not in splits["train"].column_names
    test = next(
        (
            split
            for split in ("test", "validation")
            if split in splits and (unlabelled or _labelled(splits[split], label_column))
        ),
        None,
    )
    if test is None:
        return _set_a_fifth_aside(splits["train"], name)
    return datasets.DatasetDict(train=splits["train"], test=splits[test])


# What `datasets` and the readers below it say of a file without rows: .csv with and without a header, and .parquet.
_EMPTY = ("corresponds to no data", "No columns to parse from file", "BatchSize must be greater than 0, got 0")


def _read(name: str, *given: Any, **files: Any) -> datasets.DatasetDict:
    """As `datasets.load_dataset`, with one error for whatever cannot be read."""
    try:
        return datasets.load_dataset(*given, **files)
    except StopIteration:  # of a .jsonl file's first block
        raise ValueError(_no_rows(name)) from None
    except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
        said = str(error.__cause__ or error)
        empty = any(words in said for words in _EMPTY)
        raise ValueError(_no_rows(name) if empty else f"{name} cannot be read: {said}") from error


def _no_rows(name: str) -> str:
    return f"{name} must have at least one row in every split"


def _set_a_fifth_aside(rows: datasets.Dataset, name: str) -> datasets.DatasetDict:
    """To test on, where there is no split for it."""
    if len(rows) < 2:
        raise ValueError(f"{name} ({len(rows)} row) must have at least two rows: one to train and one to test on")
    return rows.train_test_split(test_size=0.2, seed=0)


def _labelled(split: datasets.Dataset, column: str) -> bool:
    """Some test splits are published without labels, or with every label -1."""
    if column not in split.column_names:
        return False
    values = split.data.column(column)
    if values.null_count == len(values):
        return False
    one = isinstance(split.features[column], datasets.ClassLabel | datasets.Value)
    return not one or any(value not in (-1, None) for value in split.unique(column))


def tokenize(splits: datasets.DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> datasets.DatasetDict:
    """Token ids of at most `max_length`, or of what the tokenizer's model takes, unpadded, beside `label`; the text
    stays for those who show it.

    Raises:
        ValueError: a length that leaves no token but special ones.
    """
    check_max_length(max_length, tokenizer)
    length = min(max_length, tokenizer.model_max_length)
    return splits.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=length), batched=True, desc="tokenize"
    )


def read_images(
    splits: datasets.DatasetDict, processor: BaseImageProcessor, image_size: int | None = None
) -> datasets.DatasetDict:
    """Decodes and processes each image when it is read: `pixel_values` [3, H, W] and `labels`. One that cannot be read
    ends that with an ImageError that names its row.

    Args:
        image_size: pixels of the side that images are brought to; None: as the processor has it.
    """
    sizes = {} if image_size is None else processor_sizes(processor, image_size)
    feature = splits["train" if "train" in splits else next(iter(splits))].features["image"]
    stored = splits.cast_column("image", datasets.Image(decode=False))  # to say which row cannot be decoded
    return stored.with_transform(partial(_pixels, feature=feature, processor=processor, sizes=sizes))


def processor_sizes(processor: BaseImageProcessor, pixels: int) -> dict[str, dict[str, int]]:
    """What a processor is told for it to make images of that side.

    Raises:
        ValueError: no pixels.
    """
    if pixels < 1:
        raise ValueError(f"image_size ({pixels}) must be >= 1")
    square = {"height": pixels, "width": pixels}
    size = {"shortest_edge": pixels} if "shortest_edge" in (processor.size or {}) else square
    return {"size": size} | ({"crop_size": square} if getattr(processor, "do_center_crop", False) else {})


def _pixels(
    rows: dict[str, list], feature: datasets.Image, processor: BaseImageProcessor, sizes: dict[str, Any]
) -> dict[str, list]:
    named = zip(rows["image"], rows.get(ROW) or ["an image"] * len(rows["image"]))
    read = [pixels(processor, decoded(feature, value, where), **sizes) for value, where in named]
    return {"pixel_values": read} | ({"labels": rows["label"]} if "label" in rows else {})
