import json
import shutil

import numpy as np
import pytest
from PIL import Image

from dmsa.config import DataConfig
from dmsa.data import build
from dmsa.data.base import colour_map, table
from dmsa.data.coco import CURATED_FILE, Coco, is_curated
from tests.data import fixtures


def config(root, name, **changes):
    return DataConfig(name=name, root=str(root), size=32, crop=16, **changes)


def test_stuff27_maps_0_to_181_onto_27_groups(tmp_path):
    fixtures.coco(tmp_path)
    ids = np.array([*range(182), 255, 255], dtype=np.uint8).reshape(8, 23).repeat(2, 0)
    fixtures.write_grey(tmp_path / "stuffthingmaps/val2017/000000000001.png", ids)
    Image.new("RGB", (23, 16)).save(tmp_path / "val2017/000000000001.jpg")
    data = build(config(tmp_path, "coco_stuff27"), "val")
    assert (data.num_classes, data.n_things, data.n_stuff, data.things_only) == (27, 12, 15, False)
    label = data.raw(0)[1]
    mapping = {int(k): v for k, v in table("coco_stuff27")["fine_to_coarse"].items()}
    assert [mapping.get(i, 255) for i in ids.ravel().tolist()] == label.ravel().tolist()
    assert label.dtype == np.uint8
    # Known entries: person 0 -> person-things 9, banner 91 -> textile 17, wood 181 -> solid 24.
    assert (mapping[0], mapping[91], mapping[181]) == (9, 17, 24)
    assert sorted(set(mapping.values())) == list(range(27))


def test_coco80_draws_instances_without_maps(tmp_path):
    fixtures.coco(tmp_path, maps=False)
    data = build(config(tmp_path, "coco80"), "val")
    assert (data.num_classes, data.n_things, data.things_only) == (81, 80, True)
    assert data.labels_from == "instances_val2017.json"
    assert len(data) == 3
    label = data.raw(0)[1]
    want = np.zeros((48, 64), dtype=np.uint8)
    want[0:8, 0:8] = want[0:8, 16:24] = 1  # a person in two parts
    want[20:30, 5:15] = data.classes.index("dog")
    want[20:30, 30:40] = data.classes.index("toothbrush")
    want[34:46, 44:60] = 255  # crowd
    want[36:44, 50:56] = 1  # whom the crowd does not hide
    want[0:12, 40:60] = data.classes.index("dining table")
    want[4:8, 44:48] = data.classes.index("cup")
    np.testing.assert_array_equal(label, want)
    assert (data.classes.index("dog"), data.classes.index("toothbrush")) == (17, 80)
    assert (data.raw(1)[1] == 0).all()  # an image without instances is all background


def test_coco80_prefers_maps_as_transfgu_does(tmp_path):
    fixtures.coco(tmp_path)
    data = build(config(tmp_path, "coco80"), "val")
    assert data.labels_from == "stuffthingmaps/val2017"
    np.testing.assert_array_equal(data.raw(0)[1], fixtures.blocks([1, 11, 0, 0, 255]))
    assert Coco(config(tmp_path, "coco80"), "val", labels="instances").raw(0)[1][25, 7] == 17


def test_ids_that_coco_never_used_are_outside_coco80(tmp_path):
    fixtures.coco(tmp_path)
    path = tmp_path / "stuffthingmaps/val2017/000000000002.png"
    fixtures.write_grey(path, fixtures.blocks([0, 11, 25, 200]))
    data = build(config(tmp_path, "coco80"), "val")
    with pytest.raises(ValueError, match=r"000000000002\.png holds ids outside the table: \[11, 25, 200\]"):
        data.raw(1)
    with pytest.raises(ValueError, match=r"000000000002\.png holds ids outside the table: \[200\]; expected 0\.\.181"):
        build(config(tmp_path, "coco_stuff27"), "val").raw(1)


def test_the_layout_of_transfgu_works_too(tmp_path):
    fixtures.coco(tmp_path)
    (tmp_path / "images").mkdir()
    shutil.move(tmp_path / "val2017", tmp_path / "images" / "val2017")
    shutil.move(tmp_path / "stuffthingmaps" / "val2017", tmp_path / "annotations" / "val2017")
    assert len(build(config(tmp_path, "coco_stuff27"), "val")) == 3


def test_training_needs_images_only(tmp_path):
    fixtures.coco(tmp_path, "train2017", maps=False, instances=False)
    data = build(config(tmp_path, "coco_stuff27"), "train")
    assert (data[0]["label"] == 255).all()
    assert data.labels_from is None


