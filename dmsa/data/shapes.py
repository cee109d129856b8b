"""The embedded data set: procedural images with pixel-exact labels, so that training works without any download.

Every image is a function of ``(seed, split, index, size)`` and of nothing else: a cluttered, untextured background
with one to four objects that partly cover each other. A class is one outline together with one texture; both colours
of a texture, its phase and its angle are drawn anew for every object, from the distribution that the background's
colours come from too. Colour therefore says nothing about the class.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dmsa.config import DataConfig
from dmsa.data.base import SegmentationData
from dmsa.data.transforms import TrainTransform, ValTransform

SPLITS = {"train": 0, "val": 1}
DEFAULT_COUNT = {"train": 1200, "val": 240}
MIN_SIZE = 32
RADIUS = (0.21, 0.32)
"""Radius of an object's circumscribed circle, as a fraction of the image side."""
PERIOD = (0.056, 0.072)
"""Period of a texture, as a fraction of the image side (8.4 to 11 pixels of 128)."""
VISIBLE = 0.45
"""Smallest part of an object that must show, counted inside the image and in front of the other objects."""
CACHE_BYTES = 256 << 20
"""Rendered images are kept, per process, up to this total."""


def _disc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x * x + y * y < 0.81


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) < 0.78


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x) * 0.8660254 + y * 0.5, -y) < 0.6


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return (np.minimum(x, y) < 0.4) & (np.maximum(x, y) < 0.95)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    sector = 2 * np.pi / 5
    angle = np.abs((np.arctan2(y, x) + 2 * np.pi) % sector - sector / 2)  # 0 in a valley, sector / 2 at a tip
    # The edge runs straight from the valley (radius 0.62, angle 0) to the tip (radius 1, angle sector / 2).
    tip_x, tip_y = np.cos(sector / 2), np.sin(sector / 2)
    radius = np.hypot(x, y)
    return (tip_y * (radius * np.cos(angle) - 0.62) - (tip_x - 0.62) * radius * np.sin(angle)) < 0


