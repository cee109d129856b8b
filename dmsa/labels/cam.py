"""Class activation maps of cluster centroids, computed on line (Eq. 5 of the paper).

Source of the map: TransFGU (arXiv 2112.01515, `models/segmenter/segmenter_thingstuff.py`), which runs one backward pass
per class and stores the maps. Here all classes come from one pass, because the class-token attention row reaches the
class token through one token's projection, MLP and norms only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmsa.models.encoder import Attended, Encoder, as_encoder

KEPT_MASS = 0.8
"""Share of a class's positive gradient mass that survives the threshold."""


def attention_gradient_cam(
    encoder: Encoder | nn.Module,
    images: Tensor | Attended,
    centroids: Tensor,
    batch_parity: bool = False,
) -> Tensor:
    """Map where each centroid's evidence lies, from the gradient of the last block's class-token attention.

    For centroid c, with A the class-token attention row (mean over heads) and g_c the gradient of
    cos(class token, c) with respect to that row (mean over heads):

        map_c = A / max A + (g_c where it carries the top 80 % of its positive mass, else 0)    where g_c >= 0, else 0

    The gradient is closed form: the K directions are back-propagated through the class token's own projection, MLP and
    norms, and one product with the values V gives all maps. Always the plain backbone: the pyramid takes no part.

    Args:
        encoder: an `Encoder`, or a timm ViT that is wrapped into one (and thereby frozen and put into eval mode).
        images: [B, 3, H, W] normalised, or what `Encoder.features` returned for them, to share that work.
        centroids: [K, D], any scale (only directions matter).
        batch_parity: multiply g_c by 1/B as TransFGU does, whose loss is averaged over the batch. For comparison with
            its maps only: it makes a label depend on the batch it is computed in.

    Returns:
        [B, K, h, w], fp32 or the images' wider dtype; values from 0 to 1 plus the largest gradient. No gradient.

    Raises:
        ValueError: `centroids` is not [K, D] with the encoder's D, or the images do not fit the patch size.
    """
    encoder, attended = _shared(encoder, images, centroids)
    prefix = encoder.num_prefix_tokens
    gradient = class_attention_gradient(encoder, attended, centroids)[..., prefix:]  # [B, K, N]
    if batch_parity:
        gradient = gradient / max(len(attended), 1)
    attention = attended.attention[..., prefix:].mean(1)  # [B, N]
    # prefix tokens can take all of a row; its patches then count 0, not 0/0
    attention = attention / attention.amax(-1, keepdim=True).clamp(min=torch.finfo(attention.dtype).tiny)
    evidence = gradient.relu()
    evidence = evidence * carries_mass(evidence, KEPT_MASS)
    maps = torch.where(gradient >= 0, attention[:, None] + evidence, 0)
    return maps.unflatten(-1, attended.grid)


def feature_cam(encoder: Encoder | nn.Module, images: Tensor | Attended, centroids: Tensor) -> Tensor:
    """Zhou's class activation map: ReLU of the cosine between each patch feature and each centroid.

    Args and returns as `attention_gradient_cam`; values from 0 to 1.
    """
    encoder, attended = _shared(encoder, images, centroids, output=True)
    with torch.no_grad():
        patches, _ = encoder.tail(attended, attended.grid)  # [B, N, D]
        wide = torch.promote_types(patches.dtype, torch.float32)
        with torch.autocast(patches.device.type, enabled=False):
            patches = nn.functional.normalize(patches.to(wide), dim=-1)
            directions = nn.functional.normalize(centroids.to(patches), dim=-1)
            return (directions @ patches.transpose(1, 2)).relu().unflatten(-1, attended.grid)


