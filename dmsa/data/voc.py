"""PASCAL VOC 2012, and VOC 2012 Augmented with the labels of SBD (`.mat` files or PNGs).

Expected below the root (or below `VOCdevkit/VOC2012` in it): `JPEGImages/`, `SegmentationClass/`,
`ImageSets/Segmentation/{train,val}.txt`. The augmented set also needs SBD's `benchmark_RELEASE/dataset` beside it,
or `SegmentationClassAug/` with PNGs and a list `trainaug.txt`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dmsa.config import DataConfig
from dmsa.data.base import IGNORE, SegmentationData, label_lookup, map_label, root_of, table
from dmsa.data.images import CorruptImageError, read_mask
from dmsa.data.listing import list_files, read_list, refuse_twice, require_files, thin
from dmsa.data.transforms import TrainTransform, ValTransform

VOC_SOURCE = (
    "Get VOCtrainval_11-May-2012.tar (2 GB) from host.robots.ox.ac.uk/pascal/VOC/voc2012, "
    "then run `dmsa prepare --name voc`"
)
SBD_SOURCE = (
    "Get SBD's benchmark.tgz (1.4 GB) from the Semantic Boundaries Dataset page of Berkeley's computer vision group, "
    "then run `dmsa prepare --name voc_aug`; or put PNG labels into SegmentationClassAug/"
)
AUG_LISTS = ("trainaug.txt", "train_aug.txt")


def voc_root(root: str | Path) -> Path:
    """Return the folder of `root` that holds `JPEGImages`: itself, `VOC2012` or `VOCdevkit/VOC2012`.

    Raises:
        FileNotFoundError: there is none.
    """
    root = Path(root)
    for folder in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (folder / "JPEGImages").is_dir():
            return folder
    raise FileNotFoundError(
        f"no JPEGImages/ in {root}, {root / 'VOC2012'} or {root / 'VOCdevkit' / 'VOC2012'}. {VOC_SOURCE}"
    )


def sbd_root(root: str | Path) -> Path | None:
    """Return SBD's folder with `cls/` in or beside the VOC folder of `root`, or `None`."""
    root = Path(root)
    for folder in (root, root.parent, root.parent.parent):
        for name in ("benchmark_RELEASE/dataset", "sbd", "SBD"):
            if (folder / name / "cls").is_dir():
                return folder / name
    return None