def test_missing_files_are_counted_named_and_sourced(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no \.jpg images in .*val2017\. Get val2017\.zip from cocodataset\.org"
    ):
        build(config(tmp_path, "coco80"), "val")
    fixtures.coco(tmp_path)
    (tmp_path / "stuffthingmaps/val2017/000000000003.png").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"1 of 3 label maps of coco_stuff27 val .* 000000000003\.png\. Get stuffthingmaps_trainval2017\.zip",
    ):
        build(config(tmp_path, "coco_stuff27"), "val")
    (tmp_path / "val2017/000000000003.jpg").unlink()
    (tmp_path / "val2017/000000000001.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images of coco_stuff27 val .* 000000000001\.jpg"):
        build(config(tmp_path, "coco_stuff27"), "val")


def test_an_image_of_the_json_that_is_not_there(tmp_path):
    fixtures.coco(tmp_path, maps=False)
    (tmp_path / "val2017/000000000002.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images of coco80 val .* 000000000002\.jpg"):
        build(config(tmp_path, "coco80"), "val")


def test_broken_annotation_files_are_named(tmp_path):
    fixtures.coco(tmp_path, maps=False)
    path = tmp_path / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    category = content["annotations"][0]["category_id"]
    content["annotations"][0]["category_id"] = 12
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"instances_val2017\.json has categories outside the table: \[12\]"):
        build(config(tmp_path, "coco80"), "val")
    content["annotations"][0]["category_id"] = category
    for part, key in (("annotations", "image_id"), ("images", "height")):
        broken = json.loads(json.dumps(content))
        del broken[part][1][key]
        path.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=rf"instances_val2017\.json is not a COCO annotation file: .*'{key}'"):
            build(config(tmp_path, "coco80"), "val")
    content["annotations"][0]["segmentation"] = [[1.0, 2.0]]
    path.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"instances_val2017\.json has an outline of image 000000000001 that cannot be"
    ):
        build(config(tmp_path, "coco80"), "val").raw(0)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"instances_val2017\.json is not a COCO annotation file"):
        build(config(tmp_path, "coco80"), "val")


def test_curated_rule():
    ids = np.full((360, 400), 5, dtype=np.uint8)
    ids[:270] = 100  # exactly three quarters
    assert is_curated(ids)
    ids[269, 0] = 90  # a thing
    assert not is_curated(ids)
    ids[269, 0] = 255  # unlabelled is not stuff
    assert not is_curated(ids)
    assert not is_curated(np.full((359, 800), 100, dtype=np.uint8))
    assert is_curated(np.full((800, 360), 181, dtype=np.uint8))


def test_curated_list_is_needed_and_read(tmp_path):
    fixtures.coco(tmp_path)
    data = build(config(tmp_path, "coco_stuff27"), "val")
    with pytest.raises(FileNotFoundError, match=r"curated list .* is missing; `dmsa prepare --name coco_stuff27`"):
        data.curated()
    path = tmp_path / "curated/val2017" / CURATED_FILE
    path.parent.mkdir(parents=True)
    path.write_text("000000000003\n000000000001\n")
    assert data.curated() == [2, 0]


@pytest.mark.parametrize("name", ["voc", "coco80", "coco_stuff27"])
def test_tables_have_the_agreed_content(name):
    content = table(name)
    if name == "voc":
        np.testing.assert_array_equal(content["palette"], colour_map(21))
        assert content["names"][0::20] == ["background", "tvmonitor"]
        assert len(content["names"]) == content["num_classes"] == 21
    elif name == "coco80":
        assert len(content["names"]) == content["num_classes"] == 81
        categories = content["category_id_to_contiguous"]
        assert sorted(categories.values()) == list(range(1, 81))
        assert (categories["1"], categories["18"], categories["90"]) == (1, 17, 80)
        # A map's id is the category's id minus one.
        maps = content["stuffthingmap_id_to_contiguous"]
        assert {int(k) + 1: v for k, v in maps.items() if int(k) < 91} == {int(k): v for k, v in categories.items()}
        assert {v for k, v in maps.items() if int(k) >= 91} == {0}
    else:
        assert len(content["coarse"]) == 27
        assert [c.rsplit("-", 1)[1] for c in content["coarse"]] == ["things"] * 12 + ["stuff"] * 15
        mapping = content["fine_to_coarse"]
        assert sorted(map(int, mapping)) == list(range(182))
        assert all((v < 12) == (int(k) < 91) for k, v in mapping.items())
        assert [list(mapping.values()).count(k) for k in range(27)] == [
            6, 6, 10, 10, 8, 8, 8, 10, 6, 1, 10, 8, *[list(mapping.values()).count(k) for k in range(12, 27)]
        ]  # fmt: skip
