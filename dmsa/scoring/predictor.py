"""`dmsa predict`: segment images with a checkpoint, as palette PNGs and as overlays with class names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dmsa import checkpoint
from dmsa.config import Config, from_dict
from dmsa.data.classes import Classes
from dmsa.distributed import local_device
from dmsa.models.encoder import build_encoder
from dmsa.models.schedule import evaluation_rates
from dmsa.models.segmenter import Segmenter
from dmsa.scoring.refined import refined
from dmsa.scoring.upsample import upsampled_labels
from dmsa.visualize import predicted_names, predicted_palette


class Predictor:
    """A trained segmenter, ready to use.

    Attributes:
        config: of its training run.
        classes: of its training data.
        segmenter: the student, or its moving average where the teacher was one, in eval mode.
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
        from dmsa.models.encoder import fingerprint
        from dmsa.random import seed_everything

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
        averaged = self.config.model.teacher == "ema" and state["teacher"]["snapshot_epoch"] is not None
        self.segmenter.load_trainable_state(state["teacher"]["model"] if averaged else state["student"])
        self.segmenter.to(self.device).eval()

    def rates(self, grid: tuple[int, int]) -> tuple[int, ...]:
        """Return the dilation rates for a token grid (h, w)."""
        return evaluation_rates(self.config, self.epoch, grid)

    @torch.no_grad()
    def predict(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return the class scores of `images`.

        Args:
            images: `[B, 3, H, W]`, ImageNet-normalised, on any device; sides are multiples of the patch size.
            size: (H', W') to which the scores are enlarged, bilinear; the token grid's, or that of the refinement
                where the run refines its predictions (`model.refine`), if None.

        Returns:
            logits `[B, K, H', W']`, fp32, on the predictor's device. Their channels are predicted ids: `names` and
            `palette` tell what they were matched with.
        """
        images = images.to(self.device)
        logits = self.segmenter(images, self.rates(self.segmenter.encoder.grid(images)))["logits"].float()
        logits = refined(logits, images, self.config)
        return logits if size is None else F.interpolate(logits, size, mode="bilinear", align_corners=False)

    def segment(self, image: Image.Image) -> np.ndarray:
        """Return the class ids of one picture of any size, upright, uint8 `[H, W]`.

        The picture is squashed to the size of the run's evaluation. Ids are those of the data set where the run was
        scored (and so matched), else the predicted ones.
        """
        from dmsa.data.transforms import as_image, normalise, resample, to_tensor

        side = self.config.data.size
        picture = as_image(image)
        logits = self.predict(normalise(to_tensor(resample(picture, (side, side))))[None])
        ids = upsampled_labels(logits, (picture.height, picture.width))[0].cpu().numpy()
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
