"""The fast path without Triton: replicate-padded slices accumulated in place, with explicit backward formulas.

No tensor larger than the affinity [B, P, H, W] or the masks exists: a tap is a view of a padded plane, and its
product is accumulated in place. Two layouts compute the propagation:

- padded planes: P ``addcmul_`` calls an iteration, every one over all rows; best for few classes;
- a gathered sum over rows of C values (``embedding_bag``: the sum over taps stays in registers); best for many
  classes, on the CPU in float32.

Maths is in float32, or in float64 for float64 tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dmsa_kernels.refine.labels import largest
from dmsa_kernels.refine.padded import Padded
from dmsa_kernels.refine.spec import offsets, position_vector, sigma_centre_count

# Elements of one sweep's operand on the CPU: small enough for two cores' L2 caches, large enough to hide the call.
SWEEP_ELEMENTS = 1 << 18
# Elements of one sweep's operand on an accelerator, where only memory bounds the chunk.
DEVICE_SWEEP_ELEMENTS = 1 << 26
# The gathered sum copies an image's affinity into another order and indexes it; above this many weights it is not used.
GATHER_WEIGHTS = 1 << 26
# From this many classes on the gathered sum beats padded planes (measured, benchmarks/NOTES.md).
GATHER_CLASSES = 10
# Scores further than this below a pixel's best count as this far: a weight of 1.6e-28 instead of less. That changes no
# sum, and keeps subnormal numbers, on which a CPU's multiplications are many times slower, out of every later pass.
LOWEST_SCORE = -64.0
# Contrasts are divided by no less than 1e-15, the square of which leaves room in float32.
LARGEST_INVERSE = 1e15


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _constants(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values as a tensor [n]; on an accelerator without a copy from the host, which would wait for the device."""
    if device.type == "cpu":
        return torch.tensor(values, dtype=dtype)
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])


def _sweep_elements(device: torch.device) -> int:
    return SWEEP_ELEMENTS if device.type == "cpu" else DEVICE_SWEEP_ELEMENTS


