"""Gradients of what a student learns from a teacher, against their equations."""

import copy
import random

import pytest
import tiny
import torch
from test_token_prune_trainer import SANDWICH, TEXT, TOP_K, native_model, rows_of, trainer_for

from hf_tokenprune import prune
from hf_tokenprune.modeling.token_outputs import EncoderCall
from hf_tokenprune.training.distillation import difference_to_teacher, kept_token_mse


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("tokens", [False, True])
def test_kl(tokens):
    student, teacher = (drawn(*((2, 4, 3) if tokens else (5, 3)), seed=seed) for seed in (0, 1))
    counted = torch.tensor([[True] * 4, [True, True, False, False]]) if tokens else None
    difference_to_teacher(student, teacher, 3.0, counted).backward()
    with torch.no_grad():
        expected = 3.0 * ((student / 3).softmax(-1) - (teacher / 3).softmax(-1))
        expected = expected * counted[..., None] / 6 if tokens else expected / 5
    torch.testing.assert_close(student.grad, expected)
    assert teacher.grad is None


def test_what_is_no_choice_of_one_class():
    """Labels each by itself, and numbers: a softmax over them would see no difference, or another one."""
    student, teacher = (drawn(5, 3, seed=seed) for seed in (0, 1))
    difference_to_teacher(student, teacher, 2.0, problem="multi_label_classification").backward()
    with torch.no_grad():
        torch.testing.assert_close(student.grad, 2.0 * ((student / 2).sigmoid() - (teacher / 2).sigmoid()) / 5)
    student, teacher = (drawn(5, 1, seed=seed) for seed in (0, 1))
    difference_to_teacher(student, teacher, 2.0, problem="regression").backward()
    torch.testing.assert_close(student.grad, 2 * (student - teacher).detach() / 5)
    assert teacher.grad is None


@pytest.mark.parametrize("labels", [1, 3])
def test_heads_of_numbers_and_of_several_labels_learn_from_a_teacher(labels, tmp_path):
    """The smallest of a sandwich, an in-place pupil and a student: each loss has what the logits differ by."""
    config = copy.deepcopy(TEXT.config)
    config.num_labels, config.problem_type = labels, "regression" if labels == 1 else "multi_label_classification"
    rows = [{**row, "labels": torch.ones(labels)} for row in rows_of()]
    native = [tiny.build(tiny.Case(TEXT.native, config), seed=seed) for seed in (0, 3)]
    trainer = trainer_for(prune(native[0], TOP_K), tmp_path, rows=rows, teacher=native[1], distillation_weight=1.0)
    trainer.model.eval()  # no dropout
    inputs = {name: torch.stack([row[name] for row in rows[:5]]) for name in rows[0]}
    trainer.model.training = True
    loss = trainer.compute_loss(trainer.model, dict(inputs)).detach()
    with torch.no_grad():
        trainer.model.training = False
        output, wanted = trainer.model(**inputs), trainer.teacher(**inputs).logits
        if labels == 1:
            difference = (output.logits - wanted).square().mean()
        else:
            given, wanted = (output.logits / 2).sigmoid(), (wanted / 2).sigmoid()
            each = wanted * (wanted / given).log() + (1 - wanted) * ((1 - wanted) / (1 - given)).log()
            difference = 4 * each.sum(-1).mean()
    assert difference > 1e-4
    torch.testing.assert_close(loss, output.loss + difference)


def test_mse_of_kept_tokens():
    call, model = EncoderCall(trace=True), prune(native_model(), TOP_K)
    with torch.no_grad():
        model(**tiny_inputs(), encoder_call=call)
    student, teacher = (drawn(2, 13, 4, seed=seed) for seed in (0, 1))
    kept_token_mse(student, teacher, call.end).backward()
    kept = call.end.carrier >= 0
    assert 0 < kept.sum() < 19
    with torch.no_grad():
        expected = 2 * (student - teacher) * kept[..., None] / (4 * kept.sum())
    torch.testing.assert_close(student.grad, expected)
    assert teacher.grad is None


def tiny_inputs() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": torch.arange(1, 27).view(2, 13) * mask, "attention_mask": mask}


@pytest.mark.parametrize("how", ["in_place", "sandwich"])
def test_the_unpruned_model_learns_from_labels_alone(how, tmp_path):
    pruning = TOP_K if how == "in_place" else SANDWICH
    own = {"in_place_distillation": True} if how == "in_place" else {"sandwich_samples": 1}
    trainer = trainer_for(pruning, tmp_path, distillation_temperature=2.0, **own)
    model = trainer.model.train()
    inputs = {name: torch.stack([row[name] for row in rows_of()[:5]]) for name in rows_of()[0]}
    trainer.compute_loss(model, dict(inputs)).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()
    start = model.config.pruning
    chance = random.Random(f"{trainer.args.seed}/0").uniform(0.5, 0.9)
    pupils = [start] if how == "in_place" else [start.at_budget(macs, 64) for macs in (0.5, chance)]
    model.set_pruning(None)
    whole = model(**inputs)
    whole.loss.backward()
    wanted = (whole.logits.detach() / 2).softmax(-1)
    for pupil in pupils:
        model.set_pruning(pupil)
        given = (model(**inputs).logits / 2).softmax(-1)
        (4 * (wanted * (wanted / given).log()).sum(-1).mean()).backward()
    scale = max(gradient.abs().max().item() for gradient in found.values())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("weights", [{"distillation_weight": 1.0}, {"token_distillation_weight": 1.0}])
def test_flattened_batches_teach_as_padded_ones_do(weights, tmp_path):
    """Also from a native teacher, which natively takes the row for one text."""
    padded, texts = tiny_inputs(), [slice(0, 13), slice(0, 6)]
    ends = torch.tensor([0, 13, 19])
    flat = {"input_ids": torch.cat([ids[text] for ids, text in zip(padded["input_ids"], texts)])[None]}
    flat |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "labels": torch.tensor([0, 1])}
    trainer = trainer_for(TOP_K, tmp_path, teacher=native_model(), **weights)
    model = trainer.model.eval()
    wanted = trainer.compute_loss(model, padded | {"labels": torch.tensor([0, 1])})
    torch.testing.assert_close(trainer.compute_loss(model, dict(flat)), wanted, rtol=1e-5, atol=1e-5)


def test_a_teacher_of_another_order_is_refused(tmp_path):
    teacher = native_model()
    teacher.config.id2label = {0: "LABEL_1", 1: "LABEL_0", 2: "LABEL_2"}
    with pytest.raises(ValueError, match=r"the teacher's labels \(\['LABEL_1', .*\) must be in the student's order"):
        trainer_for(TOP_K, tmp_path, teacher=teacher, distillation_weight=1.0)
