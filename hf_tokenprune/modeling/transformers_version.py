"""Says which transformers is needed, before anything is imported that older ones lack: every family starts with it."""

import transformers
from packaging import version


MINIMUM = "5.17.0"


class TransformersTooOld(ImportError):
    """A family needs a later release of transformers."""


def require_transformers(minimum: str, what: str) -> None:
    """Raises `TransformersTooOld` below the release that `what` needs."""
    if version.parse(transformers.__version__) < version.parse(minimum):
        raise TransformersTooOld(
            f"{what} needs transformers >= {minimum}; this is {transformers.__version__}: pip install -U transformers"
        )


require_transformers(MINIMUM, "token pruning")
