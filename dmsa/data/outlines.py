"""Outlines as COCO writes them: polygons, and run lengths as lists or packed into text."""

from __future__ import annotations

import numpy as np

BITS, MORE, NEGATIVE = 5, 0x20, 0x10  # of a character of packed run lengths: payload, "goes on", sign


def draw_outline(outline: object, height: int, width: int) -> np.ndarray:
    """Return the pixels that an outline covers, bool `[H, W]`.

    Args:
        outline: a list of polygons `[x0, y0, x1, y1, ...]` in pixels; or `{"size": [H, W], "counts": ...}` with runs
            down the columns, off first, as a list of integers or as COCO's text.
        height, width: of the image.

    Raises:
        ValueError: it is something else, or does not fit the image.
    """
    if isinstance(outline, list):
        return _polygons(outline, height, width)
    if not isinstance(outline, dict) or "counts" not in outline:
        raise ValueError(f"{outline!r:.100}; expected polygons, or run lengths with `counts`")
    if outline.get("size") != [height, width]:
        raise ValueError(f"run lengths of size {outline.get('size')!r:.100}")
    counts = outline["counts"]
    runs = unpack_runs(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or any(type(run) is not int or run < 0 for run in runs):
        raise ValueError(f"run lengths {runs!r:.100}; expected integers of at least 0")
    if sum(runs) != height * width:
        raise ValueError(f"{len(runs)} run lengths of {sum(runs)} pixels in all, expected {height * width}")
    return _paint(runs, height, width)


def unpack_runs(text: str) -> list[int]:
    """Return the run lengths in COCO's text: characters of 6 bits, low ones first, from the fourth on as differences.

    Raises:
        ValueError: a character is out of range, or the text ends within a number.
    """
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 2 * MORE:
            raise ValueError(f"run lengths with the character {character!r}")
        value |= (bits & (MORE - 1)) << shift
        shift += BITS
        if bits & MORE:
            continue
        if bits & NEGATIVE:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError(f"run lengths that end within a number, {text[-20:]!r}")
    return runs


def _polygons(polygons: list, height: int, width: int) -> np.ndarray:
    from pycocotools import mask as coco_mask

    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"polygon {polygon!r:.100}; expected x and y of three points at least")
        if not all(type(value) in (int, float) for value in polygon):
            raise ValueError(f"polygon {polygon!r:.100}; expected numbers")
        # Drawing takes memory by the length of the edges. Annotators leave the image by some pixels, not by its size,
        # and no outline of its pixels is longer than there are pixels. NaN is refused here too.
        near = (-side <= v <= 2 * side for k, side in enumerate((width, height)) for v in polygon[k::2])
        if not all(near) or _length(polygon) > height * width + 8 * (height + width):
            raise ValueError(f"polygon {polygon!r:.100} of {len(polygon) // 2} points; expected points of the image")
    whole = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    return _paint(unpack_runs(whole["counts"].decode()), height, width)


def _paint(runs: list[int], height: int, width: int) -> np.ndarray:
    on = np.arange(len(runs)) % 2 == 1
    return np.repeat(on, runs).reshape(width, height).T


def _length(polygon: list[float]) -> float:
    x, y = np.array(polygon[::2], dtype=float), np.array(polygon[1::2], dtype=float)
    return float(np.hypot(x - np.roll(x, 1), y - np.roll(y, 1)).sum())
