"""Pictures as models take them: one reading of every PIL mode, rows with their numbers, sizes that models are told of.

What each mode means, whatever file it came from, of several frames the first:

| mode | reading |
| --- | --- |
| 1, L, P, RGB, RGBX, CMYK, YCbCr, LAB, HSV | as PIL makes RGB of them, and with it Transformers' pipelines |
| LA, La, PA, RGBA, RGBa, a palette or colour that is transparent | in front of white |
| I;16 and its kin; I of a PNG or PGM file | 0 to 65535: of 16 bits the higher eight |
| I elsewhere | 0 to 255 as it is; up to 65535 of 16 bits the higher eight; else refused |
| F | 0 to 1, 1 is white; whole numbers up to 255 as they are; else refused, as is what is not finite |
"""

import inspect
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import datasets
import numpy as np
import torch
from transformers import BaseImageProcessor, PreTrainedModel, default_data_collator


ROW = "__row__"  # the column that says which row of which split an image is
LARGEST_16 = 2**16 - 1
LESS_THAN_COLOUR = ("1", "L", "P")  # what a column's own mode may take away; other ones would clip before we read
OF_16_BITS = ("PNG", "PPM")  # kinds of files whose mode I has no other range

_ADDRESS = re.compile(r"<[^<>]* object at 0x[0-9a-fA-F]+>")  # says nothing to who reads an error

logger = logging.getLogger(__name__)
Batch = dict[str, Any]


class ImageError(ValueError):
    """An image that cannot be read, with its row."""

    def __init__(self, message: str):
        # A worker of a DataLoader sends its traceback as the message; the sentence is its end.
        super().__init__(message.strip().rpartition(f"{__name__}.{type(self).__name__}: ")[2])


def number_rows(splits: datasets.DatasetDict) -> datasets.DatasetDict:
    """With a column that says of each row where it is, for errors that come after shuffling and splitting."""
    return datasets.DatasetDict(
        {
            name: split.add_column(ROW, [f"row {row} of {name}" for row in range(len(split))])
            for name, split in splits.items()
        }
    )


def decoded(feature: datasets.Image, value: Any, where: str) -> Any:
    """A stored image as PIL has it, in colour.

    Raises:
        ImageError: it cannot be read, or has no one meaning; begins with `where`.
    """
    try:
        image = in_colour(datasets.Image().decode_example(value))
        return image.convert(feature.mode).convert("RGB") if feature.mode in LESS_THAN_COLOUR else image
    except Exception as error:  # a decoder for each kind of file, each with errors of its own
        path = value.get("path") if isinstance(value, Mapping) else None
        name = f" ({path})" if path else ""
        said = " ".join(_ADDRESS.sub("", str(error)).split())
        raise ImageError(f"{where}{name}: the image cannot be read: {type(error).__name__}: {said}") from error


def in_colour(image: Any) -> Any:
    """A PIL image in RGB, upright as EXIF has it, read as this module's table says.

    Raises:
        ValueError: values that its mode gives no one meaning.
    """
    from PIL import ImageOps

    kind = image.format  # of the file, which what is made of it does not know
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey(_eight_bits(image, kind), image.info.get("transparency"), np.asarray(image))
    if image.mode == "La":  # PIL knows no other way from there
        image = image.convert("LA")
    return _on_white(image) if image.has_transparency_data else image.convert("RGB")


def _on_white(image: Any) -> Any:
    from PIL import Image

    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _grey(values: np.ndarray, transparent: Any, stored: np.ndarray) -> Any:
    """transparent: the stored value, if any, that stands for nothing."""
    from PIL import Image

    if isinstance(transparent, int | float):
        values = np.where(stored == transparent, np.uint8(255), values)
    return Image.fromarray(values).convert("RGB")


