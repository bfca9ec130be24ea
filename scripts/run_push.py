"""Publish a pruned model on the Hub in one commit: weights, code, tokenizer or image processor, card, evidence.

    python scripts/run_push.py --model_name_or_path outputs/religion/seed-0/pruned/model --repo_id you/your-model \\
        --recipe recipes/minilm-20newsgroups-religion --evidence outputs/religion/comparison.json
    python scripts/run_push.py --model_name_or_path pruned --base_model your/bert --license apache-2.0 --stage_dir look
    python scripts/run_push.py --model_name_or_path your/bert --pruning top_k --repo_id you/bert-top-k --private

With a recipe and what `run_comparison.py` measured, the card says that; otherwise it says that nothing was measured.
The token is that of `HF_TOKEN` or `hf auth login`. With `stage_dir` the files stay there to be looked at, and nothing
is published without a `repo_id`.
"""

import filecmp
import os
import shutil
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_tokenprune import packaged
from hf_tokenprune.checkpoints import load_model, load_processing, pipeline_tag_of, takes_images, weights_digest
from hf_tokenprune.command_line import asked_pruning, model_source, parse_arguments
from hf_tokenprune.convert import prune
from hf_tokenprune.hub.cards import (
    SOMEWHERE,
    evaluation_results,
    measured_card,
    read_about,
    read_evidence,
    schedule_of,
    unmeasured_card,
)
from hf_tokenprune.hub.push import push, require_token, stage
from hf_tokenprune.images import interpolates
from hf_tokenprune.viz import comparison_picture


TEMPLATE = Path(__file__).parents[1] / "model_cards" / "template.md"
OF_NO_RECIPE = ("title", "base_model", "license")
OF_PUBLISHING = ("private", "revision", "overwrite", "message")


@dataclass
class PushArguments:
    model_name_or_path: str = field(
        metadata={"help": f"Hub id, folder, or one of {', '.join(packaged.available_models())}; pruned or to be."}
    )
    repo_id: str | None = field(default=None, metadata={"help": "Where it is published: user/name."})
    pruning: str | None = field(
        default=None, metadata={"help": "A preset's name, JSON or a .json file; the model's own if not given."}
    )
    recipe: str | None = field(default=None, metadata={"help": "Folder of the recipe that made it, with card.yaml."})
    evidence: str | None = field(default=None, metadata={"help": "comparison.json of that recipe."})
    title: str | None = field(default=None, metadata={"help": "The card's heading, without a recipe."})
    base_model: str | None = field(default=None, metadata={"help": "Hub id, without a recipe."})
    license: str | None = field(default=None, metadata={"help": "The model's licence, without a recipe: apache-2.0."})
    template: str = field(default=str(TEMPLATE), metadata={"help": "The card's, a Jinja file."})
    stage_dir: str | None = field(default=None, metadata={"help": "A folder that keeps the files: a new or empty one."})
    private: bool = field(default=False, metadata={"help": "A repository that is made now is private."})
    revision: str | None = field(default=None, metadata={"help": "A branch; made if it is not there."})
    overwrite: bool = field(default=False, metadata={"help": "The repository may hold something already."})
    message: str = field(default="Upload a token pruning model", metadata={"help": "The commit's message."})

    def __post_init__(self) -> None:
        if (self.recipe is None) != (self.evidence is None):
            raise ValueError(f"recipe ({self.recipe}) and evidence ({self.evidence}) must be given together")
        if self.repo_id is None and self.stage_dir is None:
            raise ValueError("repo_id or stage_dir must be given: otherwise there is nothing to do")
        for name, usual in ((each.name, each.default) for each in fields(self)):
            value = getattr(self, name)
            if self.recipe is not None and name in OF_NO_RECIPE and value != usual:
                raise ValueError(f"{name} ({value}) must not be given with a recipe: its card.yaml says that")
            if self.repo_id is None and name in OF_PUBLISHING and value != usual:
                raise ValueError(f"{name} ({value}) must not be given without repo_id: nothing is published")
        if self.stage_dir is not None:
            self.stage_dir = str(resolved(self.stage_dir))


def resolved(stage_dir: str) -> Path:
    """The folder itself, where a link leads to one.

    Raises:
        ValueError: no folder can be put there.
    """
    folder = Path(stage_dir).resolve()
    if folder == Path.cwd():
        raise ValueError(f"stage_dir ({stage_dir}) must not be the folder that this runs in: a new one takes its place")
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not there.is_dir():
        raise ValueError(f"stage_dir ({stage_dir}) must be a folder, and {there} is none")
    return folder


