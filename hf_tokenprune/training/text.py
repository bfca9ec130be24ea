"""Text classification data from the packaged sets, the Hub or local files, in one form."""

from pathlib import Path

import datasets
from transformers import PreTrainedTokenizerBase

from .. import packaged


def load_text_classification(
    name: str, *, config: str | None = None, text_column: str = "text", label_column: str = "label"
) -> datasets.DatasetDict:
    """Loads a data set and brings it to the columns `text` (str) and `label` (ClassLabel), splits `train` and `test`.

    Args:
        name: a packaged set's short name, a Hub id, a folder that `datasets` reads, or a `.csv`, `.json`, `.jsonl` or
            `.parquet` file.
        config: the data set's configuration, where it has several.

    Raises:
        ValueError: columns that are not there, or no labelled split to test on.
    """
    splits = _load(name, config)
    for column in (text_column, label_column):
        if column not in splits["train"].column_names:
            raise ValueError(f"column {column!r} is not in {name}; it has {splits['train'].column_names}")
    splits = splits.select_columns([text_column, label_column])
    splits = splits.rename_columns({a: b for a, b in ((text_column, "text"), (label_column, "label")) if a != b})
    if not isinstance(splits["train"].features["label"], datasets.ClassLabel):
        splits = splits.class_encode_column("label")
    return splits


def _load(name: str, config: str | None) -> datasets.DatasetDict:
    if name in packaged.available_datasets():
        return packaged.load_dataset(name)
    path = Path(name)
    if path.is_file():
        kind = {".jsonl": "json"}.get(path.suffix, path.suffix.removeprefix("."))
        return datasets.load_dataset(kind, data_files=str(path))["train"].train_test_split(test_size=0.2, seed=0)
    splits = datasets.load_dataset(name, config)
    test = next((split for split in ("test", "validation") if split in splits and _labelled(splits[split])), None)
    if "train" not in splits:
        raise ValueError(f"{name} has no split 'train'; it has {sorted(splits)}")
    if test is None:
        return splits["train"].train_test_split(test_size=0.2, seed=0)
    return datasets.DatasetDict(train=splits["train"], test=splits[test])


def _labelled(split: datasets.Dataset) -> bool:
    """Some test splits are published with every label -1."""
    column = next((c for c, f in split.features.items() if isinstance(f, datasets.ClassLabel)), None)
    return column is None or not len(split) or split[0][column] != -1


def tokenize(splits: datasets.DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> datasets.DatasetDict:
    """Token ids of at most `max_length`, unpadded, beside `label`; the text stays for those who show it."""
    return splits.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=max_length), batched=True, desc="tokenize"
    )
