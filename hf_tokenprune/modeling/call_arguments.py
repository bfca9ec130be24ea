"""What a call may say besides its inputs: every argument acts as natively, or is refused by name."""

from collections.abc import Collection, Mapping
from typing import Any


try:  # since 5.20 hidden states may be chosen by their indices
    from transformers.utils.output_capturing import selected_hidden_states
except ImportError:
    selected_hidden_states = None


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


def check_arguments(given: Mapping[str, Any], further: Collection[str] = ()) -> None:
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


def wanted_states(asked: Any, layers: int) -> tuple[bool | frozenset[int], int]:
    """Which hidden states are asked for, and how many of the first are not shown at all: 0 or 1.

    All, none, or those at some indices, negative ones from the end. Before 5.20 indices counted layers.
    """
    if selected_hidden_states is None and asked and isinstance(asked, list | tuple | set):
        return frozenset(index + 1 for index in asked), 1
    selected = selected_hidden_states(asked) if asked and selected_hidden_states is not None else None
    if selected is None:
        return bool(asked), 0
    states = layers + 1
    return frozenset(index % states for index in selected if -states <= index < states), 0
