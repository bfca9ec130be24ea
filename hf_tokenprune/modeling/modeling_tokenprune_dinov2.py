"""DINOv2 with token pruning: pre-LN image encoder with LayerScale, one structural token (the class token)."""

from .transformers_version import require_transformers  # isort: skip

from typing import Any

from torch import nn
from transformers import Dinov2Config, Dinov2ForImageClassification, Dinov2Model
from transformers.models.dinov2.modeling_dinov2 import (
    Dinov2Embeddings,
    Dinov2Encoder,
    Dinov2Layer,
    Dinov2PreTrainedModel,
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


require_transformers("5.18.0", "token pruning of DINOv2")


class TokenPruneDinov2Config(TokenPruneConfigMixin, Dinov2Config):
    """A `Dinov2Config` with `pruning`: a `PruningConfig`, its dict, a preset's name, or None.

    Raises:
        ValueError: an impossible pruning.
    """

    model_type = "tokenprune_dinov2"
    keys_to_ignore_at_inference = list(EXTRA_FIELDS)
    feed_forward_macs = property(dinov2_feed_forward_macs)
    pruning: Any = None


class TokenPruneDinov2Layer(Dinov2Anatomy, Dinov2Layer):
    """A `Dinov2Layer` that reduces tokens."""

    eager_attention = staticmethod(eager_attention_forward)


class TokenPruneDinov2Encoder(Dinov2Encoder):
    """Modifications: holds `TokenPruneDinov2Layer`s; the base model sends the tokens through them."""

    config_class = TokenPruneDinov2Config
    _can_record_outputs = {}

    def __init__(self, config: TokenPruneDinov2Config):
        Dinov2PreTrainedModel.__init__(self, config)
        self.layer = nn.ModuleList(TokenPruneDinov2Layer(config) for _ in range(config.num_hidden_layers))
        self.post_init()


class TokenPruneDinov2Model(Dinov2LikeModel, Dinov2Model):
    """`Dinov2Model` with token pruning.

    Modifications:
        - Built once, with `TokenPruneDinov2Layer`s.
    """

    config_class = TokenPruneDinov2Config
    _no_split_modules = ["Dinov2Embeddings", "TokenPruneDinov2Layer"]

    def __init__(self, config: TokenPruneDinov2Config):
        Dinov2PreTrainedModel.__init__(self, config)
        self.embeddings = Dinov2Embeddings(config)
        self.encoder = TokenPruneDinov2Encoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()


class TokenPruneDinov2ForImageClassification(Dinov2LikeClassifier, Dinov2ForImageClassification):
    """`Dinov2ForImageClassification` over a `TokenPruneDinov2Model`."""

    config_class = TokenPruneDinov2Config

    def __init__(self, config: TokenPruneDinov2Config):
        Dinov2PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.dinov2 = TokenPruneDinov2Model(config)
        width = config.hidden_size * 2
        self.classifier = nn.Linear(width, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()


register_family(
    config=TokenPruneDinov2Config,
    natives={Dinov2Model: TokenPruneDinov2Model, Dinov2ForImageClassification: TokenPruneDinov2ForImageClassification},
    auto={
        "AutoModel": TokenPruneDinov2Model,
        "AutoModelForImageClassification": TokenPruneDinov2ForImageClassification,
    },
)
