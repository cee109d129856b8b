"""`dmsa doctor`: look at a data root and say what is there, what is missing and where it comes from."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from dmsa.data.doctor import describe, examine
from dmsa.data.sources import FILE_SETS


@dataclass(frozen=True)
class DoctorOptions:
    """Look at a data root: what is there, what is missing, where it comes from, how many images each split has.

    Nothing is written. `dmsa doctor DIR` is short for `dmsa doctor --root DIR`. The exit status is 0 if both splits of
    the data set can be used; without --name, if those of any data set can.
    """

    root: str | None = None
    """Folder of the data set."""
    name: Literal["shapes", "voc", "voc_aug", "coco80", "coco_stuff27", "folder"] | None = None
    """Data set; if unset, every one that is made of official archives."""
    decode: bool = False
    """Also decode every image and label of both splits, and name the broken ones."""
    format: Literal["text", "json"] = "text"
    """What is printed."""


def main(argv: list[str]) -> int:
    """Run `dmsa doctor` with `argv`; the exit status is 0 if the data set (without `--name`: any) is usable.

    Raises:
        ValueError: no root.
        FileNotFoundError: there is no such folder.
    """
    import tyro

    # `dmsa doctor DIR` is short for `dmsa doctor --root DIR`.
    argv = ["--root", *argv] if argv and not argv[0].startswith("-") else argv
    options = tyro.cli(DoctorOptions, args=argv, prog="dmsa doctor")
    if options.root is None and options.name != "shapes":
        raise ValueError("expected --root, the folder of the data set (only `--name shapes` does without)")
    if options.root is not None and not Path(options.root).is_dir():
        raise FileNotFoundError(f"there is no folder {options.root}; `dmsa prepare --help` tells how to fill one")
    names = FILE_SETS if options.name is None else (options.name,)
    findings = [examine(name, options.root, options.decode) for name in names]
    usable = any(finding.usable for finding in findings)
    if options.name is None:
        # Of a root that holds one family of data sets, the others' missing files are of no interest.
        begun = [finding for finding in findings if finding.begun]
        findings = begun or findings
    if options.format == "json":
        content = [{**asdict(finding), "usable": finding.usable} for finding in findings]
        print(json.dumps(content, indent=1))
    else:
        print("\n\n".join(describe(finding) for finding in findings))
    return 0 if usable else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
