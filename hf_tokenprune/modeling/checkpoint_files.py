"""Faults of a checkpoint that natively end in the words of whatever read a file, or in weights at random."""

from collections.abc import Sequence
from typing import Any

from transformers.modeling_utils import load_state_dict

from .pruner_modules import PREDICTORS, VALUES
from .value_checks import quoted


# What may be new in a model that is loaded: it is trained next, or nobody asks it.
MAY_BE_NEW = {"pooler", "mask_token", "token_prior", *VALUES}
WHERE = ("cache_dir", "local_files_only", "token", "revision", "subfolder", "proxies")


def check_files(files: Sequence[str], quantized: bool) -> None:
    """Raises an OSError that names the file of weights that is no safetensors, cannot be read, or holds other numbers
    than floats."""
    for file in map(str, files):
        if not file.endswith(".safetensors"):
            raise OSError(f"{file} must be safetensors: nothing else is read")
        try:
            tensors = load_state_dict(file, map_location="meta")
        except OSError:  # there is no such file, which it says
            raise
        except Exception as error:
            raise OSError(f"{file} must be whole: it cannot be read as safetensors ({quoted(str(error))})") from error
        wrong = [name for name in tensors if _is_weight(name) and not tensors[name].is_floating_point()]
        if wrong and not quantized:
            raise OSError(
                f"{file} must hold floats where config.json says nothing of a quantization: {wrong[0]} is "
                f"{tensors[wrong[0]].dtype}"
            )


def reading_fault(error: Exception, source: Any) -> str | None:
    """What an error of native code that reads a checkpoint's files means; None: it says so itself."""
    if isinstance(error, OSError):
        return None
    functions, trace = set(), error.__traceback__
    while trace is not None:
        functions.add(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    if "get_checkpoint_shard_files" in functions:
        return (
            f"model.safetensors.index.json of {quoted(str(source))} must be JSON with 'metadata' and 'weight_map', the "
            "file of each tensor"
        )
    if "load_state_dict" in functions:
        return f"the weights of {quoted(str(source))} must be whole: they cannot be read ({quoted(str(error))})"
    return None


def check_loaded(model: Any, missing: set[str], source: Any, given: dict[str, Any]) -> None:
    """Raises an OSError where weights would be random although the checkpoint was saved with them.

    Args:
        missing: names of parameters that the checkpoint has not. given: the arguments of `from_pretrained`.
    """
    absent = sorted(name for name in missing if not _may_be_new(model, name, source, given))
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise OSError(
            f"the weights of {quoted(str(source))} must hold all that config.json asks for, and {absent[0]}{more} "
            "would be random: load it with the native class and give that to prune() if that is meant"
        )


def _may_be_new(model: Any, name: str, source: Any, given: dict[str, Any]) -> bool:
    parts = set(name.split("."))
    if parts & set(PREDICTORS):  # of a pruning that was asked for; one that is saved has its predictors
        return not _saved_as_learned(model, source, given)
    if model.base_model is not model and not name.startswith(f"{model.base_model_prefix}."):
        return type(model).__name__ not in (model.config.architectures or ())  # a head that was not saved
    return bool(parts & MAY_BE_NEW)


def _saved_as_learned(model: Any, source: Any, given: dict[str, Any]) -> bool:
    where = {name: given[name] for name in WHERE if given.get(name) is not None}
    saved = model.config_class.get_config_dict(source, **where)[0].get("pruning")
    stages = saved.get("stages", ()) if isinstance(saved, dict) else ()
    return any(stage["saliency"] == "learned" for stage in stages)


def _is_weight(name: str) -> bool:
    return name.endswith((".weight", ".bias"))


def shapes_that_differ(mismatched: Any) -> str:
    """In words: of parameters, with the shapes in the checkpoint and in the model."""
    (name, theirs, ours), *more = sorted(mismatched)
    others = f", and {len(more)} more differ" if more else ""
    return f"{name} is {list(theirs)} in the weights and {list(ours)} by config.json{others}"
