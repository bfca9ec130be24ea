"""What transformers' common tests ask of a model's own tests: its classes, a tiny config, inputs. For every family."""

import copy
import unittest
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest import mock

import torch
import transformers
from common_mixins import load_mixin
from tiny import BERT, DEIT, DINOV2, REGISTERS, VIT, Case
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device

from hf_tokenprune import PruningConfig
from hf_tokenprune.families import FAMILIES, native_to_pruned


# A family joins by its line: the tiny native config of `tiny`.
CONFIGS = {"BERT": BERT, "ViT": VIT, "DeiT": DEIT, "DINOv2": DINOV2, "DINOv2 with registers": REGISTERS}
STOCK, NONE, TOP_K = VARIANTS = ("stock", "none", "top_k")
PRUNINGS = {NONE: None, TOP_K: PruningConfig.preset("top_k", layers=[0], keep_rate=0.5)}
PASSED, FAILED, SKIPPED = WAYS = ("passed", "failed", "skipped")
LAYERS = 2  # as many as the common tests allow
# Images have no embeddings to give instead, and no table of words.
ONLY_TEXT = ("test_inputs_embeds", "test_model_get_set_embeddings")


class Tester:
    """The `model_tester` of a family and variant; its attributes are those that the mixins read."""

    batch_size = 5
    is_training = True
    num_hidden_layers = LAYERS

    def __init__(self, family: str, variant: str):
        case = Case(None, CONFIGS[family])
        self.native = _shallow(case.config)
        self.variant = variant
        self.text = hasattr(self.native, "vocab_size")
        self.seq_length = 8 if self.text else case.tokens
        self.mask_length = case.tokens - case.prefix  # of an image: as many patches
        self.num_masks = self.seq_length // 2
        for name in ("hidden_size", "num_attention_heads", "vocab_size", "image_size", "patch_size"):
            if hasattr(self.native, name):
                setattr(self, name, getattr(self.native, name))

    def get_config(self) -> Any:
        if self.variant == STOCK:
            return copy.deepcopy(self.native)
        ours = {cls.config_class: target.config_class for cls, target in native_to_pruned().items()}
        return ours[type(self.native)].from_native(self.native, PRUNINGS[self.variant])

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        return self.get_config(), {name: value.to(torch_device) for name, value in self._inputs().items()}

    def _inputs(self) -> dict[str, torch.Tensor]:
        shape = (self.batch_size, self.seq_length)
        if not self.text:
            return {"pixel_values": torch.rand(self.batch_size, 3, self.image_size, self.image_size)}
        mask = torch.randint(0, 2, shape)
        mask[:, 0] = 1  # holes anywhere but at the first token
        inputs = {"input_ids": torch.randint(0, self.vocab_size, shape), "attention_mask": mask}
        if hasattr(self.native, "type_vocab_size"):
            inputs["token_type_ids"] = torch.randint(0, self.native.type_vocab_size, shape)
        return inputs


def _shallow(config: Any) -> Any:
    """The same with few layers; what a config derives from their number it derives anew."""
    said = config.to_diff_dict()
    kept = {name: value for name, value in said.items() if name not in ("stage_names", "out_features", "out_indices")}
    return type(config).from_dict({**kept, "num_hidden_layers": LAYERS})


def _names_of_ours() -> list[Any]:
    """Patches that give our classes the places of their native ones in the tables of names that the mixins ask."""
    types = {cls.config_class.model_type: target.config_class.model_type for cls, target in native_to_pruned().items()}
    ours = {cls.__name__: target.__name__ for cls, target in native_to_pruned().items()}
    patches = []
    for name, table in vars(modeling_auto).items():
        if name.endswith("MAPPING_NAMES"):
            found = {types[key]: _renamed(table[key], ours) for key in types if key in table}
            patches.append(mock.patch.dict(table, {key: names for key, names in found.items() if names}))
    return patches


def _renamed(names: str | tuple[str, ...], ours: dict[str, str]) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) else names
    return tuple(ours[name] for name in names if name in ours)


