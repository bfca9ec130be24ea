"""`run_benchmark.py`: what is asked for is known and measured, or refused in one sentence."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from transformers import BertForSequenceClassification


SCRIPT = Path(__file__).parents[1] / "scripts" / "run_benchmark.py"


@pytest.fixture
def run(tmp_path, monkeypatch):
    def call(*words: str) -> dict[str, Any]:
        script = runpy.run_path(str(SCRIPT))
        config = tiny.BERT.to_dict() | {"vocab_size": 1100}
        script["MODELS"]["minilm-l6"] = BertForSequenceClassification, type(tiny.BERT)(**config), [1, 2]
        given = ["--models", "minilm-l6", "--rounds", "5", "--output_file", str(tmp_path / "out.json")]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *given, *words])
        script["main"]()
        return json.loads((tmp_path / "out.json").read_text())

    return call


MISTAKES = {
    "runtimes": (["--runtimes", "eager", "compile"], "unknown runtimes ['compile']; known: eager, onnx, compiled"),
    "dtypes": (["--dtypes", "float32", "int8"], "unknown dtypes ['int8']; known: float32, bfloat16, float16"),
    "models": (["--models", "gpt"], "unknown models ['gpt']; known: bert-base"),
    "most_tokens": (["--most_tokens", "1"], "most_tokens (1) must be at least 16, those of the smallest point"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_sentence(run, tmp_path, mistake):
    words, said = MISTAKES[mistake]
    with pytest.raises(SystemExit) as error:
        run(*words)
    assert str(error.value.code).startswith(said) and not list(tmp_path.iterdir())


def test_what_is_asked_for_is_measured(run):
    report = run("--batches", "2", "--runtimes", "eager", "--dtypes", "float32", "--most_tokens", "40")
    assert [row["name"] for row in report["rows"]] == ["minilm-l6, 2 x 16, float32, sdpa"]
