"""From texts or images to what a model takes."""

from dataclasses import dataclass
from typing import Any, Protocol

import datasets
import torch
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from ..images import ImageError, collate, decoded, pixels
from .arguments import PredictionError


class Encoded(Protocol):
    """The rows of one shard, ready for the model.

    lengths: real tokens of each row.
    """

    lengths: list[int]

    def batch(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """The model's inputs for some of the rows."""


@dataclass(frozen=True)
class EncodedTexts:
    """columns: what the tokenizer gave, by name: one list per row. padding: the value that fills each up."""

    columns: dict[str, list[list[int]]]
    padding: dict[str, int]
    lengths: list[int]

    def batch(self, rows: list[int]) -> dict[str, torch.Tensor]:  # long [B, N] each
        width = max(1, max(self.lengths[row] for row in rows))
        return {
            name: torch.tensor([lists[row] + [self.padding[name]] * (width - self.lengths[row]) for row in rows])
            for name, lists in self.columns.items()
        }


@dataclass(frozen=True)
class TextEncoder:
    """Texts to token ids of at most `max_length`."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def __call__(self, texts: list[str], start: int) -> EncodedTexts:
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length, return_attention_mask=True)
        padding = {
            "input_ids": self.tokenizer.pad_token_id or 0,
            "token_type_ids": self.tokenizer.pad_token_type_id,
            "attention_mask": 0,
        }
        columns = {name: encoded[name] for name in padding if name in encoded}
        return EncodedTexts(columns, padding, [len(ids) for ids in columns["input_ids"]])


@dataclass(frozen=True)
class EncodedImages:
    """values: the images as they are stored. They are decoded by the batch, because as pixels they are much larger.

    start: the row of the first, counted from the beginning of the data.
    """

    values: list[dict[str, Any]]
    start: int
    processor: BaseImageProcessor
    feature: datasets.Image
    lengths: list[int]

    def batch(self, rows: list[int]) -> dict[str, torch.Tensor]:  # [B, 3, H, W]
        read = [{"pixel_values": self._pixels(row)} for row in rows]
        try:
            return collate(read)
        except ValueError as error:  # of several sizes, where the processor leaves them as they are
            raise PredictionError(str(error)) from error

    def _pixels(self, row: int) -> torch.Tensor:  # [3, H, W]
        """Raises a PredictionError that names the row."""
        try:
            return pixels(self.processor, decoded(self.feature, self.values[row], f"row {self.start + row}"))
        except ImageError as error:
            raise PredictionError(str(error)) from error


@dataclass(frozen=True)
class ImageEncoder:
    """Images, each of `tokens` tokens."""

    processor: BaseImageProcessor
    feature: datasets.Image
    tokens: int

    def __call__(self, values: list[dict[str, Any]], start: int) -> EncodedImages:
        return EncodedImages(values, start, self.processor, self.feature, [self.tokens] * len(values))


def token_batches(lengths: list[int], max_tokens: int, max_rows: int) -> list[list[int]]:
    """The rows, the longest first, cut into batches of at most so many real tokens and rows.

    A row that is longer than the budget comes alone.
    """
    batches, tokens = [], 0
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if not batches or tokens + lengths[row] > max_tokens or len(batches[-1]) == max_rows:
            batches.append([])
            tokens = 0
        batches[-1].append(row)
        tokens += lengths[row]
    return batches
