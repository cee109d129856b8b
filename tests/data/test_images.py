"""Every kind of picture comes out as what a viewer shows, or as an error that names the file."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dmsa.config import DataConfig
from dmsa.data import build
from dmsa.data.images import CorruptImageError, as_rgb, oddities, open_image, orientation, read_mask, upright_size

RAMP = np.arange(256, dtype=np.uint8)[None].repeat(64, 0)
GREY = RAMP[..., None].repeat(3, 2)


def save(image, path, **options):
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
    return path


def read(path):
    with open_image(path) as image:
        return np.asarray(as_rgb(image))


def write_png(path, bits, colour, values):
    """Write a PNG of a kind that Pillow can read but not write: `bits` a channel, `colour` 0 (grey) or 2 (RGB)."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    if bits == 16:
        rows = [row.astype(">u2").tobytes() for row in values]
    else:  # grey, several pixels in a byte
        parts = [values[:, k :: 8 // bits].astype(np.uint8) << (8 - bits - k * bits) for k in range(8 // bits)]
        rows = [row.tobytes() for row in np.bitwise_or.reduce(parts)]
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b""))
    return path


KINDS = {
    "8-bit grey": ("a.png", lambda p: save(RAMP, p)),
    "16-bit grey": ("a.png", lambda p: save((RAMP.astype(int) * 257).astype(np.uint16), p)),
    "16-bit grey TIFF": ("a.tif", lambda p: save((RAMP.astype(int) * 257).astype(np.uint16), p)),
    "16-bit grey, big-endian": (
        "a.tif",
        lambda p: save(Image.frombytes("I;16B", (256, 64), (RAMP.astype(int) * 257).astype(">u2").tobytes()), p),
    ),
    "16-bit grey PGM": ("a.pgm", lambda p: save((RAMP.astype(int) * 257).astype(np.uint16), p)),
    "16-bit colours": ("a.png", lambda p: write_png(p, 16, 2, GREY.astype(int) * 257)),
    "floating point": ("a.tif", lambda p: save((RAMP / 255).astype(np.float32), p)),
    "palette": ("a.gif", lambda p: save(RAMP, p)),
    "palette with transparency": ("a.png", lambda p: save(Image.fromarray(GREY).quantize(256), p, transparency=3)),
    "palette with alpha": (
        "a.png",
        lambda p: save(Image.fromarray(GREY).quantize(256), p, transparency=bytes(range(256))),
    ),
    "grey and alpha": ("a.png", lambda p: save(np.stack([RAMP, RAMP[:, ::-1]], 2), p)),
    "colours and alpha": ("a.png", lambda p: save(np.concatenate([GREY, RAMP[..., None]], 2), p)),
    "colours and alpha, WebP": (
        "a.webp",
        lambda p: save(np.concatenate([GREY, RAMP[..., None]], 2), p, lossless=True, exact=True),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_grey_levels_survive(tmp_path, kind):
    name, write = KINDS[kind]
    pixels = read(write(tmp_path / name))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, GREY)


def test_cmyk_and_black_and_white(tmp_path):
    pixels = read(save(Image.fromarray(GREY).convert("CMYK"), tmp_path / "a.jpg", quality=100))
    assert np.abs(pixels.astype(int) - GREY).max() <= 4
    assert set(np.unique(read(save(Image.fromarray(RAMP).convert("1"), tmp_path / "a.png")))) == {0, 255}


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("a.tif", (RAMP / 2).astype(np.float32), r"floating point 0\.\.127\.5, expected 0\.\.1"),
        ("a.tif", np.where(RAMP > 9, np.nan, 0).astype(np.float32), "floating point nan"),
        ("a.tif", (RAMP / 255 - 0.5).astype(np.float32), r"floating point -0\.5"),
        ("a.tif", RAMP.astype(np.int32), "mode I, whose range is unknown"),
        ("a.png", (RAMP * 16.0).astype(np.uint16), r"16 bits a channel with values up to 4080 of 65535"),
        ("a.tif", RAMP.astype(np.uint16), r"16 bits a channel with values up to 255 of 65535"),
    ],
)
def test_a_range_that_cannot_be_told_is_an_error(tmp_path, name, values, message):
    path = save(values, tmp_path / name)
    with pytest.raises(CorruptImageError, match=rf"cannot decode {path}: .*{message}") as error:
        read(path)
    assert "convert it to 8 bits a channel" in str(error.value)


