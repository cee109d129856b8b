"""From a decoded image and its label to a sample: squash, crop, flip, colour; the same geometry for all three.

A training sample holds the jittered crop (`image`), the same crop without jitter (`guide`, what PAR looks at) and
the label, resampled with one box. Every random number comes from a generator seeded by (seed, epoch, index): the
sequence of samples does not depend on how many workers draw it, or in which order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from dmsa.config import DataConfig
from dmsa.data.images import as_rgb

MEAN = (0.485, 0.456, 0.406)
"""Per-channel mean of ImageNet in [0, 1], what DINO was trained with."""
STD = (0.229, 0.224, 0.225)
"""Per-channel standard deviation of ImageNet in [0, 1]."""
IGNORE = 255

JITTER_PROBABILITY = 0.3
JITTER_STRENGTH = (0.8, 0.8, 0.8, 0.2)  # brightness, contrast, saturation, hue
GREY_PROBABILITY = 0.2
BLUR_PROBABILITY = 0.2
BLUR_SIGMA = (0.1, 2.0)  # pixels of the crop

_SCALE = (1 / (255 * torch.tensor(STD))).view(3, 1, 1)
_SHIFT = (-torch.tensor(MEAN) / torch.tensor(STD)).view(3, 1, 1)

Box = tuple[float, float, float, float]


def normalise(pixels: Tensor) -> Tensor:
    """Return `(pixels / 255 - MEAN) / STD`.

    Args:
        pixels: `[..., 3, H, W]`, values 0..255, any dtype.

    Returns:
        Tensor of the same shape, float32.
    """
    return torch.addcmul(_SHIFT, pixels.float(), _SCALE)


def denormalise(images: Tensor) -> Tensor:
    """Invert :func:`normalise` up to the factor 255: `[..., 3, H, W]` back to [0, 1], clipped."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
    return (images * std + mean).clamp(0, 1)


def as_image(image: Image.Image | np.ndarray) -> Image.Image:
    """Return `image` as an upright RGB Pillow image; an array is `[H, W, 3]` uint8. Opened files are decoded here."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"expected a uint8 image [H, W, 3], got {image.shape=} {image.dtype=}")
        return Image.fromarray(image)
    return as_rgb(image)


def resample(image: Image.Image, size: tuple[int, int], box: Box | None = None) -> Image.Image:
    """Cut `box` = (left, top, right, bottom), in pixels, out of `image` and bring it to `size` = (H, W), bilinear."""
    return image.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)


def resample_label(label: np.ndarray, size: tuple[int, int], box: Box | None = None) -> np.ndarray:
    """Do what :func:`resample` does, to labels `[H, W]`: every output pixel takes the label at its centre."""
    height, width = label.shape
    left, top, right, bottom = box or (0, 0, width, height)
    rows = np.floor(top + (np.arange(size[0]) + 0.5) * ((bottom - top) / size[0])).astype(np.intp)
    columns = np.floor(left + (np.arange(size[1]) + 0.5) * ((right - left) / size[1])).astype(np.intp)
    # Whole rows first, then columns: four times faster than both indices at once.
    return label[np.clip(rows, 0, height - 1)].take(np.clip(columns, 0, width - 1), axis=1)


def to_tensor(image: Image.Image) -> Tensor:
    """Return the pixels of an RGB image as uint8 `[3, H, W]`, contiguous."""
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())


def label_tensor(label: np.ndarray | None, size: tuple[int, int]) -> Tensor:
    """Return `label` `[H, W]` as int64, or `size` = (H, W) of 255 where there is none."""
    if label is None:
        return torch.full(size, IGNORE, dtype=torch.int64)
    return torch.from_numpy(label.astype(np.int64))


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Return the generator of sample `index` in `epoch`; the three numbers are non-negative."""
    return np.random.default_rng((seed, epoch, index))


@dataclass(frozen=True)
class Augmentation:
    """What one call of :class:`TrainTransform` does; all of it is drawn before a pixel is touched."""

    left: float
    """Left edge of the crop as a fraction of the width."""
    top: float
    """Upper edge of the crop as a fraction of the height."""
    side: float
    """Side of the crop as a fraction of the squashed image's side; its square is the area."""
    flip: bool
    jitter: tuple[float, float, float, float] | None
    """Factors of brightness, contrast and saturation, and hue shift in turns; `None`: no colour jitter."""
    jitter_order: tuple[int, ...]
    grey: bool
    blur: float | None
    """Sigma in pixels of the crop; `None`: no blur."""

    @staticmethod
    def draw(rng: np.random.Generator, scale: tuple[float, float]) -> Augmentation:
        """Draw one; `scale` is the range of the crop's area."""
        u = rng.random(12).tolist()
        side = math.sqrt(scale[0] + (scale[1] - scale[0]) * u[0])
        factors = [1 - s + 2 * s * v for s, v in zip(JITTER_STRENGTH[:3], u[5:8], strict=True)]
        hue = JITTER_STRENGTH[3] * (2 * u[8] - 1)
        return Augmentation(
            left=u[1] * (1 - side),
            top=u[2] * (1 - side),
            side=side,
            flip=bool(u[3] < 0.5),
            jitter=(*factors, hue) if u[4] < JITTER_PROBABILITY else None,
            jitter_order=tuple(rng.permutation(4).tolist()),
            grey=bool(u[9] < GREY_PROBABILITY),
            blur=BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * u[11] if u[10] < BLUR_PROBABILITY else None,
        )


