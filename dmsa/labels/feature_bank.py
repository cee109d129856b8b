"""The feature bank: DINO class tokens of foreground and background crops of the training images.

Source: TransFGU (`cocostuff_crop.py`), which runs the crops of one image at a time and the left-over ones singly; here
they are batched across a few images, shared by processes, and stored as they come so that a stopped run goes on.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from dmsa import distributed
from dmsa.config import Config
from dmsa.labels.cache import content_key, dataset_key, image_count, load_arrays, save_arrays, weights_key
from dmsa.models.encoder import Encoder

FOREGROUND_SHARE = 0.5
"""A window with more foreground than this is a foreground crop."""
BACKGROUND_SHARE = 0.8
"""A window with more background than this is a background crop."""
CPU_TOKENS = 2048
"""Patch tokens of a forward pass on a CPU."""
PART_SECONDS = 15.0
"""Work that goes into one file of the cache: what a stop can cost."""
PART_IMAGES = 256
"""Images in one file of the cache, at most."""
WORKERS_PAY = 64
"""Starting data-loader workers costs more than fewer images than this do."""
VERSION = 4
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
        dataset: offers `pixels(index)`, `things_only`, and its identity (`name`, `classes`, `images`).
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
    key = content_key(**provenance, image_batch=image_batch)
    folder = None if cache_dir is None else Path(cache_dir) / f"bank-{key}"
    # A group's images always share their batches, so that neither a stop nor the number of processes changes a bit.
    groups = [indices[start : start + image_batch] for start in range(0, len(indices), image_batch)]
    known = distributed.gather_objects({} if folder is None else _groups_in(folder))
    finished = {group for parts in known for held in parts.values() for group in held}
    missing = [group for group in range(len(groups)) if group not in finished]

    made: list[dict[str, np.ndarray]] = []
    for arrays in _parts(encoder, dataset, config, boxes, groups, missing, batch):
        if folder is None:
            made.append(arrays)
        else:
            save_arrays(folder / f"part-{arrays['groups'][0]:06d}.npz", **arrays)

    gathered = _gather(made, folder, len(groups))
    if not distributed.is_main():
        return None
    joined = {key: np.concatenate([arrays[key] for arrays in gathered]) for key in gathered[0]}
    for kind in ("foreground", "background"):
        order = joined[f"{kind}_image"].argsort(kind="stable")
        joined |= {key: joined[key][order] for key in (kind, f"{kind}_image")}
    order = joined.pop("skipped_image").argsort(kind="stable")
    skipped = [str(name) for name in joined.pop("skipped")[order]]
    del joined["groups"]
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
            pixels = self.dataset.pixels(index)
        except CorruptImageError as error:
            return str(error)
        image = Image.fromarray(pixels).resize((self.side, self.side), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _parts(
    encoder: Encoder,
    dataset: Any,
    config: Config,
    boxes: Sequence[tuple[int, int, int]],
    groups: Sequence[Sequence[int]],
    missing: Sequence[int],
    batch: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield this process's share of the `missing` groups of images, as many at a time as `PART_SECONDS` suffice for."""
    from tqdm import tqdm

    chosen = [missing[place] for place in distributed.shard(len(missing))]
    indices = [index for group in chosen for index in groups[group]]
    workers = config.data.workers if len(indices) >= WORKERS_PAY else 0
    squashed = iter(
        DataLoader(SquashedImages(dataset, indices, 2 * config.data.size), batch_size=None, num_workers=workers)
    )
    before = sum(map(len, groups)) - sum(len(groups[group]) for group in missing)
    bar = tqdm(
        total=before + len(indices),
        initial=before,
        desc="feature bank",
        unit=" images",
        disable=not (indices and distributed.is_main()),
        mininterval=0.5 if sys.stderr.isatty() else 10.0,
        dynamic_ncols=True,
    )
    finished: list[dict[str, np.ndarray]] = []
    images, began = 0, time.monotonic()
    with bar:
        for place, group in enumerate(chosen):
            loaded = [(index, next(squashed)) for index in groups[group]]
            arrays = _extract(encoder, loaded, boxes, _crop(config), dataset.things_only, batch)
            finished.append({**arrays, "groups": np.array([group])})
            images += len(loaded)
            bar.update(len(loaded))
            distributed.expect()
            late = time.monotonic() - began > PART_SECONDS or images >= PART_IMAGES
            if late or place + 1 == len(chosen):
                yield {key: np.concatenate([one[key] for one in finished]) for key in finished[0]}
                finished, images, began = [], 0, time.monotonic()


