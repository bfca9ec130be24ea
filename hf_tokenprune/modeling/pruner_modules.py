"""What a pruning has modules for: predictors and tables that scores are asked of, and values that are learned.

They come and go with `config.pruning`, and live in the layers that ask them.
"""

import torch
from torch import nn

from .pruning_config import PruningConfig
from .pruning_stage import Site
from .saliency import TokenPredictor, TokenPrior
from .soft_pruning import BudgetMultipliers, mask_module


# What a pruning has parameters in, wherever in a model.
PREDICTORS = ("token_predictor",)
VALUES = ("token_mask", "token_budget")  # learned values of the sites, and what they are learned with
PRUNER_MODULES = (*PREDICTORS, *VALUES)

# The module that a saliency asks at its layer, and the size in the model's config that it is made for.
PREDICTED = {"learned": (TokenPredictor, "hidden_size"), "token_prior": (TokenPrior, "vocab_size")}


class PrunerModules:
    """Holds a pruning's modules, for base models, which say what their `token_layers` are."""

    def post_init(self) -> None:
        self.fit_pruner()
        super().post_init()

    def fit_pruner(self) -> None:
        """Gives the layers what their sites need of parameters, and takes away what an objective needs no more."""
        self._fit_token_predictors()
        self._fit_token_masks()

    def learned_pruning(self) -> PruningConfig | None:
        """`config.pruning` with the values that the masks have learned so far."""
        pruning, layers = self.config.pruning, self.token_layers()
        if pruning is None:
            return None
        masks = (layers[site.layer]._modules.get("token_mask") for stage in pruning.stages for site in stage.sites())
        learned = [
            value if mask is None else float(mask.value) if isinstance(value, float) else mask.value
            for value, mask in zip(pruning.values, masks)
        ]
        return pruning.with_learned(learned)

    def _fit_token_masks(self) -> None:
        pruning, layers = self.config.pruning, self.token_layers()
        objective = None if pruning is None else pruning.objective
        wanted = {} if objective is None else pruning.sites
        for index, layer in enumerate(layers):
            mask = mask_module(wanted[index], objective, self.longest_input) if index in wanted else None
            self._hold(layer, "token_mask", mask)
        self._hold(self, "token_budget", BudgetMultipliers() if objective and objective.name == "budget" else None)

    def _hold(self, owner: nn.Module, name: str, wanted: nn.Module | None) -> None:
        """Makes `owner.name` the wanted module, or leaves the one that is there, if it started as the same.

        It may be inside another: adapters wrap what they save whole.
        """
        held = owner._modules.get(name)
        if wanted is None:
            owner._modules.pop(name, None)
            return
        own = [module for module in (() if held is None else held.modules()) if type(module) is type(wanted)]
        if not own or vars(own[0]).get("initial") != vars(wanted).get("initial"):
            like = next(parameter for parameter in owner.parameters())
            setattr(owner, name, wanted.to(like.device))

    @property
    def longest_input(self) -> int:
        """Tokens of the longest input that the model takes."""
        return self.config.max_position_embeddings

    def _fit_token_predictors(self) -> None:
        """Gives a new token predictor to each layer whose site needs one and that has none of its kind yet."""
        layers = self.token_layers()
        for index, site in ({} if self.config.pruning is None else self.config.pruning.sites).items():
            if site.saliency not in PREDICTED or predicts(layers[index].predictor, site):
                continue
            like = next(parameter for parameter in layers[index].parameters() if parameter.is_floating_point())
            with torch.device(like.device):
                kind, size = PREDICTED[site.saliency]
                predictor = kind(getattr(self.config, size))
            layers[index].token_predictor = predictor.to(like.dtype).train(layers[index].training)
            for module in predictor.modules():
                self._init_weights(module)

    def set_token_prior(self, worth: torch.Tensor) -> None:
        """Fills the table of a site with saliency `"token_prior"`.

        Args:
            worth: of each id, positive, [V].

        Raises:
            ValueError: no such site, or not one number for each id.
        """
        prior = self.token_layers()[0].predictor
        if not isinstance(prior, TokenPrior):
            raise ValueError(f"pruning ({self.config.pruning!r}) must have a site with saliency 'token_prior'")
        if worth.shape != prior.worth.shape or not bool((worth > 0).all()):
            raise ValueError(
                f"worth ({list(worth.shape)}) must hold a positive number for each of {len(prior.worth)} ids"
            )
        prior.worth.copy_(worth)


def predicts(predictor: nn.Module | None, site: Site) -> bool:
    """Whether the module, which an adapter may wrap, is what the site asks."""
    if predictor is None or site.saliency not in PREDICTED:
        return False
    kind, _ = PREDICTED[site.saliency]
    return any(isinstance(part, kind) for part in predictor.modules())