def shift_hue(image: Image.Image, turns: float) -> Image.Image:
    """Rotate the hue of an RGB image by `turns` of the colour circle (-0.5..0.5)."""
    hue, saturation, value = image.convert("HSV").split()
    table = [(v + round(turns * 255)) % 256 for v in range(256)]
    return Image.merge("HSV", (hue.point(table), saturation, value)).convert("RGB")


def recolour(image: Image.Image, augmentation: Augmentation) -> Image.Image:
    """Apply the colour part of `augmentation` to an RGB image: jitter, grey, blur."""
    if augmentation.jitter is not None:
        steps = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for i in augmentation.jitter_order:
            amount = augmentation.jitter[i]
            image = steps[i](image).enhance(amount) if i < 3 else shift_hue(image, amount)
    if augmentation.grey:
        image = image.convert("L").convert("RGB")
    if augmentation.blur is not None:
        image = image.filter(ImageFilter.GaussianBlur(augmentation.blur))
    return image


class TrainTransform:
    """Random crop of the squashed image, flip and colour, for image, clean guide and label.

    The image is thought of as squashed to `size` x `size`; a square of `crop_scale` of its area goes to
    `crop` x `crop`. Both steps are one resampling of the original pixels. JPEG files that were opened but not
    decoded are decoded at the smallest DCT scale that still has `crop` pixels across the box.

    Args:
        config: `size`, `crop` and `crop_scale` are used.
        seed: first part of the seed of every sample, >= 0.

    Raises:
        ValueError: `crop_scale` is not an increasing pair in (0, 1], or `crop` is not positive.
    """

    def __init__(self, config: DataConfig, seed: int = 0) -> None:
        low, high = config.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"expected 0 < low <= high <= 1, got {config.crop_scale=}")
        if config.crop < 1:
            raise ValueError(f"expected a positive number of pixels, got {config.crop=}")
        if seed < 0:
            raise ValueError(f"expected a seed >= 0, got {seed=}")
        self.crop = config.crop
        self.scale = (low, high)
        self.seed = seed

    def __call__(
        self, image: Image.Image | np.ndarray, label: np.ndarray | None, *, index: int, epoch: int = 0
    ) -> dict[str, Tensor]:
        """Return `image`, `guide` (float32 `[3, S, S]`) and `label` (int64 `[S, S]`), S = `crop`.

        Args:
            image: RGB image, opened or decoded, or uint8 `[H, W, 3]`.
            label: uint8 `[H, W]`, 255 = ignore, or `None` for a label of 255.
            index: position of the sample in the data set.
            epoch: number of the epoch.
        """
        augmentation = Augmentation.draw(sample_rng(self.seed, epoch, index), self.scale)
        size = (self.crop, self.crop)
        left, top, side = augmentation.left, augmentation.top, augmentation.side
        if isinstance(image, Image.Image):
            image.draft("RGB", (math.ceil(self.crop / side),) * 2)
        crop = as_image(image)
        width, height = crop.size
        box = (left * width, top * height, (left + side) * width, (top + side) * height)
        crop = resample(crop, size, box)
        if label is not None:
            height, width = label.shape
            label = resample_label(
                label, size, (left * width, top * height, (left + side) * width, (top + side) * height)
            )
        if augmentation.flip:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            label = None if label is None else label[:, ::-1]
        clean = to_tensor(crop)
        jittered = recolour(crop, augmentation)
        return {
            "image": normalise(clean if jittered is crop else to_tensor(jittered)),
            "guide": clean.float().mul_(1 / 255),
            "label": label_tensor(label, size),
        }


class ValTransform:
    """Squash to `size` x `size`: bilinear for the image, nearest for the label; nothing random.

    Args:
        config: `size` is used.
    """

    def __init__(self, config: DataConfig) -> None:
        if config.size < 1:
            raise ValueError(f"expected a positive number of pixels, got {config.size=}")
        self.size = config.size

    def __call__(
        self, image: Image.Image | np.ndarray, label: np.ndarray | None, *, index: int = 0, epoch: int = 0
    ) -> dict[str, Any]:
        """Return the sample of :class:`TrainTransform` at S = `size`, and `size`, the original (H, W)."""
        del index, epoch
        size = (self.size, self.size)
        whole = as_image(image)
        pixels = to_tensor(resample(whole, size))
        return {
            "image": normalise(pixels),
            "guide": pixels.float().mul_(1 / 255),
            "label": label_tensor(None if label is None else resample_label(label, size), size),
            "size": (whole.height, whole.width),
        }