def test_a_negative_of_16_bits_is_an_error(tmp_path):
    path = save(RAMP.astype(np.uint16) * 257, tmp_path / "a.tif")
    content = bytearray(path.read_bytes())
    place = content.index(struct.pack("<HHI", 262, 3, 1)) + 8  # the tag of the photometric interpretation, which is 1
    content[place : place + 2] = b"\0\0"
    path.write_bytes(content)
    with pytest.raises(CorruptImageError, match=r"a\.tif: pixels of mode I;16 whose 0 is white"):
        read(path)


def test_12_bits_in_16_bit_colours_are_an_error_and_black_is_black(tmp_path):
    with pytest.raises(CorruptImageError, match="16 bits a channel"):
        read(write_png(tmp_path / "a.png", 16, 2, GREY.astype(int) * 16))
    assert not read(save(np.zeros((4, 4), np.uint16), tmp_path / "b.png")).any()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_are_upright(tmp_path, turn, suffix):
    upright = np.zeros((64, 96, 3), np.uint8)
    upright[:24, :48] = 255  # as no turn leaves it
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright), 7: np.rot90(upright, 2).transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }[turn]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = turn
    path = save(Image.fromarray(np.ascontiguousarray(stored)), tmp_path / f"a{suffix}", exif=exif)
    with open_image(path) as image:
        assert upright_size(image) == (64, 96)
    assert np.abs(read(path).astype(int) - upright).mean() < 2
    with open_image(path) as image:
        once = as_rgb(image)
    assert as_rgb(once) is once


def test_an_orientation_that_cannot_be_read_is_none(tmp_path):
    for content in (
        b"Exif\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0\0\0\0\0",
        b"Exif\0\0MM junk",
    ):
        path = save(GREY, tmp_path / "a.jpg", exif=content)
        with open_image(path) as image:
            assert orientation(image) == 1
        assert read(path).shape == GREY.shape


def folder(root, turn, mask, size=(60, 90)):
    """Write one picture stored with `turn`, bright above, and its mask."""
    upright = np.zeros((*size, 3), np.uint8)
    upright[:20] = 255
    stored = {3: upright[::-1, ::-1], 6: np.rot90(upright)}[turn]
    exif = Image.Exif()
    exif[0x0112] = turn
    for sub in ("images", "masks"):
        (root / sub).mkdir()
    save(Image.fromarray(np.ascontiguousarray(stored)), root / "images/a.jpg", exif=exif, quality=95)
    save(mask.astype(np.uint8), root / "masks/a.png")
    (root / "classes.txt").write_text("ground\nsky\n")
    return build(DataConfig(name="folder", root=str(root), size=24, crop=24, crop_scale=(1.0, 1.0)), "val")


# Upside down, both sizes are the same: a mask of the stored pixels cannot be told from an upright one.
@pytest.mark.parametrize(("turn", "as_stored"), [(3, False), (6, False), (6, True)])
def test_a_label_says_whether_a_picture_lies_on_its_side(tmp_path, turn, as_stored):
    mask = np.zeros((60, 90))
    mask[:20] = 1
    data = folder(tmp_path, turn, np.rot90(mask) if as_stored else mask)
    image, label = data.raw(0)
    assert image.shape[:2] == label.shape == ((90, 60) if as_stored else (60, 90))
    assert image[label == 1].mean() > 250
    assert image[label == 0].mean() < 5
    sample = data[0]
    assert sample["guide"][:, sample["label"] == 1].mean() > 0.9
    assert sample["guide"][:, sample["label"] == 0].mean() < 0.1
    train = build(DataConfig(name="folder", root=str(tmp_path), size=24, crop=24, crop_scale=(1.0, 1.0)), "train")[0]
    assert train["guide"][:, train["label"] == 1].mean() > 0.9


