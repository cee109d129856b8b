"""The drop-in line, tried in five callers shaped as public projects use the refinement.

Every caller gets the module as an argument. It runs once with what those projects have (pad, shift by convolution,
concatenate, multiply, sum) and once with ours, everything else the same, and the labels must not differ.
"""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measuring.baselines import materialising
from dmsa_kernels import PAMR, PAR, AffinitySpec, LocalConsistencyModule, local_affinity, propagate
from dmsa_kernels.refine import refine

DILATIONS = [1, 2, 4, 8, 12, 24]
IGNORE = 255


class Pasted(nn.Module):
    """The module that the replaced line would import: resizes one of the two, then the plain computation."""

    def __init__(self, spec: str, dilations: list[int], num_iter: int, resize: str):
        super().__init__()
        self.spec, self.dilations, self.num_iter, self.resize = spec, dilations, num_iter, resize

    def forward(self, image: Tensor, masks: Tensor) -> Tensor:
        if self.resize == "masks":
            masks = F.interpolate(masks, image.shape[-2:], mode="bilinear", align_corners=True)
        else:
            image = F.interpolate(image, masks.shape[-2:], mode="bilinear", align_corners=True)
        return materialising(image, masks, self.dilations, self.num_iter, self.spec)


def photographs(count: int, height: int, width: int, seed: int) -> Tensor:
    """Blobs of flat colour with a little noise, normalised as for ImageNet, and one border of constant padding."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 6, generator=generator)
    images = F.interpolate(coarse, (height, width), mode="nearest")
    images = images + 0.02 * torch.randn(images.shape, generator=generator)
    images[..., : width // 8] = images.mean()
    return (images - 0.45) / 0.226


def maps(batch: int, classes: int, size: tuple[int, int], seed: int) -> Tensor:
    """Class activation maps in [0, 1], smooth."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.rand(batch, classes, size[0] // 4, size[1] // 4, generator=generator)
    return F.interpolate(rough, size, mode="bicubic").clamp(0, 1)


# --- AFA: a loop over the images, their classes from nonzero, a high and a low background score ----------------------


