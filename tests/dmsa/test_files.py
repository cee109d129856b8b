import os
import re

import pytest

from dmsa.files import claim_outputs
from dmsa.pretrain.config import PretrainConfig
from dmsa.pretrain.run import pretrain
from dmsa.training.run import RunFolder


def test_outputs_are_claimed_in_a_folder_that_is_made(tmp_path):
    paths = claim_outputs(tmp_path / "new/deep", ["a.png", "b.png"], inputs=[tmp_path / "a.png"])
    assert paths == [tmp_path / "new/deep/a.png", tmp_path / "new/deep/b.png"]
    assert list((tmp_path / "new/deep").iterdir()) == []


def test_two_outputs_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}/new/a.png: several inputs")):
        claim_outputs(tmp_path / "new", ["a.png", "b.png", "./a.png"], force=True)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("how", ["itself", "symbolic link", "hard link", "another way", "a way to be made"])
def test_an_input_is_never_replaced(tmp_path, how):
    photo = tmp_path / "photos/a.png"
    photo.parent.mkdir()
    photo.write_bytes(b"pixels")
    out = tmp_path / "out"
    ways = {"itself": "photos", "another way": "photos/../photos", "a way to be made": "new/../photos"}
    if how in ways:
        out = tmp_path / ways[how]
    else:
        out.mkdir()
        (os.symlink if how == "symbolic link" else os.link)(photo, out / "a.png")
    for force in (False, True):
        with pytest.raises(ValueError, match=rf"--out='{out}' would replace what is read: {photo}"):
            claim_outputs(out, ["a.png"], inputs=[photo], force=force)


def test_what_is_there_stays_unless_forced(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"old")
    os.symlink(tmp_path / "nowhere", tmp_path / "c.png")
    with pytest.raises(FileExistsError, match=r"a\.png and 2 more: there already; --force"):
        claim_outputs(tmp_path, ["a.png", "b.png", "c.png", "d.png"])
    assert len(claim_outputs(tmp_path, ["a.png", "c.png"], force=True)) == 2
    (tmp_path / "e.png").mkdir()
    with pytest.raises(FileExistsError, match=r"e\.png: a folder, where a file is to be written"):
        claim_outputs(tmp_path, ["e.png"], force=True)


def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match=r"--out='.*file' cannot be made: there is a file of this name"):
        claim_outputs(tmp_path / "file", ["a"])
    with pytest.raises(OSError, match=r"--out='.*file/below' cannot be made: Not a directory"):
        claim_outputs(tmp_path / "file/below", ["a"])
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the super-user may write anywhere
    with pytest.raises(PermissionError, match=r"--out='.*' is not writable"):
        claim_outputs(tmp_path, ["a"])


def test_a_run_or_pretraining_does_not_replace_files_of_others(tmp_path):
    for name in ("report.md", "encoder.safetensors", "photo.jpg"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=r"report\.md: there already; no run made them, choose another --out"):
        RunFolder(tmp_path)
    with pytest.raises(FileExistsError, match=r"encoder\.safetensors: there already; no run made them"):
        pretrain(PretrainConfig(out=str(tmp_path), steps=1, report_pictures=0))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        ("report.md", "encoder.safetensors", "photo.jpg"), "mine"
    )
    RunFolder(tmp_path / "new").close()
    (tmp_path / "new/report.md").write_text("the run's")
    RunFolder(tmp_path / "new").close()
