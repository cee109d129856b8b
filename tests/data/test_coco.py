import json
import shutil

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from dmsa.config import DataConfig
from dmsa.data import build, outlines
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


# --- annotations that are not what they should be ----------------------------------------------------------------

TRIANGLE = [[1, 1, 30, 1, 1, 30]]


def annotated(root, segmentation=None, images=None, height=40, width=50, **changes):
    """Write one image with one person, as `changes` have it (`...` leaves a key out), and build the data set."""
    fixtures.write_image(root / "val2017/1.jpg", height, width)
    entry = {"id": 7, "image_id": 1, "category_id": 1, "area": 100, "segmentation": segmentation or TRIANGLE, **changes}
    content = {
        "images": images or [{"id": 1, "file_name": "1.jpg", "height": height, "width": width}],
        "annotations": [{key: value for key, value in entry.items() if value is not ...}],
    }
    (root / "annotations").mkdir(parents=True)
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content))
    return build(DataConfig(name="coco80", root=str(root), size=16, crop=8), "val")


BAD_OUTLINES = {
    "short": ({"size": [40, 50], "counts": [0, 100]}, "2 run lengths of 100 pixels in all, expected 2000"),
    "long": ({"size": [40, 50], "counts": [0, 2001]}, "2 run lengths of 2001 pixels in all, expected 2000"),
    "no runs": ({"size": [40, 50], "counts": []}, "0 run lengths of 0 pixels in all"),
    "empty text": ({"size": [40, 50], "counts": ""}, "0 run lengths of 0 pixels in all"),
    "negative": ({"size": [40, 50], "counts": [-100, 2100]}, r"run lengths \[-100, 2100\]; expected integers"),
    "fractions": ({"size": [40, 50], "counts": [0.0, 2000.0]}, "expected integers of at least 0"),
    "null": ({"size": [40, 50], "counts": None}, "run lengths None"),
    "other size": ({"size": [50, 40], "counts": [0, 2000]}, r"run lengths of size \[50, 40\]"),
    "no size": ({"counts": [0, 2000]}, "run lengths of size None"),
    "no counts": ({"size": [40, 50]}, "expected polygons, or run lengths with `counts`"),
    "cut text": ({"size": [40, 50], "counts": "0T"}, "that end within a number"),
    "other text": ({"size": [40, 50], "counts": "0\n"}, r"with the character '\\n'"),
    "short text": ({"size": [40, 50], "counts": "04"}, "2 run lengths of 4 pixels in all"),
    "odd": ([[1, 1, 9, 1, 9, 9, 1]], "expected x and y of three points at least"),
    "two points": ([[1, 1, 9, 9]], "expected x and y of three points at least"),
    "empty": ([[]], "expected x and y of three points at least"),
    "flat": ([1, 1, 9, 1, 9, 9], "polygon 1; expected x and y"),
    "words": ([[1, 1, 9, 1, 9, "9"]], "expected numbers"),
    "null point": ([[1, 1, 9, 1, 9, None]], "expected numbers"),
    "far": ([[0, 0, 1e8, 0, 1e8, 1e8, 0, 1e8]], "expected points of the image"),
    "huge": ([[0, 0, 10**400, 0, 9, 9]], "expected points of the image"),
    "NaN": ([[0, 0, float("nan"), 0, 10, 10]], "expected points of the image"),
    "infinite": ([[0, 0, float("inf"), 0, 10, 10]], "expected points of the image"),
    "endless": ([[0, 0, 50, 40] * 1000], "of 2000 points; expected points of the image"),
}


@pytest.mark.parametrize("kind", BAD_OUTLINES)
def test_outlines_that_do_not_fit_their_image(tmp_path, kind):
    outline, message = BAD_OUTLINES[kind]
    data = annotated(tmp_path, outline)
    with pytest.raises(
        ValueError,
        match=rf"instances_val2017\.json has an outline of image 1 that cannot be .* 40 x 50 pixels: .*{message}",
    ):
        data.read_label(0)


