"""What a checkpoint is, by its config: the Auto class that loads it, its task, and what makes its inputs."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # the top level's wants torchvision
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from .labels import CLASSES, MULTI_LABEL, REGRESSION
from .modeling.model_repository import PIPELINE_TAGS, pipeline_tag


class Task(NamedTuple):
    """The Auto class that loads a head."""

    auto: type

    @property
    def pipeline_tag(self) -> str:
        """The Hub's name for what it does."""
        return PIPELINE_TAGS[self.auto.__name__]


HEADS = {
    "ForSequenceClassification": Task(AutoModelForSequenceClassification),
    "ForTokenClassification": Task(AutoModelForTokenClassification),
    "ForImageClassification": Task(AutoModelForImageClassification),
    "ForImageClassificationWithTeacher": Task(AutoModelForImageClassification),
}
NO_HEAD = Task(AutoModel)
CLASSIFY = ("text-classification", "image-classification")  # what gives an input a class, a number or several labels


def task_of(architecture: str | None) -> Task:
    """The task of a model class, by its name."""
    return next((task for head, task in HEADS.items() if (architecture or "").endswith(head)), NO_HEAD)


def pipeline_tag_of(model: PreTrainedModel) -> str:
    """The Hub's name for what one of our models does."""
    return pipeline_tag(task_of(type(model).__name__).auto.__name__, model.config)


def saved_task(config: PreTrainedConfig) -> Task:
    """The task of the head that a config was saved with."""
    return task_of((config.architectures or [None])[0])


def takes_images(config: PreTrainedConfig) -> bool:
    return hasattr(config, "patch_size")


def problem_of(config: PreTrainedConfig) -> str:
    """What a classifier's loss takes its logits for, as `problem_type` names it; natively one logit is a number."""
    return config.problem_type or (REGRESSION if config.num_labels == 1 else CLASSES)


def saved_problem(config: PreTrainedConfig) -> str | None:
    """What the head that a config was saved with is of, if that tells: many that choose a class do not say so."""
    one = saved_task(config).pipeline_tag in CLASSIFY and config.num_labels == 1
    return config.problem_type or (REGRESSION if one else None)


def activation_of(config: PreTrainedConfig) -> str:
    """What makes scores of a classifier's logits, as its pipeline has it: `"softmax"`, `"sigmoid"` or `"none"`."""
    if config.problem_type == REGRESSION:
        return "none"
    return "sigmoid" if config.problem_type == MULTI_LABEL or config.num_labels == 1 else "softmax"


def load_model(source: str | Path, **given: Any) -> PreTrainedModel:
    """The model with the head that it was saved with; without one where that is not among `HEADS`, as of a masked
    language model."""
    config = given.pop("config", None) or AutoConfig.from_pretrained(source)
    return saved_task(config).auto.from_pretrained(source, config=config, **given)


def weights_digest(source: str | Path) -> str:
    """The sha256 of a checkpoint's weights, of a folder or the Hub: of one file, or of each in turn.

    Raises:
        OSError: there are none.
    """
    index = cached_file(source, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    names = [SAFE_WEIGHTS_NAME]
    if index is not None:
        names = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    hasher = hashlib.sha256()
    for name in names:
        with open(cached_file(source, name), "rb") as file:
            while block := file.read(2**20):
                hasher.update(block)
    return hasher.hexdigest()


def load_processing(source: str | Path, config: PreTrainedConfig) -> PreTrainedTokenizerBase | BaseImageProcessor:
    """The tokenizer or the image processor beside a model.

    Raises:
        OSError, ValueError: there is none.
    """
    if takes_images(config):
        return AutoImageProcessor.from_pretrained(source, backend="pil")
    return AutoTokenizer.from_pretrained(source)
