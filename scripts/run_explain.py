"""See what a pruned model does: a page on which words or patches go, site by site, with scores and both predictions.

    python scripts/run_explain.py --model_name_or_path pruned --texts "to be, or not to be" --output_dir seen
    python scripts/run_explain.py --model_name_or_path minilm-l6 --pruning top_k --dataset_name 20newsgroups-religion \\
        --output_dir seen
    python scripts/run_explain.py --model_name_or_path dinov2-small --pruning '{"preset": "tome", "r": [18, 12, 8]}' \\
        --dataset_name mnist-5k --image_column image --image_size 112 --output_dir seen

Writes `explain.html`, which needs no network and nothing beside it, `tokens_per_layer.png`, and of images
`patches-0.png` and so on.
"""

from dataclasses import dataclass, field
from pathlib import Path

import datasets
from transformers import AutoConfig, DataCollatorWithPadding, PreTrainedConfig, PreTrainedModel

from hf_tokenprune import packaged
from hf_tokenprune.checkpoints import load_model, load_processing, takes_images
from hf_tokenprune.command_line import asked_pruning, model_source, parse_arguments
from hf_tokenprune.convert import prune
from hf_tokenprune.data import DataArguments, check_max_length, read_images, tokenize
from hf_tokenprune.images import collate, sized
from hf_tokenprune.labels import LISTS, are_flags, check_problem
from hf_tokenprune.modeling.pruning_config import PruningConfig
from hf_tokenprune.viz import DocumentView, draw_patches, draw_tokens, explain, render_page, write_page


@dataclass(kw_only=True)
class ExplainArguments(DataArguments):
    model_name_or_path: str = field(
        metadata={"help": f"Hub id, folder, or one of {', '.join(packaged.available_models())}."}
    )
    output_dir: str = field(metadata={"help": "Where the page and the pictures go."})
    pruning: str | None = field(
        default=None, metadata={"help": "A preset's name, JSON or a .json file; the model's own if not given."}
    )
    texts: list[str] | None = field(default=None, metadata={"help": "Texts to look at, in place of a data set."})
    split: str = field(default="test", metadata={"help": "train or test."})
    inputs: int = field(default=4, metadata={"help": "So many rows of the data set, drawn by seed."})
    seed: int = field(default=0, metadata={"help": "Which rows."})

    def __post_init__(self) -> None:
        if (self.texts is None) == (self.dataset_name is None):
            raise ValueError(f"one of texts ({self.texts}) and dataset_name ({self.dataset_name}) must be given")
        if self.inputs < 1:
            raise ValueError(f"inputs ({self.inputs}) must be >= 1")
        if self.split not in ("train", "test"):
            raise ValueError(f"split ({self.split!r}) must be train or test")


def load(arguments: ExplainArguments) -> tuple[PreTrainedModel, object]:
    source = model_source(arguments.model_name_or_path)
    asked = {} if arguments.problem_type is None else {"problem_type": check_problem(arguments.problem_type)}
    model = load_model(source, config=AutoConfig.from_pretrained(source, **asked))
    processing = load_processing(source, model.config)
    return prune(model, asked_pruning(arguments.pruning, model, processing)).eval(), processing


def read(arguments: ExplainArguments, model: PreTrainedModel, processing: object) -> tuple[dict, list[str] | None]:
    """A batch, and what its inputs are."""
    if takes_images(model.config) != (arguments.image_column is not None):
        kind = "takes images" if takes_images(model.config) else "takes texts"
        raise ValueError(f"image_column ({arguments.image_column}) must fit the model, which {kind}")
    if arguments.texts is not None:
        check_max_length(arguments.max_length, processing)
        given = processing(arguments.texts, truncation=True, max_length=arguments.max_length, padding=True)
        return dict(given.convert_to_tensors("pt")), None
    splits = arguments.load(labelled=False)
    rows = splits[arguments.split].shuffle(seed=arguments.seed)
    rows = rows.select(range(min(arguments.inputs, len(rows))))
    labels = _labels(rows, model.config) if "label" in rows.column_names else None
    only = datasets.DatasetDict(rows=rows)
    if arguments.image_column is not None:
        read = list(read_images(only, processing, arguments.image_size)["rows"])
        return sized(model, collate([{"pixel_values": row["pixel_values"]} for row in read])), labels
    rows = tokenize(only, processing, arguments.max_length)["rows"]
    taken = [name for name in processing.model_input_names if name in rows.column_names]
    return dict(DataCollatorWithPadding(processing)(list(rows.select_columns(taken)))), labels


def _labels(rows: datasets.Dataset, config: PreTrainedConfig) -> list[str]:
    """As they are named, or as they are; of several labels, those that are there."""
    feature, labels = rows.features["label"], rows["label"][:]
    several = isinstance(feature, LISTS)
    inner = feature.feature if several else feature
    known = dict(enumerate(inner.names)) if isinstance(inner, datasets.ClassLabel) else {}
    given = [row for row in labels if row is not None] if several else []
    if are_flags(given, inner) and len(given[0]) == config.num_labels:
        labels, known = [[place for place, there in enumerate(row or ()) if there] for row in labels], config.id2label
    if several:
        return [", ".join(str(known.get(label, label)) for label in row or ()) or "none" for row in labels]
    return [str(known.get(label, label)) for label in labels]


def alive_by_layer(views: list[DocumentView], depth: int) -> dict[str, list[float]]:
    """Mean tokens that leave each layer."""
    after = [dict(zip(view.layers, view.alive()[1:])) for view in views]
    pruned, current = [], [view.alive()[0] for view in views]
    whole = [sum(current) / len(views)] * depth
    for layer in range(depth):
        current = [sites.get(layer, count) for sites, count in zip(after, current)]
        pruned.append(sum(current) / len(views))
    return {"unpadded": whole, "pruned": pruned}


def described(pruning: PruningConfig) -> str:
    """The sites of a pruning in words."""
    sites = [site for _, site in sorted(pruning.sites.items()) if not site.idle]
    return "; ".join(
        f"layer {site.layer}: {site.saliency}, {site.rule} {site.value:.4g}, {site.reduction}" for site in sites
    )


def main() -> None:
    try:
        (arguments,) = parse_arguments(ExplainArguments)
        model, processing = load(arguments)
        batch, labels = read(arguments, model, processing)
        views = explain(model, batch, processing, labels=labels)
        folder, name = Path(arguments.output_dir), Path(arguments.model_name_or_path).name
        draw_tokens(
            alive_by_layer(views, model.config.num_hidden_layers),
            folder / "tokens_per_layer.png",
            title=f"Tokens that leave each layer: {name}",
        )
        drawn = {
            folder / f"patches-{number}.png": view for number, view in enumerate(views) if view.picture is not None
        }
        for number, (path, view) in enumerate(drawn.items(), 1):
            draw_patches(view, path, title=f"{name}, image {number}")
        for path in set(folder.glob("patches-*.png")) - set(drawn):  # of a run before
            path.unlink()
        page = render_page(views, title=f"What became of each token: {name}", summary=described(model.config.pruning))
        write_page(folder / "explain.html", page)
    except (ImportError, KeyError, OSError, TypeError, ValueError, packaged.PackagedFileError) as error:
        raise SystemExit(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    print(f"wrote {folder / 'explain.html'}")


if __name__ == "__main__":
    main()