def single_patch_cam(encoder: Encoder | nn.Module, images: Tensor | Attended, centroids: Tensor) -> Tensor:
    """Map what the class token would be if it attended to one patch alone; not in the paper (`dmsa_plus`).

    With A the class-token attention row (mean over heads) and t_j the class token that attends to patch j alone:

        map_c[j] = A[j] / max A * ReLU(cos(t_j, c))

    Eq. 5 asks which way an infinitesimal shift of attention to patch j moves the class token. Where the token already
    points to a centroid nothing moves it closer, and the gradient's sign is chance; going all the way to patch j asks
    the same question without that saturation, at the price of one MLP per patch.

    Args, returns and errors as `attention_gradient_cam`, without `batch_parity`; values from 0 to 1.
    """
    encoder, attended = _shared(encoder, images, centroids)
    prefix = encoder.num_prefix_tokens
    # as for Eq. 5, what lies between attention and class token stays in the parameters' precision
    with torch.no_grad(), torch.autocast(attended.tokens.device.type, enabled=False):
        values = attended.values[:, :, prefix:]  # [B, A, N, D/A]
        context = values.permute(2, 0, 1, 3).flatten(2).to(next(encoder.parameters()).dtype)  # [N, B, D]
        token = encoder.class_token(attended, context)
        token = nn.functional.normalize(token.to(attended.attention.dtype), dim=-1)
        directions = nn.functional.normalize(centroids.to(token), dim=-1)
        names = (token @ directions.T).relu().permute(1, 2, 0)  # [B, K, N]
        attention = attended.attention[..., prefix:].mean(1)  # [B, N]
        attention = attention / attention.amax(-1, keepdim=True).clamp(min=torch.finfo(attention.dtype).tiny)
        return (attention[:, None] * names).unflatten(-1, attended.grid)


CAMS = {
    "attention_grad": attention_gradient_cam,
    "feature": feature_cam,
    "single_patch": single_patch_cam,
}
"""The maps by the name of their configuration switch, `labels.cam`."""


def class_attention_gradient(encoder: Encoder, attended: Attended, centroids: Tensor) -> Tensor:
    """Gradient of cos(class token, centroid) with respect to the class-token attention row, mean over heads.

    Args:
        encoder: the backbone.
        attended: its `features` for B images.
        centroids: [K, D].

    Returns:
        [B, K, T], T counting prefix tokens and patches.
    """
    heads, length = attended.values.shape[1:3]
    if not len(centroids):
        return attended.attention.new_zeros(len(attended), 0, length)
    # parameters and directions stay in full precision: one token's work is cheap, and the threshold compares sums
    device_type = attended.tokens.device.type
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device_type, enabled=False):
        wide = attended.attention.dtype
        values = attended.values.detach().to(wide)  # [B, A, T, D/A]
        context = (attended.attention.detach().unsqueeze(2) @ values).flatten(1)  # [B, D]
        # one copy per class, so that one ordinary backward pass carries all K directions through the one token
        context = context.to(next(encoder.parameters()).dtype).repeat(len(centroids), 1, 1).requires_grad_()
        token = encoder.class_token(attended, context).to(wide)  # [K, B, D]
        towards = nn.functional.normalize(centroids.detach().to(token), dim=-1)[:, None]  # [K, 1, D]
        norm = token.detach().norm(dim=-1, keepdim=True).clamp(min=1e-12)  # [K, B, 1]
        along = token.detach() / norm
        # d cos / d token, for every class and image
        directions = (towards - (towards * along).sum(-1, keepdim=True) * along) / norm  # [K, B, D]
        (weights,) = torch.autograd.grad(token, context, directions)  # [K, B, D]
    weights = weights.to(wide).transpose(0, 1)  # [B, K, D]
    # mean over heads of (weights of the head) . (values of the head) is one product over the joined head dimension
    return weights @ values.transpose(2, 3).flatten(1, 2) / heads


def carries_mass(evidence: Tensor, share: float) -> Tensor:
    """Mask the largest entries that together carry `share` of the sum along the last dimension.

    Args:
        evidence: [..., N], not negative.
        share: between 0 and 1.

    Returns:
        bool [..., N]; all False where the sum is 0. The entry on which the share is reached is kept.
    """
    ascending, order = evidence.sort(dim=-1)
    total = evidence.sum(dim=-1, keepdim=True)
    kept = (ascending / total).cumsum(-1) > 1 - share  # a sum of 0 gives NaN, which compares as False
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def _shared(
    encoder: Encoder | nn.Module, images: Tensor | Attended, centroids: Tensor, output: bool = False
) -> tuple[Encoder, Attended]:
    encoder = as_encoder(encoder)
    if centroids.ndim != 2 or centroids.shape[1] != encoder.embed_dim:
        raise ValueError(f"{centroids.shape=} is not [K, {encoder.embed_dim}]")
    attended = images if isinstance(images, Attended) else encoder.features(images, output=output)
    return encoder, attended
