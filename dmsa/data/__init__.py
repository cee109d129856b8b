"""Data sets; every one yields the same sample dict."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dmsa.config import DataConfig
    from dmsa.data.base import SegmentationData

SPLITS = ("train", "val")


def build(config: DataConfig, split: str, seed: int = 0) -> SegmentationData:
    """Return the data set that `config` names.

    Args:
        config: what to load; `config.root` is needed by every data set but `shapes`.
        split: `train` (augmented crops) or `val` (squashed images with labels).
        seed: seed of the augmentation, and of the drawing of `shapes`, >= 0.

    Raises:
        ValueError: unknown data set or split.
        FileNotFoundError: files are missing; the message names the first few and where they come from.
    """
    if split not in SPLITS:
        raise ValueError(f"expected split to be one of {SPLITS}, got {split=}")
    if config.name == "shapes":
        from dmsa.data.shapes import Shapes

        return Shapes(config, split, seed)
    if config.name in ("voc", "voc_aug"):
        from dmsa.data.voc import Voc

        return Voc(config, split, seed)
    if config.name in ("coco80", "coco_stuff27"):
        from dmsa.data.coco import Coco

        return Coco(config, split, seed)
    if config.name == "folder":
        from dmsa.data.folder import Folder

        return Folder(config, split, seed)
    raise ValueError(
        f"expected one of 'shapes', 'voc', 'voc_aug', 'coco80', 'coco_stuff27', 'folder', got {config.name=}"
    )
