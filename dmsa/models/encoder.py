"""The frozen backbone: any timm ViT, split before its last block.

The blocks before the last one run once per step without gradients (`Encoder.frozen`). The last block's attention is
evaluated once too (`Encoder.attend`) and shared by the student, the teacher and the class activation map; what follows
it (`Encoder.tail`) lets gradients through to the atrous pyramid that refines the attention output. No parameter of the
backbone is ever trained.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dmsa.models.state import differing_keys, read_state

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

HUB = "https://dl.fbaipublicfiles.com/dino"
DINO_FILES = {
    "vit_small_patch8_224.dino": "dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
    "vit_small_patch16_224.dino": "dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    "vit_base_patch8_224.dino": "dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth",
    "vit_base_patch16_224.dino": "dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
}
SHIPPED = "shapes_vit_tiny"

Pyramid = Callable[[Tensor, tuple[int, int], "tuple[int, ...] | None"], Tensor]


@dataclass(frozen=True, eq=False)
class Attended:
    """The last block up to its attention, evaluated once and shared by everything that needs it."""

    tokens: Tensor
    """[B, T, D] input of the last block: prefix tokens (class token first), then h*w patch tokens."""
    output: Tensor | None
    """[B, T, D] what the attention adds to the residual (projection and LayerScale included); None if not wanted."""
    values: Tensor
    """[B, A, T, D/A] the values V of every head."""
    attention: Tensor
    """[B, A, T] the class token's attention row of every head; each row sums to 1."""
    gate: Tensor | None
    """[B, D] the class token's output gate, for the few backbones that have one."""
    grid: tuple[int, int]
    """(h, w) of the patch tokens."""

    def __len__(self) -> int:
        return len(self.tokens)


