"""The drop-in line, tried in three callers shaped as public projects use the refinement.

Every caller gets the module as an argument. It runs once with what those projects have (pad, shift by convolution,
concatenate, multiply, sum) and once with ours, everything else the same, and the labels must not differ.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measuring.baselines import materialising
from dmsa_kernels import PAMR, PAR, local_affinity, propagate

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


def test_a_wrong_preset_would_be_noticed():
    """The callers above are sensitive: the other family, or the other direction of resizing, changes labels."""
    reference = per_image_pseudo_labels(PAR(num_iter=10, dilations=DILATIONS), *afa_inputs())
    other = per_image_pseudo_labels(PAMR(num_iter=10, dilations=DILATIONS), *afa_inputs())
    assert (reference != other).float().mean() > 0.005
