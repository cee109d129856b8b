"""The losses against TransFGU's golden arrays, and where they degenerate."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dmsa.config import LossConfig
from dmsa.labels.fuse import fuse, negative_label, normalize_cam
from dmsa.models.schedule import negative_weight
from dmsa.training import losses

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "transfgu_losses.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@pytest.mark.parametrize("with_teacher", [False, True])
def test_things_labels_and_losses_equal_golden(golden, with_teacher):
    teacher = golden["things_teacher_logits"] if with_teacher else None
    scores = fuse(golden["cam"], teacher, things_only=True)
    label, logits = scores.argmax(1), golden["things_logits"]
    negative, alpha = None, 0.0
    if with_teacher:
        negative = negative_label(scores, golden["things_negative_permutation"])
        alpha = negative_weight(int(golden["things_epoch"]))
    loss = losses.bootstrapping_loss(logits, label, negative, alpha, reduction="none")
    suffix = "" if with_teacher else "_no_teacher"
    assert torch.equal(label, golden[f"things_label{suffix}"])
    torch.testing.assert_close(loss, golden[f"things_ce{suffix}"], atol=1e-6, rtol=1e-6)
    mean = losses.bootstrapping_loss(logits, label, negative, alpha)
    torch.testing.assert_close(mean, golden[f"things_ce{suffix}"].mean(), atol=1e-6, rtol=1e-6)


def test_things_uncertainty_equals_golden(golden):
    foreground = (normalize_cam(golden["cam"]) > 0.1).any(1)
    loss = losses.uncertainty_loss(golden["things_logits"], things_only=True, foreground=foreground)
    torch.testing.assert_close(loss, golden["things_uncertainty"], atol=1e-6, rtol=1e-6)


def test_stuff_labels_and_losses_equal_golden(golden):
    scores = fuse(golden["cam"], golden["stuff_teacher_logits"], things_only=False)
    negative = negative_label(scores, golden["stuff_negative_permutation"])
    alpha = negative_weight(int(golden["stuff_epoch"]))
    loss = losses.bootstrapping_loss(golden["stuff_logits"], scores.argmax(1), negative, alpha, reduction="none")
    assert torch.equal(scores.argmax(1), golden["stuff_label"])
    torch.testing.assert_close(loss, golden["stuff_ce"], atol=1e-6, rtol=1e-6)
    uncertainty = losses.uncertainty_loss(golden["stuff_logits"], reduction="none")
    torch.testing.assert_close(uncertainty, golden["stuff_uncertainty"], atol=1e-6, rtol=1e-6)


def test_class_embedding_equals_golden(golden):
    pairs = losses.class_embedding_loss(golden["class_embeddings"], reduction="none")
    torch.testing.assert_close(pairs, golden["diversity"], atol=1e-6, rtol=1e-6)
    mean = losses.class_embedding_loss(golden["class_embeddings"])
    torch.testing.assert_close(mean, golden["diversity"].mean(), atol=1e-6, rtol=1e-6)


def test_segmentation_weighs_both_halves_alike():
    logits = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    label = torch.zeros(1, 4, 4, dtype=torch.long)
    label[0, 0, :2] = torch.tensor([1, 2])
    label[0, 3, 3] = losses.IGNORE
    by_hand = F.cross_entropy(logits, label, reduction="none", ignore_index=losses.IGNORE)
    expected = 0.5 * by_hand[label == 0].mean() + 0.5 * by_hand[(label == 1) | (label == 2)].mean()
    torch.testing.assert_close(losses.segmentation_loss(logits, label), expected)
    stuff = label == 2
    things = (label == 0) | (label == 1)
    expected = 0.5 * by_hand[stuff].mean() + 0.5 * by_hand[things].mean()
    torch.testing.assert_close(losses.segmentation_loss(logits, label, False, n_things=2), expected)


@pytest.mark.parametrize("value", [0, 2, losses.IGNORE])
@pytest.mark.parametrize("things_only", [True, False])
@pytest.mark.parametrize("classes", [2, 3])
def test_losses_and_gradients_stay_finite_when_a_half_is_empty(value, things_only, classes):
    logits = torch.randn(2, classes, 3, 3, requires_grad=True)
    tokens = F.normalize(torch.randn(2, classes, 8), dim=-1).requires_grad_()
    label = torch.full((2, 3, 3), min(value, classes - 1) if value != losses.IGNORE else value)
    none = torch.zeros(2, 3, 3, dtype=torch.bool)
    terms = losses.total_loss(
        {"logits": logits, "class_tokens": tokens},
        label,
        none,
        LossConfig(),
        things_only=things_only,
        n_things=1,
        negative=torch.zeros_like(label),
        alpha=0.1,
    )
    assert all(math.isfinite(term.detach()) for term in terms.values())
    terms["total"].backward()
    assert logits.grad.isfinite().all()
    assert tokens.grad.isfinite().all()
    if value == losses.IGNORE:
        assert float(terms["ce"].detach()) == float(terms["seg"].detach()) == 0.0


def test_one_class_has_no_uncertainty_and_no_pairs():
    assert float(losses.uncertainty_loss(torch.randn(1, 2, 3, 3), things_only=True)) == 0.0
    assert float(losses.class_embedding_loss(torch.randn(2, 1, 8))) == 0.0


def test_total_is_the_weighted_sum_and_enlarges_coarse_logits():
    torch.manual_seed(0)
    output = {"logits": torch.randn(2, 4, 3, 3), "class_tokens": torch.randn(2, 4, 8)}
    label = torch.randint(0, 4, (2, 6, 6))
    weights = LossConfig(seg=0.5, ce=2.0, un=0.25, cls=3.0)
    terms = losses.total_loss(output, label, torch.ones(2, 6, 6).bool(), weights, things_only=True, n_things=3)
    total = 0.5 * terms["seg"] + 2.0 * terms["ce"] + 0.25 * terms["un"] + 3.0 * terms["cls"]
    torch.testing.assert_close(terms["total"], total)
    larger = F.interpolate(output["logits"], (6, 6), mode="bilinear")
    torch.testing.assert_close(terms["ce"], F.cross_entropy(larger, label))


def test_half_precision_logits_are_widened():
    output = {"logits": torch.randn(1, 3, 4, 4).bfloat16(), "class_tokens": torch.randn(1, 3, 8).bfloat16()}
    label = torch.randint(0, 3, (1, 4, 4))
    terms = losses.total_loss(output, label, None, LossConfig(), things_only=False, n_things=2)
    assert terms["total"].dtype == torch.float32


def test_bad_arguments_are_named():
    logits = torch.randn(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"label\.shape"):
        losses.bootstrapping_loss(logits, torch.zeros(1, 3, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="n_things"):
        losses.segmentation_loss(logits, torch.zeros(1, 4, 4, dtype=torch.long), things_only=False)
    with pytest.raises(ValueError, match="reduction"):
        losses.uncertainty_loss(logits, reduction="sum")
