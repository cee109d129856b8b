import io
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from dmsa import cli
from dmsa.commands.prepare import main
from dmsa.config import DataConfig
from dmsa.data import build, prepare
from dmsa.data.coco import CURATED_FILE
from dmsa.data.prepare import check_member, list_members, unpack
from dmsa.data.sources import Archive
from tests.data import fixtures

ANY = Archive("any", "nowhere", (("in/", "out/"),))


def pack_tar(path, folder, mode="w"):
    """Pack a folder as the official tar files are: with entries for folders too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name in sorted(p.name for p in folder.iterdir()):
            archive.add(folder / name, name)


def pack_zip(path, folder, *tops):
    """Pack the sub-folders `tops` of a folder as the official zip files are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for top in tops:
            for file in sorted((folder / top).rglob("*")):
                archive.write(file, file.relative_to(folder))


@pytest.fixture
def voc(tmp_path):
    """Return the folder of VOC's archive, the root to be filled, and the labels by name."""
    labels = fixtures.voc(tmp_path / "made")
    (tmp_path / "made/VOCdevkit/VOC2012/Annotations").mkdir()
    (tmp_path / "made/VOCdevkit/VOC2012/Annotations/2007_val0.xml").write_text("boxes, of no use here")
    pack_tar(tmp_path / "down/VOCtrainval_11-May-2012.tar", tmp_path / "made")
    return tmp_path / "down", tmp_path / "root", labels


@pytest.fixture
def coco(tmp_path):
    """Return the folder of COCO's archives and the root to be filled; map 1 belongs to the curated list."""
    made = tmp_path / "made"
    for split in ("train2017", "val2017"):
        fixtures.coco(made, split)
    for name, stuff in (("1", 271), ("2", 269)):  # of 360 rows: just above and just below three quarters
        ids = np.zeros((360, 400), dtype=np.uint8)
        ids[:stuff] = 100
        fixtures.write_image(made / f"val2017/{name.zfill(12)}.jpg", 360, 400)
        fixtures.write_grey(made / f"stuffthingmaps/val2017/{name.zfill(12)}.png", ids)
    down = tmp_path / "down"
    for split in ("train2017", "val2017"):
        pack_zip(down / f"{split}.zip", made, split)
    pack_zip(down / "annotations_trainval2017.zip", made, "annotations")
    pack_zip(down / "stuffthingmaps_trainval2017.zip", made / "stuffthingmaps", "train2017", "val2017")
    return down, tmp_path / "root"


def arguments(name, down, root, *more):
    return ["--name", name, "--root", str(root), "--archives", str(down), *more]


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_voc_becomes_usable_and_only_what_is_used_is_unpacked(voc, tmp_path, capsys):
    down, root, labels = voc
    assert main(arguments("voc", down, root)) == 0
    made = contents(tmp_path / "made")
    assert contents(root) == {name: data for name, data in made.items() if "Annotations" not in name}
    text = capsys.readouterr().out
    assert "VOCtrainval_11-May-2012.tar: 12 files unpacked, 0 were there already" in text
    assert "voc: usable" in text
    assert "val   2 images (officially 1449), labels from SegmentationClass" in text
    data = build(DataConfig(name="voc", root=str(root)), "val")
    np.testing.assert_array_equal(data.raw(0)[1], labels["2007_val0"])