def _capsule(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    along = np.maximum(np.abs(x) - 0.5, 0)
    return along * along + y * y < 0.25


def _stripes(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return u % 1 < 0.5


def _checker(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (u % 1 < 0.5) ^ (v % 1 < 0.5)


def _dots(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.1


def _zigzag(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return (u + 1.2 * np.abs((0.6 * v) % 1 - 0.5)) % 1 < 0.5


def _speckle(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    # Value noise: random heights on a lattice of 0.75 periods, interpolated bilinearly and cut at their mean.
    u, v = u / 0.75, v / 0.75
    i, j = np.floor(u), np.floor(v)
    fu, fv = u - i, v - j
    heights = rng.random((64, 64), dtype=np.float32)
    i, j = i.astype(np.int64) & 63, j.astype(np.int64) & 63
    i1, j1 = (i + 1) & 63, (j + 1) & 63
    low = heights[i, j] * (1 - fv) + heights[i, j1] * fv
    high = heights[i1, j] * (1 - fv) + heights[i1, j1] * fv
    return low * (1 - fu) + high * fu < 0.5


def _bricks(u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    row = np.floor(v)
    return (v - row < 0.28) | ((0.5 * u + 0.5 * (row % 2)) % 1 < 0.17)


Field = Callable[..., np.ndarray]
THINGS: dict[str, tuple[str, str]] = {
    "striped disc": ("disc", "stripes"),
    "chequered square": ("square", "checker"),
    "dotted triangle": ("triangle", "dots"),
    "zigzag cross": ("cross", "zigzag"),
    "speckled star": ("star", "speckle"),
    "brick capsule": ("capsule", "bricks"),
}
"""The classes: name → (outline, texture). Pre-training (`dmsa.pretrain.formula`) uses none of these families."""
OUTLINES: dict[str, Field] = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
    "capsule": _capsule,
}
TEXTURES: dict[str, Field] = {
    "stripes": _stripes,
    "checker": _checker,
    "dots": _dots,
    "zigzag": _zigzag,
    "speckle": _speckle,
    "bricks": _bricks,
}
PALETTE = np.array(
    [[0, 0, 0], [230, 75, 53], [77, 187, 213], [0, 160, 135], [240, 190, 60], [140, 90, 170], [160, 110, 70]],
    dtype=np.uint8,
)
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres of a square image in [0, 1]: ``(y [size, 1], x [1, size])``."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    return axis[:, None], axis[None, :]


def _upsample(coarse: np.ndarray, size: int) -> np.ndarray:
    """Interpolate ``coarse [n, n, C]`` bilinearly to ``[size, size, C]``, corners on corners."""
    n = coarse.shape[0]
    position = np.linspace(0, n - 1, size, dtype=np.float32)
    low = np.minimum(position.astype(np.int64), n - 2)
    matrix = np.zeros((size, n), dtype=np.float32)
    rows = np.arange(size)
    matrix[rows, low] = 1 - (position - low)
    matrix[rows, low + 1] += position - low
    rows_done = np.tensordot(matrix, coarse, axes=(1, 0))  # [size, n, C]
    return np.ascontiguousarray(np.tensordot(rows_done, matrix, axes=(1, 1)).transpose(0, 2, 1))  # [size, size, C]


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A smooth mixture of colours with flat blobs, bars and thin lines scattered on it, ``[size, size, 3]``."""
    y, x = _grid(size)
    image = _upsample(rng.random((4, 4, 3), dtype=np.float32), size)
    for _ in range(rng.integers(6, 13)):
        cy, cx = rng.random(2)
        angle = rng.uniform(0, np.pi)
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        along = (x - np.float32(cx)) * cos + (y - np.float32(cy)) * sin
        across = (y - np.float32(cy)) * cos - (x - np.float32(cx)) * sin
        kind = rng.integers(3)
        if kind == 0:  # an ellipse
            a, b = rng.uniform(0.04, 0.16, 2)
            mask = (along / np.float32(a)) ** 2 + (across / np.float32(b)) ** 2 < 1
        elif kind == 1:  # a bar
            a, b = rng.uniform(0.03, 0.12, 2)
            mask = (np.abs(along) < a) & (np.abs(across) < b)
        else:  # a thin line
            mask = (np.abs(across) < 0.008) & (np.abs(along) < rng.uniform(0.1, 0.4))
        image[mask] = rng.random(3, dtype=np.float32)
    return image


def _two_colours(rng: np.random.Generator) -> np.ndarray:
    """Two random colours ``[2, 3]`` in [0, 1] whose luminances differ by 0.3 at least (or the best of 16 draws)."""
    pairs = rng.random((16, 2, 3), dtype=np.float32)
    contrast = np.abs((pairs[:, 0] - pairs[:, 1]) @ _LUMINANCE)
    enough = contrast >= 0.3
    return pairs[np.argmax(enough) if enough.any() else np.argmax(contrast)]


def _layout(rng: np.random.Generator) -> list[tuple[int, float, float, float, float]]:
    """Draw the objects of one image, back to front: ``(class, y, x, radius, angle)``, lengths in image sides."""
    placed: list[tuple[int, float, float, float, float]] = []
    for _ in range(rng.choice([1, 2, 3, 4], p=[0.1, 0.25, 0.35, 0.3])):
        centres = rng.uniform(0.14, 0.86, (6, 2))
        if placed:  # the candidate farthest from the objects that are there, so that few vanish behind others
            others = np.array([(o[1], o[2]) for o in placed])
            distance = np.linalg.norm(centres[:, None] - others[None], axis=-1).min(axis=1)
            centre = centres[distance.argmax()]
        else:
            centre = centres[0]
        radius = rng.uniform(*RADIUS)
        placed.append((int(rng.integers(len(THINGS))), centre[0], centre[1], radius, rng.uniform(0, 2 * np.pi)))
    return placed


def _masks(objects: list[tuple[int, float, float, float, float]], size: int) -> list[np.ndarray]:
    y, x = _grid(size)
    masks = []
    for kind, cy, cx, radius, angle in objects:
        cos, sin = np.float32(np.cos(angle) / radius), np.float32(np.sin(angle) / radius)
        dy, dx = y - np.float32(cy), x - np.float32(cx)
        outline = OUTLINES[list(THINGS.values())[kind][0]]
        masks.append(outline(dx * cos + dy * sin, dy * cos - dx * sin))
    return masks


def render(seed: int, split: str, index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one image and its exact label.

    Args:
        seed: Seed of the whole set, at least 0.
        split: ``"train"`` or ``"val"``; the two never share a random stream.
        index: Number of the image, at least 0.
        size: Side in pixels. The same picture at another size has the same composition.

    Returns:
        The image, uint8 ``[size, size, 3]``, and the label, uint8 ``[size, size]``: 0 is background, ``k`` is the
        k-th entry of `THINGS`.
    """
    rng = np.random.default_rng([seed, SPLITS[split], index])
    for _ in range(20):
        objects = _layout(rng)
        coarse = _masks(objects, 32)  # the composition is judged on a fixed grid, so that it does not depend on size
        label = np.zeros((32, 32), dtype=np.uint8)
        for number, mask in enumerate(coarse, start=1):
            label[mask] = number
        areas = [1.7 * 1024 * o[3] ** 2 for o in objects]  # a typical outline fills 1.7 r^2
        shown = [np.count_nonzero(label == n) / area for n, area in enumerate(areas, start=1)]
        if min(shown) >= VISIBLE and np.count_nonzero(label) >= 0.25 * label.size:
            break
    image = _background(rng, size)
    label = np.zeros((size, size), dtype=np.uint8)
    y, x = _grid(size)
    names = list(THINGS.values())
    for (kind, *_), mask in zip(objects, _masks(objects, size), strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        colours = _two_colours(rng)
        period, turn, (shift_u, shift_v) = rng.uniform(*PERIOD), rng.uniform(0, np.pi), rng.random(2)
        box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        cos, sin = np.float32(np.cos(turn) / period), np.float32(np.sin(turn) / period)
        by, bx = y[box[0]], x[:, box[1]]
        ink = TEXTURES[names[kind][1]](
            bx * cos + by * sin + np.float32(shift_u), by * cos - bx * sin + np.float32(shift_v), rng
        )
        inside = mask[box]
        image[box][inside] = colours[ink[inside].astype(np.int64)]
        label[box][inside] = kind + 1
    slope = rng.uniform(-0.3, 0.3, 2).astype(np.float32)
    light = 1 + slope[0] * (y - 0.5) + slope[1] * (x - 0.5)  # [size, size]
    image = image * light[..., None] + 0.02 * rng.standard_normal(image.shape, dtype=np.float32)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), label


class Shapes(SegmentationData):
    """The procedural set `shapes`: six classes of textured objects and a background.

    Args:
        config: `size` is the side of a picture, `crop` that of a training crop; `train_images` and `val_images` say
            how many are drawn (`DEFAULT_COUNT` if unset).
        split: `train` (augmented crops) or `val` (whole pictures); both have labels.
        seed: seed of the pictures and of the augmentation, >= 0.

    Finished pictures stay in memory, up to `CACHE_BYTES` in every process.

    Raises:
        ValueError: an unknown split, a negative seed, a size below `MIN_SIZE`, or a count below 1.
    """

    def __init__(self, config: DataConfig, split: str, seed: int = 0) -> None:
        if split not in SPLITS:
            raise ValueError(f"expected split to be one of {tuple(SPLITS)}, got {split=}")
        if seed < 0:
            raise ValueError(f"expected a seed >= 0, got {seed=}")
        if config.size < MIN_SIZE:
            raise ValueError(f"pictures of shapes need {MIN_SIZE} pixels a side, got {config.size=}")
        field = "train_images" if split == "train" else "val_images"
        count = getattr(config, field)
        if count is not None and count < 1:
            raise ValueError(f"expected a positive number of images, got config.{field}={count}")
        count = DEFAULT_COUNT[split] if count is None else count
        self.size, self.seed = config.size, seed
        self._cache: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._cache_limit = max(1, CACHE_BYTES // (4 * config.size**2))
        super().__init__(
            name="shapes",
            split=split,
            classes=["background", *THINGS],
            n_things=len(THINGS),
            things_only=True,
            names=[f"{split}_{index:06d}" for index in range(count)],
            transform=TrainTransform(config, seed) if split == "train" else ValTransform(config),
            labels_from="the drawing itself, exact",
            palette=PALETTE,
            repeat=config.repeat if split == "train" else 1,
        )

    def _picture(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index not in self._cache:
            if len(self._cache) >= self._cache_limit:
                self._cache.pop(next(iter(self._cache)))
            self._cache[index] = render(self.seed, self.split, index, self.size)
        return self._cache[index]

    def open(self, index: int) -> np.ndarray:
        return self._picture(index)[0]

    def read_label(self, index: int) -> np.ndarray:
        return self._picture(index)[1]
