"""Every preset with hyper-parameters that fit the tiny models: the other axis of the case table."""

import pytest
import torch
from tiny import LAYERS
from transformers import PreTrainedModel

from hf_tokenprune import PruningConfig, prune
from hf_tokenprune.modeling.presets import PRESETS
from hf_tokenprune.modeling.pruning_stage import SALIENCIES
from hf_tokenprune.modeling.saliency import TokenPredictor, TokenPrior


# Name -> preset, hyper-parameters that take much away, hyper-parameters that take nothing away.
_TABLE = {
    "top_k": ("top_k", {"layers": [1, 2], "keep_rate": 0.6}, {"keep_rate": 1.0}),
    "top_k_random": ("top_k", {"layers": [0, 2], "keep_rate": 0.6, "saliency": "random"}, {"keep_rate": 1.0}),
    "top_k_key_norm": ("top_k", {"layers": [1, 3], "keep_rate": 0.6, "saliency": "key_norm"}, {"keep_rate": 1.0}),
    "top_k_shift": ("top_k", {"layers": [1, 2], "keep_rate": 0.6, "saliency": "residual_shift"}, {"keep_rate": 1.0}),
    "evit": ("evit", {"layers": [0, 2], "keep_rate": 0.6}, {"keep_rate": 1}),
    "evit_normalized": (
        "evit",
        {"layers": [1, 2], "keep_rate": 0.5, "fuse_token": "normalized"},
        {"keep_rate": 1.0},
    ),
    "evit_drop": ("evit", {"layers": [1, 2], "keep_rate": 0.5, "fuse_token": False}, {"keep_rate": 1.0}),
    "tome": ("tome", {"r": 4}, {"r": 0}),
    "tome_schedule": ("tome", {"r": (5, -0.5), "proportional_attention": False}, {"r": [0]}),
    "diffrate": (
        "diffrate",
        {"prune_kept": [30, 20, 14, 9], "merge_kept": [22, 16, 10, 7]},
        {"prune_kept": [99] * LAYERS, "merge_kept": [99] * LAYERS},
    ),
    "dynamicvit": ("dynamicvit", {"layers": [1, 3], "base_rate": 0.6}, {"base_rate": 1.0}),
    "power_bert": ("power_bert", {"retention": [20, 12, 8, 5]}, {"retention": [99] * LAYERS}),
    "length_adaptive": ("length_adaptive", {"length_config": [18, 11, 7, 4]}, {"length_config": [99] * LAYERS}),
    "length_adaptive_rate": ("length_adaptive", {"keep_rate": 0.75}, {"keep_rate": 1.0}),
    "ltp": ("ltp", {"final_token_threshold": 0.055}, {"final_token_threshold": 0.0}),
    "adaptive": ("adaptive", {"layers": [1, 2], "threshold": 0.8}, {"threshold": 0.0}),
    "adaptive_prior": (
        "adaptive",
        {"layers": [1, 2], "threshold": 0.8, "prior_threshold": 0.9},
        {"threshold": 0.0, "prior_threshold": 0.0},
    ),
    "adaptive_fuse": ("adaptive_fuse", {"layers": [0, 2], "threshold": 0.8}, {"threshold": 0.0}),
    "value_merge": ("value_merge", {"layers": [1, 2], "keep_rate": 0.5}, {"keep_rate": 1.0}),
    "top_p": ("top_p", {"layers": [1, 2], "p": 0.7}, {"p": 1.0}),
}
METHODS = {name: PruningConfig.preset(preset, **values) for name, (preset, values, _) in _TABLE.items()}
IDLE = {name: PruningConfig.preset(preset, **{**values, **idle}) for name, (preset, values, idle) in _TABLE.items()}

assert {preset for preset, _, _ in _TABLE.values()} == set(PRESETS)


def pruned(native: PreTrainedModel, pruning: PruningConfig | dict | None) -> PreTrainedModel:
    """`prune`, with token predictors and tables, if any, that are always the same and tell tokens clearly apart.

    Skips the test of a method that looks ids up with a model that has none.
    """
    stages = () if pruning is None else PruningConfig.coerce(pruning, LAYERS).stages
    looked_up = any(SALIENCIES[stage.saliency].token_ids for stage in stages)
    if looked_up and not hasattr(native.config, "vocab_size"):
        pytest.skip("no token ids to look up")
    model = prune(native, pruning)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, TokenPrior):
                module.worth.copy_(torch.rand(module.worth.shape, generator=generator) + 0.5)
            for parameter in module.parameters() if isinstance(module, TokenPredictor) else ():
                if parameter.dim() > 1:
                    parameter.normal_(std=2 / parameter.shape[1] ** 0.5, generator=generator)
    return model
