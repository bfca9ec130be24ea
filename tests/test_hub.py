"""Publishing and loading through the Hub's protocol, against a server on loopback."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub_server
import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest
import tiny
import torch
import transformers
import yaml
from fresh import run_fresh
from hub_server import TOKEN, Hub
from huggingface_hub import HfApi, ModelCard
from methods import METHODS
from PIL import Image
from transformers import BertConfig, BertTokenizer, Trainer, TrainingArguments, ViTForImageClassification, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_tokenprune import (
    TokenPruneBertForSequenceClassification,
    TokenPruneTrainer,
    TokenPruneTrainingArguments,
    prune,
)
from hf_tokenprune.checkpoints import weights_digest
from hf_tokenprune.hub.cards import unmeasured_card
from hf_tokenprune.hub.push import PushError, push, stage


ROOT = Path(__file__).parents[1]
PRUNING = {"preset": "top_k", "layers": [0, 1], "keep_rate": 0.6}
TEXTS = ["a b c d e f g", "g f e"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg"]


@pytest.fixture
def hub(monkeypatch) -> Hub:
    """The server that this process takes for the Hub, with a token that it knows."""
    with hub_server.serve() as (url, hub):
        hub.url = url
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(
            transformers.utils.hub, "_hf_api", None, raising=False
        )  # knows the address it was made with
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def variables(hub: Hub, **more: str) -> dict[str, str]:
    """Of a process that takes the server for the Hub."""
    return {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"} | more


def tokenizer(folder: Path) -> BertTokenizer:
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return BertTokenizer(str(folder / "vocab.txt"))


def bert(seed: int = 0, layers: int = 3) -> TokenPruneBertForSequenceClassification:
    torch.manual_seed(seed)
    small = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32}
    return prune(transformers.BertForSequenceClassification(BertConfig(vocab_size=len(WORDS), **small)), PRUNING).eval()


def repository(folder: Path, model: Any = None, processing: Any = None) -> Path:
    """A folder as `run_push.py` stages it."""
    model = bert() if model is None else model
    template = ROOT / "model_cards" / "template.md"
    card = unmeasured_card(model, title="tiny", base_model=None, license="mit", template=template)
    folder.mkdir(parents=True)
    return stage(folder / "repository", model, processing or tokenizer(folder), card)


LOAD_ALL = """
import transformers

outputs = {}
for name, auto in ARGUMENTS["repositories"]:
    inputs = torch.load(f"{ARGUMENTS['inputs']}/{name.rpartition('/')[2]}.pt")
    model = getattr(transformers, auto).from_pretrained(name, trust_remote_code=True).eval()
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=True)
    assert type(config).__name__ == type(model.config).__name__ and config.pruning == model.config.pruning
    with torch.no_grad():
        out = model(**inputs, output_token_trace=True)
    outputs[name] = {"main": out["logits"] if "logits" in out else out.last_hidden_state,
                     "counts": out.token_trace.counts}
    base = transformers.AutoModel.from_pretrained(name, trust_remote_code=True)
    RESULT[name] = [type(model).__name__, type(base).__name__]
