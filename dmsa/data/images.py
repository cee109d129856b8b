"""Opening images and masks: the one place that knows what files hold.

Whatever a picture's file is (grey, palette, CMYK, 16 bits a channel, floating point, turned by an EXIF tag), it comes
out as what a viewer shows, upright RGB of 8 bits, or as an error that names the file. Transparent pixels keep their
stored colour; of several frames or pages the first is taken.
"""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

_EXIF_ORIENTATION, _PHOTOMETRIC = 0x0112, 0x0106
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_ORIENTATION, _DEEP = "dmsa orientation", "dmsa 16 bits"  # what is noted in `Image.info`
_DEEP_COLOURS = re.compile("(RGB[AXa]?|LA);16")
_GREY_STEPS = {"L;2": 85, "L;4": 17}  # by which Pillow multiplies grey of 2 and 4 bits
_LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
_COLOURS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


class CorruptImageError(ValueError):
    """An image or mask that exists but cannot be decoded, or whose pixels cannot be told; `path` is the file."""

    def __init__(self, path: str | os.PathLike, reason: object) -> None:
        super().__init__(path, reason)
        self.path = str(path)
        self.reason = str(reason)

    def __str__(self) -> str:
        return f"cannot decode {self.path}: {self.reason}"


def open_image(path: str | os.PathLike) -> Image.Image:
    """Open an image file without decoding it.

    Raises:
        FileNotFoundError: it is not there.
        CorruptImageError: it is not an image.
    """
    try:
        image = Image.open(path)
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:
        empty = os.path.getsize(path) == 0
        raise CorruptImageError(path, "the file is empty" if empty else "not an image that Pillow knows") from error
    except Exception as error:  # Pillow's format plugins raise whatever a broken header leads them to
        raise CorruptImageError(path, error) from error
    # Pillow keeps the upper byte of every channel; its raw mode, gone once pixels are decoded, is all that tells.
    image.info[_DEEP] = image.mode.startswith("I;16") or _DEEP_COLOURS.search(_raw_mode(image)) is not None
    return image


def _raw_mode(image: Image.Image) -> str:
    """Return how the file holds the pixels, in Pillow's words; empty once they are decoded."""
    tiles = getattr(image, "tile", None)
    return str(tiles[0][-1]) if tiles else ""


def as_rgb(image: Image.Image) -> Image.Image:
    """Return an opened or decoded picture as upright RGB of 8 bits a channel; opened files are decoded here.

    Sixteen bits are divided by 256, floating point is taken as 0..1. What it returned once, it returns as it is.

    Raises:
        CorruptImageError: it cannot be decoded, or the range of its values is unknown.
    """
    turn = orientation(image)
    _load(image)
    if image.mode not in _COLOURS and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:
        raise _unusable(image, f"pixels of mode {image.mode} whose 0 is white")
    highest = 0  # of 65535, for pictures of 16 bits a channel
    if image.mode == "P" and "transparency" in image.info:
        pixels = image.convert("RGBA").convert("RGB")
    elif image.mode in _COLOURS:
        pixels = image if image.mode == "RGB" else image.convert("RGB")
        if image.info.get(_DEEP):
            bands: Any = pixels.getextrema()  # a pair for every band
            highest = 257 * max(high for _, high in bands)
    elif image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image)
        highest = int(values.max())
        pixels = Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    elif image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):
            raise _unusable(image, f"floating point {values.min():g}..{values.max():g}, expected 0..1")
        pixels = Image.fromarray((values * 255 + 0.5).astype(np.uint8)).convert("RGB")
    else:
        raise _unusable(image, f"pixels of mode {image.mode}, whose range is unknown")
    if 0 < highest < 2**12:  # 12 bits or fewer in 16: all but black
        raise _unusable(image, f"16 bits a channel with values up to {highest} of 65535")
    if turn > 1:
        pixels = pixels.transpose(_TURNS[turn])
        ignore_orientation(pixels)  # the copy has the tag too
    return pixels


def _unusable(image: Image.Image, reason: str) -> CorruptImageError:
    return CorruptImageError(_name(image), f"{reason}; convert it to 8 bits a channel")


def _name(image: Image.Image) -> str:
    return str(getattr(image, "filename", "") or "a picture without a file")


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # as in `open_image`
        raise CorruptImageError(_name(image), error) from error


def _frames(image: Image.Image) -> int:
    try:
        return getattr(image, "n_frames", 1)
    except Exception as error:  # as in `open_image`
        raise CorruptImageError(_name(image), error) from error


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a picture, 1..8; 1 (upright) if it has none that can be read."""
    if image.format == "TIFF":
        return 1  # Pillow turns these while it decodes
    if _ORIENTATION not in image.info:
        try:
            found = image.getexif().get(_EXIF_ORIENTATION, 1)
        except Exception:  # a broken tag must not cost a picture that every viewer shows
            found = 1
        image.info[_ORIENTATION] = found if found in _TURNS else 1
    return image.info[_ORIENTATION]


def ignore_orientation(image: Image.Image) -> None:
    """Take the pixels as they are stored from here on."""
    image.info[_ORIENTATION] = 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return (H, W) of :func:`as_rgb` of an opened picture."""
    if image.format == "TIFF":
        _load(image)  # before that, versions of Pillow differ
    sideways = orientation(image) in _SIDEWAYS
    return (image.width, image.height) if sideways else (image.height, image.width)


def oddities(image: Image.Image) -> list[str]:
    """Return what is unusual about an opened picture, in a few words each."""
    odd = []
    if (turn := orientation(image)) > 1:
        odd.append(f"turned upright as EXIF says (orientation {turn})")
    if image.info.get(_DEEP):
        odd.append("of 16 bits a channel, reduced to 8")
    kinds = {"1": "in black and white", "P": "with a palette", "CMYK": "in CMYK", "F": "in floating point"}
    if image.mode in kinds:
        odd.append(kinds[image.mode])
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        odd.append("with transparency, taken with the stored colours")
    if (frames := _frames(image)) > 1:
        odd.append(f"of {frames} frames or pages, the first is taken")
    return odd


def read_mask(path: str | os.PathLike) -> np.ndarray:
    """Return the ids in a mask file, upright, uint8 `[H, W]`; palette images are read as indices, not as colours.

    Raises:
        FileNotFoundError: it is not there.
        CorruptImageError: it cannot be decoded.
        ValueError: it holds colours instead of ids, or ids above 255.
    """
    with open_image(path) as image:
        if image.mode not in ("P", "L", "1", "I") and not image.mode.startswith("I;16"):
            raise ValueError(
                f"{path} is a {image.mode} image of colours; expected a palette or 8-bit grey PNG "
                "whose pixels are class ids"
            )
        if image.format in _LOSSY:
            raise ValueError(f"{path} holds a {image.format} image, whose pixels are no exact ids; expected a PNG")
        if (frames := _frames(image)) > 1:
            raise ValueError(f"{path} holds {frames} frames or pages; expected one mask")
        scale = next((step for raw, step in _GREY_STEPS.items() if raw in _raw_mode(image)), 1)
        turn = orientation(image)
        _load(image)
        ids = np.array(image.transpose(_TURNS[turn]) if turn > 1 else image)
    if ids.dtype == np.uint8:
        return ids // scale if scale > 1 else ids
    if ids.dtype != bool and (ids.min(initial=0) < 0 or ids.max(initial=0) > 255):
        raise ValueError(f"{path} holds ids up to {ids.max()}; expected 0..255")
    return ids.astype(np.uint8)
