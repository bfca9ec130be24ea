"""Images as users have them: every mode has one reading everywhere, or is refused with its row."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
import torch
from PIL import Image, ImageCms
from transformers import HfArgumentParser, ViTForImageClassification
from transformers.image_utils import load_image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_tokenprune import TokenPruneTrainingArguments
from hf_tokenprune.data import load_classification, read_images
from hf_tokenprune.images import collate, decoded, in_colour
from hf_tokenprune.prediction import PredictionArguments, predict_dataset
from hf_tokenprune.profiling.arguments import ProfileArguments
from hf_tokenprune.profiling.subject import load_subject
from hf_tokenprune.training.finetune import FinetuneArguments, finetune


PIXELS = ViTImageProcessorPil(size={"height": 24, "width": 24}, do_rescale=False, do_normalize=False)
GREY = np.linspace(0, 255, 24 * 24).round().reshape(24, 24)
SHARES = (GREY / 255).astype(np.float32)
L = Image.fromarray(GREY.astype(np.uint8))
RGB = Image.merge("RGB", [L, L.transpose(Image.Transpose.ROTATE_90), L.transpose(Image.Transpose.ROTATE_180)])
ALPHA = L.transpose(Image.Transpose.ROTATE_270)


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(ALPHA)
    return image


def on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGB", image.size, "white")
    white.paste(image.convert("RGB"), mask=ALPHA)
    return white


def lab() -> Image.Image:
    srgb, own = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(RGB, srgb, own, outputMode="LAB")


NATIVE = {
    "1": L.convert("1"),
    "L": L,
    "P": RGB.convert("P"),
    "RGB": RGB,
    "RGBX": RGB.convert("RGBX"),
    "CMYK": RGB.convert("CMYK"),
    "YCbCr": RGB.convert("YCbCr"),
    "HSV": RGB.convert("HSV"),
    "LAB": lab(),
    "PA": RGB.convert("P").convert("PA"),
    "RGBA": RGB.convert("RGBA"),
    "LA": L.convert("LA"),
}


@pytest.mark.parametrize("mode", NATIVE)
def test_ordinary_modes_are_what_pipelines_make_of_them(mode):
    image = NATIVE[mode]
    assert image.mode == mode
    assert np.array_equal(in_colour(image), load_image(image))


def transparent(image: Image.Image, **given: Any) -> Image.Image:
    content = io.BytesIO()
    image.save(content, "PNG", **given)
    return Image.open(content)


def palette() -> Image.Image:
    image = Image.fromarray((np.arange(576) % 4).astype(np.uint8).reshape(24, 24), "P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    return image


def painted(where: np.ndarray, image: Image.Image) -> Image.Image:
    """White there."""
    values = np.array(image.convert("RGB"))
    values[where] = 255
    return Image.fromarray(values)


DEEP = Image.fromarray((GREY * 257).astype(np.uint16))
SEE_THROUGH = {
    "RGBA": (with_alpha(RGB), on_white(RGB)),
    "LA": (with_alpha(L), on_white(L)),
    "RGBa": (with_alpha(RGB).convert("RGBa"), on_white(RGB)),
    "La": (with_alpha(L).convert("La"), on_white(L)),
    "one colour of a palette": (transparent(palette(), transparency=0), painted(np.array(palette()) == 0, palette())),
    "a share of each colour": (
        transparent(palette(), transparency=bytes([255, 0, 255, 255])),
        painted(np.array(palette()) == 1, palette()),
    ),
    "one grey": (transparent(L, transparency=0), painted(np.array(L) == 0, L)),
    "one grey of 16 bits": (transparent(DEEP, transparency=0), painted(np.array(DEEP) == 0, L)),
}


@pytest.mark.parametrize("what", SEE_THROUGH)
def test_what_is_transparent_is_in_front_of_white(what):
    image, expected = SEE_THROUGH[what]
    difference = np.abs(np.asarray(in_colour(image), dtype=int) - np.asarray(expected, dtype=int))
    assert difference.max() <= 2  # of what is stored times its alpha


def tiff(values: np.ndarray) -> Image.Image:
    content = io.BytesIO()
    Image.fromarray(values).save(content, "TIFF")
    return Image.open(content)


def pgm(values: np.ndarray) -> Image.Image:
    return Image.open(io.BytesIO(b"P5 24 24 65535\n" + values.astype(">u2").tobytes()))


WHOLE = np.full((24, 24), 7)
RANGES = {
    "shares": (tiff(SHARES), L),
    "floats of a byte": (tiff(GREY.astype(np.float32)), L),
    "whole numbers of a byte": (tiff(GREY.astype(np.int32)), L),
    "whole numbers of 16 bits": (tiff((GREY * 257).astype(np.int32)), L),
    "16 bits": (tiff((GREY * 257).astype(np.uint16)), L),
    "16 bits, other end": (Image.frombytes("I;16B", (24, 24), (GREY * 257).astype(">u2").tobytes()), L),
    "16 bits of a PGM": (pgm(GREY * 257), L),
    "a dark PGM": (pgm(WHOLE), Image.new("L", (24, 24))),
    "black floats": (tiff(0 * SHARES), Image.new("L", (24, 24))),
    "white floats": (tiff(0 * SHARES + 1), Image.new("L", (24, 24), 255)),
}


@pytest.mark.parametrize("what", RANGES)
def test_values_of_more_than_a_byte_keep_their_range(what):
    image, expected = RANGES[what]
    assert np.array_equal(in_colour(image), expected.convert("RGB"))


UNCLEAR = {
    "below nothing": (SHARES - 0.5, "numbers from -0.5 to 0.5 (mode F) must be in 0 to 1, or whole and in 0 to 255"),
    "a little above one": (SHARES * 1.02, "numbers from 0 to 1.02 (mode F) must be"),
    "large": (SHARES * 4096, "numbers from 0 to 4096 (mode F) must be"),
    "not a number": (np.where(SHARES == 0, np.nan, SHARES), "numbers from nan to nan (mode F) must be"),
    "without an end": (np.where(SHARES == 1, np.inf, SHARES), "numbers from 0 to inf (mode F) must be"),
    "whole below nothing": (WHOLE - 8, "whole numbers from -1 to -1 (mode I) must be in 0 to 255, or of 16 bits"),
    "whole and large": (WHOLE * 10**5, "whole numbers from 700000 to 700000 (mode I) must be"),
}


@pytest.mark.parametrize("what", UNCLEAR)
def test_what_has_no_one_meaning_is_refused(what):
    values, words = UNCLEAR[what]
    with pytest.raises(ValueError, match=re.escape(words)):
        in_colour(tiff(values.astype(np.float32 if values.dtype.kind == "f" else np.int32)))


def test_the_first_frame_counts():
    for kind in ("GIF", "TIFF"):
        content = io.BytesIO()
        RGB.convert("P").save(content, kind, save_all=True, append_images=[Image.new("P", RGB.size)])
        image = Image.open(content)
        assert image.n_frames == 2
        assert np.array_equal(in_colour(image), RGB.convert("P").convert("RGB"))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    RGB.crop((0, 0, 20, 24)).save(tmp_path / "a.jpg", exif=exif)
    assert np.array_equal(in_colour(Image.open(tmp_path / "a.jpg")), load_image(str(tmp_path / "a.jpg")))


FILES = [
    *(image for image, _ in RANGES.values()),
    *(NATIVE[mode] for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB")),
    *(SEE_THROUGH[name][0] for name in ("RGBA", "LA", "one colour of a palette")),
]


def content(image: Image.Image) -> bytes:
    """A file of the kind that it came from, or one that keeps its mode."""
    file = io.BytesIO()
    image.save(file, image.format or "TIFF")
    return file.getvalue()


def save_images(path: Path, contents: list[bytes]) -> str:
    features = datasets.Features({"pic": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"pic": [{"bytes": each, "path": None} for each in contents], "label": [i % 2 for i in range(len(contents))]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return str(path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny.build(tiny.Case(ViTForImageClassification, tiny.VIT)).save_pretrained(tmp_path / "model")
    PIXELS.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_all_scripts_read_alike(model, tmp_path):
    """Training, profile (and planning, which has its inputs), and prediction, by the logits."""
    contents = [content(image) for image in FILES]
    name = save_images(tmp_path / "pics.parquet", contents)
    expected = np.stack([np.asarray(in_colour(Image.open(io.BytesIO(each)))) for each in contents])
    expected = torch.tensor(expected).permute(0, 3, 1, 2)
    splits = load_classification(name, input_column="pic", images=True)
    found = {row["__row__"]: place for place, row in enumerate(splits["train"])}
    trained = read_images(splits, PIXELS)["train"][:]
    for where, place in found.items():
        assert torch.equal(trained["pixel_values"][place], expected[int(where.split()[1])])
    given = {"model_name_or_path": str(model), "dataset_name": name, "image_column": "pic"}
    arguments = ProfileArguments(**given, pruning='{"preset": "top_k", "layers": [1], "keep_rate": 0.5}')
    for row in load_subject(arguments, torch.device("cpu")).inputs:
        assert any(torch.equal(row["pixel_values"], each) for each in expected)
    predict_dataset(PredictionArguments(**given, output_dir=str(tmp_path / "out"), logits=True))
    native = ViTForImageClassification.from_pretrained(model)
    with torch.no_grad():
        logits = native(expected.float()).logits
    read = datasets.load_dataset("parquet", data_files=str(tmp_path / "out" / "*.parquet"), split="train")
    torch.testing.assert_close(torch.tensor(read["logits"][:]), logits, rtol=1e-5, atol=1e-4)


BROKEN = {"no image": b"no image", "torn": content(RANGES["shares"][0])[:900], "unclear": content(tiff(SHARES - 1))}


def train(model: Path, name: str, output: Path, **given: Any) -> dict:
    given = {"model_name_or_path": str(model), "dataset_name": name, "image_column": "pic", **given}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 4, "output_dir": str(output)}
    parser = HfArgumentParser([FinetuneArguments, TokenPruneTrainingArguments])
    return finetune(*parser.parse_dict({**quiet, "pruning": "top_k", **given}))


@pytest.mark.parametrize(("bad", "workers"), [*((bad, 0) for bad in BROKEN), ("unclear", 1)])
def test_a_training_ends_with_the_row_that_cannot_be_read(bad, workers, model, tmp_path):
    contents = [content(L)] * 20
    contents[13] = BROKEN[bad]
    name = save_images(tmp_path / "pics.parquet", contents)
    with pytest.raises(ValueError, match=r"^row 13 of train: the image cannot be read: \w+: [^\n]*$"):
        train(model, name, tmp_path / "out", dataloader_num_workers=workers, max_steps=6)


def profiled(model: Path, name: str, folder: Path) -> None:
    arguments = ProfileArguments(model_name_or_path=str(model), dataset_name=name, image_column="pic")
    load_subject(arguments, torch.device("cpu"))


def predicted(model: Path, name: str, folder: Path) -> None:
    given = {"model_name_or_path": str(model), "dataset_name": name, "image_column": "pic"}
    predict_dataset(PredictionArguments(**given, output_dir=str(folder)))


@pytest.mark.parametrize("mode", [None, "L", "RGB"])
def test_the_mode_of_a_column_comes_after_the_reading(mode):
    feature, value = datasets.Image(mode=mode), {"bytes": content(tiff(SHARES)), "path": None}
    assert np.array_equal(decoded(feature, value, "row 0"), L.convert("RGB"))
    value = {"bytes": content(RGB), "path": None}
    assert np.array_equal(decoded(feature, value, "row 0"), RGB.convert(mode or "RGB").convert("RGB"))


@pytest.mark.parametrize("read", [profiled, predicted])
def test_whoever_reads_says_the_row(read: Callable, model, tmp_path):
    contents = [content(L)] * 5 + [b"no image"] * 5
    name = save_images(tmp_path / "pics.parquet", contents)
    with pytest.raises((ValueError, SystemExit), match=r"row [5-9]( of train)?: the image cannot be read: Unident"):
        read(model, name, tmp_path / "out")


def test_the_row_of_a_file_names_the_file(tmp_path):
    for index in range(10):
        folder = tmp_path / "pics" / "train" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        L.save(folder / f"{index}.png")
    (tmp_path / "pics" / "train" / "a" / "4.png").write_bytes(b"no image")
    splits = read_images(load_classification(str(tmp_path / "pics"), input_column="image", images=True), PIXELS)
    with pytest.raises(ValueError, match=r"^row 2 of train \(.*4\.png\): the image cannot be read"):
        [list(split) for split in splits.values()]


def test_images_of_several_sizes_are_no_batch():
    processor = BitImageProcessorPil(size={"shortest_edge": 24}, do_center_crop=False, do_convert_rgb=True)
    rows = [
        {"pixel_values": processor(Image.new("RGB", size), return_tensors="pt")["pixel_values"][0]}
        for size in ((30, 24), (24, 36))
    ]
    assert collate(rows[:1])["pixel_values"].shape == (1, 3, 24, 30)
    with pytest.raises(ValueError, match=re.escape("must have one size, and the image processor makes 24 x 30 and 36")):
        collate(rows)