def per_image_pseudo_labels(
    refinement: nn.Module, images: Tensor, cams: Tensor, image_labels: Tensor, low: float = 0.35, high: float = 0.55
) -> Tensor:
    """Labels [B, H, W]: 0 where even the low background score wins, ignored where the two disagree, else class + 1."""
    batch, _, height, width = images.shape
    small = F.interpolate(images, (height // 2, width // 2), mode="bilinear", align_corners=False)
    labels = torch.full((batch, height, width), IGNORE)
    for i in range(batch):
        present = torch.nonzero(image_labels[i])[:, 0]
        ids = torch.cat([present.new_zeros(1), present + 1])
        winners = []
        for score in (high, low):
            background = cams.new_full((1, 1, *cams.shape[2:]), score)
            stack = torch.cat([background, cams[[i]][:, present]], 1).softmax(1)
            refined = refinement(small[[i]], stack)
            refined = F.interpolate(refined, (height, width), mode="bilinear", align_corners=False)
            winners.append(ids[refined.argmax(1)[0]])
        by_high, by_low = winners
        labels[i] = by_high
        labels[i][by_high == 0] = IGNORE
        labels[i][(by_high == 0) & (by_low == 0)] = 0
    return labels


AFA_LABELS = torch.tensor([[1, 0, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])


def afa_inputs() -> tuple[Tensor, Tensor, Tensor]:
    return photographs(3, 80, 96, seed=1), maps(3, 6, (40, 48), seed=2), AFA_LABELS


def test_afa_loop():
    before = per_image_pseudo_labels(Pasted("par", DILATIONS, 10, "masks"), *afa_inputs())
    after = per_image_pseudo_labels(PAR(num_iter=10, dilations=DILATIONS), *afa_inputs())
    assert torch.equal(before, after)
    assert {0, 1, IGNORE} <= set(before.unique().tolist())  # all three outcomes occur


def test_afa_without_the_loop():
    """What docs/refine.md offers instead: all images at once, one affinity for both scores, valid_classes."""
    images, cams, image_labels = afa_inputs()
    height, width = images.shape[2:]
    small = F.interpolate(images, (height // 2, width // 2), mode="bilinear", align_corners=False)
    valid = F.pad(image_labels > 0, (1, 0), value=True)  # the background is always there
    affinity = local_affinity(small, DILATIONS)
    winners = []
    for score in (0.55, 0.35):
        stack = torch.cat([cams.new_full((len(cams), 1, *cams.shape[2:]), score), cams], 1)
        stack = stack.masked_fill(~valid[:, :, None, None], -torch.inf).softmax(1)
        refined = propagate(affinity, stack, 10, valid_classes=valid)
        refined = F.interpolate(refined, (height, width), mode="bilinear", align_corners=False)
        winners.append(refined.masked_fill(~valid[:, :, None, None], -1).argmax(1))
    by_high, by_low = winners
    labels = by_high.masked_fill(by_high == 0, IGNORE).masked_fill((by_high == 0) & (by_low == 0), 0)
    expected = per_image_pseudo_labels(Pasted("par", DILATIONS, 10, "masks"), images, cams, image_labels)
    assert torch.equal(labels, expected)


# --- WeCLIP: the image comes to the size of the map, 20 iterations, no gradient --------------------------------------


def refine_at_map_size(refinement: nn.Module, images: Tensor, scores: list[Tensor]) -> list[Tensor]:
    """One label map [h, w] an image; `scores` holds a [C_i, h, w] an image, background first."""
    with torch.no_grad():
        return [refinement(image[None], score[None]).argmax(1)[0] for image, score in zip(images, scores, strict=True)]


def test_weclip_image_to_mask():
    images = photographs(2, 96, 112, seed=3)
    scores = [maps(1, 2, (60, 72), seed=4)[0].requires_grad_(), maps(1, 5, (48, 56), seed=5)[0].requires_grad_()]
    before = refine_at_map_size(Pasted("par", DILATIONS, 20, "image"), images, scores)
    after = refine_at_map_size(PAR(num_iter=20, dilations=DILATIONS, resize="image"), images, scores)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert [tuple(label.shape) for label in after] == [(60, 72), (48, 56)]


# --- NACLIP: half-precision logits of many prompts, enlarged to the photograph's own size ----------------------------


def open_vocabulary_labels(
    refinement: nn.Module, image: Tensor, logits: Tensor, prompt_class: Tensor, threshold: float
) -> Tensor:
    """Labels [H, W]; `logits` [1, Q, h, w] in half precision, several prompts a class, unsure pixels go to class 0."""
    enlarged = F.interpolate(logits.float(), image.shape[-2:], mode="bilinear").to(logits.dtype)
    refined = refinement(image, enlarged).to(logits.dtype)
    probability = (refined[0].float() * 40).softmax(0)  # [Q, H, W]
    per_class = torch.stack([probability[prompt_class == c].amax(0) for c in range(int(prompt_class.max()) + 1)])
    best, label = per_class.max(0)
    return label.masked_fill(best < threshold, 0)


class PastedForHalf(Pasted):
    """Pasted code has to leave half precision before the call, or its epsilon rounds to zero."""

    def forward(self, image: Tensor, masks: Tensor) -> Tensor:
        return super().forward(image, masks.to(image.dtype))


@pytest.mark.parametrize("size", [(75, 100), (64, 97)])
def test_naclip_half_logits(size):
    image = photographs(1, *size, seed=6)
    logits = (0.2 * maps(1, 14, (16, 20), seed=7)).half()
    prompt_class = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 3, 4, 5, 5, 5, 6])
    before = open_vocabulary_labels(PastedForHalf("pamr", [8, 16], 10, "masks"), image, logits, prompt_class, 0.12)
    after = open_vocabulary_labels(PAMR(num_iter=10, dilations=[8, 16]), image, logits, prompt_class, 0.12)
    assert torch.equal(before, after)
    assert len(after.unique()) > 3


def test_half_logits_give_float32_like_the_replaced_code():
    image, logits = photographs(1, 40, 50, seed=6), maps(1, 5, (16, 20), seed=7).half()
    before = PastedForHalf("pamr", [8, 16], 10, "masks")(image, logits)
    after = PAMR(num_iter=10, dilations=[8, 16])(image, logits)
    assert after.dtype == before.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert PAR([1, 2], 3)(image, logits.bfloat16()).dtype == torch.float32


# --- Talk2DINO, FreeDA: many classes, thirty at a time for memory ----------------------------------------------------


def thirty_classes_at_a_time(refinement: nn.Module, image: Tensor, masks: Tensor) -> Tensor:
    """Labels [H, W] of masks [1, C, h, w]."""
    with torch.no_grad():
        parts = [refinement(image, masks[:, first : first + 30]) for first in range(0, masks.shape[1], 30)]
    return torch.cat(parts, 1)[0].argmax(0)


def test_talk2dino_chunks_of_classes():
    image, masks = photographs(1, 48, 56, seed=8), maps(1, 70, (24, 28), seed=9)
    before = thirty_classes_at_a_time(Pasted("pamr", [8, 16], 10, "masks"), image, masks)
    ours = PAMR(num_iter=10, dilations=[8, 16])
    assert torch.equal(thirty_classes_at_a_time(ours, image, masks), before)
    labels, _ = ours(image, masks, return_labels=True)  # what docs/dropin.md offers instead of the loop
    assert torch.equal(labels[0], before)
    assert len(before.unique()) > 30


# --- Box2Mask, 1-stage-wseg: a loss between masks and refined masks, gradients through all iterations ----------------


def consistency_loss(refinement: nn.Module, image: Tensor, masks: Tensor, boxes: Tensor) -> Tensor:
    """Mean absolute change of the masks inside the boxes."""
    return ((refinement(image, masks) - masks).abs() * boxes).sum() / boxes.sum().clamp(min=1)


@pytest.mark.parametrize("dilations", [[2], [1, 4]])
def test_box2mask_gradients_through_the_masks(dilations):
    image, masks = photographs(3, 40, 48, seed=10), maps(3, 1, (40, 48), seed=11)
    boxes = torch.zeros(3, 1, 40, 48)
    boxes[:, :, 8:30, 5:40] = 1
    results = []
    for refinement in (Pasted("lcm", dilations, 10, "masks"), LocalConsistencyModule(num_iter=10, dilations=dilations)):
        leaf = masks.clone().requires_grad_()
        loss = consistency_loss(refinement, image, leaf, boxes)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    (loss, grad), (our_loss, our_grad) = results
    assert torch.allclose(our_loss, loss, rtol=1e-5)
    assert (our_grad - grad).norm() <= 1e-5 * grad.norm()
    assert grad.norm() > 1e-3


# --- what else those projects read, set, call and override -----------------------------------------------------------


def test_a_wrong_preset_would_be_noticed():
    """The callers above are sensitive: the other family, or the other direction of resizing, changes labels."""
    reference = per_image_pseudo_labels(PAR(num_iter=10, dilations=DILATIONS), *afa_inputs())
    other = per_image_pseudo_labels(PAMR(num_iter=10, dilations=DILATIONS), *afa_inputs())
    assert (reference != other).float().mean() > 0.005


X = photographs(2, 9, 8, seed=12)
MASKS = maps(2, 3, (8, 8), seed=13)


def shifted(x: Tensor, dilations: list[int]) -> Tensor:
    """[B, C, P, H, W] by padding and slicing."""
    places = [(i, j) for i in (0, 1, 2) for j in (0, 1, 2) if (i, j) != (1, 1)]
    height, width = x.shape[2:]
    out = []
    for d in dilations:
        padded = F.pad(x, [d] * 4, mode="replicate")
        out += [padded[..., i * d : i * d + height, j * d : j * d + width] for i, j in places]
    return torch.stack(out, 2)


def test_neighbours_and_submodules():
    near = shifted(X, [1, 3])
    assert torch.equal(PAR([1, 3], 1).get_dilated_neighbors(X), near)
    assert torch.equal(LocalConsistencyModule([1, 3], 1).get_dilated_neighbors(X), near)
    pamr = PAMR(1, [1, 3])
    assert torch.equal(pamr.aff_m(X), near)
    assert torch.equal(pamr.aff_x(X), (near - X[:, :, None]).abs())
    deviation = torch.cat([near, X[:, :, None], X[:, :, None]], 2).std(2, keepdim=True)
    assert torch.allclose(pamr.aff_std(X), deviation)
    for module in (pamr.aff_x, pamr.aff_m, pamr.aff_std):
        assert module.dilations == [1, 3]
        assert torch.equal(module.weight_check, module.kernel)


def test_dilations_of_the_submodules_count():
    pamr = PAMR(2, [1])
    pamr.aff_x.dilations = [3]
    with pytest.raises(ValueError, match=r"aff_x.dilations=\[3\], aff_m.dilations=\[1\]"):
        pamr(X, MASKS)
    pamr.aff_m.dilations = pamr.aff_std.dilations = [3]
    assert torch.equal(pamr(X, MASKS), refine(X, MASKS, [3], 2, spec="pamr"))
    pamr.dilations = [2]
    assert pamr.aff_std.dilations == [2]
    assert torch.equal(pamr(X, MASKS), refine(X, MASKS, [2], 2, spec="pamr"))


def test_constants_of_other_kinds():
    par = PAR([1, 2], 2)
    expected = refine(X, MASKS, [1, 2], 2, spec=AffinitySpec(alpha=0.5, eps=0.5e-8, position_weight=0.25))
    for kind in (float, np.float64, np.float32, torch.tensor, lambda v: nn.Parameter(torch.tensor([v]), False)):
        par.w1, par.w2 = kind(0.5), kind(0.25)
        assert torch.equal(par(X, MASKS), expected)
    par = PAR([1, 2], 2)
    par.w1 = nn.Parameter(torch.tensor(0.5))
    with pytest.raises(TypeError, match="w1 requires a gradient, but constants have none here"):
        par(X, MASKS)
    with torch.no_grad():
        par(X, MASKS)
    lcm = LocalConsistencyModule([1, 2], 2, resize="masks")
    lcm.alpha = torch.tensor(0.5)
    spec = AffinitySpec(alpha=0.5, eps=0.5e-8, position_weight=0.0)
    assert torch.equal(lcm(X, MASKS), refine(X, MASKS, [1, 2], 2, spec=spec))


def test_eps_and_spec_of_the_modules():
    """ClusterCAM adds 1e-5 to the deviation; RML's PAMR is PAR without the distance term."""
    spec = AffinitySpec(eps=0.3 * 1e-5)
    assert torch.equal(PAR([1, 2], 2, eps=1e-5)(X, MASKS), refine(X, MASKS, [1, 2], 2, spec=spec))
    assert torch.equal(PAR([1, 2], 2, spec="lcm")(X, MASKS), refine(X, MASKS, [1, 2], 2, spec="lcm"))
    other = AffinitySpec(exponent=1, alpha=0.2, sigma="centre_once", eps=1e-6, position_weight=0.0)
    for module in (PAR([1, 2], 2, spec=other), PAMR(2, [1, 2], spec=other)):
        assert torch.allclose(module(X, MASKS), refine(X, MASKS, [1, 2], 2, spec=other), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="eps=0 must be positive"):
        PAR([1], 1, eps=0)


def test_positions_can_be_set_to_what_they_are():
    par = PAR([1, 2], 2)
    expected = par(X, MASKS)
    par.pos = par.get_pos().double()
    assert torch.equal(par(X, MASKS), expected)
    par.pos = 2 * par.pos
    with pytest.raises(ValueError, match=r"are not the distances of dilations=.*AffinitySpec\(position_weight=0.0"):
        par(X, MASKS)


def test_no_override_is_ignored():
    class OtherNeighbours(PAR):
        def get_dilated_neighbors(self, x):
            return super().get_dilated_neighbors(x) * 2

    class OtherPositions(PAR):
        def get_pos(self):
            return super().get_pos() * 2

    class Own(OtherNeighbours):
        def forward(self, imgs, masks):
            return self.get_dilated_neighbors(masks).mean(2)

    with pytest.raises(TypeError, match="OtherNeighbours overrides get_dilated_neighbors"):
        OtherNeighbours([1], 1)(X, MASKS)
    with pytest.raises(ValueError, match="are not the distances"):
        OtherPositions([1], 1)(X, MASKS)
    assert Own([1], 1)(X, MASKS).shape == MASKS.shape
    par = PAR([1], 1)
    par.get_dilated_neighbors = lambda x: x
    with pytest.raises(TypeError, match="overrides get_dilated_neighbors"):
        par(X, MASKS)
    pamr = PAMR(1, [1])
    pamr.aff_m = nn.Identity()
    pamr.aff_m.dilations = [1]
    with pytest.raises(TypeError, match="aff_m was replaced"):
        pamr(X, MASKS)


def test_other_kernels_do_not_load():
    state = PAR([1], 1).state_dict()
    state["kernel"] = state["kernel"].flip(0)
    with pytest.raises(RuntimeError, match="kernel holds other filters than the shifts"):
        PAR([1], 1).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({}, "num_iter=1 and dilations=[1]"), ({"num_iter": 10}, "dilations=[1]"), ({"dilations": [8, 16]}, "num_iter=1")],
    ids=str,
)
def test_defaults_that_differ_between_copies_are_told(arguments, said):
    with pytest.warns(UserWarning, match=re.escape(f"PAMR() takes {said}, the defaults of 1-stage-wseg")):
        pamr = PAMR(**arguments)
    assert (pamr.num_iter, pamr.dilations) == (arguments.get("num_iter", 1), arguments.get("dilations", [1]))


def test_arguments_that_are_written_down_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PAMR(num_iter=1, dilations=[1])
        PAMR(1, (1,))
