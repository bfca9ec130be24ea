"""Classification data, texts or images, from the packaged sets, the Hub or local files, in one form."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from . import packaged


def load_classification(
    name: str,
    *,
    config: str | None = None,
    input_column: str = "text",
    label_column: str = "label",
    labelled: bool = True,
) -> datasets.DatasetDict:
    """Loads a data set and brings it to the columns `text` (str) or `image` (Image), and `label` (ClassLabel).

    The splits are `train` and `test`.

    Args:
        name: a packaged set's short name, a Hub id, a folder that `datasets` reads, or a `.csv`, `.json`, `.jsonl` or
            `.parquet` file.
        config: the data set's configuration, where it has several.
        labelled: whether `label` must be there; if not, it is as the file has it, and is missing where that has none.

    Raises:
        ValueError: data that cannot be read or have no rows, columns that are not there, or no split to train on.
    """
    splits = _load(name, config, label_column)
    if not all(map(len, splits.values())):
        raise ValueError(_no_rows(name))
    columns = [input_column]
    if labelled or all(label_column in split.column_names for split in splits.values()):
        columns.append(label_column)
    for column in columns:
        if column not in splits["train"].column_names:
            raise ValueError(f"column {column!r} is not in {name}; it has {splits['train'].column_names}")
    splits = splits.select_columns(columns)
    kind = "image" if isinstance(splits["train"].features[input_column], datasets.Image) else "text"
    splits = splits.rename_columns({a: b for a, b in zip(columns, (kind, "label")) if a != b})
    if not labelled or isinstance(splits["train"].features["label"], datasets.ClassLabel):
        return splits
    if not isinstance(splits["train"].features["label"], datasets.Value):
        raise ValueError(f"column {label_column!r} of {name} must hold one class a row")
    return _encode_labels(splits)


NAMED = {"help": f"Hub id, folder, file, or one of {', '.join(packaged.available_datasets())}."}


@dataclass(kw_only=True)
class DataArguments:
    """Which data, and what of it: what fine-tuning, profiling, planning and explaining ask alike."""

    dataset_name: str | None = field(default=None, metadata=NAMED)
    dataset_config: str | None = field(default=None, metadata={"help": "The data set's configuration."})
    text_column: str = field(default="text", metadata={"help": "Column with the text."})
    image_column: str | None = field(default=None, metadata={"help": "Column with images, in place of text."})
    label_column: str = field(default="label", metadata={"help": "Column with the class."})
    max_length: int = field(default=256, metadata={"help": "Tokens that a text is cut to."})
    image_size: int | None = field(
        default=None,
        metadata={"help": "Pixels of the side that images are brought to; the processor's own if not given."},
    )

    def load(self, *, labelled: bool = True) -> datasets.DatasetDict:
        """As `load_classification`."""
        return load_classification(
            self.dataset_name,
            config=self.dataset_config,
            input_column=self.image_column or self.text_column,
            label_column=self.label_column,
            labelled=labelled,
        )


def _encode_labels(splits: datasets.DatasetDict) -> datasets.DatasetDict:
    """One numbering for all splits, though a class may be missing in one of them."""
    values = {value for split in splits.values() for value in split.unique("label")}
    if None in values:
        raise ValueError("label (None) must be there in every row")
    numbers = {value: number for number, value in enumerate(sorted(values))}
    feature = datasets.ClassLabel(names=[str(value) for value in numbers])
    return datasets.DatasetDict(
        {
            name: split.remove_columns("label").add_column(
                "label", [numbers[value] for value in split["label"]], feature=feature
            )
            for name, split in splits.items()
        }
    )


def _load(name: str, config: str | None, label_column: str) -> datasets.DatasetDict:
    if name in packaged.available_datasets():
        return packaged.load_dataset(name)
    path = Path(name)
    if path.is_file():
        kind = {".jsonl": "json"}.get(path.suffix, path.suffix.removeprefix("."))
        return _set_a_fifth_aside(_read(name, kind, data_files=str(path))["train"], name)
    splits = _read(name, name, config)
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
    return column in split.column_names and len(split) > 0 and split[0][column] not in (-1, None)


def tokenize(splits: datasets.DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> datasets.DatasetDict:
    """Token ids of at most `max_length`, unpadded, beside `label`; the text stays for those who show it."""
    return splits.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=max_length), batched=True, desc="tokenize"
    )


def read_images(
    splits: datasets.DatasetDict, processor: BaseImageProcessor, image_size: int | None = None
) -> datasets.DatasetDict:
    """Decodes and processes each image when it is read: `pixel_values` [3, H, W] and `labels`.

    Args:
        image_size: pixels of the side that images are brought to; None: as the processor has it.
    """
    sizes: dict[str, Any] = {}
    if image_size is not None:
        square = {"height": image_size, "width": image_size}
        sizes["size"] = {"shortest_edge": image_size} if "shortest_edge" in (processor.size or {}) else square
        sizes |= {"crop_size": square} if getattr(processor, "do_center_crop", False) else {}
    return splits.with_transform(partial(_pixels, processor=processor, sizes=sizes))


def _pixels(rows: dict[str, list], processor: BaseImageProcessor, sizes: dict[str, Any]) -> dict[str, list]:
    images = [image.convert("RGB") for image in rows["image"]]
    pixels = processor(images, return_tensors="pt", **sizes)["pixel_values"]
    return {"pixel_values": list(pixels)} | ({"labels": rows["label"]} if "label" in rows else {})
