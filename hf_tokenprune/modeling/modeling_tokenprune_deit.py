"""DeiT with token pruning: pre-LN image encoder, two structural tokens (the class and the distillation token)."""

from .transformers_version import MINIMUM  # noqa: F401  # isort: skip

from typing import Any

import torch
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
)
from transformers.models.deit.modeling_deit import (
    DeiTEmbeddings,
    DeiTLayer,
    DeiTPooler,
    DeiTPreTrainedModel,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_tokenprune import TokenPruneConfigMixin
from .modeling_tokenprune import TokenPruneHead, register_family
from .modeling_tokenprune_images import ViTAnatomy, ViTLikeClassifier, ViTLikeModel
from .token_outputs import EXTRA_FIELDS, TokenPruneTwoHeadedOutput


class TokenPruneDeiTConfig(TokenPruneConfigMixin, DeiTConfig):
    """A `DeiTConfig` with `pruning`: a `PruningConfig`, its dict, a preset's name, or None.

    Raises:
        ValueError: an impossible pruning.
    """

    model_type = "tokenprune_deit"
    keys_to_ignore_at_inference = list(EXTRA_FIELDS)
    pruning: Any = None


class TokenPruneDeiTLayer(ViTAnatomy, DeiTLayer):
    """A `DeiTLayer` that reduces tokens."""

    eager_attention = staticmethod(eager_attention_forward)


class TokenPruneDeiTModel(ViTLikeModel, DeiTModel):
    """`DeiTModel` with token pruning.

    Modifications:
        - Built once, with `TokenPruneDeiTLayer`s.
    """

    config_class = TokenPruneDeiTConfig
    structural_tokens = 2
    _no_split_modules = ["DeiTEmbeddings", "TokenPruneDeiTLayer"]

    def __init__(self, config: TokenPruneDeiTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        DeiTPreTrainedModel.__init__(self, config)
        self.embeddings = DeiTEmbeddings(config, use_mask_token=use_mask_token)
        self.layers = nn.ModuleList(TokenPruneDeiTLayer(config) for _ in range(config.num_hidden_layers))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = DeiTPooler(config) if add_pooling_layer else None
        self.post_init()


def _classifier(config: TokenPruneDeiTConfig) -> nn.Module:
    return nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()


class TokenPruneDeiTForImageClassification(ViTLikeClassifier, DeiTForImageClassification):
    """`DeiTForImageClassification` over a `TokenPruneDeiTModel`."""

    config_class = TokenPruneDeiTConfig

    def __init__(self, config: TokenPruneDeiTConfig):
        DeiTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.deit = TokenPruneDeiTModel(config, add_pooling_layer=False)
        self.classifier = _classifier(config)
        self.post_init()


class TokenPruneDeiTForImageClassificationWithTeacher(TokenPruneHead, DeiTForImageClassificationWithTeacher):
    """`DeiTForImageClassificationWithTeacher` over a `TokenPruneDeiTModel`: reads both structural tokens."""

    config_class = TokenPruneDeiTConfig
    output_class = TokenPruneTwoHeadedOutput

    def __init__(self, config: TokenPruneDeiTConfig):
        DeiTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.deit = TokenPruneDeiTModel(config, add_pooling_layer=False)
        self.cls_classifier = _classifier(config)
        self.distillation_classifier = _classifier(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        attention_mask: torch.Tensor | None = None,
        output_token_trace: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TokenPruneTwoHeadedOutput:
        """Takes what `DeiTForImageClassificationWithTeacher` takes, and `output_token_trace`."""
        return self.run_head(
            super().forward,
            output_token_trace,
            pixel_values=pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            attention_mask=attention_mask,
            **kwargs,
        )


register_family(
    config=TokenPruneDeiTConfig,
    natives={
        DeiTModel: TokenPruneDeiTModel,
        DeiTForImageClassification: TokenPruneDeiTForImageClassification,
        DeiTForImageClassificationWithTeacher: TokenPruneDeiTForImageClassificationWithTeacher,
    },
    auto={
        "AutoModel": TokenPruneDeiTModel,
        "AutoModelForImageClassification": (
            TokenPruneDeiTForImageClassification,
            TokenPruneDeiTForImageClassificationWithTeacher,
        ),
    },
)