class CommonTests:
    """Goes before the mixin. With a family and a variant it stands for the file of tests that each native model has."""

    family: str
    variant: str

    def setUp(self) -> None:
        super().setUp()
        for patch in _names_of_ours():
            patch.start()
            self.addCleanup(patch.stop)
        self.addCleanup(transformers.logging.set_verbosity, transformers.logging.get_verbosity())
        transformers.logging.set_verbosity_warning()  # some tests read the warnings
        transformers.set_seed(0)
        self.model_tester = Tester(self.family, self.variant)
        self._as_natively(self._testMethodName)

    def _as_natively(self, name: str) -> None:
        """What the native models' own files change for one test."""
        native = self.model_tester.native
        if name == "test_reverse_loading_mapping" and hasattr(native, "use_swiglu_ffn"):
            native.use_swiglu_ffn = True  # some of the names that are mapped are of its weights
        if name in ONLY_TEXT and not self.model_tester.text:
            self.skipTest("images have no embeddings of words")
        if "training" in name or name == "test_problem_types":  # a head without a loss does not train
            self.all_model_classes = tuple(cls for cls in self.all_model_classes if "WithTeacher" not in cls.__name__)

    def _prepare_for_class(self, inputs: dict[str, Any], model_class: type, return_labels: bool = False) -> Any:
        inputs = super()._prepare_for_class(inputs, model_class, return_labels=return_labels)
        if "WithTeacher" in model_class.__name__:
            inputs.pop("labels", None)
        return inputs


def _config_test(name: str) -> Any:
    def test(self: Any) -> None:
        pruning = PRUNINGS.get(self.variant)
        further = {} if pruning is None else {"pruning": pruning.to_dict()}
        tester = load_mixin("test_configuration_common").ConfigTester(
            self,
            config_class=type(self.model_tester.get_config()),
            has_text_modality=self.model_tester.text,
            hidden_size=37,
            **further,
        )
        getattr(tester, name)()

    return test


def families() -> list[str]:
    """Those that this transformers has."""
    return [family for family in CONFIGS if FAMILIES[family].available]


@cache
def tests_class(family: str, variant: str) -> type[unittest.TestCase]:
    """The common tests of a family, as stock classes ("stock") or ours with nothing pruned or `top_k` 0.5."""
    checks = [name for name in dir(load_mixin("test_configuration_common").ConfigTester) if "_config_" in name]
    mixin = load_mixin("test_modeling_common").ModelTesterMixin
    natives = [getattr(transformers, name) for name in FAMILIES[family].models]
    pairs = native_to_pruned()
    body = {
        "family": family,
        "variant": variant,
        "all_model_classes": tuple(cls if variant == STOCK else pairs[cls] for cls in natives),
        "test_resize_embeddings": Tester(family, variant).text,
        # Not by the year that a config's file says: ours say none.
        "test_can_init_all_missing_weights_before_2023": True,
        # A mask token is for pre-training, and no loss reaches it.
        "test_all_params_have_gradient": not _mask_token(natives[-1], Tester(family, STOCK).native),
        **{f"test_config_{name.partition('_config_')[2]}": _config_test(name) for name in checks},
    }
    return type(f"{family.replace(' ', '')}ModelTest", (CommonTests, mixin, unittest.TestCase), body)


def _mask_token(native: type, config: Any) -> bool:
    with torch.device("meta"):
        return any(name.endswith("mask_token") for name, _ in native(config).named_parameters())


def names_of_tests(family: str) -> list[str]:
    return unittest.TestLoader().getTestCaseNames(tests_class(family, STOCK))


@dataclass(frozen=True)
class Outcome:
    """Which of the `WAYS` a test went, how often it skipped (models apart), and what it said."""

    way: str
    skips: int
    said: str


def run(family: str, variant: str, name: str) -> Outcome:
    """Runs one test."""
    result = unittest.TestResult()
    tests_class(family, variant)(name).run(result)
    failed = [text for _, text in result.failures + result.errors]
    skipped = [text for _, text in result.skipped]
    way = FAILED if failed else SKIPPED if skipped else PASSED
    return Outcome(way, len(skipped), "\n".join(failed or skipped))


def main() -> None:
    """Prints how many tests passed, failed and were skipped."""
    for family in families():
        for variant in VARIANTS:
            ways = [run(family, variant, name).way for name in names_of_tests(family)]
            print(f"{family}, {variant}: {', '.join(f'{ways.count(way)} {way}' for way in WAYS)}", flush=True)


if __name__ == "__main__":
    main()
