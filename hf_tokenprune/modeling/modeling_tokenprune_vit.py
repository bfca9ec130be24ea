"""ViT with token pruning: pre-LN image encoder, one structural token (the class token)."""

from .transformers_version import MINIMUM  # noqa: F401  # isort: skip

from typing import Any

from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel
from transformers.models.vit.modeling_vit import (
    ViTEmbeddings,
    ViTLayer,
    ViTPooler,
    ViTPreTrainedModel,
    eager_attention_forward,
)

from .configuration_tokenprune import TokenPruneConfigMixin
from .modeling_tokenprune import register_family
from .modeling_tokenprune_images import ViTAnatomy, ViTLikeClassifier, ViTLikeModel
from .token_outputs import EXTRA_FIELDS


class TokenPruneViTConfig(TokenPruneConfigMixin, ViTConfig):
    """A `ViTConfig` with `pruning`: a `PruningConfig`, its dict, a preset's name, or None.

    Raises:
        ValueError: an impossible pruning.
    """

    model_type = "tokenprune_vit"
    keys_to_ignore_at_inference = list(EXTRA_FIELDS)
    pruning: Any = None


class TokenPruneViTLayer(ViTAnatomy, ViTLayer):
    """A `ViTLayer` that reduces tokens."""

    eager_attention = staticmethod(eager_attention_forward)


class TokenPruneViTModel(ViTLikeModel, ViTModel):
    """`ViTModel` with token pruning.

    Modifications:
        - Built once, with `TokenPruneViTLayer`s.
    """

    config_class = TokenPruneViTConfig
    _no_split_modules = ["ViTEmbeddings", "TokenPruneViTLayer"]

    def __init__(self, config: TokenPruneViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        ViTPreTrainedModel.__init__(self, config)
        self.embeddings = ViTEmbeddings(config, use_mask_token=use_mask_token)
        self.layers = nn.ModuleList(TokenPruneViTLayer(config) for _ in range(config.num_hidden_layers))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = ViTPooler(config) if add_pooling_layer else None
        self.post_init()


class TokenPruneViTForImageClassification(ViTLikeClassifier, ViTForImageClassification):
    """`ViTForImageClassification` over a `TokenPruneViTModel`."""

    config_class = TokenPruneViTConfig

    def __init__(self, config: TokenPruneViTConfig):
        ViTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.vit = TokenPruneViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()


register_family(
    config=TokenPruneViTConfig,
    natives={ViTModel: TokenPruneViTModel, ViTForImageClassification: TokenPruneViTForImageClassification},
    auto={"AutoModel": TokenPruneViTModel, "AutoModelForImageClassification": TokenPruneViTForImageClassification},
)
