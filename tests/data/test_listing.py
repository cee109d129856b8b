import os
import re
import socket

import numpy as np
import pytest

from dmsa.config import DataConfig
from dmsa.data import build
from dmsa.data.folder import read_classes
from dmsa.data.listing import IMAGE_SUFFIXES, by_stem, list_files, read_lines, read_list
from tests.data import fixtures


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


# --- folders ---------------------------------------------------------------------------------------------------


def test_everything_is_listed_or_said_to_be_left_out(tmp_path):
    folder = tmp_path / "photos"
    for name in (
        "a.jpg",
        "B.JPG",
        "c.jfif",
        "d.Gif",
        "e.png/f.tiff",
        "deep/er/g.jpeg",
        ".git/h.jpg",
        "._a.jpg",
        "i.HEIC",
    ):
        touch(folder / name)
    for name in ("j.heic", "notes.txt", "README"):
        touch(folder / name)
    touch(tmp_path / "elsewhere/k.png")
    os.symlink(tmp_path / "elsewhere", folder / "linked")
    os.symlink(folder / "a.jpg", folder / "l.jpg")
    os.symlink(folder, folder / "deep/loop")
    os.symlink(tmp_path / "gone.jpg", folder / "m.jpg")
    os.symlink(folder / "itself.jpg", folder / "itself.jpg")
    os.symlink(folder / "deep", folder / "again")  # under its own name it comes first
    open(os.fsencode(folder) + b"/caf\xe9.jpg", "wb").close()
    touch(folder / "o\np.jpg")
    with socket.socket(socket.AF_UNIX) as plug:
        plug.bind(str(folder / "n.png"))
    listing = list_files(folder, IMAGE_SUFFIXES)
    assert listing.files == [
        "B.JPG",
        "a.jpg",
        "c.jfif",
        "d.Gif",
        "deep/er/g.jpeg",
        "e.png/f.tiff",
        "l.jpg",
        "linked/k.png",
    ]
    assert listing.left_out == {
        "hidden": ["._a.jpg", ".git"],
        "linked to a folder that is listed already": ["again", "deep/loop"],
        "linked to nothing": ["itself.jpg", "m.jpg"],
        "that are no files": ["n.png"],
        "with a control character in the name": ["o\\np.jpg"],
        "with a name that is not UTF-8": ["caf\\xe9.jpg"],
        "with the ending .HEIC": ["i.HEIC"],
        "with the ending .heic": ["j.heic"],
        "with the ending .txt": ["notes.txt"],
        "without an ending": ["README"],
    }
    (note,) = listing.notes()
    assert note.startswith(
        f"left out of {folder}: 2 hidden (._a.jpg, .git); 2 linked to a folder that is listed already"
    )