class Encoder(nn.Module):
    """A frozen timm ViT, split before its last block.

    Args:
        vit: a `timm.models.vision_transformer.VisionTransformer` with a class token, pre-norm blocks and standard
            attention (register tokens, LayerScale, query-key norm and missing biases are all fine). It is put into
            eval mode, where it stays, and its parameters are frozen.

    Raises:
        TypeError: `vit` is not a timm VisionTransformer, or its last block is of a kind that has no class-token
            attention row to differentiate; the message names it.
    """

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        check_architecture(vit)
        self.vit: VisionTransformer = vit.requires_grad_(False)
        self.embed_dim: int = vit.embed_dim
        self.patch_size: int = vit.patch_embed.patch_size[0]
        self.num_heads: int = vit.blocks[-1].attn.num_heads
        self.depth: int = len(vit.blocks)
        self.num_prefix_tokens: int = vit.num_prefix_tokens
        self._before_last = before_last
        self.eval()

    def train(self, mode: bool = True) -> Encoder:
        """Stay in eval mode: the backbone is frozen, and its dropout would make the labels random."""
        return super().train(False)

    def compile_frozen(self, **options: Any) -> None:
        """Compile the frozen blocks with `torch.compile(**options)`; call before training."""
        self._before_last = torch.compile(before_last, **options)

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Return the token grid (h, w) of `images` [B, 3, H, W].

        Raises:
            ValueError: the images are not [B, 3, H, W] or their sides are not multiples of the patch size.
        """
        side = self.patch_size
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"{images.shape=} is not [B, 3, H, W]")
        height, width = images.shape[-2:]
        if height % side or width % side or not height or not width:
            raise ValueError(f"{images.shape=}: the sides must be multiples of the patch size {side}")
        return height // side, width // side

    def frozen(self, images: Tensor) -> Tensor:
        """Run everything before the last block, without gradients.

        Args:
            images: [B, 3, H, W] normalised; H and W are multiples of the patch size.

        Returns:
            [B, T, D] tokens, T = prefix tokens + h*w.
        """
        grid = self.grid(images)
        if not len(images):  # timm's reshapes are ambiguous for an empty batch
            return images.new_zeros(0, self.num_prefix_tokens + grid[0] * grid[1], self.embed_dim)
        with torch.no_grad():
            return self._before_last(self.vit, images)

    def attend(self, tokens: Tensor, grid: tuple[int, int], *, output: bool = True) -> Attended:
        """Evaluate the last block's attention, without gradients.

        Args:
            tokens: [B, T, D] from `frozen`.
            grid: (h, w) of the patch tokens.
            output: also compute the attention of the patch tokens; the class activation map alone does not need it.
        """
        if tokens.ndim != 3 or tokens.shape[1:] != (self.num_prefix_tokens + grid[0] * grid[1], self.embed_dim):
            raise ValueError(
                f"{tokens.shape=} does not fit {grid=}: expected "
                f"[B, {self.num_prefix_tokens} + {grid[0]}*{grid[1]}, {self.embed_dim}]"
            )
        block = self.vit.blocks[-1]
        with torch.no_grad():
            normed = block.norm1(tokens)
            query, key, value = _project(block.attn, normed)
            # in fp32 under autocast: the map divides by the row's maximum
            wide = torch.promote_types(query.dtype, torch.float32)
            scores = (query[:, :, :1] * block.attn.scale) @ key.transpose(-2, -1)  # [B, A, 1, T]
            attention = scores.squeeze(2).to(wide).softmax(-1)
            gate = _gate(block.attn, normed)
            mixed = None
            if output:
                mixed = _mix(block.attn, query, key, value)
                mixed = block.ls1(_finish(block.attn, mixed, gate))
            return Attended(tokens, mixed, value, attention, None if gate is None else gate[:, 0], grid)

    def features(self, images: Tensor, *, output: bool = True) -> Attended:
        """`frozen` and `attend` together: everything that student, teacher and CAM share for `images` [B, 3, H, W]."""
        grid = self.grid(images)
        return self.attend(self.frozen(images), grid, output=output)

    def class_token(self, attended: Attended, context: Tensor) -> Tensor:
        """Return the final class token [..., B, D] from its attention-weighted values `context`, of the same shape.

        Differentiable with respect to `context`: this is the part of the network that lies between the class-token
        attention row and the class token.
        """
        block = self.vit.blocks[-1]
        # a copy, because autograd cannot save what inference mode made
        attended_to = _finish(block.attn, context, None if attended.gate is None else attended.gate.clone())
        token = attended.tokens[:, 0].to(context.dtype) + block.ls1(attended_to)
        return self.vit.norm(token + block.ls2(block.mlp(block.norm2(token))))

    def tail(
        self,
        tokens: Tensor | Attended,
        grid: tuple[int, int],
        rates: tuple[int, ...] | None = None,
        pyramid: Pyramid | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the last block and the final norm, with the pyramid on the attention output: x <- x + y + pyramid(y).

        Args:
            tokens: [B, T, D] from `frozen`, or the shared `Attended`.
            grid: (h, w) of the patch tokens.
            rates: dilation rates handed to the pyramid.
            pyramid: maps the patch part of the attention output, [B, h*w, D], to what is added to it; it already
                carries its gain. Without one this is the plain backbone. The class token bypasses it.

        Returns:
            patch tokens [B, h*w, D] and class token [B, D], both after the final norm. Gradients reach the pyramid
            and nothing before it.
        """
        attended = tokens if isinstance(tokens, Attended) else self.attend(tokens, grid)
        if attended.output is None:
            raise ValueError("the shared attention was evaluated with output=False: the patch tokens are missing")
        block, prefix = self.vit.blocks[-1], self.num_prefix_tokens
        x = attended.tokens + attended.output  # [B, T, D]
        if pyramid is not None:
            patches = x[:, prefix:] + pyramid(attended.output[:, prefix:], grid, rates)
            x = torch.cat([x[:, :prefix], patches], dim=1)
        x = self.vit.norm(x + block.ls2(block.mlp(block.norm2(x))))
        return x[:, prefix:], x[:, 0]

    def attention(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the last block's class-token attention rows [B, A, T] for `tokens` [B, T, D] from `frozen`."""
        return self.attend(tokens, grid, output=False).attention

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The plain backbone: `images` [B, 3, H, W] to patch tokens [B, h*w, D] and class token [B, D]."""
        grid = self.grid(images)
        with torch.no_grad():
            return self.tail(self.frozen(images), grid)


def before_last(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Return the input `[B, T, D]` of a timm ViT's last block for `images` `[B, 3, H, W]`."""
    return blocks_before_last(vit, vit.patch_embed(images))


def blocks_before_last(vit: VisionTransformer, embedded: Tensor) -> Tensor:
    """Return the same for what the patch embedding made of the images, in its own layout."""
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(embedded)))
    for block in vit.blocks[:-1]:
        x = block(x)
    return x