def test_outlines_that_fit(tmp_path):
    mask = np.zeros((40, 50), np.uint8)
    mask[3:20, 5:30] = np.random.default_rng(0).integers(0, 2, (17, 25))
    packed = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[2], mask.ravel(order="F"), [2]])))).tolist()
    assert outlines.unpack_runs(packed) == runs
    for counts in (packed, runs):
        np.testing.assert_array_equal(outlines.draw_outline({"size": [40, 50], "counts": counts}, 40, 50), mask == 1)
    outside = outlines.draw_outline([[-3, -3, 60, -3, 60, 20, -3, 20]], 40, 50)  # annotators leave the image a little
    assert outside[:20].all()
    assert not outside[20:].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"area": None}, r"with id=7, image_id=1 has area=None; expected its area in pixels"),
        ({"area": ...}, r"with id=7, image_id=1 has no 'area'"),
        ({"area": float("nan")}, "has area=nan"),
        ({"area": "9"}, "has area='9'"),
        ({"iscrowd": "no"}, "has iscrowd='no'; expected 0 or 1"),
        ({"category_id": ...}, "with id=7, image_id=1 has no 'category_id'"),
        ({"category_id": [1]}, r"has category_id=\[1\]; expected an integer"),
        ({"image_id": None}, "has image_id=None"),
        ({"id": ...}, "with image_id=1 has no 'id'"),
        ({"images": [{"id": 1, "height": 40, "width": 50}]}, "'images' with id=1 has no 'file_name'"),
        ({"images": [{"id": 1, "file_name": "1.jpg", "height": 40}]}, r"file_name='1\.jpg' has no 'width'"),
        ({"images": [{"id": 1, "file_name": "1.jpg", "height": 10**9, "width": 9}]}, r"expected 1\.\.65536 pixels"),
        ({"images": [{"id": 1, "file_name": "1.jpg", "height": 40.5, "width": 9}]}, r"has height=40\.5"),
        ({"images": ["1.jpg"]}, "'1.jpg' in 'images', no object"),
    ],
)
def test_entries_are_named_with_what_they_lack(tmp_path, changes, message):
    with pytest.raises(ValueError, match=rf"instances_val2017\.json is not a COCO annotation file: .*{message}"):
        annotated(tmp_path, **changes)


def test_ids_that_occur_twice(tmp_path):
    one = {"id": 1, "file_name": "1.jpg", "height": 40, "width": 50}
    for i, images in enumerate(([one, {**one, "file_name": "2.jpg"}], [one, {**one, "id": 2}])):
        with pytest.raises(ValueError, match=r"instances_val2017\.json names 1 twice"):
            annotated(tmp_path / str(i), images=images)
    fixtures.coco(tmp_path / "c", maps=False)
    path = tmp_path / "c/annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"].append(content["annotations"][0])
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"instances_val2017\.json names 1 twice"):
        build(DataConfig(name="coco80", root=str(tmp_path / "c")), "val")
    for text in ("[]", '{"images": []}', "{"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"instances_val2017\.json is not a COCO annotation file"):
            build(DataConfig(name="coco80", root=str(tmp_path / "c")), "val")


def test_annotations_and_images_that_are_not_used_are_counted(tmp_path):
    fixtures.write_image(tmp_path / "val2017/2.jpg")
    data = annotated(tmp_path, image_id=3)
    path = tmp_path / "annotations/instances_val2017.json"
    assert data.left_out == [
        f"left out: 1 annotations of {path} of images that it does not list (ids 7)",
        f"left out: 1 images that {path} does not list (2)",
    ]
    assert not data.read_label(0).any()
    path.write_text(path.read_text().replace('"image_id": 3', '"image_id": 1').replace(json.dumps(TRIANGLE), "[]"))
    data = build(DataConfig(name="coco80", root=str(tmp_path)), "val")
    assert data.left_out[0] == f"left out: 1 annotations of {path} without an outline (ids 7)"


def test_a_size_that_is_not_the_files_is_an_error(tmp_path):
    data = annotated(tmp_path, images=[{"id": 1, "file_name": "1.jpg", "height": 50, "width": 40}])
    with pytest.raises(ValueError, match=r"label of 1 is \(50, 40\), its image \(40, 50\)"):
        data.raw(0)
