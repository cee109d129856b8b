"""What the data sets consist of: files, official archives, where they come from and how many images they hold."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dmsa.data.coco import curated_file, image_folders, map_folders
from dmsa.data.listing import list_files
from dmsa.data.voc import AUG_LISTS, sbd_root

COCO_SITE = "cocodataset.org/#download"
STUFF_SITE = "github.com/nightrome/cocostuff (COCO-Stuff 164K, pixel maps)"
VOC_SITE = "host.robots.ox.ac.uk/pascal/VOC/voc2012"
SBD_SITE = "the Semantic Boundaries Dataset page of Berkeley's computer vision group"

FILE_SETS = ("voc", "voc_aug", "coco80", "coco_stuff27")
"""Data sets that are made of official archives."""


SPLIT_IMAGES = {
    "voc": {"train": 1464, "val": 1449},
    "voc_aug": {"train": 10582, "val": 1449},
    "coco80": {"train": 118287, "val": 5000},
    "coco_stuff27": {"train": 118287, "val": 5000},
}
"""Images of every split in the official releases."""
OFFICIAL_MAPS, OFFICIAL_CURATED = 5000, 2175
"""Label maps of val2017, and those on the curated list that IIC, PiCIE and STEGO share."""


@dataclass(frozen=True)
class Archive:
    """An official archive and what is taken out of it."""

    name: str
    site: str
    parts: tuple[tuple[str, str], ...]
    """Pairs of a path in the archive (a file, or a folder with a slash at the end) and where it goes below the root."""
    optional: bool = False


@dataclass(frozen=True)
class Item:
    """A file or folder that a data set needs, or can use."""

    path: Path
    what: str
    suffix: str | None
    """Files with this suffix are counted in a folder; `None`: lines are counted in a list; empty: just a file."""
    official: int | None
    """How many the official release has; `None` if that is not a matter of counting."""
    archive: str
    """Name of the archive that holds it, `-` if none does."""
    site: str
    """Where the archive, or the file itself, comes from."""
    needed: str = "needed"
    """`needed`, or when it is not."""

    def count(self) -> int | None:
        """Return how many files or lines there are, 1 for a plain file, `None` if it is missing."""
        if self.suffix is None:
            if not self.path.is_file():
                return None
            return sum(1 for line in self.path.read_bytes().splitlines() if line.strip())
        if not self.suffix:
            return 1 if self.path.is_file() else None
        return len(list_files(self.path, (self.suffix,), flat=True).files) or None


_VOC = Archive(
    "VOCtrainval_11-May-2012.tar",
    VOC_SITE,
    tuple(
        (f"VOCdevkit/VOC2012/{part}/", f"VOCdevkit/VOC2012/{part}/")
        for part in ("ImageSets/Segmentation", "SegmentationClass", "JPEGImages")
    ),
)
_SBD = Archive(
    "benchmark.tgz",
    SBD_SITE,
    tuple((f"benchmark_RELEASE/dataset/{part}",) * 2 for part in ("train.txt", "val.txt", "cls/")),
)


def archives(name: str) -> list[Archive]:
    """Return the archives of a data set, small ones first."""
    if name == "voc":
        return [_VOC]
    if name == "voc_aug":
        return [_VOC, _SBD]
    instances = tuple((f"annotations/instances_{s}2017.json",) * 2 for s in ("val", "train"))
    return [
        Archive("annotations_trainval2017.zip", COCO_SITE, instances, optional=name == "coco_stuff27"),
        Archive(
            "stuffthingmaps_trainval2017.zip",
            STUFF_SITE,
            tuple((f"{s}2017/", f"stuffthingmaps/{s}2017/") for s in ("val", "train")),
            optional=name == "coco80",
        ),
        *(Archive(f"{s}2017.zip", COCO_SITE, ((f"{s}2017/",) * 2,)) for s in ("val", "train")),
    ]


def _voc_folder(root: Path) -> Path:
    folders = (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012")
    return next((f for f in folders if (f / "JPEGImages").is_dir()), folders[-1])


def items(name: str, root: Path) -> list[Item]:
    """Return what a data set consists of below `root`."""
    if name in ("voc", "voc_aug"):
        voc = _voc_folder(root)
        lists = voc / "ImageSets" / "Segmentation"
        source = (_VOC.name, _VOC.site)
        found = [
            Item(lists / "train.txt", "list of the training images", None, 1464, *source),
            Item(lists / "val.txt", "list of the validation images", None, 1449, *source),
            Item(voc / "JPEGImages", "images", ".jpg", 17125, *source),
            Item(voc / "SegmentationClass", "palette masks", ".png", 2913, *source),
        ]
        if name == "voc_aug":
            sbd = sbd_root(root) or sbd_root(voc) or root / "benchmark_RELEASE" / "dataset"
            source = (_SBD.name, _SBD.site)
            aug_list = next((lists / n for n in AUG_LISTS if (lists / n).is_file()), lists / AUG_LISTS[0])
            without_list, without_sbd = f"not needed with {aug_list.name}", "not needed with SBD"
            found += [
                Item(sbd / "train.txt", "list of SBD's training images", None, 8498, *source, without_list),
                Item(sbd / "val.txt", "list of SBD's validation images", None, 2857, *source, without_list),
                Item(sbd / "cls", "SBD's labels", ".mat", 11355, *source, "not needed with SegmentationClassAug"),
                Item(voc / "SegmentationClassAug", "augmented masks", ".png", None, "-", "your own", without_sbd),
                Item(aug_list, "list of the augmented set", None, 10582, "-", "your own", without_sbd),
            ]
        return found
    official = {f"{split}2017": number for split, number in SPLIT_IMAGES[name].items()}
    annotations, maps, *_ = archives(name)
    found = []
    for split in ("val2017", "train2017"):
        found.append(Item(image_folders(root, split)[0], "images", ".jpg", official[split], f"{split}.zip", COCO_SITE))
        need = "needed" if split == "val2017" else "not needed: labels of training images are only looked at"
        json_need: str | None = need
        map_need = need
        if name == "coco80":
            map_need = "not needed with the instances; labels come from these if they are there"
            json_need = "not needed with the maps" if split == "val2017" else need
        else:
            json_need = None
        if json_need:
            path = root / "annotations" / f"instances_{split}.json"
            found.append(Item(path, "instances", "", None, annotations.name, annotations.site, json_need))
        found.append(
            Item(map_folders(root, split)[0], "label maps", ".png", official[split], maps.name, maps.site, map_need)
        )
    path = curated_file(root, "val2017")
    need = "only for the protocol stego"
    found.append(Item(path, "curated list", None, OFFICIAL_CURATED, "-", "`dmsa prepare` makes it from the maps", need))
    return found
