"""`dmsa prepare`: unpack the official archives into the layout that the data sets expect, and make the curated list."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dmsa.data.coco import map_folders
from dmsa.data.doctor import describe, examine
from dmsa.data.listing import few, list_files
from dmsa.data.prepare import curate, unpack
from dmsa.data.sources import archives, items


@dataclass(frozen=True)
class PrepareOptions:
    """Unpack the official archives into the expected layout, make the curated list, verify the counts.

    Download the archives first (nothing is downloaded here) and put them into one folder under their own names:
    VOCtrainval_11-May-2012.tar for voc, that and SBD's benchmark.tgz for voc_aug, {val,train}2017.zip and
    annotations_trainval2017.zip or stuffthingmaps_trainval2017.zip for coco80, {val,train}2017.zip and
    stuffthingmaps_trainval2017.zip for coco_stuff27. An interrupted run goes on where it stopped when started again.
    """

    name: Literal["voc", "voc_aug", "coco80", "coco_stuff27"]
    """Data set."""
    root: str
    """Folder of the data set; made if it does not exist."""
    archives: str | None = None
    """Folder of the downloaded archives; the root if unset."""
    force: bool = False
    """Unpack and replace files that are there already, and an existing curated list."""


def main(argv: list[str]) -> int:
    """Run `dmsa prepare` with `argv`; the exit status is 0 if the data set is usable afterwards.

    Raises:
        FileNotFoundError: none of the archives is there, and nothing was unpacked before.
        ValueError: an archive is broken or unsafe.
        FileExistsError: another curated list is there already.
    """
    import tyro

    options = tyro.cli(PrepareOptions, args=argv, prog="dmsa prepare")
    root = Path(options.root)
    folder = root if options.archives is None else Path(options.archives)
    specs = archives(options.name)
    present = {spec.name: folder / spec.name for spec in specs if (folder / spec.name).is_file()}
    if not present and not any(item.count() for item in items(options.name, root)):
        wanted = "; ".join(f"{spec.name} from {spec.site}" for spec in specs if not spec.optional)
        raise FileNotFoundError(f"none of the archives of {options.name} is in {folder}. Download {wanted}")
    for spec in specs:
        if spec.name not in present:
            print(f"{spec.name}: not in {folder} ({spec.site})")
            continue
        done = unpack(present[spec.name], spec, root, options.force)
        print(f"{spec.name}: {done.written} files unpacked, {done.present} were there already")
        if done.kept:
            print(f"  kept {len(done.kept)} files of another size (--force replaces them): {few(done.kept)}")
    if options.name.startswith("coco") and list_files(map_folders(root, "val2017")[0], (".png",), flat=True).files:
        print(curate(root, "val2017", options.force))
    finding = examine(options.name, str(root))
    print(describe(finding))
    return 0 if finding.usable else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