def _eight_bits(image: Any, kind: str | None) -> np.ndarray:  # uint8 [H, W]
    values = np.asarray(image)
    if image.mode == "F":
        return _of_floats(values)
    least, most = int(values.min()), int(values.max())
    if image.mode == "I" and (least < 0 or most > LARGEST_16):
        raise ValueError(f"whole numbers from {least} to {most} (mode I) must be in 0 to 255, or of 16 bits")
    if image.mode == "I" and kind not in OF_16_BITS and most <= 255:
        return values.astype(np.uint8)
    return (values >> 8).astype(np.uint8)


def _of_floats(values: np.ndarray) -> np.ndarray:
    least, most = values.min(), values.max()
    if least >= 0 and most <= 1:
        return (values * 255).round().astype(np.uint8)
    if least >= 0 and most <= 255 and (values == values.round()).all():
        return values.astype(np.uint8)
    raise ValueError(
        f"numbers from {least:g} to {most:g} (mode F) must be in 0 to 1, or whole and in 0 to 255: nothing tells how "
        "bright others are"
    )


def pixels(processor: BaseImageProcessor, image: Any, **sizes: Any) -> torch.Tensor:  # [3, H, W]
    """What a model takes of one image."""
    return processor(image, return_tensors="pt", **sizes)["pixel_values"][0]


def collate(rows: list[Mapping[str, Any]]) -> Batch:
    """As `default_data_collator`.

    Raises:
        ValueError: images of several sizes.
    """
    sizes = sorted({tuple(row["pixel_values"].shape[-2:]) for row in rows})
    if len(sizes) > 1:
        raise ValueError(
            f"the images of a batch must have one size, and the image processor makes {_by(sizes[0])} and "
            f"{_by(sizes[-1])} of them: take batches of one, or a processor with a height and a width"
        )
    return default_data_collator(rows)


@dataclass(frozen=True)
class Sizing:
    """What a model must be told of the size of its images. It holds no model, and goes to workers that are spawned.

    own: height and width that the model takes untold; None: any.
    """

    own: tuple[int, int] | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Sizing":
        asks = "interpolate_pos_encoding" in inspect.signature(type(model).forward).parameters
        return cls(sides(model.config.image_size) if asks else None)

    def __call__(self, batch: Mapping[str, Any]) -> Batch:
        """The batch, with `interpolate_pos_encoding` where its images are of another size, and without it elsewhere."""
        batch = {name: value for name, value in batch.items() if name != "interpolate_pos_encoding"}
        if self.own is None or "pixel_values" not in batch:
            return batch
        given = tuple(batch["pixel_values"].shape[-2:])
        if given == self.own:
            return batch
        _say_once(given, self.own)
        return batch | {"interpolate_pos_encoding": True}

    def collate(self, rows: list[Mapping[str, Any]]) -> Batch:
        """Rows as `collate` makes a batch of them."""
        return self(collate(rows))


def sized(model: PreTrainedModel, batch: Mapping[str, Any]) -> Batch:
    """A batch as one model takes it: the native model, called with the same, gives the same."""
    return Sizing.of(model)(batch)


@cache
def _say_once(given: tuple[int, int], own: tuple[int, int]) -> None:
    logger.warning("images of %s: position embeddings of %s are interpolated", _by(given), _by(own))


def interpolates(model: PreTrainedModel, processor: BaseImageProcessor) -> bool:
    """Whether a model must be told of the size of all images that a processor makes."""
    own, made = Sizing.of(model).own, processed_size(processor)
    return None not in (own, made) and own != made


def processed_size(processor: BaseImageProcessor) -> tuple[int, int] | None:
    """Height and width of what a processor makes; None where that depends on the image."""
    given = getattr(processor, size_name(processor), None) or {}
    height, width = (dict(given).get(side) for side in ("height", "width"))
    return None if height is None or width is None else (height, width)


def size_name(processor: BaseImageProcessor) -> str:
    """The name of the processor's setting that has the last word."""
    return "crop_size" if getattr(processor, "do_center_crop", False) else "size"


def sides(size: int | Iterable[int]) -> tuple[int, int]:
    """Height and width of what a config gives as one number or two."""
    return tuple(size) if isinstance(size, Iterable) else (size, size)


def _by(size: Iterable[int]) -> str:
    return " x ".join(map(str, size))