torch.save(outputs, ARGUMENTS["outputs"])
"""


def test_every_family_and_head_loads_from_the_hub_bit_for_bit(hub, tmp_path):
    cases = [(str(case), case, PRUNING) for case in tiny.cases(tiny.ALL)]
    named = {name: case for name, case, _ in cases}
    cases.append(("merging", named["ViTForImageClassification"], {"preset": "tome", "r": [8, 4, 4, 0]}))
    cases.append(("table", named["BertForSequenceClassification"], METHODS["adaptive_prior"]))
    expected, repositories = {}, []
    for title, case, pruning in cases:
        name = f"someone/{title}"
        model = prune(tiny.build(case), pruning).eval()
        if title == "table":
            model.base_model.set_token_prior(torch.rand(tiny.VOCABULARY) * 2)
        model.push_to_hub(name)
        assert len(hub.model(name).history) == 2  # the Hub's own first one
        torch.save(tiny.inputs_for(case), tmp_path / f"{title}.pt")
        with torch.no_grad():
            out = model(**tiny.inputs_for(case), output_token_trace=True)
        expected[name] = (tiny.main_output(out), out.token_trace.counts, type(model).__name__)
        own = "AutoModel" + "".join(str(case).partition("For")[1:]).removesuffix("WithTeacher")
        repositories.append((name, own))
    done = run_fresh(
        LOAD_ALL,
        tmp_path / "stranger",
        variables=variables(hub),
        repositories=repositories,
        inputs=str(tmp_path),
        outputs=str(tmp_path / "outputs.pt"),
    )
    found = torch.load(tmp_path / "outputs.pt")
    for name, (main, counts, kind) in expected.items():
        base = kind.partition("For")[0].removesuffix("Model") + "Model"
        assert done.result[name] == [kind, base]
        assert torch.equal(found[name]["counts"], counts)
        assert torch.equal(found[name]["main"], main), name


PIPELINE = """
from transformers import pipeline

