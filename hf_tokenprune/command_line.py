"""What all command lines read alike: arguments from flags or a file, models by short name, a pruning in one string."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, PreTrainedTokenizerBase

from . import packaged


_IN_JSON = ("pruning", "config_overrides")  # one string as a flag; a file may hold the mapping itself


class _Loader(yaml.SafeLoader):
    """Reads 2e-5 as a number, as YAML 1.2 has it: PyYAML takes a number without a point for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """What a `.json` or `.yaml` file holds.

    Raises:
        OSError: no such file.
        ValueError, yaml.YAMLError: it holds no mapping, or cannot be read.
    """
    text = Path(path).read_text(encoding="utf-8")
    content = json.loads(text) if Path(path).suffix == ".json" else yaml.load(text, _Loader)
    if not isinstance(content, dict):
        raise ValueError(f"{path} ({content!r}) must hold a mapping")
    return content


def parse_arguments(*classes: type) -> tuple[Any, ...]:
    """One instance of each dataclass, from flags, or from the `.json` or `.yaml` file that is the only argument."""
    parser = HfArgumentParser(classes)
    if len(sys.argv) != 2 or Path(sys.argv[1]).suffix not in (".json", ".yaml", ".yml"):
        return parser.parse_args_into_dataclasses()
    given = read_mapping(sys.argv[1])
    for name in _IN_JSON:
        if isinstance(given.get(name), dict):
            given[name] = json.dumps(given[name])
    return parser.parse_dict(given)


def model_source(name: str) -> str | Path:
    """The folder of a packaged model, by its short name; whatever else `from_pretrained` takes as it is."""
    return packaged.model_path(name) if name in packaged.available_models() else name


def written_pruning(text: str, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """A pruning from a preset's name, JSON or a `.json` file; the separator is protected where nothing else is said."""
    if text.endswith(".json"):
        text = Path(text).read_text()
    wish = json.loads(text) if text.lstrip().startswith("{") else {"preset": text}
    if tokenizer is not None and tokenizer.sep_token_id is not None:
        wish.setdefault("protected_token_ids", [tokenizer.sep_token_id])
    return wish
