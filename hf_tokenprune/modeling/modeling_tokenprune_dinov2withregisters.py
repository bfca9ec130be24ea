"""DINOv2 with registers and token pruning: structural tokens are the class token and the registers behind it."""

from .transformers_version import require_transformers  # isort: skip

from typing import Any

from torch import nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersForImageClassification, Dinov2WithRegistersModel
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersEmbeddings,
    Dinov2WithRegistersEncoder,
    Dinov2WithRegistersLayer,
    Dinov2WithRegistersPreTrainedModel,
    eager_attention_forward,
)

from .configuration_tokenprune import TokenPruneConfigMixin
from .modeling_tokenprune import register_family
from .modeling_tokenprune_images import (
    Dinov2Anatomy,
    Dinov2LikeClassifier,
    Dinov2LikeModel,
    dinov2_feed_forward_macs,
)
from .token_outputs import EXTRA_FIELDS


require_transformers("5.18.0", "token pruning of DINOv2 with registers")


class TokenPruneDinov2WithRegistersConfig(TokenPruneConfigMixin, Dinov2WithRegistersConfig):
    """A `Dinov2WithRegistersConfig` with `pruning`: a `PruningConfig`, its dict, a preset's name, or None.

    Raises:
        ValueError: an impossible pruning.
    """

    model_type = "tokenprune_dinov2_with_registers"
    keys_to_ignore_at_inference = list(EXTRA_FIELDS)
    feed_forward_macs = property(dinov2_feed_forward_macs)
    pruning: Any = None


class TokenPruneDinov2WithRegistersLayer(Dinov2Anatomy, Dinov2WithRegistersLayer):
    """A `Dinov2WithRegistersLayer` that reduces tokens."""

    eager_attention = staticmethod(eager_attention_forward)


class TokenPruneDinov2WithRegistersEncoder(Dinov2WithRegistersEncoder):
    """Modifications: holds `TokenPruneDinov2WithRegistersLayer`s; the base model sends the tokens through them."""

    config_class = TokenPruneDinov2WithRegistersConfig
    _can_record_outputs = {}

    def __init__(self, config: TokenPruneDinov2WithRegistersConfig):
        Dinov2WithRegistersPreTrainedModel.__init__(self, config)
        self.layer = nn.ModuleList(TokenPruneDinov2WithRegistersLayer(config) for _ in range(config.num_hidden_layers))
        self.post_init()


class TokenPruneDinov2WithRegistersModel(Dinov2LikeModel, Dinov2WithRegistersModel):
    """`Dinov2WithRegistersModel` with token pruning.

    Modifications:
        - Built once, with `TokenPruneDinov2WithRegistersLayer`s.
    """

    config_class = TokenPruneDinov2WithRegistersConfig
    _no_split_modules = ["Dinov2WithRegistersEmbeddings", "TokenPruneDinov2WithRegistersLayer"]

    @property
    def structural_tokens(self) -> int:
        return 1 + self.config.num_register_tokens

    def __init__(self, config: TokenPruneDinov2WithRegistersConfig):
        Dinov2WithRegistersPreTrainedModel.__init__(self, config)
        self.embeddings = Dinov2WithRegistersEmbeddings(config)
        self.encoder = TokenPruneDinov2WithRegistersEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()


class TokenPruneDinov2WithRegistersForImageClassification(
    Dinov2LikeClassifier, Dinov2WithRegistersForImageClassification
):
    """`Dinov2WithRegistersForImageClassification` over a `TokenPruneDinov2WithRegistersModel`."""

    config_class = TokenPruneDinov2WithRegistersConfig

    def __init__(self, config: TokenPruneDinov2WithRegistersConfig):
        Dinov2WithRegistersPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.dinov2_with_registers = TokenPruneDinov2WithRegistersModel(config)
        width = config.hidden_size * 2
        self.classifier = nn.Linear(width, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()


register_family(
    config=TokenPruneDinov2WithRegistersConfig,
    natives={
        Dinov2WithRegistersModel: TokenPruneDinov2WithRegistersModel,
        Dinov2WithRegistersForImageClassification: TokenPruneDinov2WithRegistersForImageClassification,
    },
    auto={
        "AutoModel": TokenPruneDinov2WithRegistersModel,
        "AutoModelForImageClassification": TokenPruneDinov2WithRegistersForImageClassification,
    },
)
