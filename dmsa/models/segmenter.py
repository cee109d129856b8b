"""The student: frozen encoder, atrous pyramid, mask decoder."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dmsa.config import ModelConfig
from dmsa.models.aspp import AtrousPyramid
from dmsa.models.decoder import MaskTransformer
from dmsa.models.encoder import Attended, Encoder, build_encoder
from dmsa.models.state import differing_keys

DEFAULT_RATES = (1, 1, 2, 3)


class Segmenter(nn.Module):
    """Images to class scores. Pyramid and decoder are trained, the encoder is not.

    Args:
        config: the `model` part of the configuration.
        num_classes: K, counting the background class of data sets of things.
        encoder: share this encoder instead of building `config.encoder`.
    """

    def __init__(self, config: ModelConfig, num_classes: int, encoder: Encoder | None = None) -> None:
        super().__init__()
        if config.aspp not in ("mhsa", "neck", "off"):
            raise ValueError(f"{config.aspp=} is not one of mhsa, neck, off")
        self.encoder = build_encoder(config.encoder, config.weights) if encoder is None else encoder
        self.num_classes = num_classes
        self.placement = config.aspp
        dim = self.encoder.embed_dim
        self.pyramid = None if config.aspp == "off" else AtrousPyramid(dim, image_pooling=config.aspp_image_pooling)
        self.decoder = MaskTransformer(num_classes, dim, config.decoder_layers, config.decoder_heads)

    def forward(
        self,
        images: Tensor | None,
        rates: tuple[int, ...] | None = None,
        *,
        frozen: Attended | None = None,
    ) -> dict[str, Tensor]:
        """Segment `images` [B, 3, H, W] (normalised; sides are multiples of the patch size).

        Args:
            images: may be `None` when `frozen` is given.
            rates: the pyramid's dilation rates; (1, 1, 2, 3) if unset.
            frozen: what `encoder.features(images)` returned, to share that work.

        Returns:
            `logits` [B, K, h, w] on the token grid and `class_tokens` [B, K, D] of unit length.
        """
        if frozen is None:
            if images is None:
                raise ValueError("images is None and no frozen features are given: nothing to segment")
            frozen = self.encoder.features(images)
        return self.from_frozen(frozen, frozen.grid, rates)

    def from_frozen(
        self, tokens: Tensor | Attended, grid: tuple[int, int], rates: tuple[int, ...] | None = None
    ) -> dict[str, Tensor]:
        """Segment from `encoder.frozen(images)` or, sharing the last attention too, `encoder.features(images)`.

        Args:
            tokens: [B, T, D] tokens, or `Attended`.
            grid: (h, w) of the patch tokens.
            rates: as in `forward`.

        Returns:
            As `forward`.
        """
        rates = DEFAULT_RATES if rates is None else tuple(rates)
        inside = self.pyramid if self.placement == "mhsa" else None
        patches, _ = self.encoder.tail(tokens, grid, rates, inside)  # [B, N, D]
        if self.placement == "neck" and self.pyramid is not None:
            patches = patches + self.pyramid(patches, grid, rates)
        logits, class_tokens = self.decoder(patches)
        return {"logits": logits.transpose(1, 2).unflatten(2, grid), "class_tokens": class_tokens}

    def twin(self) -> Segmenter:
        """Return an independent copy that shares the encoder: same weights, in eval mode, nothing trainable."""
        other = copy.deepcopy(self, {id(self.encoder): self.encoder})
        return other.requires_grad_(False).eval()

    def trainable_state(self) -> dict[str, Tensor]:
        """Return copies of all weights but the encoder's, by name."""
        state = self.state_dict()
        return {key: value.clone() for key, value in state.items() if not key.startswith("encoder.")}

    @torch.no_grad()
    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Load what `trainable_state` returned.

        Raises:
            ValueError: other keys or shapes; the first differing ones are listed.
        """
        own = {key: value for key, value in self.state_dict().items() if not key.startswith("encoder.")}
        differing = differing_keys(state, own)
        if differing:
            raise ValueError(f"the state is of another segmenter: {len(differing)} keys differ, first {differing[:5]}")
        for key, value in own.items():
            value.copy_(state[key])

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