def make(arguments: PushArguments, scratch: Path) -> Path:
    """A folder with all files of the repository."""
    folder = scratch / "repository"
    source = model_source(arguments.model_name_or_path)
    model = load_model(source)
    processing = load_processing(source, model.config)
    model = prune(model, asked_pruning(arguments.pruning, model, processing))
    if model.base_model.looks_ids_up and any(table.empty for table in model.base_model.prior_tables()):
        raise ValueError("the table of saliency ('token_prior') must be filled: fit_token_prior or fine-tuning does so")
    address = arguments.repo_id or SOMEWHERE
    if arguments.recipe is None:
        title = arguments.title or (arguments.repo_id or Path(arguments.stage_dir).name).rpartition("/")[2]
        known = {"base_model": arguments.base_model, "license": arguments.license}
        known["interpolated"] = takes_images(model.config) and interpolates(model, processing)
        card = unmeasured_card(model, title=title, **known, template=arguments.template, address=address)
        return stage(folder, model, processing, card)
    about, evidence = read_about(arguments.recipe), read_evidence(arguments.evidence, arguments.recipe)
    task, layers = pipeline_tag_of(model), model.config.num_hidden_layers
    if task != about["pipeline_tag"]:
        raise ValueError(
            f"{type(model).__name__} ({task}) must be for {about['pipeline_tag']}, as {arguments.recipe} is"
        )
    if layers != about["layers"]:
        raise ValueError(f"layers ({about['layers']}) of {arguments.recipe} must be {layers}, as the model has")
    seed = measured_seed(evidence, model, source, arguments.evidence)
    picture = comparison_picture(evidence, scratch / "accuracy_over_macs.png", title=about["title"])
    drawn = schedule_of(evidence, about, scratch / "schedule.png", seed)
    named = {"recipe": Path(arguments.recipe).name, "picture": picture.name, "schedule": drawn.name}
    card = measured_card(about, evidence, **named, template=arguments.template, address=address, seed=seed)
    results = evaluation_results(about, evidence)
    return stage(folder, model, processing, card, evidence=evidence, pictures=[picture, drawn], results=results)


def measured_seed(evidence: dict[str, Any], model: PreTrainedModel, source: str | Path, name: str) -> int:
    """Which of a comparison's pruned models this one is, by its place among the seeds.

    Raises:
        ValueError: none of them.
    """
    own = model.config.pruning and model.config.pruning.to_dict()
    seeds = [seed for seed, pruning in enumerate(evidence["prunings"]) if pruning == own]
    if not seeds:
        raise ValueError(f"evidence ({name}) must be of this model's pruning, and is of others")
    if "weights" in evidence:  # older comparisons did not tell them
        digest = weights_digest(source)
        seeds = [seed for seed in seeds if evidence["weights"][seed] == digest]
    if not seeds:
        raise ValueError(f"evidence ({name}) must be of this model's weights, and is of others")
    return seeds[0]


def keep(made: Path, folder: Path) -> Path:
    """Puts the files that were made into a folder at once, or leaves there what is the same already.

    Raises:
        ValueError: it holds something else, or cannot be replaced.
    """
    if folder.is_dir() and any(folder.iterdir()):
        if not _same(made, folder):
            raise ValueError(f"stage_dir ({folder}) must be empty, or hold what is staged now")
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as near:
            os.replace(shutil.copytree(made, Path(near) / "repository"), folder)
    except OSError as error:
        raise ValueError(f"stage_dir ({folder}) must be one that can be replaced: {error}") from error
    return folder


def _same(one: Path, other: Path) -> bool:
    files, theirs = ({path.relative_to(top) for path in top.rglob("*") if path.is_file()} for top in (one, other))
    return files == theirs and all(filecmp.cmp(one / path, other / path, shallow=False) for path in files)


def main() -> None:
    try:
        (arguments,) = parse_arguments(PushArguments)
        if arguments.repo_id is not None:
            require_token()
        with tempfile.TemporaryDirectory() as scratch:
            folder = make(arguments, Path(scratch))
            if arguments.stage_dir is not None:
                folder = keep(folder, Path(arguments.stage_dir))
            if arguments.repo_id is None:
                print(f"wrote {folder}; nothing was published")
                return
            wishes = {name: getattr(arguments, name) for name in ("revision", "overwrite", "message")}
            done = push(folder, arguments.repo_id, private=arguments.private or None, **wishes)
    except Exception as error:  # whatever a model, a template or a server raises: its words, and no traceback
        raise SystemExit(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    print(f"published {done.commit_url}")


if __name__ == "__main__":
    main()
