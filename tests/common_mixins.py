"""Transformers' own common tests, as its source package has them, unedited.

`tests/test_modeling_common.py` and its like are fetched once, for the transformers that is installed, and imported as a
package of another name than `tests`, which is taken: they import each other by relative names. What the package leaves
out does not run: the tests of exporters, of generation and, behind `test_pipeline_mixin.py`, of pipelines.
"""

import functools
import importlib
import os
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import transformers

from hf_tokenprune.packaged import Package, cache_dir, fetch, whole_folder


# The same tests on every machine; transformers reads it on import.
os.environ.setdefault("TRANSFORMERS_TEST_DEVICE", "cpu")

SHA256 = {
    "5.17.0": "a153be279169b55b92d8000bf4af294aed684503d091cca7804da2dd8a9de000",
    "5.23.0": "19d647a4d5d903a7c644ca5cde2d86efc3dde7d8c687ae7988806ff2205efa71",
}
PINNED = transformers.__version__ in SHA256
NOT_PINNED = f"the common tests of transformers {transformers.__version__} are not pinned, only {sorted(SHA256)}"
NAME = "transformers_common_tests"
# What the mixins import of what is left out: two bases without tests, and the values that every config takes.
LEFT_OUT = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "return_dict": False,
            "output_hidden_states": True,
            "output_attentions": True,
            "dtype": "float16",
            "chunk_size_feed_forward": 5,
            "architectures": ["BertModel"],
            "id2label": {0: "label"},
            "label2id": {"label": "0"},
            "problem_type": "regression",
        }
    },
}


def mixins_folder() -> Path:
    """The `tests` of the installed transformers, in the cache.

    Raises:
        PackagedFileError: the source package cannot be fetched, or its checksum is wrong.
    """
    version = transformers.__version__
    package = Package("transformers", version, SHA256[version], 10, f"transformers-{version}/tests", ())
    return whole_folder(
        cache_dir() / package.cache_name,
        lambda partial: _unpack(fetch(package, partial / "source", source=True), package.folder, partial),
    )


def _unpack(archive: Path, folder: str, into: Path) -> Path:
    with tarfile.open(archive) as source:
        members = [member for member in source.getmembers() if member.isfile() and member.name.startswith(f"{folder}/")]
        source.extractall(into, members, filter="data")
    (into / folder / "__init__.py").touch()  # left out of the package, and read by the tests of configs
    return into / folder


@functools.cache
def load_mixin(module: str) -> ModuleType:
    """One of the files, by its name."""
    if NAME not in sys.modules:
        folder = mixins_folder()
        _package(NAME).__path__ = [str(folder)]
        for name, content in LEFT_OUT.items():
            if not (folder / f"{name.replace('.', '/')}.py").exists():
                _package(f"{NAME}.{name.partition('.')[0]}")
                _package(f"{NAME}.{name}").__dict__.update(content)
    return importlib.import_module(f"{NAME}.{module}")


def _package(name: str) -> ModuleType:
    module = sys.modules.setdefault(name, ModuleType(name))
    module.__path__ = []
    return module
