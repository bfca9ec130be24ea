"""Who looks at what goes through the modules of a model.

Packed tokens of a batch are one row, which a hook does not expect. And of some modules the parts are called, and not
they.
"""

from collections.abc import Callable, Iterable

from torch import nn
from transformers.utils import logging


logger = logging.get_logger(__name__)

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Whose hooks do not look at the tokens: torch's (sharding, weight norms), this package's profiler, and those of native
# models that capture outputs, which do nothing here.
LAYOUT_BLIND = ("torch.", "hf_tokenprune.", "transformers.utils.output_capturing")


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
            forward, before = own["_forward_hooks"], own["_forward_pre_hooks"]
            if forward or before or own["_backward_hooks"] or own["_backward_pre_hooks"]:
                found += [module] if any(_looks(hook) for name in HOOKS for hook in own[name].values()) else []
    return found


def asks_for_gradients(hook: Callable) -> bool:
    """Of `enable_input_require_grads`, which adapters under gradient checkpointing want."""
    return getattr(hook, "__name__", "") == "make_inputs_require_grads"


def _looks(hook: Callable) -> bool:
    return not asks_for_gradients(hook) and not (getattr(hook, "__module__", None) or "").startswith(LAYOUT_BLIND)


def warn_of_uncalled(model: nn.Module, hooked: list[nn.Module], uncalled: Iterable[nn.Module]) -> None:
    """Says which hooks are never called, because the parts of their module are, and not it."""
    lost = {id(module) for module in uncalled} & {id(module) for module in hooked}
    names = [name for name, module in model.named_modules() if id(module) in lost] if lost else []
    if names:
        more = " and others" if names[3:] else ""
        logger.warning_once(
            f"hooks on {', '.join(map(repr, names[:3]))}{more} are not called: put them on a layer, or on what "
            "computes inside one"
        )
