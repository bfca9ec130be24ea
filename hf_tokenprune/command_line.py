"""What all command lines read alike: arguments from flags or a file, models by short name, a pruning in one string."""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase

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
        ValueError: it holds no mapping, or cannot be read.
    """
    text = Path(path).read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text) if Path(path).suffix == ".json" else yaml.load(text, _Loader)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} ({content!r}) must hold a mapping")
    return content


def parse_mapping(name: str, text: str) -> dict[str, Any]:
    """What an argument holds in JSON.

    Raises:
        ValueError: it holds no mapping, or cannot be read.
    """
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} ({text}) must be JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} ({text}) must be a JSON object")
    return content


def parse_arguments(*classes: type) -> tuple[Any, ...]:
    """One instance of each dataclass, from flags, or from the `.json` or `.yaml` file that is the only argument."""
    parser = HfArgumentParser(classes)
    if len(sys.argv) != 2 or Path(sys.argv[1]).suffix not in (".json", ".yaml", ".yml"):
        return parser.parse_args_into_dataclasses()
    return parser.parse_dict(typed_arguments(classes, read_mapping(sys.argv[1]), sys.argv[1]))


def typed_arguments(classes: tuple[type, ...], given: Mapping[str, Any], path: str) -> dict[str, Any]:
    """What a file holds for these dataclasses, as their parser takes it.

    Raises:
        ValueError: a value of another type than its argument has.
    """
    given = {
        name: json.dumps(value) if name in _IN_JSON and isinstance(value, dict) else value
        for name, value in given.items()
    }
    _check_types(classes, given, path)
    return given


_PLAIN = {bool: bool, int: int, float: (int, float), str: str}


def _check_types(classes: tuple[type, ...], given: dict[str, Any], path: str) -> None:
    """Raises a ValueError for a value of another type than its argument has: flags are converted, files are not."""
    for each in (each for cls in classes for each in fields(cls)):
        value, alternatives = given.get(each.name), [each.type]
        if get_origin(each.type) in (Union, UnionType):
            alternatives = [kind for kind in get_args(each.type) if kind is not NoneType]
        if value is None or len(alternatives) > 1:
            continue
        (kind,) = alternatives
        if get_origin(kind) is list:
            right = isinstance(value, list) and all(_is(item, get_args(kind)[0]) for item in value)
        else:
            right = _is(value, kind)
        if not right:
            raise ValueError(f"{each.name} ({value!r}) in {path} must be {kind if get_origin(kind) else kind.__name__}")


def _is(value: Any, kind: Any) -> bool:
    """Whether a value has a plain type; True of other types, which are checked where they are used."""
    if kind not in _PLAIN:
        return True
    return isinstance(value, _PLAIN[kind]) and (kind is bool or not isinstance(value, bool))


def model_source(name: str) -> str | Path:
    """The folder of a packaged model, by its short name; whatever else `from_pretrained` takes as it is."""
    return packaged.model_path(name) if name in packaged.available_models() else name


def written_pruning(text: str, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """A pruning from a preset's name, JSON or a `.json` file; the separator is protected where nothing else is said."""
    if text.endswith(".json"):
        wish = read_mapping(text)
    else:
        wish = parse_mapping("pruning", text) if text.lstrip().startswith("{") else {"preset": text}
    if tokenizer is not None and tokenizer.sep_token_id is not None:
        wish.setdefault("protected_token_ids", [tokenizer.sep_token_id])
    return wish


def asked_pruning(text: str | None, model: PreTrainedModel, processing: Any) -> Any:
    """What is asked for, as `written_pruning` reads it; if nothing is, what the model has."""
    if text is None:
        return getattr(model.config, "pruning", None)
    return written_pruning(text, processing if isinstance(processing, PreTrainedTokenizerBase) else None)
