"""Masks as people store them: class indices, soft maps, and the dictionaries of class activation maps.

| file | content |
|---|---|
| `NAME.png` | class indices, palette or grey; 255 is ignored |
| `NAME.npy`, `NAME.npz` | class indices (integers `[h, w]`), or scores `[C, h, w]`, integers over their range |
| `NAME.npy`, `NAME.npz` of a dictionary | `keys` and `high_res`, `cam` or `maps`; or class numbers and their maps |
| `NAME/ID.png`, `NAME_ID.png` | scores of the class ID, 8 or 16 bits over their range |
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmsa.data.base import IGNORE
from dmsa.data.images import CorruptImageError, open_image, read_mask
from dmsa.data.listing import by_stem, few, list_files

MASK_SUFFIXES = (".png", ".npy", ".npz")
MAP_KEYS = ("high_res", "cam", "maps")
"""Where dictionaries keep their maps; the finest first."""
_OF_A_CLASS = re.compile(r"(.+)[/_](\d+)")
# What the pickles of arrays, tensors and dictionaries call; anything else could be a program.
_HARMLESS = re.compile(
    r"(collections\.OrderedDict|numpy\.(dtype|ndarray)|numpy\.(_core|core)\.(multiarray|numeric)\.(_reconstruct|scalar"
    r"|_frombuffer)|numpy\.dtypes\.\w+|_codecs\.encode|torch\._utils\._rebuild_(tensor_v2|parameter)|torch\.storage\._load_from_bytes)"
)


@dataclass(frozen=True)
class MaskFile:
    """A file of the masks of one image, or of the scores of its class `class_id`."""

    path: Path
    class_id: int | None = None


@dataclass(frozen=True)
class Maps:
    """Scores of the classes of one image.

    Attributes:
        ids: class of each plane.
        scores: float32 `[len(ids), h, w]`, of any size.
        ignored: bool `[h, w]`, pixels that stay 255, of class indices; these are zeros and ones that do not tell how
            sure they are. `None` for scores.
    """

    ids: tuple[int, ...]
    scores: np.ndarray
    ignored: np.ndarray | None = None


def find_masks(folder: Path, images: Mapping[str, Path]) -> tuple[dict[str, list[MaskFile]], list[str]]:
    """Return the mask files below `folder` by the name of their image, the path below the folder without its ending.

    Args:
        folder: where the masks are.
        images: files of the images by name. A file `NAME/ID.png` or `NAME_ID.png` is one class of the image NAME if
            that has no mask of its own, and no image has the file's name.

    Returns:
        Files by name, also of masks without an image; and what else is in the folder, in words.

    Raises:
        FileNotFoundError: there are none.
        ValueError: two files could be the mask of one name.
    """
    listing = list_files(folder, MASK_SUFFIXES)
    found = by_stem(listing.files, folder, "masks")
    if not found:
        raise FileNotFoundError(f"MASKS={str(folder)!r} has no masks ({', '.join(MASK_SUFFIXES)})")
    masks: dict[str, list[MaskFile]] = {}
    for name, file in found.items():
        part = _OF_A_CLASS.fullmatch(name)
        if part and name not in images and part[1] in images and part[1] not in found:
            masks.setdefault(part[1], []).append(MaskFile(folder / file, int(part[2])))
        else:
            masks[name] = [MaskFile(folder / file)]
    return masks, listing.notes()


def read_maps(files: Sequence[MaskFile], first_class: int) -> Maps:
    """Read the masks of one image.

    Args:
        files: of one image, from :func:`find_masks`.
        first_class: class of the key 0 of a dictionary, and of the first plane of scores without keys.

    Raises:
        ValueError: contents that are no masks, or do not fit together; the message names the file.
        OSError: a file cannot be read.
    """
    path = files[0].path
    if files[0].class_id is not None:
        planes = [read_plane(file.path) for file in files]
        if len({plane.shape for plane in planes}) > 1:
            raise ValueError(f"{path.parent}: the maps of {path.name} and its siblings differ in size")
        return _checked(path, [file.class_id for file in files if file.class_id is not None], np.stack(planes))
    if path.suffix.lower() == ".png":
        return from_indices(read_mask(path))
    stored = _load(path)
    if isinstance(stored, Mapping):
        return _checked(path, *_of_dictionary(path, stored, first_class))
    if stored.ndim == 2 and stored.dtype.kind in "iu":
        if stored.size and (stored.min() < 0 or stored.max() > IGNORE):
            raise ValueError(f"{path} holds class indices up to {stored.max()}; expected 0..254, or 255 to ignore")
        return from_indices(stored.astype(np.uint8))
    stack = stored[None] if stored.ndim == 2 else stored
    return _checked(path, [first_class + i for i in range(len(stack))], stack)


def read_plane(path: Path) -> np.ndarray:
    """Return one map of scores, float32 `[h, w]`: an array in a file, or a grey PNG over the range of its bits."""
    if path.suffix.lower() != ".png":
        stored = _load(path)
        if isinstance(stored, Mapping) or stored.squeeze().ndim != 2:
            raise ValueError(f"{path} is not one map [h, w]")
        return _scores(stored.squeeze())
    with open_image(path) as image:
        if image.mode not in ("L", "I") and not image.mode.startswith("I;16"):
            raise ValueError(f"{path} is a {image.mode} image; expected scores as grey levels of 8 or 16 bits")
        try:
            levels = np.array(image)
        except (OSError, SyntaxError) as error:
            raise CorruptImageError(path, error) from error
    return _scores(levels if levels.dtype == np.uint8 else levels.astype(np.uint16))


def from_indices(ids: np.ndarray) -> Maps:
    """Return one plane of zeros and ones for each class index in `ids`, uint8 `[h, w]`; 255 has none."""
    present = np.unique(ids[ids != IGNORE])
    return Maps(tuple(present.tolist()), (ids == present[:, None, None]).astype(np.float32), ids == IGNORE)


def _of_dictionary(path: Path, stored: Mapping[Any, Any], first_class: int) -> tuple[list[int], Any]:
    """Class ids and their maps from `keys` and maps, or from class numbers and one map each."""
    name = next((name for name in MAP_KEYS if name in stored), None)
    if name is None:
        if not stored or not all(isinstance(key, (int, np.integer)) for key in stored):
            raise ValueError(
                f"{path} holds {few(list(stored)) or 'nothing'}; expected `keys` and one of {', '.join(MAP_KEYS)}, or"
                " class numbers"
            )
        planes = [_array(plane) for plane in stored.values()]
        if len({plane.shape for plane in planes}) > 1:
            raise ValueError(f"{path}: its maps differ in size: {few([plane.shape for plane in planes])}")
        return [int(key) + first_class for key in stored], np.stack(planes)
    if "keys" not in stored:
        raise ValueError(f"{path} has {name!r} but no 'keys' to tell its classes")
    keys, maps = _array(stored["keys"]).reshape(-1).tolist(), _array(stored[name])
    if len(keys) == len(maps) + 1 and keys[0] == 0:
        return [int(key) for key in keys[1:]], maps  # ids with the background, which has no map, in front
    if len(keys) != len(maps):
        raise ValueError(f"{path} has {len(keys)} keys for maps of shape {maps.shape}; expected one map a key")
    return [int(key) + first_class for key in keys], maps


def _checked(path: Path, ids: Sequence[int], planes: np.ndarray) -> Maps:
    if planes.ndim != 3 or 0 in planes.shape[1:]:
        raise ValueError(f"{path} holds an array of shape {planes.shape}; expected scores [C, h, w]")
    if len(set(ids)) < len(ids) or any(not 0 <= i < IGNORE for i in ids):
        raise ValueError(f"{path} has the classes {few(list(ids), 12)}; expected different ones of 0..254")
    scores = _scores(planes)
    if not np.isfinite(scores).all():
        raise ValueError(f"{path} holds scores that are not finite")
    return Maps(tuple(ids), scores)


def _array(values: Any) -> np.ndarray:
    return values.detach().float().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _scores(values: np.ndarray) -> np.ndarray:
    """Return scores as float32; unsigned integers are shares of their type's largest value."""
    if values.dtype.kind == "u":
        return values.astype(np.float32) / np.iinfo(values.dtype).max
    if values.dtype.kind not in "fib":
        raise ValueError(f"scores of type {values.dtype} are not numbers")
    return np.ascontiguousarray(values, dtype=np.float32)


