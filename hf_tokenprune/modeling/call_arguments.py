"""What a call may say besides its inputs: every argument acts as natively, or is refused by name."""

from collections.abc import Mapping
from typing import Any

from torch import nn


DECODER = ("encoder_hidden_states", "encoder_attention_mask", "past_key_values")
# Read before, by the losses of heads, or of no effect on a native encoder.
KNOWN = (
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "use_cache",
    "num_items_in_batch",
    "output_router_logits",
)
# Whose hooks do not look at the tokens: torch's (sharding, weight norms), this package's profiler, and those of native
# models that capture outputs, which do nothing here.
LAYOUT_BLIND = ("torch.", "hf_tokenprune.", "transformers.utils.output_capturing")


def check_arguments(given: Mapping[str, Any], further: tuple[str, ...] = ()) -> None:
    """Raises for what would be dropped without a word.

    Args:
        given: the arguments that the forward does not name.
        further: those that the model has read from there.

    Raises:
        ValueError: arguments of a decoder.
        TypeError: names that nobody here knows; native models hand them to their kernels, or drop them.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for name in DECODER:
        if name in given:
            raise ValueError(f"{name} must be None: token pruning needs a bidirectional encoder")
    if given.pop("is_causal", False):
        raise ValueError("is_causal (True) must be False: token pruning needs a bidirectional encoder")
    unknown = [name for name in given if name not in KNOWN and name not in further]
    if unknown:
        raise TypeError(f"forward got arguments that it does not know: {', '.join(unknown)}")


def hooked_modules(model: nn.Module) -> list[nn.Module]:
    """The modules inside a model with a hook that looks at what goes through.

    Every call asks, so most of it is a walk over empty dicts.
    """
    found, levels = [], [model._modules]
    for level in levels:  # grows on the way
        for module in level.values():
            if module is None:
                continue
            own = module.__dict__
            if own["_modules"]:
                levels.append(own["_modules"])
            forward, backward = own["_forward_hooks"], own["_backward_hooks"]
            before, before_backward = own["_forward_pre_hooks"], own["_backward_pre_hooks"]
            if forward or backward or before or before_backward:
                hooks = (*forward.values(), *backward.values(), *before.values(), *before_backward.values())
                found += [module] if any(map(_looks, hooks)) else []
    return found


def _looks(hook: Any) -> bool:
    # Of `enable_input_require_grads`, which adapters with gradient checkpointing ask for.
    if getattr(hook, "__name__", "") == "make_inputs_require_grads":
        return False
    return not (getattr(hook, "__module__", None) or "").startswith(LAYOUT_BLIND)