def _extract(
    encoder: Encoder,
    loaded: Sequence[tuple[int, Tensor | str]],
    boxes: Sequence[tuple[int, int, int]],
    size: int,
    things_only: bool,
    batch: int,
) -> dict[str, np.ndarray]:
    """Return the crops' class tokens of a group of squashed images; their crops share batches."""
    from dmsa.data.transforms import MEAN, STD

    device = next(encoder.parameters()).device
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
    pixels = torch.tensor(
        [(t * encoder.patch_size, x * encoder.patch_size, s * encoder.patch_size) for t, x, s in boxes]
    )
    damaged = [(index, item) for index, item in loaded if isinstance(item, str)]
    good = [(index, item) for index, item in loaded if not isinstance(item, str)]
    crops = [torch.zeros(0, 3, size, size, device=device)]
    kinds, sources = [np.zeros(0, bool)], [np.zeros(0, np.int64)]
    if good:
        images = torch.stack([item for _, item in good]).to(device).float().div_(255).sub_(mean).div_(std)
        shares = window_shares(foreground_of(encoder, images), boxes).cpu()  # [B, W]
        for image, (index, _), share in zip(images, good, shares, strict=True):
            is_foreground = share > FOREGROUND_SHARE
            is_background = (1 - share > BACKGROUND_SHARE) & (not things_only)
            chosen = (is_foreground | is_background).nonzero().flatten()
            crops.append(cut(image, pixels[chosen].tolist(), size))
            kinds.append(is_foreground[chosen].numpy())
            sources.append(np.full(len(chosen), index, dtype=np.int64))
    features = [class_tokens(encoder, part).cpu() for part in torch.cat(crops).split(batch) if len(part)]
    tokens = torch.cat(features).numpy() if features else np.zeros((0, encoder.embed_dim), np.float32)
    foreground, source = np.concatenate(kinds), np.concatenate(sources)
    return {
        "foreground": tokens[foreground],
        "background": tokens[~foreground],
        "foreground_image": source[foreground],
        "background_image": source[~foreground],
        "skipped": np.array([message for _, message in damaged], dtype=np.str_),
        "skipped_image": np.array([index for index, _ in damaged], dtype=np.int64),
    }


def _thin(count: int, limit: int | None) -> list[int]:
    if limit is not None and limit < 1:
        raise ValueError(f"labels.bank_images={limit} must be at least 1")
    if limit is None or limit >= count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]


def _groups_in(folder: Path) -> dict[str, list[int]]:
    """Return the files in `folder`, by name, and the groups of images that each of them holds."""
    return {path.name: load_arrays(path, "groups")["groups"].tolist() for path in sorted(folder.glob("part-*.npz"))}


def _gather(made: list[dict[str, np.ndarray]], folder: Path | None, groups: int) -> list[dict[str, np.ndarray]]:
    """Collect the parts of all processes on rank 0, one of each at a time, so that only rank 0 holds the whole bank."""
    here = {str(number): arrays["groups"].tolist() for number, arrays in enumerate(made)}
    if folder is not None:
        here = _groups_in(folder)
    # A folder that processes share shows the same files to all of them; the first one sends each group.
    taken: set[int] = set()
    mine: list[str] = []
    for number, parts in enumerate(distributed.gather_objects(here)):
        for name, held in parts.items():
            if not taken & set(held):
                taken |= set(held)
                mine += [name] * (number == distributed.rank())
    gathered = []
    for place in range(max(distributed.gather_objects(len(mine)))):
        arrays = None
        if place < len(mine):
            arrays = made[int(mine[place])] if folder is None else load_arrays(folder / mine[place])
        everyone = distributed.gather_objects(arrays)
        gathered += [arrays for arrays in everyone if arrays is not None] if distributed.is_main() else []
    if len(taken) < groups:
        raise RuntimeError(
            f"the feature bank holds {len(taken)} of {groups} groups of images; start again to complete it"
        )
    return gathered
