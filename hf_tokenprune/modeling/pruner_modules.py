"""What a pruning has modules for: predictors and tables that scores are asked of, and values that are learned.

They live in the layers that ask them. Masks go when no objective needs them; predictors and tables stay, for the next
pruning that asks them, and only those that are asked are saved.
"""

from collections.abc import Sequence

import torch
from torch import nn

from .pruning_config import PruningConfig
from .pruning_stage import SALIENCIES
from .saliency import TokenPredictor, TokenPrior
from .soft_pruning import BudgetMultipliers, mask_module
from .value_checks import quoted


# Names of modules. ASKED: in a layer, by the saliency that asks. VALUES: learned values of the sites, and what they are
# learned with.
ASKED = {"learned": "token_predictor", "token_prior": "token_prior"}
PREDICTORS = ("token_predictor",)
VALUES = ("token_mask", "token_budget")
# Half a float is too coarse for what is learned in small steps, and for what tells tokens apart.
IN_FLOAT32 = {*VALUES, ASKED["token_prior"]}


class PrunerModules:
    """Holds a pruning's modules, for base models, which say what their `token_layers` are."""

    def post_init(self) -> None:
        self.fit_pruner()
        # Of those that are there alone; a head gathers its base model's.
        held = {name.rpartition(".")[2] for name, _ in self.named_modules()}
        self._keep_in_fp32_modules_strict = IN_FLOAT32 & held
        super().post_init()

    def fit_pruner(self) -> None:
        """Gives the layers what their sites need of parameters, and takes away what an objective needs no more."""
        self._fit_token_predictors()
        self._fit_token_prior()
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
        """Gives a new token predictor to each layer whose site needs one and that has none yet."""
        layers = self.token_layers()
        for index, site in ({} if self.config.pruning is None else self.config.pruning.sites).items():
            if site.saliency != "learned" or layers[index].predictor is not None:
                continue
            like = next(parameter for parameter in layers[index].parameters() if parameter.is_floating_point())
            with torch.device(like.device):
                predictor = TokenPredictor(self.config.hidden_size)
            layers[index].token_predictor = predictor.to(like.dtype).train(layers[index].training)
            for module in predictor.modules():
                self._init_weights(module)

    def _fit_token_prior(self) -> None:
        """Gives the first layer an empty table if its site looks ids up, or one that has grown with the ids."""
        if not self.looks_ids_up:
            return
        layer, entries = self.token_layers()[0], self.config.vocab_size
        held = _tables_in(layer.prior)
        if held and len(held[0].worth) == entries:
            return
        prior = TokenPrior(entries).to(next(layer.parameters()).device)
        if held:
            worth = held[0].worth
            prior.worth.fill_(float(worth.mean()))
            prior.worth[: len(worth)] = worth[:entries]
        layer.token_prior = prior

    @property
    def looks_ids_up(self) -> bool:
        """Whether the first layer's site scores by token ids."""
        sites = {} if self.config.pruning is None else self.config.pruning.sites
        return 0 in sites and SALIENCIES[sites[0].saliency].token_ids

    def prior_tables(self) -> list[TokenPrior]:
        """The tables of the site that looks ids up: one, or more where an adapter wraps it.

        Raises:
            ValueError: there is no such site, or it has none yet.
        """
        if not self.looks_ids_up:
            raise ValueError(f"pruning ({quoted(self.config.pruning)}) must have a site with saliency 'token_prior'")
        tables = _tables_in(self.token_layers()[0].prior)
        if not tables:
            raise ValueError("layer (0) has no table; set_pruning(...) makes it one")
        return tables

    def set_token_prior(self, worth: torch.Tensor | Sequence[float]) -> None:
        """Fills the table of a site with saliency `"token_prior"`.

        Args:
            worth: of each id, positive, [V].

        Raises:
            ValueError: no such site, or not one number for each id.
        """
        tables = self.prior_tables()
        entries, worth = len(tables[0].worth), torch.as_tensor(worth)
        if worth.shape != (entries,):
            raise ValueError(f"worth's shape ({list(worth.shape)}) must be [{entries}]: a number for each id")
        wrong = worth[~((worth > 0) & worth.isfinite())]
        if len(wrong):
            raise ValueError(f"worth ({wrong[0].item()}) must be positive and finite, for each id")
        for table in tables:
            table.worth.copy_(worth)


def _tables_in(module: nn.Module | None) -> list[TokenPrior]:
    """Adapters wrap what they save whole, and hold it more than once."""
    return [] if module is None else [part for part in module.modules() if isinstance(part, TokenPrior)]