def as_encoder(model: nn.Module) -> Encoder:
    """Return `model` if it is an `Encoder`, else wrap a timm ViT into one."""
    return model if isinstance(model, Encoder) else Encoder(model)


def _project(attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, _ = x.shape
    qkv = attention.qkv(x)  # [B, T, 3D]
    width = qkv.shape[-1] // (3 * attention.num_heads)
    qkv = qkv.reshape(batch, length, 3, attention.num_heads, width).permute(2, 0, 3, 1, 4)
    query, key, value = qkv.unbind(0)  # [B, A, T, D/A]
    return attention.q_norm(query), attention.k_norm(key), value


def _mix(attention: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    # the same operations as timm's own forward, so that the plain path stays bit-equal to it
    if attention.fused_attn:
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
    else:
        mixed = ((query * attention.scale) @ key.transpose(-2, -1)).softmax(dim=-1) @ value
    return mixed.transpose(1, 2).flatten(2)  # [B, T, D]


def _gate(attention: Any, x: Tensor) -> Tensor | None:
    gate = getattr(attention, "gate", None)
    return None if gate is None else gate(x).sigmoid()


def _finish(attention: Any, mixed: Tensor, gate: Tensor | None) -> Tensor:
    mixed = attention.norm(mixed) if hasattr(attention, "norm") else mixed
    return attention.proj(mixed if gate is None else mixed * gate)


def check_architecture(vit: Any) -> None:
    """Raise the `TypeError` that says why `vit` cannot be the backbone of an `Encoder`."""
    from timm.models.vision_transformer import Attention, Block, VisionTransformer

    if not isinstance(vit, VisionTransformer):
        raise TypeError(
            f"the backbone is a {type(vit).__name__}; "
            "expected a timm VisionTransformer, such as vit_small_patch8_224.dino"
        )
    if getattr(vit, "cls_token", None) is None:
        raise TypeError("the backbone has no class token; the centroids and the class activation map need one")
    if not isinstance(vit.blocks[-1], Block) or type(vit.blocks[-1].attn) is not Attention:
        raise TypeError(
            f"the backbone's last block is {type(vit.blocks[-1]).__name__} with "
            f"{type(getattr(vit.blocks[-1], 'attn', None)).__name__}; expected timm's pre-norm Block with Attention"
        )


def build_encoder(name: str, weights: str | Path | None = None) -> Encoder:
    """Build a frozen encoder by name and load its weights.

    Args:
        name: any timm ViT, such as `vit_small_patch8_224.dino` (S/8), `vit_small_patch16_224.dino`,
            `vit_base_patch8_224.dino`, `vit_base_patch16_224.dino`; `shapes_vit_tiny`, which ships in the package; or
            `hybrid:NAME`, two blocks on the feature maps of the timm network NAME (`dmsa pretrain --recipe hybrid`).
        weights: a local file (see `load_weights`); `None` for timm's hub (or the shipped file); `"random"` for an
            untrained backbone, as tests and speed measurements use it.

    Raises:
        ValueError: unknown name, or weights of another architecture (the first differing keys are listed).
        TypeError: the model has no class token or no standard attention.
        FileNotFoundError: the weights are not there; the message says what to download and where to put it.
    """
    if name == SHIPPED:
        return _build_shipped(weights)
    if name.startswith("hybrid:"):
        return _build_hybrid(name, weights)
    import timm

    near = difflib.get_close_matches(name, [*DINO_FILES, *timm.list_models("vit*")], n=3)
    unknown = f"encoder {name!r} is neither {SHIPPED!r} nor a model that timm {timm.__version__} knows" + (
        f"; did you mean {', '.join(near)}?" if near else ""
    )
    if not timm.is_model(name):
        raise ValueError(unknown)
    try:
        vit = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True)
    except RuntimeError as error:  # the architecture is known, its tag is not
        raise ValueError(f"{unknown} ({error})") from error
    except TypeError as error:
        raise TypeError(f"encoder {name!r} is not a vision transformer with dynamic image size: {error}") from error
    encoder = Encoder(vit)
    if weights is None:
        _load_from_hub(encoder, name)
    elif str(weights) != "random":
        load_weights(encoder, weights, name)
    return encoder


def _build_shipped(weights: str | Path | None) -> Encoder:
    from dmsa.models.shapes_vit import WEIGHTS, shapes_vit_tiny

    encoder = Encoder(shapes_vit_tiny())
    if str(weights) != "random":
        load_weights(encoder, WEIGHTS if weights is None else weights, SHIPPED)
    return encoder


def _build_hybrid(name: str, weights: str | Path | None) -> Encoder:
    from dmsa.models.hybrid import hybrid_vit

    if weights is None:
        raise FileNotFoundError(
            f"weights of {name!r} are made with `dmsa pretrain --recipe hybrid --encoder {name} --images FOLDER`; then "
            "pass its encoder.safetensors: `--model.weights PATH`"
        )
    encoder = Encoder(hybrid_vit(name))
    if str(weights) != "random":
        load_weights(encoder, weights, name)
    return encoder


def _load_from_hub(encoder: Encoder, name: str) -> None:
    import timm

    try:
        pretrained = timm.create_model(name, pretrained=True, num_classes=0, dynamic_img_size=True)
    # whatever the hub client raises (no network, offline mode, proxy, unknown tag), the remedy is the same
    except Exception as error:
        raise FileNotFoundError(f"{_where_to_get(name)}\ntimm's hub said: {type(error).__name__}: {error}") from error
    encoder.vit.load_state_dict(pretrained.state_dict())


def _where_to_get(name: str) -> str:
    if name == SHIPPED:
        return f"weights of {name!r} ship with the package: reinstall it, or make them with `dmsa pretrain`."
    use = "then pass the file by path: `--model.weights PATH` (in Python: `build_encoder(name, weights=PATH)`)"
    if name in DINO_FILES:
        url = f"{HUB}/{DINO_FILES[name]}"
        return (
            f"weights of {name!r} are not here. Download {url}, put it anywhere (say weights/{Path(url).name}), {use}."
        )
    return f"weights of {name!r} are not here. Download them as `.pth` or `.safetensors` from the model's page, {use}."


def load_weights(encoder: Encoder, path: str | Path, name: str = "the encoder") -> None:
    """Load backbone weights from a local file, strictly.

    Understands the original DINO checkpoints (backbone only, or the full one with its `teacher` entry and its
    `module.` and `backbone.` prefixes), other `.pth` files with a `state_dict` or `model` entry, and safetensors.
    Nothing in the file is executed. Position embeddings of another image size are resampled.

    Args:
        encoder: filled in place.
        path: `.safetensors`, or anything `torch.save` wrote.
        name: the architecture's name, for messages.

    Raises:
        FileNotFoundError: no such file; says what to download and where to put it.
        ValueError: the file is not a checkpoint, or holds another architecture (the first differing keys are listed).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {_where_to_get(name)}")
    expected = encoder.vit.state_dict()
    state = _strip(read_state(path), expected)
    if "pos_embed" in state and "pos_embed" in expected:
        state["pos_embed"] = _resample_positions(encoder.vit, state["pos_embed"], expected["pos_embed"])
    differing = differing_keys(state, expected)
    if differing:
        raise ValueError(
            f"{path} holds another architecture than {name!r}: {len(differing)} keys differ, "
            f"first {'; '.join(differing[:5])}"
        )
    encoder.vit.load_state_dict(state)


def _strip(state: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    stripped = {}
    for key, value in state.items():
        while key.startswith(("module.", "backbone.")):
            key = key.partition(".")[2]
        # projection and classification heads are not part of a backbone
        if key in expected or not key.startswith(("head.", "fc_norm.")):
            stripped[key] = value
    return stripped


def _resample_positions(vit: VisionTransformer, found: Tensor, expected: Tensor) -> Tensor:
    prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
    side = round((found.shape[1] - prefix) ** 0.5) if found.ndim == 3 else 0
    square = side > 0 and side * side == found.shape[1] - prefix
    if found.shape == expected.shape or not square or found.shape[::2] != expected.shape[::2]:
        return found
    from timm.layers import resample_abs_pos_embed

    return resample_abs_pos_embed(found, list(vit.patch_embed.grid_size), num_prefix_tokens=prefix)


def fingerprint(encoder: Encoder) -> str:
    """Return the SHA-256 of an encoder's weights, names and shapes included."""
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