def _bands(height: int, row_elements: int, device: torch.device) -> list[tuple[int, int]]:
    """Rows ``start:stop`` of the bands in which a map is swept, about equally high."""
    rows = max(1, _sweep_elements(device) // max(1, row_elements))
    count = -(-height // rows)
    return [(height * i // count, height * (i + 1) // count) for i in range(count)]


class _Guide:
    """A padded guide image [b, K, H, W] and the constants of its affinity."""

    def __init__(self, image: Tensor, dilations: list[int], exponent: float, alpha: float, sigma: str, eps: float):
        dtype = _compute_dtype(image)
        self.dilations, self.exponent, self.alpha, self.sigma, self.eps = dilations, exponent, alpha, sigma, eps
        self.padded = Padded(tuple(image.shape), dilations, dtype, image.device)
        self.padded.inner.copy_(image)
        self.padded.fill()

    def deviation(self, start: int, stop: int) -> tuple[Tensor | None, Tensor]:
        """Mean and standard deviation, [b, K, rows, W], over the neighbourhoods of the rows (None and 1 for "none").

        Centred at a pilot, the mean of the first dilation's eight neighbours. It is exact where they are equal, so a
        constant neighbourhood gives exactly 0; and since it is the mean of 8 of the n samples, the term that corrects
        for it is at most n / 8 times the variance, so little cancels.
        """
        centre = self.padded.rows(start, stop)
        if self.sigma == "none":
            return None, torch.ones_like(centre)
        neighbours = self.padded.neighbours(start, stop)
        copies = sigma_centre_count(self.sigma, self.dilations)
        count = len(neighbours) + copies
        pilot = neighbours[0] + neighbours[1]
        for neighbour in neighbours[2:8]:
            pilot.add_(neighbour)
        pilot.div_(8)
        step = centre - pilot
        linear = step * copies
        square = step.square().mul_(copies)
        for neighbour in neighbours:
            torch.sub(neighbour, pilot, out=step)
            square.addcmul_(step, step)
            linear.add_(step)
        correction = linear.div_(count)
        variance = square.addcmul_(correction, correction, value=-count).clamp_min_(0).div_(count - 1)
        return pilot.add_(correction), variance.sqrt_()

    def inverse_scale(self, sigma: Tensor) -> Tensor:
        """``1 / (alpha * sigma + eps)``, in place of ``sigma``; 0 where sigma is 0.

        A channel without contrast has the same score for all neighbours: left out, it drowns no other in rounding.
        """
        flat = sigma == 0
        return sigma.mul_(self.alpha).add_(self.eps).reciprocal_().clamp_max_(LARGEST_INVERSE).masked_fill_(flat, 0.0)

    def softmax(self, start: int, stop: int, inverse: Tensor, out: Tensor, position: Tensor | None = None) -> Tensor:
        """Write the softmax over neighbours into out [b, P, rows, W], plus ``position`` [1, P, 1, 1] if given.

        ``inverse`` is :meth:`inverse_scale`.
        """
        centre = self.padded.rows(start, stop)
        scales = inverse.pow(self.exponent).div_(centre.shape[1]).unbind(1)
        step = torch.empty_like(inverse)
        magnitudes = step.unbind(1)
        for score, neighbour in zip(out.unbind(1), self.padded.neighbours(start, stop)):
            torch.sub(neighbour, centre, out=step)
            if self.exponent == 2:
                step.square_()
            else:
                step.abs_()
            torch.mul(magnitudes[0], scales[0], out=score)
            for magnitude, scale in zip(magnitudes[1:], scales[1:]):
                score.addcmul_(magnitude, scale)
        torch.sub(out.amin(1, keepdim=True), out, out=out).clamp_min_(LOWEST_SCORE).exp_()
        # Divided, not multiplied by a reciprocal: that would round all weights of a pixel to the same side.
        total = out.sum(1, keepdim=True)
        if position is None:
            out.div_(total)
        else:
            torch.addcdiv(position, out, total, out=out)
        return out

    def images(self) -> int:
        return self.padded.buffer.shape[0]


def _image_chunks(image: Tensor) -> list[slice]:
    """Images swept together: one by one on the CPU, where a map fills the caches, all on an accelerator."""
    batch = image.shape[0]
    step = 1 if image.device.type == "cpu" else max(1, batch)
    return [slice(i, i + step) for i in range(0, batch, step)]


def local_affinity(
    image: Tensor,
    dilations: list[int],
    *,
    exponent: float,
    alpha: float,
    sigma: str,
    eps: float,
    position_weight: float,
    fast: bool,
) -> Tensor:
    """Weights [B, P, H, W] of the P = 8 * D neighbours of every pixel of image [B, K, H, W]."""
    batch, channels, height, width = image.shape
    dtype = _compute_dtype(image)
    position = _constants(position_vector(dilations, alpha, eps, position_weight), dtype, image.device)
    position = position.view(1, -1, 1, 1)
    taps = 8 * len(dilations)
    weights = torch.empty((batch, taps, height, width), dtype=torch.float16 if fast else dtype, device=image.device)
    for chunk in _image_chunks(image):
        guide = _Guide(image[chunk], dilations, exponent, alpha, sigma, eps)
        for start, stop in _bands(height, guide.images() * channels * width, image.device):
            _, deviation = guide.deviation(start, stop)
            out = weights[chunk, :, start:stop]
            band = torch.empty_like(out, dtype=dtype) if fast else out
            guide.softmax(start, stop, guide.inverse_scale(deviation), band, position if position_weight else None)
            if fast:
                out.copy_(band)
    return weights


def local_affinity_backward(
    grad_weights: Tensor,
    image: Tensor,
    dilations: list[int],
    *,
    exponent: float,
    alpha: float,
    sigma: str,
    eps: float,
    position_weight: float,
) -> Tensor:
    """Gradient [B, K, H, W] of the image; the affinity is computed again, band by band.

    With ``s`` the softmax, ``h_p = s_p (G_p - sum_j s_j G_j)``, ``z = r / (alpha sigma + eps)`` and e the exponent,
    a neighbour receives ``-e/K h_p sign(z) |z|^(e-1) / (alpha sigma + eps)``, the centre the negative of it, and sigma
    receives ``alpha e/K sum_p h_p |z|^e / (alpha sigma + eps)``, which it passes on to its samples as
    ``(x - mean) / ((n - 1) sigma)`` (nothing where sigma is 0).
    """
    channels, height, width = image.shape[1:]
    dtype = _compute_dtype(image)
    grad_image = torch.empty_like(image)
    for chunk in _image_chunks(image):
        guide = _Guide(image[chunk], dilations, exponent, alpha, sigma, eps)
        shape = (guide.images(), channels, height, width)
        grads = Padded(shape, dilations, dtype, image.device)
        grads.buffer.zero_()
        for start, stop in _bands(height, guide.images() * channels * width, image.device):
            mean, deviation = guide.deviation(start, stop)
            inverse = guide.inverse_scale(deviation.clone())
            grad = grad_weights[chunk, :, start:stop].to(dtype)
            share = guide.softmax(start, stop, inverse, torch.empty_like(grad))
            grad = share.mul_(grad - (share * grad).sum(1, keepdim=True))  # h, [b, P, rows, W]
            _scatter_affinity_band(guide, grads, start, stop, grad, mean, deviation, inverse)
        grads.fold()
        grad_image[chunk] = grads.inner
    return grad_image


def _scatter_affinity_band(
    guide: _Guide,
    grads: Padded,
    start: int,
    stop: int,
    grad_scores: Tensor,
    mean: Tensor | None,
    deviation: Tensor,
    inverse: Tensor,
) -> None:
    """Add the image gradient of one band of scores [b, P, rows, W] to ``grads``."""
    centre, grad_centre = guide.padded.rows(start, stop), grads.rows(start, stop)
    neighbours, grad_neighbours = guide.padded.neighbours(start, stop), grads.neighbours(start, stop)
    factor = -guide.exponent / centre.shape[1]
    grad_sigma = torch.zeros_like(inverse)
    step = torch.empty_like(inverse)
    for p, neighbour in enumerate(neighbours):
        torch.sub(neighbour, centre, out=step).mul_(inverse)  # z
        grad_score = grad_scores[:, p : p + 1] * factor
        if guide.exponent == 2:
            slope = step * grad_score
            grad_sigma.addcmul_(slope, step)
        else:
            slope = step.sign() * grad_score
            grad_sigma.addcmul_(slope, step)
        slope.mul_(inverse)
        grad_neighbours[p].add_(slope)
        grad_centre.sub_(slope)
    if mean is None:
        return
    copies = sigma_centre_count(guide.sigma, guide.dilations)
    spread = deviation * (len(neighbours) + copies - 1)
    per_sample = grad_sigma.mul_(inverse).mul_(-guide.alpha).div_(spread).masked_fill_(deviation == 0, 0.0)
    for neighbour, grad_neighbour in zip(neighbours, grad_neighbours):
        torch.sub(neighbour, mean, out=step)
        grad_neighbour.addcmul_(step, per_sample)
    grad_centre.addcmul_(torch.sub(centre, mean, out=step), per_sample, value=copies)


def _gathers(weights: Tensor, classes: int) -> bool:
    """Whether the gathered sum runs: it depends on nothing but one image's own shape, so a batch equals its images."""
    taps, height, width = weights.shape[1:]
    return (
        weights.device.type == "cpu"
        and weights.dtype != torch.float64
        and classes >= GATHER_CLASSES
        and taps * height * width <= GATHER_WEIGHTS
    )


def _neighbour_indices(height: int, width: int, dilations: list[int]) -> Tensor:
    """Flat index of every pixel's neighbours, int32 [H * W, P], on the CPU."""
    shifts = torch.tensor(offsets(dilations), dtype=torch.int32)  # [P, 2]
    rows = torch.arange(height, dtype=torch.int32).unsqueeze(1) + shifts[:, 0]
    columns = torch.arange(width, dtype=torch.int32).unsqueeze(1) + shifts[:, 1]
    rows = rows.clamp_(0, height - 1).mul_(width)  # [H, P]
    return (rows.unsqueeze(1) + columns.clamp_(0, width - 1)).flatten(0, 1)


def _propagate_gathered(
    weights: Tensor, masks: Tensor, indices: Tensor, num_iter: int, anchor: Tensor | None
) -> Tensor:
    """One image: weights [P, H, W], masks [C, H, W], indices [H * W, P], anchor [1, H, W] -> [C, H, W] (strided)."""
    height, width = masks.shape[1:]
    per_pixel = weights.float().flatten(1).t().contiguous()  # [H * W, P]
    first = table = masks.float().flatten(1).t().contiguous()  # [H * W, C]
    hold = None if anchor is None else anchor.float().flatten(1).t()  # [H * W, 1]
    for _ in range(num_iter):
        table = F.embedding_bag(indices, table, per_sample_weights=per_pixel, mode="sum")
        if hold is not None:
            table.lerp_(first, hold)
    return table.t().unflatten(1, (height, width))


def _propagate_padded(
    weights: Tensor, masks: Tensor, dilations: list[int], num_iter: int, anchor: Tensor | None, out: Tensor
) -> None:
    """weights [b, P, H, W], masks and out [b, C, H, W]; as many planes at a time as the caches hold."""
    batch, classes, height, width = masks.shape
    dtype = _compute_dtype(weights, masks)
    taps = weights.to(dtype).unsqueeze(2).unbind(1)  # P times [b, 1, H, W]
    hold = None if anchor is None else anchor.to(dtype)  # [b, 1, H, W]
    planes = max(1, _sweep_elements(masks.device) * 2 // (batch * height * width))
    for first in range(0, classes, planes):
        chunk = slice(first, min(classes, first + planes))
        shape = (batch, chunk.stop - chunk.start, height, width)
        source = Padded(shape, dilations, dtype, masks.device)
        target = Padded(shape, dilations, dtype, masks.device)
        start = masks[:, chunk].to(dtype)
        source.inner.copy_(start)
        for _ in range(num_iter):
            source.fill()
            _step(source, taps, target.inner)
            if hold is not None:
                target.inner.lerp_(start, hold)
            source, target = target, source
        out[:, chunk] = source.inner


def _step(source: Padded, taps: Sequence[Tensor], out: Tensor) -> None:
    """out <- sum_p taps[p] * neighbour_p of the filled ``source``."""
    torch.mul(source.views[0], taps[0], out=out)
    for neighbour, tap in zip(source.views[1:], taps[1:]):
        out.addcmul_(neighbour, tap)


def propagate(
    weights: Tensor,
    masks: Tensor,
    dilations: list[int],
    num_iter: int,
    valid_classes: Tensor | None,
    anchor: Tensor | None = None,
) -> Tensor:
    """``num_iter`` times ``masks(q) <- sum_p weights_p(q) * masks(q + o_p)``; masks and result [B, C, H, W].

    With an ``anchor`` [B, 1, H, W] every iteration keeps that share of the first masks.
    """
    if valid_classes is not None and masks.device.type != "cpu":
        # Counting the valid planes would stop the device; they are computed on zeros instead.
        keep = valid_classes[:, :, None, None]
        out = propagate(weights, masks.where(keep, 0.0), dilations, num_iter, None, anchor)
        return torch.empty_like(masks).copy_(out.where(keep, 0.0))
    out = torch.empty_like(masks)
    indices = None
    for chunk in _image_chunks(masks):
        planes, result = masks[chunk], out[chunk]
        hold = None if anchor is None else anchor[chunk]
        if valid_classes is not None:
            chosen = valid_classes[chunk][0]
            result.zero_()
            planes = planes[:, chosen]
            result = torch.empty_like(planes)
        if planes.shape[1] == 0:
            continue
        if _gathers(weights, planes.shape[1]) and masks.dtype != torch.float64:
            if indices is None:
                indices = _neighbour_indices(masks.shape[2], masks.shape[3], dilations)
            share = None if hold is None else hold[0]
            result[0] = _propagate_gathered(weights[chunk][0], planes[0], indices, num_iter, share)
        else:
            _propagate_padded(weights[chunk], planes, dilations, num_iter, hold, result)
        if valid_classes is not None:
            out[chunk][:, chosen] = result
    return out


def propagate_labels(
    weights: Tensor,
    masks: Tensor,
    dilations: list[int],
    num_iter: int,
    valid_classes: Tensor | None,
    anchor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The class of the largest propagated value among the valid classes and that value, both [B, H, W].

    16-bit masks are widened first, so that no two classes are equal by rounding alone.
    """
    wide = masks.to(_compute_dtype(masks))
    return largest(propagate(weights, wide, dilations, num_iter, valid_classes, anchor), valid_classes)


def propagate_backward(
    grad: Tensor,
    weights: Tensor,
    masks: Tensor,
    dilations: list[int],
    num_iter: int,
    valid_classes: Tensor | None,
    *,
    need_weights: bool,
    need_masks: bool,
    anchor: Tensor | None = None,
    need_anchor: bool = False,
) -> tuple[Tensor, ...]:
    """Gradients of the weights [B, P, H, W], the masks [B, C, H, W] and an anchor [B, 1, H, W]; empty if not needed.

    Masks: the transposed step, a scatter into the padded planes, ``num_iter`` times. Weights: the planes of all
    iterations are computed again, one class at a time, and ``grad_w_p += grad_t * neighbour_p(masks_t)``. With an
    anchor a, ``grad_t`` is scaled by ``1 - a`` in both, the masks receive ``a * total`` as well, where ``total`` is the
    sum of the unscaled ``grad_t``, and the anchor ``sum_c total * masks - sum_p w_p grad_w_p / (1 - a)``: the averages
    that it is compared with need not be kept.
    """
    dtype = _compute_dtype(weights, masks)
    if valid_classes is not None:
        keep = valid_classes[:, :, None, None]
        grad, masks = grad.where(keep, 0.0), masks.where(keep, 0.0)
    need_anchor = need_anchor and anchor is not None
    asked_weights, need_weights = need_weights, need_weights or need_anchor
    grad_weights = torch.zeros(weights.shape if need_weights else 0, dtype=dtype, device=weights.device)
    grad_anchor = masks.new_zeros((len(masks), 1, *masks.shape[2:]) if need_anchor else 0, dtype=dtype)
    grad_masks = torch.empty_like(masks) if need_masks else masks.new_empty(0)
    batch, classes, height, width = masks.shape
    for chunk in _image_chunks(masks):
        taps = weights[chunk].to(dtype).unsqueeze(2).unbind(1)
        hold = None if anchor is None else anchor[chunk].to(dtype)
        rows = _image_count(chunk, batch) * height * width
        planes = 1 if need_weights else max(1, _sweep_elements(masks.device) * 2 // rows)
        for first in range(0, classes, planes):
            these = slice(first, min(classes, first + planes))
            history = _history(masks[chunk, these], taps, dilations, num_iter, hold, dtype) if need_weights else []
            upstream = grad[chunk, these].to(dtype)
            total = torch.zeros_like(upstream) if hold is not None else upstream
            for t in reversed(range(num_iter)):
                if hold is not None:
                    total.add_(upstream)
                    upstream = upstream * (1 - hold)
                if need_weights:
                    for p, neighbour in enumerate(history[t].views):
                        grad_weights[chunk, p : p + 1].addcmul_(upstream, neighbour)
                if need_masks or t > 0:
                    upstream = _transposed_step(upstream, taps, dilations)
            if need_masks:
                grad_masks[chunk, these] = upstream if hold is None else upstream.addcmul(total, hold)
            if need_anchor:
                grad_anchor[chunk] += (total * masks[chunk, these]).sum(1, keepdim=True)
    if need_masks and valid_classes is not None:
        grad_masks = torch.empty_like(masks).copy_(grad_masks.where(keep, 0.0))
    grads = (grad_weights.to(weights.dtype) if asked_weights else weights.new_empty(0), grad_masks)
    if anchor is None:
        return grads
    if need_anchor:
        grad_anchor -= (weights * grad_weights).sum(1, keepdim=True) / (1 - anchor.to(dtype))
    return *grads, grad_anchor.to(anchor.dtype)


def _image_count(chunk: slice, batch: int) -> int:
    return len(range(*chunk.indices(batch)))


def _history(
    masks: Tensor,
    taps: Sequence[Tensor],
    dilations: list[int],
    num_iter: int,
    hold: Tensor | None,
    dtype: torch.dtype,
) -> list[Padded]:
    """The filled planes before each iteration; masks [b, c, H, W]."""
    planes = [Padded(tuple(masks.shape), dilations, dtype, masks.device) for _ in range(num_iter)]
    for t, source in enumerate(planes):
        if t == 0:
            source.inner.copy_(masks)
        else:
            _step(planes[t - 1], taps, source.inner)
            if hold is not None:
                source.inner.lerp_(planes[0].inner, hold)
        source.fill()
    return planes


def _transposed_step(grad: Tensor, taps: Sequence[Tensor], dilations: list[int]) -> Tensor:
    """Adjoint of one step: grad [b, c, H, W] is scattered to the neighbours it came from."""
    padded = Padded(tuple(grad.shape), dilations, grad.dtype, grad.device)
    padded.buffer.zero_()
    for neighbour, tap in zip(padded.views, taps):
        neighbour.addcmul_(grad, tap)
    padded.fold()
    return padded.inner
