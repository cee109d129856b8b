"""Compile and measure before training starts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from dmsa_kernels import tuning
from dmsa_kernels.backend import resident, resolve
from dmsa_kernels.refine.functional import local_affinity, propagate
from dmsa_kernels.refine.spec import AffinitySpec
from dmsa_kernels.tuning import Config


def warmup(
    image: Tensor,
    masks: Tensor,
    dilations: Sequence[int],
    num_iter: int,
    *,
    spec: str | AffinitySpec = "par",
    precision: str = "exact",
    valid_classes: Tensor | None = None,
    return_labels: bool = False,
) -> dict[str, Config]:
    """Compile the refinement's kernels for these shapes and measure their configurations, before training starts.

    One call of a few seconds keeps compilation out of the first steps and out of CUDA graphs, where it is not allowed.
    Compiled is what these arguments need: the gradients of those of ``image`` and ``masks`` that require one (``.grad``
    is not touched), and the variants for ``valid_classes`` and ``return_labels``. Later calls of any batch size, and of
    sizes in the same power-of-two bucket, use what was measured. Off the GPU there is nothing to compile: the operators
    run once and an empty dictionary comes back.

    Args:
        image: guide ``[B, K, H, W]`` as in training.
        masks: ``[B, C, H, W]``, the same size as the image.
        dilations: as in training.
        num_iter: iterations T as in training.
        spec: as in :func:`dmsa_kernels.local_affinity`.
        precision: ``"exact"`` or ``"fast"``.
        valid_classes: as in :func:`dmsa_kernels.propagate`.
        return_labels: as in :func:`dmsa_kernels.propagate`.

    Returns:
        The configuration chosen for each measured kernel.
    """
    dilations = list(dilations)

    def run(return_labels: bool = False) -> Any:
        affinity = local_affinity(image, dilations, spec=spec, precision=precision)
        return propagate(affinity, masks, num_iter, valid_classes=valid_classes, return_labels=return_labels)

    with torch.no_grad():
        run(return_labels)
    chosen = {}
    if resolve("auto", image, masks) == "triton":
        with torch.no_grad(), torch.cuda.device(image.device):
            with resident(False):  # one launch for all iterations has nothing to measure
                chosen = _measured_configs(run, image, masks, len(dilations), precision, valid_classes is not None)
            run(return_labels)
    leaves = [tensor for tensor in (image, masks) if tensor.requires_grad]
    if leaves and not return_labels:
        with torch.enable_grad():
            refined = run()
        torch.autograd.grad(refined, leaves, torch.ones_like(refined), allow_unused=True)
    return chosen


def _measured_configs(
    run: Callable[[], object], image: Tensor, masks: Tensor, dilations: int, precision: str, has_valid: bool
) -> dict[str, Config]:
    from dmsa_kernels.refine.triton import affinity as affinity_kernels
    from dmsa_kernels.refine.triton import propagate as propagate_kernels

    neighbours = 8 * dilations
    pixels = image.shape[-2] * image.shape[-1]
    dtype = torch.float16 if precision == "fast" else torch.float32
    width = propagate_kernels.plane_width(masks.shape[1], dtype, neighbours, has_valid, image.device)
    keys = {
        "local_affinity_fwd": (affinity_kernels.tuning_key(neighbours, pixels), 4),
        "propagate_fwd": (propagate_kernels.tuning_key(neighbours, pixels, width), width),
    }
    chosen = {}
    for kernel, (key, width) in keys.items():

        def measure(config: Config, kernel: str = kernel, key: Hashable = key) -> float:
            tuning.remember(kernel, key, config)
            return _milliseconds(run)

        chosen[kernel] = tuning.tune(kernel, key, measure, neighbours=neighbours, width=width)
    return chosen


def _milliseconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median time of ``run`` on the current GPU, after one call that compiles."""
    run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]
