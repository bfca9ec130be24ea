"""What all families' configs share: the nested pruning config and the complete `auto_map`."""

from typing import Any

from .pruning_config import PruningConfig
from .value_checks import is_a, is_false, plain_text, quoted


SAFETENSORS = (".safetensors", ".safetensors.index.json")


class TokenPruneConfigMixin:
    """Goes before the native config class. The subclass declares the field `pruning: Any = None`.

    Modifications:
        - `pruning` holds a `PruningConfig` or None; preset names and dicts are resolved on assignment, on disk it is a
          plain dict.
        - `auto_map` always names every class of the family, whichever of them is saved.
    """

    family_auto_map: dict[str, tuple[str, ...]] = {}
    must_be_false: tuple[str, ...] = ()
    class_token = True
    token_ids = False

    def __setattr__(self, key: str, value: Any) -> None:
        """Checks on assignment, because `from_pretrained(..., name=value)` assigns to a finished config.

        Raises:
            ValueError: quoting the value and the rule it breaks; the old value stays.
        """
        if key in self.must_be_false and not is_false(value):
            raise ValueError(f"{key} ({quoted(value)}) must be False: token pruning needs a bidirectional encoder")
        if key == "transformers_weights" and value is not None and not _names_safetensors(value):
            raise ValueError(f"{key} ({quoted(value)}) must be safetensors: a file of {' or '.join(SAFETENSORS)}")
        if key == "pruning":
            value = PruningConfig.coerce(value, self.num_hidden_layers)
            if value is not None and not self.class_token:
                value.check_class_token()
            if value is not None and not self.token_ids:
                value.check_token_ids()
            if value is not None and value.protected_token_ids and not self.token_ids:
                raise ValueError(
                    f"protected_token_ids ({quoted(list(value.protected_token_ids))}) must be empty: {self.model_type} "
                    "has no token ids"
                )
        elif key == "num_hidden_layers" and self.pruning is not None:
            self.pruning.resolve(value)
        super().__setattr__(key, value)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As natively, where there is one: a model of default sizes is not what anybody saved.

        Raises:
            OSError: there is no config.json, or nothing in it.
        """
        source = pretrained_model_name_or_path
        try:
            found, unused = super().get_config_dict(source, **kwargs)
        except (AttributeError, TypeError) as error:  # natively, of JSON that is no object
            raise OSError(f"config.json of {quoted(str(source))} must be a JSON object") from error
        # What natively is noted of a file, and is not in it, begins so.
        if not is_a(found, dict) or not any(name[:1] != "_" for name in found):
            raise OSError(f"config.json of {quoted(str(source))} must be there, a JSON object that describes a model")
        return found, unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As natively.

        Raises:
            ValueError: it is of one of our models and says nothing of the pruning.
        """
        if config_dict.get("model_type") == cls.model_type and "pruning" not in config_dict | kwargs:
            raise ValueError(f"a config of model_type ({cls.model_type!r}) must have 'pruning': null prunes nothing")
        # The pruning comes last, when the depth is the one that was asked for in the same `from_pretrained`.
        pruning = kwargs.pop("pruning", config_dict.get("pruning"))
        output = super().from_dict({**config_dict, "pruning": None}, **kwargs)
        config = output[0] if isinstance(output, tuple) else output
        config.pruning = pruning
        return output

    @property
    def complete_auto_map(self) -> dict[str, str]:
        """Every Auto class of the family and what it loads: of several classes the one that is saved, or the first."""
        saved = self.architectures or ()
        return {
            auto: next((name for name in names if name.rpartition(".")[2] in saved), names[0])
            for auto, names in self.family_auto_map.items()
        }

    @property
    def attention_width(self) -> int:
        """Features of all heads together."""
        return self.hidden_size

    @property
    def feed_forward_macs(self) -> int:
        """Multiply-accumulates of one token's feed-forward."""
        return 2 * self.hidden_size * self.intermediate_size

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output["pruning"] = None if self.pruning is None else self.pruning.to_dict()
        output["auto_map"] = self.complete_auto_map
        return output

    @classmethod
    def from_native(cls, native: Any, pruning: Any = None) -> "TokenPruneConfigMixin":
        """This family's config with everything that a native config of the same family says."""
        values = native.to_dict()
        for name in ("model_type", "transformers_version", "architectures", "auto_map", "pruning"):
            values.pop(name, None)
        return cls(**values, pruning=pruning, attn_implementation=native._attn_implementation)


def _names_safetensors(name: Any) -> bool:
    """An empty name is none."""
    text = plain_text(name)
    return text is not None and (not text or text.endswith(SAFETENSORS))
