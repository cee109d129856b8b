"""Compile every variant that the operators can select, for one instruction set, and name those that spill registers.

    python -m benchmarks.modelling.spills                       # all instruction sets, one after another
    python -m benchmarks.modelling.spills --capability 86 --lists 6
    python -m benchmarks.modelling.spills --match 'one launch' --maps 0

Lists of one to eight dilations, guides of 1, 3 and 4 channels, exact and fast, flags, anchors, both gradients, tiles of
every number of warps, masks that are packed and such as are large enough not to be; and the convolution on random maps.
Exit status 1 if something spills.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from benchmarks.modelling import machine_code, stub

CAPABILITIES = (90, 80, 86, 89, 100, 120)
LISTS = ((3,), (8, 16), (1, 2, 4), (1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2, 4, 8, 12, 24), (1, 2, 3, 4, 5, 6, 7))
LISTS = (*LISTS, (1, 2, 4, 8, 12, 24, 32, 64))


def calls(lists: Sequence[int], maps: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield a name and a call for every variant."""
    import torch

    from dmsa_kernels import backend, local_affinity, multi_dilation_dwconv, plans, propagate, tuning
    from dmsa_kernels.refine.triton.propagate import plane_width

    plan_step = tuning.plan_step

    def forced(call: Callable[[], object], tile: tuning.Config, least: int) -> object:
        """Run a call as a larger or smaller map would be: with this tile, and masks of ``least`` bytes not packed."""

        def step(kernel: str, *sizes: Any, most_warps: int = 32) -> tuning.Step:
            found = plan_step(kernel, *sizes, most_warps=most_warps)
            return found if kernel != "propagate_fwd" or tile.num_warps > most_warps else found._replace(config=tile)

        kept, tuning.plan_step, tuning.MIN_PLANAR_BYTES = tuning.MIN_PLANAR_BYTES, step, least
        plans.clear()
        try:
            return call()
        finally:
            tuning.plan_step, tuning.MIN_PLANAR_BYTES = plan_step, kept

    def one_launch(call: Callable[[], object], tile: tuning.Config) -> object:
        """Run a call with one launch for all iterations, with this tile, whatever the estimate says."""
        kept = tuning._CONFIGS["propagate_resident"], tuning._MOST_RESIDENT_WORK
        tuning._CONFIGS["propagate_resident"], tuning._MOST_RESIDENT_WORK = (tile,), float("inf")
        plans.clear()
        try:
            with backend.resident(True):
                return call()
        finally:
            tuning._CONFIGS["propagate_resident"], tuning._MOST_RESIDENT_WORK = kept

    height, width = 96, 320  # several of every tile
    for count in lists:
        dilations = list(LISTS[count - 1])
        for precision in ("exact", "fast"):
            for guide in (1, 3, 4):
                image = torch.empty(2, guide, height, width)
                yield (
                    f"{count} dilations, guide {guide}, {precision}",
                    lambda i=image, d=dilations, p=precision: local_affinity(i, d, precision=p),
                )
            affinity = local_affinity(torch.empty(2, 3, height, width), dilations, precision=precision)
            for classes in (2, 3, 21, 24):
                for flags in ("", "valid", "anchor"):
                    masks = torch.empty(2, classes, height, width)
                    extra = {}
                    if flags == "valid":
                        extra["valid_classes"] = torch.ones(2, classes, dtype=torch.bool)
                    if flags == "anchor":
                        extra["anchor"] = 0.5

                    def run(affinity=affinity, masks=masks, extra=extra) -> object:
                        return propagate(affinity, masks, 2, **extra)

                    name = f"{count} dilations, {classes} classes {flags}, {precision}"
                    side = plane_width(classes, affinity.weights.dtype, 8 * count, flags == "valid", masks.device)
                    tiles = tuning.configs("propagate_fwd", neighbours=8 * count, width=side)
                    for tile in {tile.num_warps: tile for tile in tiles}.values():
                        yield f"{name}, {tile}", functools.partial(forced, run, tile, 1 << 62)
                        if side > 1 and not flags and precision == "exact":
                            yield f"{name}, {tile}, not packed", functools.partial(forced, run, tile, 0)
                    for tile in tuning.configs("propagate_resident", neighbours=8 * count, width=side):
                        yield f"{name}, {tile}, one launch", functools.partial(one_launch, run, tile)
                    if precision == "exact" and classes < 24:

                        def gradients(dilations=dilations, masks=masks, extra=extra) -> object:
                            image = torch.empty(2, 3, height, width, requires_grad=True)
                            leaf = masks.clone().requires_grad_()
                            out = propagate(local_affinity(image, dilations), leaf, 2, **extra)
                            return torch.autograd.grad(out, (leaf, image), torch.empty_like(out))

                        yield f"{count} dilations, {classes} classes {flags}, gradients", gradients
    draw = random.Random(0)
    for _ in range(maps):
        shape = draw.choice((1, 2, 4)), draw.choice((1, 31, 256, 384)), draw.randint(14, 130), draw.randint(14, 130)
        dtype, kernel = draw.choice((torch.float32, torch.bfloat16)), draw.choice((3, 3, 5, 7))
        x = torch.empty(shape, dtype=dtype)
        if draw.random() < 0.5:
            x = x.contiguous(memory_format=torch.channels_last)
        weight = torch.empty(4, shape[1], kernel, kernel, dtype=dtype)
        rates = [draw.randint(1, 24) for _ in range(4)]

        def convolve(x=x, weight=weight, rates=rates) -> object:
            leaves = x.requires_grad_(), weight.requires_grad_()
            out = multi_dilation_dwconv(*leaves, rates, reduce="concat")
            return torch.autograd.grad(out, leaves, torch.empty_like(out))

        yield f"convolution {shape} {dtype} k={kernel} strides {x.stride()}", convolve


def spilling(lists: Sequence[int], maps: int, match: str) -> int:
    """Print one JSON line a kernel that spills, and how many there are; over the stub."""
    driver = stub.Driver()
    seen: set[bytes] = set()
    found = 0
    for name, call in tqdm(calls(lists, maps), desc=f"sm_{driver.capability}", unit=" calls", mininterval=10):
        if match not in name:
            continue
        with driver.recording() as launches:
            call()
        for launch in launches:
            if launch.cubin in seen:
                continue
            seen.add(launch.cubin)
            if machine_code.usage(launch.cubin)["stack"]:
                code = machine_code.read(launch.cubin)
                found += 1
                constants = {k: v for k, v in launch.arguments.items() if k.isupper()}
                report = {"call": name, "kernel": launch.name, "warps": launch.num_warps, "registers": code.registers}
                print(json.dumps(report | {"spills": code.spills, "stack": code.stack, **constants}), flush=True)
    print(f"sm_{driver.capability}: {len(seen)} kernels, {found} spill", flush=True)
    return int(found > 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.modelling.spills",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--capability", nargs="+", type=int, choices=CAPABILITIES, default=CAPABILITIES)
    parser.add_argument("--lists", nargs="*", type=int, default=range(1, 9), help="lengths of the dilation lists")
    parser.add_argument("--maps", type=int, default=60, help="random maps of the convolution")
    parser.add_argument("--match", default="", help="only calls whose name contains this")
    arguments = parser.parse_args(argv)
    if stub.is_ready():
        return spilling(arguments.lists, arguments.maps, arguments.match)
    options = ["--lists", *map(str, arguments.lists), "--maps", str(arguments.maps), "--match", arguments.match]
    statuses = [stub.in_child(__spec__.name, options, capability=c) for c in arguments.capability]
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main())