def augmented_list(voc: Path, sbd: Path | None) -> list[str]:
    """Return the 10,582 images of `train_aug`: VOC train and all of SBD, without VOC val, sorted.

    A list `trainaug.txt` in `ImageSets/Segmentation` takes precedence.

    Raises:
        FileNotFoundError: there is neither the list nor SBD.
    """
    lists = voc / "ImageSets" / "Segmentation"
    for name in AUG_LISTS:
        if (lists / name).is_file():
            # DeepLab's list has lines "/JPEGImages/x.jpg /SegmentationClassAug/x.png".
            names = [Path(entry).stem for entry in read_list(lists / name)]
            refuse_twice(names, lists / name)
            return names
    if sbd is None:
        raise FileNotFoundError(f"neither {lists / AUG_LISTS[0]} nor benchmark_RELEASE/dataset/cls. {SBD_SOURCE}")
    missing = [name for name in ("train.txt", "val.txt") if not (sbd / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{' and '.join(missing)} missing in {sbd}. {SBD_SOURCE}")
    union = {*read_list(sbd / "train.txt"), *read_list(sbd / "val.txt"), *read_list(lists / "train.txt")}
    return sorted(union - set(read_list(lists / "val.txt")))


def read_sbd(path: Path) -> np.ndarray:
    """Return the class ids of an SBD `cls/*.mat` file, uint8 `[H, W]`.

    Raises:
        FileNotFoundError: it is not there.
        CorruptImageError: it is not a MATLAB file with `GTcls.Segmentation`.
    """
    from scipy.io import loadmat

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. {SBD_SOURCE}")
    try:
        ids = loadmat(path)["GTcls"]["Segmentation"][0, 0]
        if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.min(initial=0) < 0 or ids.max(initial=0) > IGNORE:
            raise ValueError(f"expected ids 0..255 [H, W], got {ids.shape=} {ids.dtype=}")
    except Exception as error:  # scipy raises a dozen kinds for broken files, down to TypeError and ZeroDivisionError
        raise CorruptImageError(path, f"{type(error).__name__}: {error}") from error
    return np.ascontiguousarray(ids, dtype=np.uint8)


def _files(folder: Path, suffix: str) -> set[str]:
    return set(list_files(folder, (suffix,), flat=True).files)


class Voc(SegmentationData):
    """VOC 2012 (`name="voc"`) or VOC 2012 Augmented (`"voc_aug"`): 20 things and the background.

    Args:
        config: `name`, `root`, `repeat`, `train_images`, `val_images` and what the transforms use.
        split: `train` (1,464 images, or 10,582) or `val` (1,449).
        seed: seed of the augmentation.

    Raises:
        ValueError: no root.
        FileNotFoundError: images, labels or lists are missing.
    """

    def __init__(self, config: DataConfig, split: str, seed: int = 0) -> None:
        root = root_of(config, f"the folder of VOC 2012 ({VOC_SOURCE})")
        self.root = voc_root(root)
        classes = table("voc")
        self._lut = label_lookup({i: i for i in range(classes["num_classes"])})
        lists = self.root / "ImageSets" / "Segmentation"
        require_files("split lists", ["train.txt", "val.txt"], _files(lists, ".txt"), lists, VOC_SOURCE)
        augmented = config.name == "voc_aug" and split == "train"
        self._sbd = (sbd_root(root) or sbd_root(self.root)) if augmented else None
        names = augmented_list(self.root, self._sbd) if augmented else read_list(lists / f"{split}.txt")
        total = len(names)
        names = thin(names, config.train_images if split == "train" else config.val_images)
        require_files(
            f"images of {config.name} {split}",
            [f"{name}.jpg" for name in names],
            _files(self.root / "JPEGImages", ".jpg"),
            self.root / "JPEGImages",
            VOC_SOURCE,
        )
        labels_from = self._check_labels(names, config.name, split, augmented)
        super().__init__(
            name=config.name,
            split=split,
            classes=classes["names"],
            n_things=classes["num_classes"] - 1,
            things_only=True,
            names=names,
            transform=TrainTransform(config, seed) if split == "train" else ValTransform(config),
            labels_from=labels_from,
            palette=np.array(classes["palette"], dtype=np.uint8),
            repeat=config.repeat if split == "train" else 1,
            total=total,
        )

    def _check_labels(self, names: list[str], name: str, split: str, augmented: bool) -> str | None:
        """Return where labels come from; `None` for a training split that has none at all."""
        folders = {"SegmentationClass": ".png"}
        if augmented:
            folders["SegmentationClassAug"] = ".png"
        present = {Path(f).stem for folder in folders for f in _files(self.root / folder, ".png")}
        sources = [folder for folder in folders if (self.root / folder).is_dir()]
        if self._sbd is not None:
            present |= {Path(f).stem for f in _files(self._sbd / "cls", ".mat")}
            sources.append("SBD cls/*.mat")
        if split == "train" and present.isdisjoint(names):
            return None
        source = SBD_SOURCE if augmented else VOC_SOURCE
        require_files(f"labels of {name} {split}", names, present, self.root / "SegmentationClass", source)
        return ", ".join(sources)

    def image_path(self, index: int) -> Path:
        return self.root / "JPEGImages" / f"{self.image_name(index)}.jpg"

    def read_label(self, index: int) -> np.ndarray | None:
        """Return VOC's own label where there is one, else the augmented PNG, else SBD's."""
        if self.labels_from is None:
            return None
        name = self.image_name(index)
        for folder in ("SegmentationClass", "SegmentationClassAug"):
            path = self.root / folder / f"{name}.png"
            if path.is_file():
                return map_label(read_mask(path), self._lut, path)
        if self._sbd is None:
            raise FileNotFoundError(f"{self.root / 'SegmentationClass' / name}.png is missing. {VOC_SOURCE}")
        path = self._sbd / "cls" / f"{name}.mat"
        return map_label(read_sbd(path), self._lut, path)
