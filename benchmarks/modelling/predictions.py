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
from benchmarks.modelling.lanes import READS
from benchmarks.modelling.model import UNITS, Model, predict
from dmsa_kernels import multi_dilation_dwconv, refine
from dmsa_kernels.backend import resident

CONVOLUTIONS = {
    # name: x [B, C, H, W], dilations
    "vit 20x20": ((32, 384, 20, 20), (1, 6, 12, 18)),
    "vit 40x40": ((32, 384, 40, 40), (1, 6, 12, 18)),
    "daformer": ((2, 1024, 128, 128), (6, 12, 18)),
}


Row = tuple[str, list[stub.Launch], Sequence[int], float, int]
"""Name, launches, dilations of a convolution, host time, number of launches."""


def refinements(driver: stub.Driver, match: str) -> Iterator[Row]:
    """Yield a row for every workload and precision.

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

                yield name, *measured(driver, call, ())
                with resident(True):
                    if case.launch_bound and driver.cooperative_launches(call):
                        yield f"{name}, resident", *measured(driver, call, ())


def convolutions(driver: stub.Driver, match: str) -> Iterator[Row]:
    """Yield a row for the forward pass, and for each launch of the backward pass."""
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

                yield f"{name} forward", *measured(driver, forward, dilations)
                out = forward()
                grad = torch.empty_like(out)

                def backward(out=out, x=x, weight=weight, grad=grad) -> object:
                    return torch.autograd.grad(out, (x, weight), grad, retain_graph=True)

                launches, _, host, _ = measured(driver, backward, dilations)
                for launch, label in zip(launches, ("input gradient", "filter gradient"), strict=True):
                    yield f"{name} {label}", [launch], dilations, host / len(launches), 1


def measured(
    driver: stub.Driver, call: Callable[[], object], dilations: Sequence[int]
) -> tuple[list[stub.Launch], Sequence[int], float, int]:
    """Return a call's launches, the dilations, its host time over the stub, and how many the driver counts."""
    with driver.recording() as launches:
        call()
    counted = driver.launches(call)
    if counted != len(launches):
        raise RuntimeError(f"the driver counted {counted} launches, {len(launches)} were recorded")
    return launches, dilations, driver.host_seconds(call, calls=5 if counted > 50 else 20, rounds=5), counted


def main(argv: Sequence[str] | None = None) -> int:
    """Print the rows; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.modelling.predictions", description=__doc__)
    parser.add_argument("--gpu", choices=[name for name, gpu in gpus.GPUS.items() if gpu.capability], default="H100")
    parser.add_argument("--match", default="")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    gpu = gpus.GPUS[arguments.gpu]
    driver = stub.Driver(gpu.l2_bytes, gpu.multiprocessors)
    models = {reads: Model(gpu, driver.folder, reads) for reads in READS}
    bare = driver.bare_launch_seconds()
    for family in (refinements, convolutions):
        for name, launches, dilations, host, counted in family(driver, arguments.match):
            by_reads = {r: [model.cost(launch, dilations) for launch in launches] for r, model in models.items()}
            costs = by_reads["banks"]
            row = {"gpu": arguments.gpu, "row": name, **asdict(predict(costs, host)), "launches": counted}
            row |= {"stub_host_s": host, "bare_launch_s": bare}
            row["device_bound"] = predict(costs, 0.0).bound
            row |= {f"device_{reads}_s": predict(found, host).device_s for reads, found in by_reads.items()}
            row["units_s"] = {unit: sum(c.seconds.get(unit, 0.0) for c in costs) for unit in UNITS}
            row["kernels"] = {c.name: {"registers": c.registers, "spills": c.spills} for c in costs}
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
