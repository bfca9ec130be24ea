"""What the repository of a model holds: weights that are safetensors."""

from typing import Any

PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


class ModelRepository:
    """How a model is read. Goes before the native model class.

    Modifications:
        - Only safetensors are read.
    """

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, use_safetensors: bool | None = None, **kwargs: Any) -> Any:
        """As natively, from safetensors alone: what pickles are told to do is done by whoever reads them.

        Raises:
            ValueError: pickles are asked for.
            OSError: there is nothing to read, or nothing but pickles.
        """
        rule = f"{cls.__name__} reads nothing else; load other weights with the native class and give that to prune()"
        if use_safetensors is False:
            raise ValueError(f"use_safetensors (False) must be True: {rule}")
        if str(source).endswith(PICKLES):
            raise ValueError(f"{str(source)!r} must be safetensors: {rule}")
        try:
            return super().from_pretrained(source, *args, use_safetensors=True, **kwargs)
        except OSError as error:
            if "file named model.safetensors" not in str(error):
                raise
            raise OSError(f"{str(source)!r} must hold its weights as safetensors: {rule}") from error