def _load(path: Path) -> Mapping[Any, Any] | np.ndarray:
    """Return the array or dictionary in a `.npy` or `.npz` file; nothing in it is run."""
    try:
        if path.suffix.lower() == ".npz":
            if not zipfile.is_zipfile(path):
                raise ValueError("not an archive of numpy arrays")
            with np.load(path) as archive:
                arrays = {name: archive[name] for name in archive.files}
            return next(iter(arrays.values())) if len(arrays) == 1 else arrays
        with open(path, "rb") as stream:
            first = np.lib.format.read_magic(stream) == (1, 0)
            header = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
            if not header(stream)[2].hasobject:
                stream.seek(0)
                return np.load(stream, allow_pickle=False)
            stored = _Unpickler(stream).load()
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise CorruptImageError(path, error) from error
    stored = stored.item() if isinstance(stored, np.ndarray) and stored.ndim == 0 else stored
    if not isinstance(stored, (Mapping, np.ndarray)):
        raise CorruptImageError(path, f"holds a {type(stored).__name__}; expected an array or a dictionary of maps")
    return stored


class _Unpickler(pickle.Unpickler):
    """Reads dictionaries of arrays and tensors; refuses whatever else a pickle may call."""

    def find_class(self, module: str, name: str) -> Any:
        if not _HARMLESS.fullmatch(f"{module}.{name}"):
            raise pickle.UnpicklingError(
                f"refused to call {module}.{name}: expected arrays in a dictionary, no program"
            )
        return _load_storage if name == "_load_from_bytes" else super().find_class(module, name)


def _load_storage(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
