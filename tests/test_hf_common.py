"""Transformers' own common tests, unedited: ours goes the way of the stock classes, but for one table of exceptions."""

from dataclasses import dataclass

import pytest
from common_mixins import NOT_PINNED, PINNED
from common_testers import CONFIGS, FAILED, NONE, PASSED, SKIPPED, STOCK, TOP_K, families, names_of_tests, run
from transformers import ViTForImageClassification

from hf_tokenprune.families import FAMILIES, native_to_pruned
from hf_tokenprune.modeling.modeling_tokenprune import Prunable
from hf_tokenprune.packaged import PackagedFileError


pytestmark = [pytest.mark.hf_common, pytest.mark.skipif(not PINNED, reason=NOT_PINNED)]

OURS = (NONE, TOP_K)
ALL = tuple(CONFIGS)
IMAGES = ("ViT", "DeiT", "DINOv2", "DINOv2 with registers")
DINOV2S = ("DINOv2", "DINOv2 with registers")


@dataclass(frozen=True)
class Difference:
    """A test that ours does not pass as the stock classes do, in these families and variants.

    Args:
        way: what it does instead. says: a part of what it says then.
    """

    reason: str
    way: str
    says: str
    families: tuple[str, ...] = ALL
    variants: tuple[str, ...] = OURS


HIDES_STRUCTURE = Difference(
    "a mask that hides the class token or a register of an image is refused with a sentence",
    FAILED,
    "they are no patches",
    families=IMAGES,
)
HIDES_PATCH = Difference(
    "a mask that hides a patch from DINOv2's classifier is refused with a sentence",
    FAILED,
    "reads the mean of all patches",
    families=DINOV2S,
)
SDPA = "test_eager_matches_sdpa_inference"
LEFT = ("00_fp16", "08_fp32", "16_bf16"), ("01_fp16", "09_fp32", "17_bf16")
RIGHT = ("04_fp16", "12_fp32", "20_bf16"), ("05_fp16", "13_fp32", "21_bf16")
DIFFERENCES = {
    "test_reverse_loading_mapping": Difference(
        "ours saves current names, on purpose: Trainer resumes with load_state_dict, which knows no old ones",
        FAILED,
        "No key mapping was performed!",
        families=IMAGES,
    ),
    "test_capture_outputs_decorator": Difference(
        "ours collects hidden states and attentions on the way through the layers, and not by hooks",
        SKIPPED,
        "No usage of the `capture_outputs` decorator.",
    ),
    "test_can_capture_specific_layers_hidden_states": Difference(
        "likewise: base models are skipped, heads pass (test_arguments.py compares all with stock)",
        SKIPPED,
        "Cannot capture hidden states",
    ),
    f"{SDPA}_24_fp32_pad_left_output_attentions": HIDES_STRUCTURE,
    **{f"{SDPA}_{name}_pad_left_sdpa_kernels": HIDES_STRUCTURE for name in LEFT[0]},
    **{f"{SDPA}_{name}_pad_left": HIDES_STRUCTURE for name in LEFT[1]},
    **{f"{SDPA}_{name}_pad_right_sdpa_kernels": HIDES_PATCH for name in RIGHT[0]},
    **{f"{SDPA}_{name}_pad_right": HIDES_PATCH for name in RIGHT[1]},
}


def _rows() -> list:
    try:
        return [(family, name) for family in families() for name in names_of_tests(family)] if PINNED else [("", "")]
    except PackagedFileError:  # the one test says it
        return [("BERT", "")]


ROWS = _rows()


@pytest.mark.parametrize(("family", "name"), ROWS, ids=["-".join(row) for row in ROWS])
def test_ours_goes_the_way_of_stock(family, name):
    stock = run(family, STOCK, name)
    assert stock.way != FAILED, stock.said
    for variant in OURS:
        ours, known = run(family, variant, name), DIFFERENCES.get(name)
        if known is None or family not in known.families or variant not in known.variants:
            assert (ours.way, ours.skips) == (stock.way, stock.skips), f"{variant}: {ours.said or stock.said}"
        else:
            assert known.way != stock.way, f"{name} is no difference: stock classes go the same way"
            assert ours.way == known.way, f"{variant}: the table says {known.way}, {known.reason}: {ours.said}"
            assert known.says in ours.said, f"{variant}: another reason than {known.says!r}: {ours.said}"


@pytest.mark.parametrize("family", [family for family in families() if family in IMAGES])
def test_old_names_map_where_they_are_asked_for(family, monkeypatch):
    monkeypatch.setitem(Prunable.save_pretrained.__kwdefaults__, "save_original_format", True)
    for variant in OURS:
        ours = run(family, variant, "test_reverse_loading_mapping")
        assert ours.way == PASSED, ours.said


def test_a_fault_of_ours_is_seen(monkeypatch):
    def without_loss(self, pixel_values, labels=None, **kwargs):
        return forward(self, pixel_values, **kwargs)

    ours = native_to_pruned()[ViTForImageClassification]
    forward = ours.forward
    assert run("ViT", NONE, "test_training").way == PASSED
    monkeypatch.setattr(ours, "forward", without_loss)
    assert run("ViT", NONE, "test_training").way == FAILED


def test_every_family_is_tested():
    assert set(CONFIGS) == set(FAMILIES)


def test_the_table_names_what_there_is():
    known = {family: set(names_of_tests(family)) for family in families()}
    for name, difference in DIFFERENCES.items():
        assert set(difference.families) <= set(CONFIGS) and set(difference.variants) <= set(OURS)
        assert all(name in known[family] for family in difference.families if family in known), name
