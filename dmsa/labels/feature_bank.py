"""The feature bank: DINO class tokens of foreground and background crops of the training images.

Source: TransFGU (`cocostuff_crop.py`), which runs the crops of one image at a time and the left-over ones singly; here
they are batched across images, sharded over processes, and stored in parts so that a run that was stopped continues.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from dmsa.config import Config
from dmsa.labels.cache import content_key, dataset_key, image_count, load_arrays, save_arrays, weights_key
from dmsa.models.encoder import Encoder

FOREGROUND_SHARE = 0.5
"""A window with more foreground than this is a foreground crop."""
BACKGROUND_SHARE = 0.8
"""A window with more background than this is a background crop."""
CPU_TOKENS = 2048
"""Patch tokens of a forward pass on a CPU."""
PART = 32
"""Images per file of the cache: what a run that is stopped has to do again, at most."""
WORKERS_FROM = 256
"""Images from which on loader processes are worth their start."""
VERSION = 3
"""Raised when the crops or features change, so that older caches are not taken for current ones."""


@dataclass(frozen=True)
class FeatureBank:
    """Class tokens of crops, after the encoder's final norm, not normalised; ordered by image, then window."""

    foreground: np.ndarray
    """float32 [F, D]."""
    background: np.ndarray
    """float32 [G, D]; empty for data sets of things."""
    foreground_image: np.ndarray
    """int64 [F] index of the image each crop comes from."""
    background_image: np.ndarray
    """int64 [G]."""
    provenance: dict[str, Any]
    """Everything the bank depends on, and the names of images that could not be decoded (`skipped`)."""


