"""Every code block of the README runs; those that make an environment of their own, in `.ci/run`. One command does not:
FSDP shards over accelerators.

Names like `your/bert` are folders here, with tiny models and data, and commands get further arguments that make them
short. What is for several devices and machines runs as two processes on this one's CPU. Not among the ordinary tests:
`pytest -m readme`. The figures of its tables are those of the evidence.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hub_server
import pytest
import tiny
import torch
import yaml
from transformers import BertForSequenceClassification

from hf_tokenprune import prune
from hf_tokenprune.checkpoints import weights_digest
from hf_tokenprune.training.comparison import Recipe, quality_table


ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
SHORT = {
    "run_finetune.py": "--max_steps 1 --max_train_samples 8 --max_test_samples 4 --report_to none --use_cpu",
    "run_predict.py": "--max_rows 8",
    "run_profile.py": "--max_inputs 4 --batch_size 2 --batch_sizes 1 --rounds 3 --device cpu",
    "run_plan.py": "--max_inputs 8 --batch_size 4 --rounds 3 --device cpu",
    "run_explain.py": "--inputs 1",
    "run_push.py": "",
    "run_quickstart.py": "--batch_size 4 --timed_documents 4 --timed_rounds 3 --shown_documents 1",
    "run_comparison.py": "--seeds 0 --timed_inputs 4 --timed_rounds 3",
}
FILES = {  # that commands take
    "run.yaml": {
        "model_name_or_path": "pruned",
        "dataset_name": "your/data",
        "split": "test",
        "output_dir": "predicted",
    },
    "recipe.yaml": {
        "model_name_or_path": "your/bert",
        "dataset_name": "your/data",
        "pruning": '{"preset": "top_k", "layers": [3, 6], "keep_rate": 0.5}',
        "output_dir": "finetuned",
        "max_steps": 2,
        "report_to": "none",
        "use_cpu": True,  # or each of the two processes would train by itself
    },
    "profile.yaml": {
        "model_name_or_path": "your/classifier",
        "lengths": [20, 30],
        "batch_size": 2,
        "batch_sizes": [1],
        "rounds": 3,
        "batch_rounds": 3,
    },
}
SHORT_RECIPE = {
    "model_name_or_path": "your/bert-classifier",
    "dataset_name": "your/data",
    "max_steps": 1,
    "save_strategy": "no",
    "max_train_samples": 20,
}


def commands() -> Iterator[str]:
    for language, block in BLOCKS:
        if language == "bash":
            yield from (line for line in block.replace("\\\n", " ").splitlines() if line.strip())


def script_of(command: str) -> str:
    first = shlex.split(command)[0]
    return next(word for word in shlex.split(command) if word.endswith(".py")).rpartition("/")[2] if first in (
        "python", ".venv/bin/python") else first  # fmt: skip


def as_run_here(command: str, script: str) -> list[str]:
    """The words of a command, made short; in two processes of this machine in place of many devices and machines."""
    words = shlex.split(command, comments=True)[1:]
    if script != "accelerate":
        held_out = ["--held_out_samples", "4"] if "--held_out_samples" in words else []
        return [sys.executable, *words, *SHORT[script].split(), *held_out]
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    several = "--multi_gpu --num_processes 2 --main_process_port 0" if "--num_processes" in words else "--cpu"
    return [sys.executable, "-m", "accelerate.commands.launch", *several.split(), *words[place:]]


def write_short_recipe(folder: Path, source: str) -> None:
    """A recipe whose runs take a step each, on tiny data."""
    folder.mkdir(parents=True)
    for path in (ROOT / "recipes" / source).glob("*.yaml"):
        given = yaml.safe_load(path.read_text())
        if path.name == "baseline.yaml":
            given |= SHORT_RECIPE
        elif path.name == "pruned.yaml":
            given |= {key: value for key, value in SHORT_RECIPE.items() if key != "model_name_or_path"}
        (folder / path.name).write_text(yaml.safe_dump(given))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder where the README's names are something."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("scripts", "model_cards"):
        (folder / name).symlink_to(ROOT / name)
    for path in (ROOT / "recipes").iterdir():
        (folder / "recipes" / path.name).parent.mkdir(exist_ok=True)
        if path.name != "minilm-20newsgroups-religion":
            (folder / "recipes" / path.name).symlink_to(path)
    write_short_recipe(folder / "recipes" / "minilm-20newsgroups-religion", "minilm-20newsgroups-religion")
    write_short_recipe(folder / "your-recipe", "minilm-20newsgroups-religion")
    for name, content in FILES.items():
        (folder / name).write_text(yaml.safe_dump(content))
    config = tiny.BERT.__class__(**tiny.BERT.to_dict() | {"num_hidden_layers": 12, "max_position_embeddings": 512})
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    for name in ("your/bert", "your/bert-classifier", "your/classifier"):
        model.save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    for name in ("your/pruned-bert", "pruned"):
        prune(model, "top_k").save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    evidence = json.loads((ROOT / "model_cards" / "evidence" / "minilm-20newsgroups-religion.json").read_text())
    trained = folder / "outputs" / "religion" / "seed-0" / "pruned" / "model"
    shallow = BertForSequenceClassification(config.__class__(**config.to_dict() | {"num_hidden_layers": 6}))
    own = prune(shallow, evidence["prunings"][0])
    own.base_model.set_token_prior([1.0] * model.config.vocab_size)
    own.save_pretrained(trained)
    tiny.tokenizer().save_pretrained(trained)
    short = Recipe.read(folder / "recipes" / "minilm-20newsgroups-religion")
    evidence["recipe"] = {"baseline": short.baseline, **short.others}
    evidence["weights"] = [weights_digest(trained)] * len(evidence["seeds"])
    (folder / "outputs" / "religion" / "comparison.json").write_text(json.dumps(evidence))
    rows = [{"id": i, "text": "w20 w9 " * (3 + i % 9), "label": "abc"[i % 3]} for i in range(24)]
    for path in ("your/data/train.jsonl", "your/data/test.jsonl", "texts/a.jsonl"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def hub() -> Iterator[dict[str, str]]:
    """A Hub on loopback that knows `you`; what a process needs to take it for the Hub."""
    hub_server.USER = "you"
    with hub_server.serve() as (url, _):
        yield {"HF_ENDPOINT": url, "HF_TOKEN": hub_server.TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    hub_server.USER = "someone"


@pytest.mark.readme
@pytest.mark.real
@pytest.mark.parametrize("command", commands())
def test_commands(command, place, hub):
    script = script_of(command)
    if script == "python3":
        pytest.skip("an environment of its own: .ci/run")
    if "--use_fsdp" in command:
        pytest.skip("shards over accelerators: no test machine has several")
    words = as_run_here(command, script)
    environment = os.environ | (hub if script == "run_push.py" else {})
    done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.readme
def test_python(place, monkeypatch, hub):
    """One after the other, with what they take for granted."""
    monkeypatch.chdir(place)
    for name in ("HF_TOKEN", "HF_HUB_DISABLE_XET"):
        monkeypatch.setenv(name, hub[name])
    words = tiny.tokenizer()
    texts = ["w20 w9 w4 w5 w6 w7", "w8 w9"]
    batch = dict(words(texts, padding=True, return_tensors="pt"))
    labelled = {**batch, "labels": torch.tensor([0, 1])}
    data = [{**words(texts[0]), "labels": i % 2} for i in range(16)]
    known = {"tokenizer": words, "texts": texts, "data": data, "batches": [batch], "labelled_batches": [labelled] * 2}
    # Where a checkpoint comes from the Hub, the folder that was pushed stands for it.
    pushed = place / "you" / "your-model"
    if not pushed.exists():
        pushed.parent.mkdir()
        pushed.symlink_to(place / "pruned")
    for language, block in BLOCKS:
        if language == "python":
            exec(compile(block, "README.md", "exec"), known)


def evidence(name: str) -> dict:
    return json.loads((ROOT / "model_cards" / "evidence" / f"{name}.json").read_text())


def front_table() -> list[tuple[list[str], dict[str, dict], dict]]:
    """Of each row of the first table: its cells, the runs of its comparison by name, and how its model was timed.

    A row has the runs of the card that it links, else those of the row before; it is of `pruned` unless it names a run.
    """
    rows, comparison = [], {}
    table = re.search(r"(?:^\|.*\n)+", TEXT, flags=re.MULTILINE)[0].splitlines()[2:]
    for line in table:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        card = re.search(r"\(model_cards/([\w-]+)\.md\)", cells[0])
        comparison = evidence(card[1]) if card else comparison
        runs = {row["run"]: row for row in comparison["quality"]}
        own = re.search(r"`(.+?)`", cells[0])
        if own:  # its truncation has its name
            runs |= {
                name: runs[run] for name in ("pruned", "truncated") if (run := own[1].replace("pruned", name)) in runs
            }
        named = own[1] if own else "pruned"
        rows.append((cells, runs, next(row for row in comparison["speed"]["rows"] if row["model"] == named)))
    return rows


def test_the_front_table_is_what_was_measured():
    rows = front_table()
    assert len(rows) >= 6
    for (name, macs, speed, points, truncated), runs, timed in rows:
        pruned = runs["pruned"]
        low, high = pruned["interval"]
        assert macs == f"{1 / pruned['mac_ratio_to_unpadded']:.2f}x fewer", name
        assert speed.startswith(f"{timed['speedup_to_unpadded']:.2f}x the speed"), name
        assert points == f"{pruned['points_to_control']:+.2f} [{low:+.2f}, {high:+.2f}]", name
        told = f"{runs['truncated']['points_to_control']:+.2f}" if "truncated" in runs else None
        assert truncated == told if told else truncated in ("", "not measured"), name
    said = re.search(r"padded stock model in arrival order the times are (.*?)\.\n", TEXT, flags=re.DOTALL)[1]
    assert re.findall(r"\d+\.\d+x", said) == [f"{timed['speedup_to_padded']:.2f}x" for *_, timed in rows]
    assert TEXT.count("| three seeds each |") == 1 and all(len(runs["pruned"]["seeds"]) == 3 for _, runs, _ in rows)


def test_the_comparison_of_two_groups_is_what_was_measured():
    assert quality_table(evidence("minilm-20newsgroups-religion")["quality"]) in TEXT


def test_what_is_said_of_budgets_was_measured():
    runs = {row["run"]: row for row in evidence("minilm-budgets")["quality"]}
    targets = {0.3: runs["target 0.3"], 0.5: runs["pruned"], 0.7: runs["target 0.7"]}
    said = re.search(
        r"with ([^%]*?) on the\ntest documents .*?at ([^%]*?) % \(control: ([\d.]+) %\)", TEXT, flags=re.DOTALL
    )
    numbers = [[float(number) for number in re.findall(r"\d+\.\d+", part)] for part in said.groups()]
    assert numbers == [
        [round(row["mac_ratio_to_stock"], 3) for row in targets.values()],
        [round(row["accuracy"], 2) for row in targets.values()],
        [round(runs["control"]["accuracy"], 2)],
    ]
    each = list(zip(*runs["many budgets"]["at_budgets"]))  # by budget, then by seed
    for name, field, scale in (
        ("set_budget", "budget", 1),
        ("measured", "mac_ratio_to_stock", 1),
        ("accuracy, %", "accuracy", 100),
    ):
        cells = re.search(rf"^\| `?{name}`? \| (.*) \|$", TEXT, flags=re.MULTILINE)[1].split(" | ")
        means = [scale * sum(seed[field] for seed in seeds) / len(seeds) for seeds in each]
        assert [float(cell) for cell in cells] == pytest.approx(means, abs=0.0051)
