"""`dmsa predict`: segment images with a checkpoint, as palette PNGs and as overlays with class names."""

from __future__ import annotations

import glob
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor

from dmsa.config import Config, from_dict
from dmsa.data.base import IMAGE_SUFFIXES, CorruptImageError, decode, few, open_image
from dmsa.engine import checkpoint
from dmsa.engine.distributed import local_device
from dmsa.engine.files import write_atomically
from dmsa.engine.report import png_bytes, predicted_names, predicted_palette
from dmsa.engine.task import Classes, evaluation_rates
from dmsa.models.encoder import build_encoder
from dmsa.models.segmenter import Segmenter
from dmsa.visualize import name_regions, overlay


class Predictor:
    """A trained segmenter, ready to use.

    Attributes:
        config: of its training run.
        classes: of its training data.
        segmenter: the student, in eval mode.
        epoch: epoch the weights were last trained in.
        assignment: predicted id that stands for every class, None if the run was never scored.
        names, palette: names and colours of predicted ids.

    Args:
        state: a checkpoint's content.
        source: where it is from, for messages.
        device: where to run.

    Raises:
        ValueError: the encoder's weights are not those of the training run.
    """

    def __init__(self, state: Mapping[str, Any], source: str | Path, device: torch.device | None = None) -> None:
        from dmsa.engine.trainer import fingerprint, seed_everything

        self.config: Config = from_dict(state["config"], source=str(source))
        self.classes = Classes.from_state_dict(state["dataset"])
        self.epoch: int = state["trained_epoch"]
        self.step: int = state["step"]
        self.assignment: list[int] | None = state["assignment"]
        self.names = predicted_names(self.classes, self.assignment)
        self.palette = predicted_palette(self.classes, self.assignment)
        self.device = device or local_device()
        # A backbone without trained weights is drawn from the run's seed.
        seed_everything(self.config.train.seed)
        encoder = build_encoder(self.config.model.encoder, self.config.model.weights)
        if fingerprint(encoder) != state["encoder"]:
            raise ValueError(
                f"{source} was trained on other encoder weights than those that model.encoder="
                f"{self.config.model.encoder}, model.weights={self.config.model.weights} give now"
            )
        self.segmenter = Segmenter(self.config.model, self.classes.num_classes, encoder)
        self.segmenter.load_trainable_state(state["student"])
        self.segmenter.to(self.device).eval()

    def rates(self, grid: tuple[int, int]) -> tuple[int, ...]:
        """Return the dilation rates for a token grid (h, w)."""
        return evaluation_rates(self.config, self.epoch, grid)

    @torch.no_grad()
    def predict(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return the class scores of `images`.

        Args:
            images: `[B, 3, H, W]`, ImageNet-normalised, on any device; sides are multiples of the patch size.
            size: (H', W') to which the scores are enlarged, bilinear; the token grid's if None.

        Returns:
            logits `[B, K, H', W']`, fp32, on the predictor's device. Their channels are predicted ids: `names` and
            `palette` tell what they were matched with.
        """
        images = images.to(self.device)
        logits = self.segmenter(images, self.rates(self.segmenter.encoder.grid(images)))["logits"].float()
        return logits if size is None else F.interpolate(logits, size, mode="bilinear", align_corners=False)

    def segment(self, image: Image.Image) -> np.ndarray:
        """Return the class ids of one picture of any size, uint8 `[H, W]`.

        The picture is squashed to the size of the run's evaluation. Ids are those of the data set where the run was
        scored (and so matched), else the predicted ones.
        """
        from dmsa.data.transforms import normalise, resample, to_tensor

        side = self.config.data.size
        pixels = to_tensor(resample(image.convert("RGB"), (side, side)))
        predicted = self.predict(normalise(pixels)[None], (image.height, image.width)).argmax(1)[0]
        ids = predicted.to(torch.uint8).cpu().numpy()
        if self.assignment is None:
            return ids
        table = np.arange(256, dtype=np.uint8)
        table[np.asarray(self.assignment)] = np.arange(len(self.assignment), dtype=np.uint8)
        return table[ids]


def load_predictor(path: str | Path, device: torch.device | None = None) -> Predictor:
    """Load a run folder (its best checkpoint, else its newest) or a checkpoint file.

    Raises:
        FileNotFoundError: no checkpoint there, or the encoder's weights are missing.
        ValueError: the file is damaged or does not fit the encoder.
    """
    found = checkpoint.find(path)
    return Predictor(checkpoint.load(found), found, device)


@dataclass(frozen=True)
class PredictOptions:
    """Segment images with a checkpoint: one palette PNG of class ids and one overlay with class names for each."""

    images: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES", help_behavior_hint="")]
    """Image files, folders of images, or quoted patterns."""
    checkpoint: str
    """Run folder (its best checkpoint) or checkpoint file of train.py."""
    out: str = "predictions"
    """Folder for NAME.png (class ids, VOC-style palette) and NAME_overlay.png."""
    overlay: bool = True
    """Also write the overlays."""


def find_images(words: Sequence[str]) -> list[Path]:
    """Return the image files that files, folders and patterns name, in order and once each.

    Raises:
        FileNotFoundError: a word that names nothing.
        ValueError: no words.
    """
    if not words:
        raise ValueError("IMAGES is empty: name image files, folders or patterns")
    found: dict[Path, None] = {}
    for word in words:
        path = Path(word)
        if path.is_dir():
            inside = sorted(item for item in path.rglob("*") if item.suffix.lower() in IMAGE_SUFFIXES)
        elif path.is_file():
            inside = [path]
        else:
            inside = [Path(item) for item in sorted(glob.glob(word, recursive=True)) if Path(item).is_file()]
        if not inside:
            raise FileNotFoundError(
                f"IMAGES={word!r} is no image, no folder with images ({', '.join(IMAGE_SUFFIXES)}) and no pattern that "
                "matches one"
            )
        found.update(dict.fromkeys(inside))
    return list(found)


def output_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for every file: its stem, with as many folders before it as it takes to tell them apart."""
    depth = 1
    names = [path.stem for path in paths]
    while len(set(names)) < len(names) and depth < max(len(path.parts) for path in paths):
        depth += 1
        counts = {name: names.count(name) for name in names}
        names = [
            "_".join([*path.parent.parts[1 - depth :], path.stem]).replace("/", "") if counts[name] > 1 else name
            for path, name in zip(paths, names, strict=True)
        ]
    if len(set(names)) < len(names):
        names = [f"{path.stem}_{path.suffix[1:]}" for path in paths]
    return names


def main(argv: list[str]) -> int:
    """Run `dmsa predict` with `argv` and return the exit status: 1 if an image could not be read."""
    options = tyro.cli(PredictOptions, args=argv, prog="dmsa predict")
    paths = find_images(options.images)
    predictor = load_predictor(options.checkpoint)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    palette = predictor.classes.palette
    names = predictor.classes.classes if predictor.assignment is not None else predictor.names
    broken = []
    for path, name in zip(paths, output_names(paths), strict=True):
        try:
            with open_image(path) as opened:
                picture = decode(path, lambda opened=opened: opened.convert("RGB"))
        except CorruptImageError as error:
            broken.append(path)
            print(f"skipped: {error}", file=sys.stderr)
            continue
        ids = predictor.segment(picture)
        mask = Image.fromarray(ids, mode="P")
        mask.putpalette(palette.tobytes())
        _write_png(folder / f"{name}.png", mask)
        if options.overlay:
            drawn = name_regions(overlay(np.asarray(picture), ids, palette), ids, names)
            _write_png(folder / f"{name}_overlay.png", Image.fromarray(drawn))
    print(f"{len(paths) - len(broken)} images segmented into {folder} (epoch {predictor.epoch + 1})")
    if broken:
        print(f"{len(broken)} of {len(paths)} images could not be read: {few(broken)}", file=sys.stderr)
    if predictor.assignment is None:
        print("this run was never scored: ids are clusters without names", file=sys.stderr)
    return 1 if broken else 0


def _write_png(path: Path, image: Image.Image) -> None:
    write_atomically(path, lambda stream: stream.write(png_bytes(image)))