def test_voc_aug_unpacks_sbd_too(tmp_path, capsys):
    made = tmp_path / "made"
    fixtures.sbd(made, fixtures.voc(made))
    shutil.copytree(made / "benchmark_RELEASE", tmp_path / "sbd/benchmark_RELEASE")
    shutil.rmtree(made / "benchmark_RELEASE")
    pack_tar(tmp_path / "down/VOCtrainval_11-May-2012.tar", made)
    assert main(arguments("voc_aug", tmp_path / "down", tmp_path / "root")) == 1  # half of it
    text = capsys.readouterr().out
    assert "benchmark.tgz: not in" in text
    assert "train unusable: neither" in text
    pack_tar(tmp_path / "down/benchmark.tgz", tmp_path / "sbd", "w:gz")
    assert main(arguments("voc_aug", tmp_path / "down", tmp_path / "root")) == 0
    text = capsys.readouterr().out
    assert "benchmark.tgz: 8 files unpacked" in text
    assert "train 7 images (officially 10582)" in text
    data = build(DataConfig(name="voc_aug", root=str(tmp_path / "root")), "train")
    assert data.images == 7
    assert set(np.unique(data.raw(data.images - 1)[1])) == {0, 5}


def test_coco_gets_its_curated_list_by_the_rule(coco, capsys):
    down, root = coco
    assert main(arguments("coco_stuff27", down, root)) == 0
    text = capsys.readouterr().out
    assert f"curated list {root / 'curated/val2017' / CURATED_FILE}: 1 of 3 images" in text
    assert (root / "curated/val2017" / CURATED_FILE).read_text() == "000000000001\n"
    data = build(DataConfig(name="coco_stuff27", root=str(root)), "val")
    assert data.curated() == [0]
    assert (root / "annotations/instances_val2017.json").is_file()
    assert len(list((root / "stuffthingmaps/train2017").iterdir())) == 3


def test_coco80_needs_no_maps_and_stuff27_no_instances(coco, capsys):
    down, root = coco
    (down / "stuffthingmaps_trainval2017.zip").rename(down / "later.zip")
    assert main(arguments("coco80", down, root)) == 0
    assert "labels from instances_val2017.json" in capsys.readouterr().out
    assert not (root / "curated").exists()
    assert main(arguments("coco_stuff27", down, root)) == 1
    assert "3 of 3 label maps of coco_stuff27 val are missing" in capsys.readouterr().out
    (down / "later.zip").rename(down / "stuffthingmaps_trainval2017.zip")
    (down / "annotations_trainval2017.zip").unlink()
    assert main(arguments("coco_stuff27", down, root)) == 0


def test_a_second_run_writes_nothing(coco, capsys):
    down, root = coco
    main(arguments("coco_stuff27", down, root))
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    capsys.readouterr()
    assert main(arguments("coco_stuff27", down, root)) == 0
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before
    text = capsys.readouterr().out
    assert "val2017.zip: 0 files unpacked, 3 were there already" in text
    assert "1 of 3 images, as before" in text


def test_nothing_is_replaced_without_force(coco, capsys):
    down, root = coco
    main(arguments("coco_stuff27", down, root))
    want = contents(root)
    (root / "val2017/000000000003.jpg").write_bytes(b"the user's own")
    same_size = root / "val2017/000000000002.jpg"
    same_size.write_bytes(bytes(len(want["val2017/000000000002.jpg"])))
    mine = root / "curated/val2017" / CURATED_FILE
    mine.write_text("000000000002\n")
    capsys.readouterr()
    with pytest.raises(FileExistsError, match=rf"{CURATED_FILE} differs .*\(1 of 3 images\); --force replaces it"):
        main(arguments("coco_stuff27", down, root))
    text = capsys.readouterr().out
    assert "val2017.zip: 0 files unpacked, 2 were there already" in text
    assert "kept 1 files of another size (--force replaces them)" in text
    assert "000000000003.jpg" in text
    assert mine.read_text() == "000000000002\n"
    assert (root / "val2017/000000000003.jpg").read_bytes() == b"the user's own"
    assert main(arguments("coco_stuff27", down, root, "--force")) == 0
    assert contents(root) == want