def test_what_belongs_to_others_is_not_spoken_of(tmp_path):
    for name in ("a.png", "masks/a.png", "classes.txt", "deep/masks/b.png"):
        touch(tmp_path / name)
    listing = list_files(tmp_path, (".png",), skip=("masks", "classes.txt"))
    assert (listing.files, listing.notes()) == (["a.png", "deep/masks/b.png"], [])
    assert list_files(tmp_path / "absent", (".png",)).files == []


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    touch(tmp_path / "a.png")
    touch(tmp_path / "closed/b.png")
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("closed/"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", lambda path: scandir(f"{path}/"))  # the super-user may read anything
    listing = list_files(tmp_path, (".png",))
    assert listing.files == ["a.png"]
    assert listing.left_out == {"that cannot be read: Permission denied": ["closed"]}


def test_official_folders_are_flat_and_exact(tmp_path):
    for name in ("a.jpg", "b.JPG", "c.jpg/d.jpg"):
        touch(tmp_path / name)
    listing = list_files(tmp_path, (".jpg",), flat=True)
    assert (listing.files, listing.left_out) == (["a.jpg"], {"with the ending .JPG": ["b.JPG"]})


def test_two_files_of_one_name():
    assert by_stem(["a.b.png", "x/a.png"], "somewhere", "masks") == {"a.b": "a.b.png", "x/a": "x/a.png"}
    with pytest.raises(ValueError, match=r"masks in somewhere differ only by their ending, a\.PNG, a\.png: keep one"):
        by_stem(["a.PNG", "a.png", "b.png"], "somewhere", "masks")


def test_accents_may_be_composed_or_not(tmp_path):
    image, mask = "caf\u00e9", "cafe\u0301"
    fixtures.write_image(tmp_path / f"images/{image}.jpg")
    fixtures.write_grey(tmp_path / f"masks/{mask}.png", fixtures.blocks([0, 1]))
    data = build(DataConfig(name="folder", root=str(tmp_path)), "val")
    np.testing.assert_array_equal(data.raw(0)[1], fixtures.blocks([0, 1]))
    fixtures.write_grey(tmp_path / f"masks/{image}.png", fixtures.blocks([0, 1]))
    with pytest.raises(ValueError, match=r"masks in .* differ only"):
        build(DataConfig(name="folder", root=str(tmp_path)), "val")


def test_images_in_linked_folders_train(tmp_path):
    fixtures.write_image(tmp_path / "disk/a.jpg")
    (tmp_path / "root/images").mkdir(parents=True)
    os.symlink(tmp_path / "disk", tmp_path / "root/images/mine")
    touch(tmp_path / "root/images/._a.jpg")
    data = build(DataConfig(name="folder", root=str(tmp_path / "root"), size=16, crop=8), "train")
    assert [data.image_name(i) for i in range(data.images)] == ["mine/a"]
    assert data[0]["image"].shape == (3, 8, 8)
    assert data.left_out == [f"left out of {tmp_path}/root/images: 1 hidden (._a.jpg)"]


def test_one_coco_folder_is_read_and_the_other_named(tmp_path):
    fixtures.coco(tmp_path)
    fixtures.write_image(tmp_path / "images/val2017/9.jpg")
    fixtures.write_grey(tmp_path / "stuffthingmaps/val2017/9.png", fixtures.blocks([0]))
    for name in [f"{i:012d}" for i in range(1, 4)]:
        (tmp_path / f"stuffthingmaps/val2017/{name}.png").unlink()
    touch(tmp_path / "images/val2017/10.JPG")
    data = build(DataConfig(name="coco_stuff27", root=str(tmp_path)), "val")
    assert data.images == 1
    assert data.left_out == [
        f"left out of {tmp_path}/images/val2017: 1 with the ending .JPG (10.JPG)",
        f"left out: {tmp_path}/val2017, since there is {tmp_path}/images/val2017",
    ]


# --- lists -----------------------------------------------------------------------------------------------------

TEXT = "background\nWände\nمی‌رود\n"  # a Persian word needs its joiner


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("tail", ["", "  \n\n\t\n"])
def test_lists_as_editors_save_them(tmp_path, encoding, ends, tail):
    path = tmp_path / "classes.txt"
    path.write_bytes((TEXT + tail).replace("\n", ends).encode(encoding))
    assert read_lines(path) == TEXT.split()
    assert read_classes(path) == (TEXT.split(), 2, True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("cat\ndog​\n".encode(), r"invisible character U\+200B in line 2, 'dog\\u200b'; remove it"),
        ("﻿﻿cat\n".encode(), r"invisible character U\+FEFF in line 1"),
        ("cat\n".encode("utf-16-le"), r"invisible character U\+0000 in line 1"),
        ("café\n".encode("latin-1"), "is not a text file in UTF-8"),
        ("café\n".encode("utf-16")[:-1], "is not a text file in UTF-8"),
    ],
)
def test_lists_that_are_not_what_they_seem(tmp_path, content, message):
    path = tmp_path / "classes.txt"
    path.write_bytes(content)
    for read in (read_list, read_classes):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
            read(path)


def test_a_list_names_nothing_twice(tmp_path):
    path = tmp_path / "val.txt"
    path.write_text("a 1\n\nb\na 1\n")
    with pytest.raises(ValueError, match=r"val\.txt names a twice"):
        read_list(path)
    path.write_text("a 1\n\nb\n")
    assert read_list(path) == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat\n\ndog\n", "has no name in line 2; expected one for every id"),
        ("\ncat\ndog\n", "has no name in line 1"),
        ("cat\nCat\n", "names cat twice"),
        ("cat\nbackground\n", r"has a background that is not the first class; expected it in line 1"),
        ("dog, small\n", "has kinds small; expected `thing` or `stuff` after the last comma"),
    ],
)
def test_class_names_that_would_change_the_classes(tmp_path, text, message):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"classes\.txt {message}"):
        read_classes(path)


def test_commas_and_capitals_in_class_names(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("house, brick, thing\nsky, stuff\n")
    assert read_classes(path) == (["house, brick", "sky"], 1, False)
    path.write_text("Background\ncell,\n")
    assert read_classes(path) == (["background", "cell"], 1, True)
