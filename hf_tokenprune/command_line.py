"""What all command lines read alike: arguments from flags or a file, models by short name, a pruning in one string."""

import json
import sys
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, PreTrainedTokenizerBase

from . import packaged


def parse_arguments(*classes: type) -> tuple[Any, ...]:
    """One instance of each dataclass, from flags, or from the `.json` or `.yaml` file that is the only argument."""
    parser = HfArgumentParser(classes)
    readers = {".json": parser.parse_json_file, ".yaml": parser.parse_yaml_file, ".yml": parser.parse_yaml_file}
    suffix = Path(sys.argv[1]).suffix if len(sys.argv) == 2 else None
    return readers[suffix](sys.argv[1]) if suffix in readers else parser.parse_args_into_dataclasses()


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
