"""Tiny native models of every family and head, and inputs for them: the case table of the suite."""

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hf_tokenprune.families import supported_natives


LAYERS = 4
VOCABULARY = 50
EXECUTIONS = ("packed", "padded", "masked")

BERT = BertConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
    num_labels=3,
)
_IMAGES = {
    "image_size": 24,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_labels": 3,
}
VIT = ViTConfig(**_IMAGES, intermediate_size=64)
DEIT = DeiTConfig(**_IMAGES, intermediate_size=64)
DINOV2 = Dinov2Config(**_IMAGES, mlp_ratio=2, layerscale_value=0.7)
REGISTERS = Dinov2WithRegistersConfig(**_IMAGES, mlp_ratio=2, layerscale_value=0.7, num_register_tokens=4)


@dataclass(frozen=True)
class Case:
    """A native class with a tiny config."""

    native: type[PreTrainedModel]
    config: object

    @property
    def text(self) -> bool:
        return self.config is BERT

    @property
    def prefix(self) -> int:
        """Structural tokens."""
        return {id(DEIT): 2, id(REGISTERS): 5}.get(id(self.config), 1)

    @property
    def tokens(self) -> int:
        """Of an image: structural ones and 36 patches."""
        return self.prefix + 36

    @property
    def learns(self) -> bool:
        """Whether the native class has a loss."""
        return self.native is not DeiTForImageClassificationWithTeacher

    def __str__(self) -> str:
        return self.native.__name__


def _cases(*pairs: tuple[type[PreTrainedModel], object]) -> list:
    known = supported_natives()
    reason = f"needs a later transformers than {transformers.__version__}"
    return [
        pytest.param(
            Case(*pair), id=pair[0].__name__, marks=pytest.mark.skipif(pair[0].__name__ not in known, reason=reason)
        )
        for pair in pairs
    ]


BASES = _cases(
    (BertModel, BERT), (ViTModel, VIT), (DeiTModel, DEIT), (Dinov2Model, DINOV2), (Dinov2WithRegistersModel, REGISTERS)
)
HEADS = _cases(
    (BertForSequenceClassification, BERT),
    (BertForTokenClassification, BERT),
    (ViTForImageClassification, VIT),
    (DeiTForImageClassification, DEIT),
    (DeiTForImageClassificationWithTeacher, DEIT),
    (Dinov2ForImageClassification, DINOV2),
    (Dinov2WithRegistersForImageClassification, REGISTERS),
)
LEARNING_HEADS = [param for param in HEADS if param.values[0].learns]
ALL = BASES + HEADS
# Every anatomy, and heads that read no more than the first tokens: for tables with many methods.
TYPICAL = BASES + [
    param for param in HEADS if param.id in ("BertForSequenceClassification", "DeiTForImageClassificationWithTeacher")
]


def cases(parameters: list) -> list[Case]:
    """The cases of a list of test parameters that this transformers has."""
    plain = [getattr(parameter, "values", (parameter,))[0] for parameter in parameters]
    return [case for case in plain if case.native.__name__ in supported_natives()]


def build(case: Case, *, seed: int = 0, attention: str = "sdpa", spread: float = 0.5) -> PreTrainedModel:
    """A tiny native model in eval mode.

    Args:
        spread: standard deviation of the matrices: wide enough for scores that differ clearly.
    """
    torch.manual_seed(seed)
    config = copy.deepcopy(case.config)  # tests change what they build
    model = case.native._from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=spread / parameter[0].numel() ** 0.5 * 2, generator=generator)
    return model


def text_inputs(lengths: list[int], *, seed: int = 0, padding: int = 0, pad_id: int = 0) -> dict[str, torch.Tensor]:
    """Token ids (1 .. VOCABULARY - 1) of the given lengths, padded on the right to the longest plus `padding`."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths) + padding
    ids = torch.full((len(lengths), width), pad_id)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(1, VOCABULARY, (length,), generator=generator)
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}


def image_inputs(batch: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(batch, 3, 24, 24, generator=generator)}


def inputs_for(case: Case, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """A ragged batch of text, or a batch of images."""
    return text_inputs([17, 5, 30, 1], seed=seed, padding=2) if case.text else image_inputs(3, seed=seed)


def tokenizer() -> PreTrainedTokenizerFast:
    """One that knows the words w4 to w49."""
    words = {name: i for i, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(4, 50))])}
    model = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = Whitespace()
    model.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


def save_text_model(folder: Path) -> None:
    """A tiny classifier and its tokenizer."""
    torch.manual_seed(0)
    BertForSequenceClassification(BERT).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def main_output(outputs: object) -> torch.Tensor:
    """The logits of a head, the sequence of a base model."""
    return outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]