def windows(grid: tuple[int, int], scales: Sequence[float]) -> list[tuple[int, int, int]]:
    """List square windows (top, left, side) on a grid, at every scale with a stride of half a window.

    Args:
        grid: (h, w) in tokens.
        scales: window sides as fractions of the shorter side, in (0, 1].
    """
    if not scales or not all(0 < scale <= 1 for scale in scales):
        raise ValueError(f"{scales=} must be fractions in (0, 1], at least one")
    found = []
    for scale in scales:
        side = max(1, int(min(grid) * scale))
        stride = max(1, side // 2)
        tops, lefts = (range(0, length - side + 1, stride) for length in grid)
        found += [(top, left, side) for top in tops for left in lefts]
    return found


def window_shares(foreground: Tensor, boxes: Sequence[tuple[int, int, int]]) -> Tensor:
    """Return the share of foreground in each window.

    Args:
        foreground: bool [B, h, w].
        boxes: (top, left, side) of W windows.

    Returns:
        float32 [B, W], from 0 to 1.
    """
    total = F.pad(foreground.float().cumsum(1).cumsum(2), (1, 0, 1, 0))  # [B, h + 1, w + 1]
    top, left, side = torch.tensor(boxes, device=foreground.device).T
    below, right = top + side, left + side
    count = total[:, below, right] - total[:, top, right] - total[:, below, left] + total[:, top, left]
    return count / side**2


@torch.no_grad()
def foreground_of(encoder: Encoder, images: Tensor) -> Tensor:
    """Return bool [B, h, w]: the last block's class attention, mean over heads, is above its mean over the image."""
    attended = encoder.features(images, output=False)
    row = attended.attention[..., encoder.num_prefix_tokens :].mean(1)  # [B, N]
    return (row > row.mean(-1, keepdim=True)).unflatten(-1, attended.grid)


@torch.no_grad()
def class_tokens(encoder: Encoder, crops: Tensor) -> Tensor:
    """Return the class tokens [n, D] of crops [n, 3, S, S], normalised pixels, as fp32."""
    attended = encoder.features(crops, output=False)
    context = attended.attention.unsqueeze(2) @ attended.values.to(attended.attention.dtype)
    with torch.autocast(crops.device.type, enabled=False):
        return encoder.class_token(attended, context.flatten(1).to(next(encoder.parameters()).dtype)).float()


def cut(image: Tensor, boxes: Sequence[tuple[int, int, int]], size: int) -> Tensor:
    """Cut square windows out of an image and resize each of them.

    Args:
        image: [3, H, W].
        boxes: (top, left, side) in pixels, of n windows.
        size: side of the results in pixels.

    Returns:
        [n, 3, size, size], in the order of `boxes`.
    """
    crops = image.new_empty(len(boxes), 3, size, size)
    for side in sorted({box[2] for box in boxes}):
        where = [i for i, box in enumerate(boxes) if box[2] == side]
        group = torch.stack([image[:, t : t + side, x : x + side] for t, x, _ in (boxes[i] for i in where)])
        crops[where] = F.interpolate(group, (size, size), mode="bilinear", antialias=True)
    return crops


def build_feature_bank(
    encoder: Encoder,
    dataset: Any,
    config: Config,
    cache_dir: str | Path | None = None,
    *,
    batch: int | None = None,
    image_batch: int | None = None,
) -> FeatureBank | None:
    """Collect the class tokens of foreground (and, unless the data set labels things only, background) crops.

    Every image is squashed to twice the training size. Windows at `config.labels.bank_scales`, with a stride of half
    a window, are foreground crops where more than 50 % of them is foreground, background crops where more than 80 %
    is background. Each crop is resized to the training size (or to `labels.bank_crop`); crops of different images share
    a batch.

    Args:
        encoder: on the device where it is to run.
        dataset: offers `raw(index)`, `things_only`, and its identity (`name`, `classes`, `images`).
        config: reads `data.size`, `data.workers`, `labels.bank_scales`, `labels.bank_crop`,
            `labels.bank_images`.
        cache_dir: keeps finished parts there, under a key of encoder weights, data set and the fields above; a second
            call reads them. Nothing is kept if unset.
        batch: crops per forward pass; if unset 128, on a CPU as many as make 2,048 tokens (see `batch_for`).
        image_batch: images per forward pass, at twice the training size; if unset 8, on a CPU as many as make 2,048
            tokens.

    Returns:
        the bank; in a distributed run, to rank 0, and `None` to the others. It does not depend on the number of
        processes or on `batch`, up to rounding.

    Raises:
        ValueError: a scale is out of range, or the squashed image is no multiple of the patch size.
    """
    boxes, indices = _plan(encoder, dataset, config)
    batch = batch or batch_for(encoder, _crop(config), 128)
    image_batch = image_batch or batch_for(encoder, 2 * config.data.size, 8)
    provenance = bank_identity(encoder, dataset, config)
    folder = None if cache_dir is None else Path(cache_dir) / f"bank-{content_key(**provenance)}"
    rank, world = (dist.get_rank(), dist.get_world_size()) if _distributed() else (0, 1)
    parts = [indices[start : start + PART] for start in range(0, len(indices), PART)]
    mine = range(rank, len(parts), world)

    made: dict[int, dict[str, np.ndarray]] = {}
    missing = [part for part in mine if folder is None or not _part_path(folder, part).is_file()]
    squashed = _squashed(dataset, [index for part in missing for index in parts[part]], config)
    with _progress(sum(len(parts[part]) for part in mine), sum(len(parts[part]) for part in missing)) as advance:
        for part in missing:
            arrays = _extract(
                encoder, squashed, parts[part], boxes, _crop(config), dataset.things_only, batch, image_batch, advance
            )
            if folder is None:
                made[part] = arrays
            else:
                save_arrays(_part_path(folder, part), **arrays)

    gathered = []
    for start in range(0, len(parts), world):
        part = start + rank
        arrays = None
        if part < len(parts):
            arrays = made.pop(part) if folder is None else load_arrays(_part_path(folder, part))
        gathered += _gather(arrays) if world > 1 else [arrays]
    if rank:
        return None
    gathered = [arrays for arrays in gathered if arrays is not None]
    joined = {key: np.concatenate([arrays[key] for arrays in gathered]) for key in gathered[0]}
    skipped = [str(name) for name in joined.pop("skipped")]
    if skipped:
        warnings.warn(f"feature bank: skipped {len(skipped)} damaged images: {', '.join(skipped[:5])}", stacklevel=2)
    return FeatureBank(**joined, provenance={**provenance, "skipped": skipped})


def batch_for(encoder: Encoder, size: int, most: int) -> int:
    """Return how many images of side `size` one forward pass takes: `most`, on a CPU fewer, so that caches hold them.

    One core is busy with a single image already. There a batch only saves the calls' own time, and the activations of
    a large one travel to memory and back: with the shipped backbone, 128 crops cost a third more than 8 times 16.
    """
    if next(encoder.parameters()).device.type != "cpu":
        return most
    return max(1, min(most, CPU_TOKENS // (size // encoder.patch_size) ** 2))


def bank_identity(encoder: Encoder, dataset: Any, config: Config) -> dict[str, Any]:
    """Return everything that `build_feature_bank` depends on, as plain values; its content key is made from this."""
    _, indices = _plan(encoder, dataset, config)
    return {
        "version": VERSION,
        "encoder": weights_key(encoder),
        "dataset": dataset_key(dataset),
        "dataset_name": getattr(dataset, "name", type(dataset).__name__),
        "things_only": bool(dataset.things_only),
        "images": len(indices),
        "size": config.data.size,
        "scales": list(config.labels.bank_scales),
        "crop": _crop(config),
    }


def _crop(config: Config) -> int:
    """Return the side of a resized crop."""
    return config.data.size if config.labels.bank_crop is None else config.labels.bank_crop


def _plan(encoder: Encoder, dataset: Any, config: Config) -> tuple[list[tuple[int, int, int]], list[int]]:
    """Return the windows of an image and the images, after checking that they make sense."""
    if config.data.size % encoder.patch_size:
        raise ValueError(f"{config.data.size=} is not a multiple of the encoder's patch size {encoder.patch_size}")
    if _crop(config) % encoder.patch_size:
        raise ValueError(
            f"{config.labels.bank_crop=} is not a multiple of the encoder's patch size {encoder.patch_size}"
        )
    side = 2 * config.data.size // encoder.patch_size
    return windows((side, side), config.labels.bank_scales), _thin(image_count(dataset), config.labels.bank_images)


class SquashedImages(torch.utils.data.Dataset):
    """Images squashed to a square, uint8 [3, side, side]; a string names a damaged one."""

    def __init__(self, dataset: Any, indices: Sequence[int], side: int) -> None:
        self.dataset, self.indices, self.side = dataset, list(indices), side

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Tensor | str:
        from dmsa.data.images import CorruptImageError

        index = self.indices[place]
        try:
            pixels = self.dataset.raw(index)[0]
        except CorruptImageError as error:
            return str(error)
        image = Image.fromarray(pixels).resize((self.side, self.side), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _squashed(dataset: Any, indices: Sequence[int], config: Config) -> Iterator[Tensor | str]:
    workers = config.data.workers if len(indices) >= WORKERS_FROM else 0
    return iter(
        DataLoader(SquashedImages(dataset, indices, 2 * config.data.size), batch_size=None, num_workers=workers)
    )


def _extract(
    encoder: Encoder,
    squashed: Iterator[Tensor | str],
    indices: Sequence[int],
    boxes: Sequence[tuple[int, int, int]],
    size: int,
    things_only: bool,
    batch: int,
    image_batch: int,
    advance: Callable[[int], object],
) -> dict[str, np.ndarray]:
    """Run one part; crops wait until a batch is full, whichever images they come from. `advance` hears of images."""
    from dmsa.data.transforms import MEAN, STD

    device = next(encoder.parameters()).device
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
    pixels = torch.tensor(
        [(t * encoder.patch_size, x * encoder.patch_size, s * encoder.patch_size) for t, x, s in boxes]
    )
    waiting: list[Tensor] = []
    features: list[Tensor] = []
    kinds: list[np.ndarray] = []
    sources: list[np.ndarray] = []
    skipped: list[str] = []

    def run(everything: bool) -> None:
        if not waiting or not (everything or sum(map(len, waiting)) >= batch):
            return
        crops = torch.cat(waiting)
        ready = len(crops) if everything else len(crops) // batch * batch
        waiting[:] = [crops[ready:]] if ready < len(crops) else []
        features.extend(class_tokens(encoder, part).cpu() for part in crops[:ready].split(batch))

    for start in range(0, len(indices), image_batch):
        loaded = [(index, next(squashed)) for index in indices[start : start + image_batch]]
        advance(len(loaded))
        skipped += [item for _, item in loaded if isinstance(item, str)]
        loaded = [(index, item) for index, item in loaded if not isinstance(item, str)]
        if not loaded:
            continue
        images = torch.stack([item for _, item in loaded]).to(device).float().div_(255).sub_(mean).div_(std)
        shares = window_shares(foreground_of(encoder, images), boxes).cpu()  # [B, W]
        for image, (index, _), share in zip(images, loaded, shares, strict=True):
            is_foreground = share > FOREGROUND_SHARE
            is_background = (1 - share > BACKGROUND_SHARE) & (not things_only)
            chosen = (is_foreground | is_background).nonzero().flatten()
            if not len(chosen):
                continue
            waiting.append(cut(image, pixels[chosen].tolist(), size))
            kinds.append(is_foreground[chosen].numpy())
            sources.append(np.full(len(chosen), index, dtype=np.int64))
            run(everything=False)
    run(everything=True)
    tokens = torch.cat(features).numpy() if features else np.zeros((0, encoder.embed_dim), np.float32)
    foreground = np.concatenate(kinds) if kinds else np.zeros(0, bool)
    source = np.concatenate(sources) if sources else np.zeros(0, np.int64)
    return {
        "foreground": tokens[foreground],
        "background": tokens[~foreground],
        "foreground_image": source[foreground],
        "background_image": source[~foreground],
        "skipped": np.array(skipped, dtype=np.str_),
    }


@contextlib.contextmanager
def _progress(total: int, missing: int) -> Iterator[Callable[[int], object]]:
    """Show how many images of this process are done, on rank 0; silent if none is missing."""
    from tqdm import tqdm

    hidden = not missing or (_distributed() and dist.get_rank() > 0)
    interval = 0.5 if sys.stderr.isatty() else 10.0
    with tqdm(
        total=total,
        initial=total - missing,
        desc="feature bank",
        unit=" images",
        disable=hidden,
        mininterval=interval,
        dynamic_ncols=True,
    ) as bar:
        yield bar.update


def _thin(count: int, limit: int | None) -> list[int]:
    if limit is not None and limit < 1:
        raise ValueError(f"labels.bank_images={limit} must be at least 1")
    if limit is None or limit >= count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]


def _part_path(folder: Path, part: int) -> Path:
    return folder / f"part-{part:06d}.npz"


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _gather(arrays: dict[str, np.ndarray] | None) -> list[dict[str, np.ndarray] | None]:
    """Collect one part of every process; part by part, so that only rank 0 ever holds the whole bank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, arrays)
    return everyone if dist.get_rank() == 0 else []
