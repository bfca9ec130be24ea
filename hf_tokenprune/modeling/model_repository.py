"""What the repository of a model holds: weights that are safetensors, and a card that says what the model is."""

import re
from os import PathLike
from os.path import exists
from typing import Any

from transformers.utils.hub import ModelCard

from .checkpoint_files import check_files, check_loaded, reading_fault, shapes_that_differ
from .held_inside import HeldInside


PIPELINE_TAGS = {
    "AutoModel": "feature-extraction",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForImageClassification": "image-classification",
}
PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")
# Of the card that transformers makes where there is none.
NOBODY_WROTE_IT = "This model card has been automatically generated."


class ModelRepository(HeldInside):
    """How a model is read and published. Goes before the native model class.

    Modifications:
        - Only safetensors are read, and what cannot be read is named.
        - Weights of the body that a checkpoint has not are an error, and not random.
        - Where the repository has no card, the one that is published says what the model is.
    """

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, use_safetensors: bool | None = None, **kwargs: Any
    ) -> Any:
        """As natively, from safetensors alone: what pickles are told to do is done by whoever reads them.

        Raises:
            ValueError: pickles are asked for.
            OSError: there is nothing to read, or nothing but pickles; a file is broken, or lacks weights.
            RuntimeError: weights of other shapes than the config's.
        """
        source = pretrained_model_name_or_path
        rule = f"{cls.__name__} reads nothing else; load other weights with the native class and give that to prune()"
        if use_safetensors is False:
            raise ValueError(f"use_safetensors (False) must be True: {rule}")
        if str(source).endswith(PICKLES):
            raise ValueError(f"{str(source)!r} must be safetensors: {rule}")
        wishes = {**kwargs, "use_safetensors": True, "output_loading_info": True}
        try:
            model, info = super().from_pretrained(source, *args, **wishes)
        except OSError as error:
            if "file named model.safetensors" not in str(error):
                raise
            raise OSError(f"{str(source)!r} must hold its weights as safetensors: {rule}") from error
        except RuntimeError as error:  # the shapes that it is about are in its log alone
            if "ignore_mismatched_sizes" not in str(error) or kwargs.get("ignore_mismatched_sizes"):
                raise
            _, info = super().from_pretrained(source, *args, **{**wishes, "ignore_mismatched_sizes": True})
            words = shapes_that_differ(info["mismatched_keys"])
            raise RuntimeError(f"{str(source)!r} must fit its config: {words}") from error
        except Exception as error:
            fault = reading_fault(error, source)
            if fault is None:
                raise
            raise OSError(fault) from error
        if kwargs.get("output_loading_info"):  # who asks what is missing is told, and not refused
            return model, info
        if source is not None and kwargs.get("state_dict") is None:
            check_loaded(model, info["missing_keys"], source, kwargs)
        return model

    @classmethod
    def _load_pretrained_model(
        cls, model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, *rest: Any, **further: Any
    ) -> Any:
        # What natively knows the files, wherever they are, and reads them next.
        check_files(checkpoint_files or (), load_config.is_quantized)
        return super()._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *rest, **further)

    def _upload_modified_files(self, working_dir: str | PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # Both ways of publishing a model end here, with the card in the folder.
        card = ModelCard.load(f"{working_dir}/README.md")
        if _is_template(card):
            card.text = card_text(self, repo_id)
            card.data.pipeline_tag = pipeline_tag(_auto_class(self), self.config)
            if _is_hub_id(self.name_or_path) and self.name_or_path != repo_id:
                card.data.base_model = self.name_or_path
            card.save(f"{working_dir}/README.md")
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def pipeline_tag(auto: str, config: Any) -> str:
    """The Hub's name for what the models of an Auto class do."""
    return "image-feature-extraction" if auto == "AutoModel" and not config.token_ids else PIPELINE_TAGS[auto]


def card_text(model: Any, repo_id: str) -> str:
    """A card's text from a model's config, which is all that is known of it."""
    auto, pruning = _auto_class(model), model.config.pruning
    sites = [] if pruning is None else [pruning.sites[layer] for layer in sorted(pruning.sites)]
    return f"""
# {repo_id.rpartition("/")[2]}

A `{type(model).__name__}` with token pruning: {_in_words(sites)}

Nothing was measured of it: neither what it costs nor what it gets right.

## Where tokens go

{_table(sites)}

## Use

```python
from transformers import {auto}

model = {auto}.from_pretrained("{repo_id}", trust_remote_code=True)
model.set_pruning(None)  # the same weights with nothing pruned
```

The code that comes with it needs torch and transformers alone, and says from which release.
"""


def _in_words(sites: list) -> str:
    if not sites:
        return "as it is saved nothing is pruned, and `set_pruning` switches that."
    *first, last = [str(site.layer) for site in sites]
    layers = f"layers {', '.join(first)} and {last}" if first else f"layer {last}"
    merged = {"dropped" if site.reduction == "drop" else "merged into others" for site in sites}
    return f"tokens that matter little are {' or '.join(sorted(merged))} at {layers}, and later layers cost less."


def _table(sites: list) -> str:
    if not sites:
        return "Nothing is pruned."
    head = "| layer | place | score | rule | value | what does not stay |\n| --- | --- | --- | --- | --- | --- |"
    place = {"before": "before it", "between": "between attention and feed-forward"}
    rows = [
        f"| {s.layer} | {place[s.place]} | {s.saliency} | {s.rule} | {s.value:.4g} | {s.reduction} |" for s in sites
    ]
    return "\n".join([head, *rows])


def _auto_class(model: Any) -> str:
    """The Auto class that loads a model's class."""
    names = type(model.config).family_auto_map
    own = type(model).__name__
    return next(auto for auto in PIPELINE_TAGS if any(name.endswith(f".{own}") for name in names.get(auto, ())))


def _is_template(card: ModelCard) -> bool:
    """Whether nobody changed the card that transformers makes: then its only text is one sentence."""
    before, _, after = ModelCard.from_template(card.data, model_description="\0").text.partition("\0")
    text = card.text
    own = text[len(before) : len(text) - len(after)]
    return text.startswith(before) and text.endswith(after) and own.endswith(NOBODY_WROTE_IT) and "\n" not in own


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not exists(name)