def test_a_label_of_neither_size_is_an_error(tmp_path):
    data = folder(tmp_path, 6, np.zeros((60, 91)))
    with pytest.raises(
        ValueError, match=r"label of a is \(60, 91\), its image \(60, 90\), turned upright as EXIF says"
    ):
        data.raw(0)


def test_masks_are_upright_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    ids = np.arange(6, dtype=np.uint8).reshape(2, 3)
    np.testing.assert_array_equal(
        read_mask(save(np.ascontiguousarray(np.rot90(ids)), tmp_path / "a.png", exif=exif)), ids
    )


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "F"])
def test_masks_of_colours_are_refused(tmp_path, mode):
    path = save(Image.new(mode, (4, 4)), tmp_path / f"a.{'tif' if mode == 'F' else 'png'}")
    with pytest.raises(ValueError, match=rf"{path} is a {mode} image of colours; expected a palette or 8-bit grey PNG"):
        read_mask(path)


def test_masks_of_bits_16_bits_and_frames(tmp_path):
    ids = np.array([[0, 1], [1, 0]], np.uint8)
    np.testing.assert_array_equal(read_mask(save(Image.fromarray(ids * 255).convert("1"), tmp_path / "a.png")), ids)
    np.testing.assert_array_equal(read_mask(save(ids.astype(np.uint16), tmp_path / "b.png")), ids)
    frames = Image.fromarray(ids)
    frames.save(tmp_path / "c.png", save_all=True, append_images=[Image.fromarray(1 - ids)])
    with pytest.raises(ValueError, match=r"c\.png holds 2 frames or pages; expected one mask"):
        read_mask(tmp_path / "c.png")


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_masks_of_few_bits_hold_the_ids_that_are_stored(tmp_path, bits):
    ids = np.random.default_rng(0).integers(0, 2**bits, (6, 16), dtype=np.uint8)
    np.testing.assert_array_equal(read_mask(write_png(tmp_path / "a.png", bits, 0, ids)), ids)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_masks_of_inexact_pixels_are_refused(tmp_path, kind):
    Image.fromarray(RAMP).save(tmp_path / "a.png", format=kind)
    with pytest.raises(
        ValueError, match=rf"a\.png holds a {kind} image, whose pixels are no exact ids|RGB image of col"
    ):
        read_mask(tmp_path / "a.png")


def test_what_is_unusual_is_said(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    cases = {
        "turned upright as EXIF says (orientation 8)": save(GREY, tmp_path / "a.jpg", exif=exif),
        "of 16 bits a channel, reduced to 8": write_png(tmp_path / "b.png", 16, 2, GREY.astype(int) * 257),
        "in CMYK": save(Image.fromarray(GREY).convert("CMYK"), tmp_path / "c.jpg"),
        "in floating point": save((RAMP / 255).astype(np.float32), tmp_path / "d.tif"),
        "with transparency, taken with the stored colours": save(Image.new("RGBA", (4, 4)), tmp_path / "e.png"),
    }
    for what, path in cases.items():
        with open_image(path) as image:
            assert oddities(image) == [what]
    animated = Image.fromarray(GREY)
    animated.save(tmp_path / "f.tif", save_all=True, append_images=[Image.fromarray(255 - GREY)])
    with open_image(tmp_path / "f.tif") as image:
        assert oddities(image) == ["of 2 frames or pages, the first is taken"]
    np.testing.assert_array_equal(read(tmp_path / "f.tif"), GREY)
    with open_image(save(GREY, tmp_path / "g.jpg")) as image:
        assert oddities(image) == []


def test_broken_files_are_named(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_bytes(b"no image")
    stream = io.BytesIO()
    Image.fromarray(GREY).save(stream, "PNG")
    (tmp_path / "cut.png").write_bytes(stream.getvalue()[:-40])
    for name, reason in (("empty", "the file is empty"), ("text", "not an image that Pillow knows"), ("cut", "")):
        path = next(tmp_path.glob(f"{name}.*"))
        with pytest.raises(CorruptImageError, match=rf"cannot decode {path}: {reason}"):
            read(path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent.jpg")