@pytest.mark.parametrize("name", ["voc", "coco_stuff27"])
def test_an_interrupted_run_leaves_no_half_file_and_goes_on(name, request, monkeypatch, capsys):
    down, root = request.getfixturevalue(name.split("_")[0])[:2]
    copy, copied = shutil.copyfileobj, []

    def stop_at_the_fifth(stream, out, length):
        if len(copied) == 4:
            out.write(stream.read(10))
            raise KeyboardInterrupt
        copied.append(out.name)
        copy(stream, out, length)

    monkeypatch.setattr(prepare.shutil, "copyfileobj", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        main(arguments(name, down, root))
    assert len(contents(root)) == 4
    monkeypatch.setattr(prepare.shutil, "copyfileobj", copy)
    # A run that is killed cannot clean up after itself.
    killed = Path(copied[0]).parent / ".0.jpg.part"
    killed.write_bytes(b"half")
    first = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    assert main(arguments(name, down, root)) == 0
    assert {p: p.stat().st_mtime_ns for p in first} == first
    assert [p for p in root.rglob("*.part")] == [killed]


@pytest.mark.parametrize(
    "name", ["../evil", "in/../../evil", "/etc/evil", "in\\..\\evil", "C:/evil", "in/a/../../../evil"]
)
@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_members_that_lead_out_are_refused_before_anything_is_written(tmp_path, name, kind):
    path = tmp_path / f"archive.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("in/good", b"1")
            archive.writestr(name, b"2")
    else:
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
            for member in ("in/good", name):
                info = tarfile.TarInfo(member)
                info.size = 1
                archive.addfile(info, io.BytesIO(b"1"))
    with pytest.raises(ValueError, match=r"archive\.\S+ has a member .*evil' that leads out of its folder"):
        unpack(path, ANY, tmp_path / "root")
    assert not (tmp_path / "root").exists()
    assert not (tmp_path.parent / "evil").exists()


def test_good_names_pass():
    for name in ("in/good", "./in/good", "in/..good", "in/a.b..c", "in/"):
        check_member(Path("a"), name)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    path = tmp_path / "archive.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("in/link")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(ValueError, match=r"'in/link' that is a link or a device; nothing was unpacked"):
        list_members(path, ANY, tmp_path)


def test_links_in_zip_files_are_refused(tmp_path):
    info = zipfile.ZipInfo("in/link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(ValueError, match="link or a device"):
        list_members(tmp_path / "archive.zip", ANY, tmp_path)


def test_a_folder_that_is_a_link_is_never_written_through(tmp_path):
    """`in` as a link to elsewhere, then `in/file`: the second goes below the root all the same."""
    path = tmp_path / "archive.tar"
    (tmp_path / "elsewhere").mkdir()
    with tarfile.open(path, "w") as archive:
        link = tarfile.TarInfo("in")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "elsewhere")
        archive.addfile(link)
        info = tarfile.TarInfo("in/file")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"1"))
    assert unpack(path, ANY, tmp_path / "root").written == 1
    assert (tmp_path / "root/out/file").read_bytes() == b"1"
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("name", ["voc", "coco_stuff27"])
def test_a_download_that_was_cut_off_is_named(name, request, capsys):
    down, root = request.getfixturevalue(name.split("_")[0])[:2]
    archive = max(down.iterdir(), key=lambda path: path.stat().st_size)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    assert cli.main(["prepare", *arguments(name, down, root)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"dmsa prepare: {archive} cannot be read: ")
    assert error.endswith("download it again\n")
    assert len(error.splitlines()) == 1
    archive.write_bytes(whole)
    assert main(arguments(name, down, root)) == 0


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_tar_files_may_end_nowhere_but_at_their_end(tmp_path, mode):
    path = tmp_path / "archive.tar"
    with tarfile.open(path, mode) as archive:
        for name in ("in/a", "in/b"):
            info = tarfile.TarInfo(name)
            info.size = 512
            archive.addfile(info, io.BytesIO(bytes(range(256)) * 2))
    assert len(list_members(path, ANY, tmp_path / "root")) == 2
    whole = path.read_bytes()
    # Between the members, in the second header, in the second member, before the end; any place of the packed one.
    for cut in (1024, 1200, 1600, 2048) if mode == "w" else range(20, len(whole), 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"archive\.tar cannot be read: .*; download it again"):
            unpack(path, ANY, tmp_path / "root")
    garbled = bytearray(whole)
    garbled[1024 + 150 if mode == "w" else -6] ^= 0xFF  # the second header, the checksum
    path.write_bytes(garbled)
    with pytest.raises(ValueError, match=r"archive\.tar cannot be read: .*; download it again"):
        unpack(path, ANY, tmp_path / "root")
    assert not (tmp_path / "root").exists()


def test_a_broken_member_is_named_and_leaves_nothing(tmp_path):
    path = tmp_path / "archive.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("in/a", b"first one")
        archive.writestr("in/b", b"second one")
    path.write_bytes(path.read_bytes().replace(b"second one", b"sekond one"))
    with pytest.raises(ValueError, match=r"archive\.zip cannot be read: Bad CRC-32 for file 'in/b'; download it again"):
        unpack(path, ANY, tmp_path / "root")
    assert contents(tmp_path / "root") == {"out/a": b"first one"}


def test_a_full_disk_is_not_the_archives_fault(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("in/a", b"first one")

    def full(stream, out, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match="No space left on device"):
        unpack(tmp_path / "archive.zip", ANY, tmp_path / "root")
    assert contents(tmp_path / "root") == {}


def test_another_archive_under_the_name(voc):
    down, root, _ = voc
    with tarfile.open(down / "VOCtrainval_11-May-2012.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("VOCdevkit/VOC2007/README"))
    with pytest.raises(
        ValueError, match=r"has none of VOCdevkit/VOC2012/ImageSets/Segmentation/.*not the official archive\?"
    ):
        main(arguments("voc", down, root))


def test_no_archives_says_where_to_get_them(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"none of the archives of voc is in .*VOCtrainval_11-May-2012\.tar from"
    ):
        main(arguments("voc", tmp_path, tmp_path / "root"))
    with pytest.raises(
        FileNotFoundError, match=r"stuffthingmaps_trainval2017\.zip from .*val2017\.zip from cocodataset"
    ):
        main(arguments("coco_stuff27", tmp_path, tmp_path / "root"))
    assert not (tmp_path / "root").exists()


def test_archives_may_lie_in_the_root_or_be_gone_afterwards(voc, capsys):
    down, _, _ = voc
    assert main(["--name", "voc", "--root", str(down)]) == 0
    (down / "VOCtrainval_11-May-2012.tar").unlink()
    assert main(["--name", "voc", "--root", str(down)]) == 0  # nothing left to unpack: looks and counts


def test_a_file_that_the_archive_lacks_makes_it_unusable(voc, tmp_path, capsys):
    down, root, _ = voc
    (tmp_path / "made/VOCdevkit/VOC2012/SegmentationClass/2007_val1.png").unlink()
    pack_tar(down / "VOCtrainval_11-May-2012.tar", tmp_path / "made")
    assert main(arguments("voc", down, root)) == 1
    text = capsys.readouterr().out
    assert "voc: NOT usable" in text
    assert "1 of 2 labels of voc val are missing in" in text


def test_a_corrupt_map_stops_the_curated_list(coco, capsys):
    down, root = coco
    main(arguments("coco_stuff27", down, root))
    path = root / "stuffthingmaps/val2017/000000000002.png"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"cannot decode .*000000000002\.png"):
        main(arguments("coco_stuff27", down, root))
    assert main(arguments("coco_stuff27", down, root, "--force")) == 0


def test_help_reads(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "dmsa prepare" in text
    assert all(word in text for word in ("--name", "--root", "--archives", "--force", "VOCtrainval_11-May-2012.tar"))
    with pytest.raises(SystemExit) as stop:
        main(["--name", "voc"])
    assert stop.value.code == 2
