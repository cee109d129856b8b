"""One JSON line a row: its predicted time on one GPU. ``python -m benchmarks.modelling`` runs this over the stub."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch

from benchmarks.measuring.cases import CASES
from benchmarks.modelling import gpus, stub
from benchmarks.modelling.model import UNITS, Cost, Model, predict
from dmsa_kernels import multi_dilation_dwconv, refine
from dmsa_kernels.backend import resident

CONVOLUTIONS = {
    # name: x [B, C, H, W], dilations
    "vit 20x20": ((32, 384, 20, 20), (1, 6, 12, 18)),
    "vit 40x40": ((32, 384, 40, 40), (1, 6, 12, 18)),
    "daformer": ((2, 1024, 128, 128), (6, 12, 18)),
}


def refinements(driver: stub.Driver, model: Model, match: str) -> Iterator[tuple[str, list[Cost], float, int]]:
    """Yield name, costs of the launches, host time and their number for every workload and precision.

    Where the launches dominate, also with one launch for all iterations, if the map fits the GPU.
    """
    for case in CASES:
        for precision in ("exact", "fast"):
            name = f"{case.name} {precision}"
            if match in name:
                image, masks = torch.empty(case.batch, 3, case.height, case.width), torch.empty(case.shape)

                def call(image=image, masks=masks, case=case, precision=precision) -> object:
                    options = {"spec": case.spec, "precision": precision, "resize": "none"}
                    return refine(image, masks, list(case.dilations), case.num_iter, **options)

                yield name, *measured(driver, model, call, ())
                with resident(True):
                    if case.launch_bound and driver.cooperative_launches(call):
                        yield f"{name}, resident", *measured(driver, model, call, ())


def convolutions(driver: stub.Driver, model: Model, match: str) -> Iterator[tuple[str, list[Cost], float, int]]:
    """Yield the same for the forward pass, and for each launch of the backward pass."""
    for workload, (shape, dilations) in CONVOLUTIONS.items():
        for dtype in (torch.float32, torch.bfloat16):
            for layout in ("nchw", "channels_last"):
                name = f"{workload} {str(dtype)[6:]} {layout}"
                if match not in name:
                    continue
                channels_last = layout == "channels_last"
                memory = torch.channels_last if channels_last else torch.contiguous_format
                x = torch.empty(shape, dtype=dtype).contiguous(memory_format=memory).requires_grad_()
                weight = torch.empty(len(dilations), shape[1], 3, 3, dtype=dtype, requires_grad=True)

                def forward(x=x, weight=weight, dilations=dilations) -> torch.Tensor:
                    return multi_dilation_dwconv(x, weight, dilations, reduce="concat")

                yield f"{name} forward", *measured(driver, model, forward, dilations)
                out = forward()
                grad = torch.empty_like(out)

                def backward(out=out, x=x, weight=weight, grad=grad) -> object:
                    return torch.autograd.grad(out, (x, weight), grad, retain_graph=True)

                costs, host, _ = measured(driver, model, backward, dilations)
                for cost, label in zip(costs, ("input gradient", "filter gradient"), strict=True):
                    yield f"{name} {label}", [cost], host / len(costs), 1


def measured(
    driver: stub.Driver, model: Model, call: Callable[[], object], dilations: Sequence[int]
) -> tuple[list[Cost], float, int]:
    """Return a call's costs, its host time over the stub, and its launches as the driver counts them."""
    with driver.recording() as launches:
        call()
    costs = [model.cost(launch, dilations) for launch in launches]
    counted = driver.launches(call)
    if counted != len(costs):
        raise RuntimeError(f"the driver counted {counted} launches, {len(costs)} were recorded")
    return costs, driver.host_seconds(call, calls=5 if len(costs) > 50 else 20, rounds=5), counted


def main(argv: Sequence[str] | None = None) -> int:
    """Print the rows; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.modelling.predictions", description=__doc__)
    parser.add_argument("--gpu", choices=[name for name, gpu in gpus.GPUS.items() if gpu.capability], default="H100")
    parser.add_argument("--match", default="")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    gpu = gpus.GPUS[arguments.gpu]
    driver = stub.Driver(gpu.l2_bytes, gpu.multiprocessors)
    model = Model(gpu, driver.folder)
    bare = driver.bare_launch_seconds()
    for family in (refinements, convolutions):
        for name, costs, host, launches in family(driver, model, arguments.match):
            prediction = predict(costs, host)
            row = {"gpu": arguments.gpu, "row": name, **asdict(prediction), "launches": launches, "stub_host_s": host}
            row["bare_launch_s"] = bare
            row["units_s"] = {unit: sum(c.seconds.get(unit, 0.0) for c in costs) for unit in UNITS}
            row["kernels"] = {c.name: {"registers": c.registers, "spills": c.spills} for c in costs}
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
