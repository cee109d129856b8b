"""Pictures: labels in their palette, overlays with class names, panels of one image's way from pixels to prediction."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dmsa.data.classes import Classes

IGNORE_COLOUR = (224, 224, 192)
PIXELS_AT_ONCE = 2**20  # that are mixed or measured in floating point
PANEL_TITLES = ("image", "CAM", "teacher", "refined", "prediction", "ground truth")


def colourise(labels: np.ndarray, palette: np.ndarray, ignore: int = 255) -> np.ndarray:
    """Return the colours of `labels`.

    Args:
        labels: integers `[H, W]`, ids of `palette` or `ignore`.
        palette: uint8 `[n, 3]`.
        ignore: id that is drawn in `IGNORE_COLOUR`.

    Returns:
        uint8 `[H, W, 3]`.

    Raises:
        ValueError: an id that the palette does not have.
    """
    table = np.full((256, 3), IGNORE_COLOUR, dtype=np.uint8)
    table[: len(palette)] = palette
    table[ignore] = IGNORE_COLOUR
    wrong = labels[(labels != ignore) & ((labels < 0) | (labels >= len(palette)))]
    if wrong.size:
        raise ValueError(f"labels hold id {int(wrong.flat[0])}, expected 0..{len(palette) - 1} or {ignore=}")
    return table[labels]


def heatmap(values: np.ndarray) -> np.ndarray:
    """Return `values` `[H, W]`, clipped to [0, 1], as colours from dark blue through orange to pale yellow, uint8."""
    stops = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    colours = np.array([[4, 5, 40], [70, 18, 110], [187, 55, 84], [249, 142, 9], [252, 255, 190]], dtype=float)
    clipped = np.clip(np.nan_to_num(values), 0, 1)
    return np.stack([np.interp(clipped, stops, colours[:, k]) for k in range(3)], axis=-1).astype(np.uint8)


def overlay(image: np.ndarray, labels: np.ndarray, palette: np.ndarray, opacity: float = 0.55) -> np.ndarray:
    """Return `image` (uint8 `[H, W, 3]`) with the colours of `labels` (`[H, W]`) laid over it, edges drawn in white."""
    mixed = colourise(labels, palette)
    rows = max(1, PIXELS_AT_ONCE // max(1, labels.shape[1]))
    for top in range(0, len(labels), rows):
        part = np.s_[top : top + rows]
        mixed[part] = image[part] * (1 - opacity) + mixed[part] * opacity + 0.5
    edge = np.zeros(labels.shape, dtype=bool)
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[1:] |= labels[1:] != labels[:-1]
    mixed[edge] = 255
    return mixed


def name_regions(
    picture: np.ndarray, labels: np.ndarray, classes: Sequence[str], *, smallest: float = 0.01
) -> np.ndarray:
    """Write each class's name on its area (at the member nearest to its centre) if it covers a share of `smallest`.

    Args:
        picture: uint8 `[H, W, 3]`; not changed.
        labels: ids `[H, W]`; ids without a name get none.
        classes: names.
        smallest: share of the picture below which an area stays without a name.
    """
    canvas = Image.fromarray(picture)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=max(10, min(canvas.size) // 24))
    # Areas and centres of a large picture are taken from every n-th pixel, for the sake of memory.
    step = math.ceil(math.sqrt(labels.size / PIXELS_AT_ONCE)) or 1
    labels = labels[::step, ::step]
    for label in np.unique(labels):
        if label >= len(classes):
            continue
        rows, columns = np.nonzero(labels == label)
        if len(rows) < smallest * labels.size:
            continue
        nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
        position = (step * int(columns[nearest]), step * int(rows[nearest]))
        left, top, right, bottom = draw.textbbox(position, classes[label], font=font, anchor="mm")
        # Keep the words inside the picture.
        shift_x = max(0, 2 - left) - max(0, right + 2 - canvas.width)
        shift_y = max(0, 2 - top) - max(0, bottom + 2 - canvas.height)
        draw.rectangle(
            (left - 2 + shift_x, top - 1 + shift_y, right + 2 + shift_x, bottom + 1 + shift_y), fill=(0, 0, 0)
        )
        draw.text((position[0] + shift_x, position[1] + shift_y), classes[label], font=font, fill="white", anchor="mm")
    return np.asarray(canvas)


def panel(
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str] = PANEL_TITLES,
    legend: Sequence[tuple[str, tuple[int, int, int]]] = (),
    side: int = 160,
) -> Image.Image:
    """Lay pictures out as a table: one row an image, one titled column a stage, the class names below.

    Args:
        rows: for every image one uint8 `[H, W, 3]` picture a column.
        titles: of the columns.
        legend: name and colour of the classes that occur.
        side: pixels of a cell.

    Raises:
        ValueError: a row has another number of pictures than there are titles.
    """
    for row in rows:
        if len(row) != len(titles):
            raise ValueError(f"a row holds {len(row)} pictures, expected {len(titles)}: {', '.join(titles)}")
    font = ImageFont.load_default(size=13)
    gap, header, line = 4, 20, 18
    width = gap + len(titles) * (side + gap)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    places, x, y = [], gap, 0
    for name, _ in legend:
        needed = 16 + int(measure.textlength(name, font=font)) + 12
        if x + needed > width and x > gap:
            x, y = gap, y + line
        places.append((x, y))
        x += needed
    footer = y + line + gap if legend else 0
    table_height = header + len(rows) * (side + gap)
    canvas = Image.new("RGB", (width, table_height + footer), "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.text((gap + column * (side + gap) + side // 2, header // 2), title, fill="black", font=font, anchor="mm")
    for r, row in enumerate(rows):
        for column, picture in enumerate(row):
            cell = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(cell, (gap + column * (side + gap), header + r * (side + gap)))
    for (name, colour), (x, y) in zip(legend, places, strict=True):
        draw.rectangle((x, table_height + y + 3, x + 12, table_height + y + 15), fill=colour, outline="black")
        draw.text((x + 16, table_height + y + 9), name, fill="black", font=font, anchor="lm")
    return canvas


def predicted_palette(classes: Classes, assignment: Sequence[int] | None) -> np.ndarray:
    """Return the colours of predicted ids: those of the classes that they were matched with."""
    palette = np.array(classes.palette)
    if assignment is not None:
        palette = palette.copy()
        palette[np.asarray(assignment)] = classes.palette
    return palette


def predicted_names(classes: Classes, assignment: Sequence[int] | None) -> list[str]:
    """Return the names of predicted ids: those of the classes that they were matched with, else `cluster n`."""
    if assignment is None:
        first = ["background"] if classes.things_only else []
        return [*first, *(f"cluster {n}" for n in range(len(first), classes.num_classes))]
    names = list(classes.classes)
    for name, predicted in zip(classes.classes, assignment, strict=True):
        names[predicted] = name
    return names


def png_bytes(image: Image.Image) -> bytes:
    """Return an image as the bytes of a PNG file."""
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()
