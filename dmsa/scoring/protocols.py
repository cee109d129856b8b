"""What a score means: which images are scored, at what size, and how images and labels get there.

| protocol | images | network input | labels |
|---|---|---|---|
| `transfgu` (the paper's tables) | the whole validation set | squashed to 320 x 320, bilinear | squashed, nearest |
| `stego` (most later papers) | the curated validation set | short side 320, centre crop | the same, nearest |
| `native` | the whole validation set | squashed to 320 x 320, bilinear | the annotation's own size |

Common to all: logits are upsampled (bilinear) to the label's size before the argmax, one Hungarian match over the
whole set's histogram with the background in it, 255 ignored, no CRF, no flip.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from dmsa.data.transforms import Box, as_image, resample, resample_label

NAMES = ("transfgu", "stego", "native")


@dataclass(frozen=True)
class Protocol:
    """One way of scoring.

    Args:
        name: `transfgu`, `stego` or `native`.
        size: side of the network's input in pixels; 320 in the papers.

    Raises:
        ValueError: the name is unknown, or the size is not positive.
    """

    name: str
    size: int = 320

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"expected a protocol of {NAMES}, got {self.name=}")
        if self.size < 1:
            raise ValueError(f"expected a positive number of pixels, got {self.size=}")

    @property
    def curated(self) -> bool:
        """Whether data sets with a curated validation set are scored on that alone."""
        return self.name == "stego"

    def describe(self, curated: bool = False) -> str:
        """Return one line to print beside a score; `curated`: the data set has such a list."""
        images = "curated images" if curated and self.curated else "all images"
        how = {
            "transfgu": f"squashed to {self.size}x{self.size}, labels nearest",
            "stego": f"short side {self.size}, centre crop, labels nearest",
            "native": f"squashed to {self.size}x{self.size}, scored at the annotation's own size",
        }[self.name]
        return (
            f"{self.name}: {images}, {how}; one Hungarian match over the set, background included, 255 ignored, "
            "no CRF, no flip"
        )

    def _box(self, height: int, width: int) -> Box | None:
        """Return the centre square of the `stego` protocol in pixels of the original, `None` for the whole image."""
        if self.name != "stego":
            return None
        scale = min(height, width) / self.size
        # The offset is a whole number of resized pixels, as torchvision's CenterCrop has it.
        top, left = (round((round(side / scale) - self.size) / 2) * scale for side in (height, width))
        side = min(height, width)
        return (min(left, width - side), min(top, height - side), min(left, width - side) + side,
                min(top, height - side) + side)  # fmt: skip

    def image(self, image: Image.Image | np.ndarray) -> Image.Image:
        """Return the network's input, an RGB image of `size` x `size`.

        Args:
            image: RGB image, or uint8 `[H, W, 3]`.
        """
        whole = as_image(image)
        return resample(whole, (self.size, self.size), self._box(whole.height, whole.width))

    def label(self, label: np.ndarray) -> np.ndarray:
        """Return the label at the size at which predictions are scored, uint8 `[H', W']`.

        Args:
            label: uint8 `[H, W]`.
        """
        if self.name == "native":
            return label
        return resample_label(label, (self.size, self.size), self._box(*label.shape))

    def prediction(self, pred: np.ndarray, annotation: tuple[int, int]) -> np.ndarray:
        """Bring a predicted mask to where :meth:`label` brings the annotation.

        A mask that already has the scored size is taken as it is; one of another size is a mask of the whole image.

        Args:
            pred: uint8 `[h, w]`.
            annotation: (H, W) of the annotation.

        Returns:
            uint8, of the shape of :meth:`label`.
        """
        target = annotation if self.name == "native" else (self.size, self.size)
        if pred.shape == target:
            return pred
        if pred.shape != annotation:
            pred = resample_label(pred, annotation)
        return self.label(pred)