given = {"trust_remote_code": True, "model": ARGUMENTS["name"]}
RESULT["now"] = pipeline("text-classification", **given)(ARGUMENTS["texts"])
RESULT["then"] = pipeline("text-classification", revision=ARGUMENTS["revision"], **given)(ARGUMENTS["texts"])
RESULT["branch"] = pipeline("text-classification", revision="next", **given)(ARGUMENTS["texts"])
given["model"] = ARGUMENTS["of_images"]
RESULT["image"] = pipeline("image-classification", **given)(ARGUMENTS["image"])
"""


def assert_same_answers(own: list[dict], theirs: list[dict]) -> None:
    """Of two processes, which may add in another order."""
    assert [each["label"] for each in own] == [each["label"] for each in theirs]
    assert [each["score"] for each in own] == pytest.approx([each["score"] for each in theirs], abs=1e-6)


def test_pipelines_and_pinned_revisions(hub, tmp_path):
    then, now = bert(0), bert(1)
    first = push(repository(tmp_path / "a", then), "someone/tiny")
    push(repository(tmp_path / "b", now), "someone/tiny", overwrite=True)
    push(repository(tmp_path / "c", then), "someone/tiny", revision="next", overwrite=True)
    assert len(hub.model("someone/tiny").history) == 4
    seeing = prune(tiny.build(tiny.Case(ViTForImageClassification, tiny.VIT)), PRUNING).eval()
    processor = ViTImageProcessorPil(size={"height": 24, "width": 24})
    push(repository(tmp_path / "d", seeing, processor), "someone/seeing")
    image = str(tmp_path / "image.png")
    Image.effect_noise((30, 40), 90).convert("RGB").save(image)
    asked = {"name": "someone/tiny", "texts": TEXTS, "revision": first.oid}
    asked |= {"of_images": "someone/seeing", "image": image}
    found = run_fresh(PIPELINE, tmp_path / "stranger", variables=variables(hub), **asked).result
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for when, model in (("now", now), ("then", then), ("branch", then)):
        own = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer(tmp_path))(TEXTS)
        assert_same_answers(own, found[when])
    own = transformers.pipeline("image-classification", model=seeing, image_processor=processor)(image)
    assert_same_answers(own, found["image"])
    torch.set_num_threads(threads)
    assert found["now"] != found["then"]


def test_the_repository_is_whole(hub, tmp_path):
    push(repository(tmp_path / "made"), "someone/tiny", private=True)
    files = hub.files("someone/tiny")
    assert hub.model("someone/tiny").private and len(hub.model("someone/tiny").history) == 2
    assert {"model.safetensors", "config.json", "modeling_tokenprune_bert.py", "tokenizer.json", "README.md"} <= set(
        files
    )
    assert not pickles(files)
    card = ModelCard(files["README.md"].decode())
    assert set(card.data.tags) == {"token-pruning", "hf_tokenprune"}
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-classification")


def test_the_card_of_a_model_that_pushes_itself(hub, tmp_path):
    model = bert()
    model.name_or_path = "someone/bert"
    model.push_to_hub("someone/tiny")
    card = ModelCard(hub.files("someone/tiny")["README.md"].decode())
    assert set(card.data.tags) == {"token-pruning", "hf_tokenprune"}
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-classification")
    assert card.data.base_model == "someone/bert"
    assert "More Information Needed" not in card.text and "dropped at layers 0 and 1" in card.text
    assert "| 1 | between attention and feed-forward | cls_attention | keep_rate | 0.36 | drop |" in card.text
    assert 'AutoModelForSequenceClassification.from_pretrained("someone/tiny", trust_remote_code=True)' in card.text
    assert len(hub.model("someone/tiny").history) == 2

    model.name_or_path = str(tmp_path)
    model.base_model.push_to_hub("someone/base")
    data = ModelCard(hub.files("someone/base")["README.md"].decode()).data
    assert (data.pipeline_tag, data.base_model) == ("feature-extraction", None)

    prune(tiny.build(tiny.Case(ViTModel, tiny.VIT)), "top_k").push_to_hub("someone/images")
    assert ModelCard(hub.files("someone/images")["README.md"].decode()).data.pipeline_tag == "image-feature-extraction"


def test_a_card_that_somebody_wrote_is_kept(hub):
    written = "---\nlicense: mit\ntags:\n- token-pruning\n- hf_tokenprune\n---\n\n# Mine\n\n[More Information Needed]\n"
    bert(0).push_to_hub("someone/tiny")
    files = hub.files("someone/tiny")
    hub.model("someone/tiny").commit("main", files | {"README.md": written.encode()}, "a card")
    bert(1).push_to_hub("someone/tiny")
    assert hub.files("someone/tiny")["model.safetensors"] != files["model.safetensors"]
    assert hub.files("someone/tiny")["README.md"].decode() == written


@pytest.mark.parametrize("stock", [True, False], ids=["stock", "ours"])
def test_from_the_trainer(stock, hub, tmp_path):
    trainer = trainer_for("someone/trained", tmp_path, stock=stock)
    trainer.train()
    trainer.push_to_hub()
    files = hub.files("someone/trained")
    assert {"model.safetensors", "config.json", "modeling_tokenprune_bert.py", "tokenizer.json"} <= set(files)
    assert len(hub.model("someone/trained").history) == 2
    assert {"token-pruning", "hf_tokenprune"} <= set(ModelCard(files["README.md"].decode()).data.tags)
    assert stock or not pickles(files)
    assert stock or json.loads(files["training_args.json"])["max_steps"] == 2


def test_what_is_pushed_during_training_is_whole(hub, tmp_path):
    wishes = {"push_to_hub": True, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_for("someone/trained", tmp_path, hub_token=TOKEN, **wishes)
    trainer.train()
    repository = hub.model("someone/trained")
    assert repository.messages[1] == "Training in progress, step 1"
    for sha in repository.history[1:]:
        files = repository.commits[sha]
        assert {"model.safetensors", "config.json", "modeling_tokenprune_bert.py", "tokenizer.json"} <= set(files)
        assert not pickles(files) and TOKEN.encode() not in files["training_args.json"]


def trainer_for(name: str, folder: Path, *, stock: bool = False, **wishes: Any) -> Trainer:
    model, words = bert(), tokenizer(folder)
    rows = [{**words(text), "labels": i} for i, text in enumerate(TEXTS)]
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    kinds = (Trainer, TrainingArguments) if stock else (TokenPruneTrainer, TokenPruneTrainingArguments)
    arguments = kinds[1](str(folder / "run"), hub_model_id=name, max_steps=2, **quiet, **wishes)
    return kinds[0](model, arguments, train_dataset=rows, processing_class=words)


def pickles(files: dict[str, bytes]) -> list[str]:
    return [name for name in files if name.endswith((".bin", ".ckpt", ".pkl", ".pt", ".pth"))]


def test_a_wrong_token(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(PushError, match=r"the token must be valid .*401"):
        push(repository(tmp_path / "made"), "someone/tiny")
    assert not hub.repositories
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(PushError, match="may write to 'else/tiny'"):
        push(tmp_path / "made" / "repository", "else/tiny")
    with pytest.raises(PushError, match="repo_id"):
        push(tmp_path / "made" / "repository", "no name at all")


def test_a_name_that_is_taken(hub, tmp_path):
    folder = repository(tmp_path / "made")
    push(folder, "someone/tiny")
    before = dict(hub.files("someone/tiny"))
    with pytest.raises(PushError, match=r"'someone/tiny'\) must be new or empty, and holds \d+ files"):
        push(folder, "someone/tiny")
    assert hub.files("someone/tiny") == before
    push(folder, "someone/tiny", overwrite=True)


def test_a_connection_that_is_cut(hub, tmp_path):
    folder = repository(tmp_path / "made")
    hub.cut_uploads = 1_000
    with pytest.raises(PushError, match="nothing of this push was published in 'someone/tiny': push again"):
        push(folder, "someone/tiny")
    assert set(hub.files("someone/tiny")) == {".gitattributes"}
    hub.cut_uploads, hub.cut_commits = 2, 1_000  # two are made up for
    with pytest.raises(PushError, match="push again"):
        push(folder, "someone/tiny")
    assert set(hub.files("someone/tiny")) == {".gitattributes"}
    hub.cut_commits = 0
    push(folder, "someone/tiny")
    assert hub.files("someone/tiny")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_commit_that_lands_without_an_answer(hub, tmp_path):
    folder = repository(tmp_path / "made")
    hub.cut_answers = 1
    done = push(folder, "someone/tiny")
    assert done.oid == hub.model("someone/tiny").history[-1] and done.commit_url.endswith(
        f"someone/tiny/commit/{done.oid}"
    )
    assert hub.files("someone/tiny")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    hub.cut_answers, hub.cut_afterwards = 1, True
    with pytest.raises(PushError, match="whether this push was published in 'someone/tiny' cannot be read"):
        push(folder, "someone/tiny", revision="next", overwrite=True)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_another_commit_is_not_taken_for_ours(name, hub, tmp_path):
    folder = repository(tmp_path / "made")

    def other() -> None:
        theirs = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        hub.model("someone/tiny").commit("main", theirs | {name: theirs[name][::-1]}, "theirs")

    hub.before_commit = other
    with pytest.raises(PushError, match="changed by someone else meanwhile"):
        push(folder, "someone/tiny")


@pytest.mark.parametrize("error", [RuntimeError("Data processing error:\n CAS"), PermissionError("xet token refused")])
def test_an_upload_that_fails_by_xet(error, hub, tmp_path, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(HfApi, "preupload_lfs_files", fail)
    words = f"the upload to 'someone/tiny' failed .{type(error).__name__}: {' '.join(str(error).split())}.; nothing of"
    with pytest.raises(PushError, match=words):
        push(repository(tmp_path / "made"), "someone/tiny")
    assert set(hub.files("someone/tiny")) == {".gitattributes"}


def test_somebody_else_was_faster(hub, tmp_path):
    def other() -> None:
        hub.model("someone/tiny").commit("main", {"theirs.txt": b"1"}, "theirs")

    hub.before_commit = other
    with pytest.raises(PushError, match="changed by someone else meanwhile"):
        push(repository(tmp_path / "made"), "someone/tiny")
    assert set(hub.files("someone/tiny")) == {"theirs.txt"}


def test_a_folder_that_holds_something(tmp_path):
    (tmp_path / "left.txt").write_text("over")
    with pytest.raises(ValueError, match=r"folder \(.*\) must be empty"):
        stage(tmp_path, bert(), None, ModelCard("---\nlicense: mit\n---\n"))


def run_push(hub: Hub, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "scripts" / "run_push.py"), *arguments]
    environment = os.environ | variables(hub, HF_TOKEN=TOKEN)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return done.stdout + done.stderr


def test_the_command_line(hub, tmp_path):
    recipe = ROOT / "recipes" / "minilm-20newsgroups-religion"
    evidence = ROOT / "model_cards" / "evidence" / "minilm-20newsgroups-religion.json"
    measured = json.loads(evidence.read_text())
    other = repository(tmp_path / "other", bert(layers=6))
    shallow = bert()
    shallow.set_pruning(measured["prunings"][1])
    shallow.base_model.set_token_prior([1.0] * shallow.config.vocab_size)
    shallow = str(repository(tmp_path / "shallow", shallow))
    model = bert(layers=6)
    model.set_pruning(measured["prunings"][1])
    empty = str(repository(tmp_path / "empty", model))
    model.base_model.set_token_prior([1.0] * model.config.vocab_size)
    made = str(repository(tmp_path / "made", model))
    headless = str(repository(tmp_path / "headless", model.base_model))
    torch.nn.init.normal_(model.classifier.weight)
    weighed = str(repository(tmp_path / "weighed", model))
    measured["weights"] = ["0" * 64, weights_digest(made), "0" * 64]
    evidence = tmp_path / "comparison.json"
    evidence.write_text(json.dumps(measured))
    given = ["--repo_id", "someone/measured", "--recipe", str(recipe), "--evidence", str(evidence)]
    for wrong, words in (
        (str(other), "must be of this model's pruning"),
        (empty, "table of saliency ('token_prior') must be filled"),
        (headless, "(feature-extraction) must be for text-classification"),
        (weighed, "must be of this model's weights"),
        (shallow, f"layers (6) of {recipe} must be 3, as the model has"),
    ):
        refused = run_push(hub, *given, "--model_name_or_path", wrong)
        assert words in refused and "Traceback" not in refused and not hub.repositories
    another = [*given[:2], "--recipe", str(recipe.with_name("minilm-reuters-r8")), *given[4:]]
    refused = run_push(hub, *another, "--model_name_or_path", made)
    assert "must be '20newsgroups-religion', which" in refused and not hub.repositories
    printed = run_push(hub, *given, "--model_name_or_path", made)
    assert "published http" in printed, printed
    files = hub.files("someone/measured")
    assert json.loads(files["evidence.json"]) == measured
    assert files["accuracy_over_macs.png"].startswith(b"\x89PNG")
    pruned = next(row for row in measured["quality"] if row["run"] == "pruned")
    (result,) = yaml.safe_load(files[".eval_results/hf_tokenprune.yaml"])
    assert result["value"] == pytest.approx(pruned["accuracy"] / 100, abs=1e-4)
    card = ModelCard(files["README.md"].decode())
    assert card.data.eval_results[0].metric_value == result["value"] and "(accuracy_over_macs.png)" in card.text
    values = measured["prunings"][1]["stages"]
    assert "The values are those of seed 1" in card.text
    assert all(f"| {value:.4g} |" in card.text for stage in values for value in stage["values"])


def test_what_was_staged_may_be_staged_again(hub, tmp_path):
    made, look = str(repository(tmp_path / "made")), str(tmp_path / "look")
    given = ["--model_name_or_path", made, "--stage_dir", look, "--repo_id", "someone/look"]
    hub.repositories["someone/look"] = hub_server.Repository()
    hub.model("someone/look").commit("main", {"theirs.txt": b"1"}, "theirs")
    assert "must be new or empty" in run_push(hub, *given)  # staged, and not published
    assert "published http" in run_push(hub, *given, "--overwrite")
    Path(look, "README.md").write_text("mine")
    refused = run_push(hub, *given, "--overwrite")
    assert f"stage_dir ({look}) must be empty, or hold what is staged now" in refused
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".look")]


@pytest.fixture
def refused(hub, tmp_path, monkeypatch) -> Callable[..., str]:
    """Runs the command, which fails, on a model that is all right; what it says in the end."""
    model = str(repository(tmp_path / "made"))
    script = str(ROOT / "scripts" / "run_push.py")

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, "--model_name_or_path", model, *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(script, run_name="__main__")
        assert isinstance(end.value.code, str) and "\n" not in end.value.code
        return end.value.code

    return run


def test_the_command_line_on_tokens_and_names(hub, refused, tmp_path, monkeypatch):
    hub.repositories["someone/taken"] = hub_server.Repository()
    hub.model("someone/taken").commit("main", {"theirs.txt": b"1"}, "theirs")
    assert "must be new or empty, and holds 1 files, theirs.txt among them" in refused("--repo_id", "someone/taken")
    assert set(hub.files("someone/taken")) == {"theirs.txt"}
    assert "may write to 'else/tiny'" in refused("--repo_id", "else/tiny")
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    assert "PushError: the token must be valid and may write to" in refused("--repo_id", "someone/tiny")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    assert "PushError: no token: set HF_TOKEN" in refused("--repo_id", "someone/tiny")
    assert set(hub.repositories) == {"someone/taken"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--recipe r --evidence e --license mit", "license (mit) must not be given with a recipe"),
        ("--recipe r --evidence e --base_model you/bert", "base_model (you/bert) must not be given with a recipe"),
        ("--recipe r --evidence e --title mine", "title (mine) must not be given with a recipe"),
        ("--private", "private (True) must not be given without repo_id: nothing is published"),
        ("--revision next", "revision (next) must not be given without repo_id"),
        ("--overwrite", "overwrite (True) must not be given without repo_id"),
        ("--message hello", "message (hello) must not be given without repo_id"),
    ],
)
def test_what_would_be_ignored_is_refused(given, said, refused, tmp_path):
    assert said in refused("--stage_dir", str(tmp_path / "look"), *given.split())


def test_where_nothing_can_be_staged_is_said_before_a_model_is_loaded(refused, tmp_path, monkeypatch):
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loaded")

    (tmp_path / "here").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path / "here")
    with monkeypatch.context() as patched:
        patched.setattr("hf_tokenprune.checkpoints.load_model", load)
        assert "stage_dir (.) must not be the folder that this runs in" in refused("--stage_dir", ".")
        for place in ("file", "file/look"):
            said = f"stage_dir ({tmp_path / place}) must be a folder, and {tmp_path / 'file'} is none"
            assert said in refused("--stage_dir", str(tmp_path / place))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr("shutil.copytree", fail)
    said = refused("--stage_dir", str(tmp_path / "look"))
    assert said == f"ValueError: stage_dir ({tmp_path / 'look'}) must be one that can be replaced: not yours"


def test_a_link_to_an_empty_folder_is_staged_into(hub, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    made = str(repository(tmp_path / "made"))
    printed = run_push(hub, "--model_name_or_path", made, "--stage_dir", str(tmp_path / "link"))
    assert "nothing was published" in printed, printed
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / "README.md").is_file()


def test_the_command_line_on_what_nobody_thought_of(refused, tmp_path, monkeypatch):
    (tmp_path / "broken.md").write_text("{% if %}")
    wish = ["--stage_dir", str(tmp_path / "look"), "--template"]
    assert refused(*wish, str(tmp_path / "broken.md")).startswith("TemplateSyntaxError: ")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(BertTokenizer, "save_pretrained", fail)
    assert refused(*wish[:2]) == "RuntimeError: two lines"
