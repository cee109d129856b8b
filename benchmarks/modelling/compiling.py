"""Say how long the first call with a list of dilations compiles, kernel by kernel, in seconds of processor time.

    python -m benchmarks.modelling.compiling
    python -m benchmarks.modelling.compiling --dilations 8 16 --capability 80

Over the stub, with an empty cache; the compiler itself is loaded before. The assembler's processes count.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from benchmarks.modelling import stub
from benchmarks.modelling.spills import CAPABILITIES


def seconds() -> float:
    """Return the processor time of this process and of those that it waited for."""
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system


def measure(dilations: Sequence[int], classes: int) -> None:
    """Print what a call without gradients compiles, then what one with those of masks and image compiles on top."""
    import torch
    import triton

    from dmsa_kernels import local_affinity, propagate

    stub.Driver().bare_launch_seconds()
    image, masks = torch.empty(1, 3, 96, 96), torch.empty(1, classes, 96, 96)

    def forward() -> torch.Tensor:
        return propagate(local_affinity(image, dilations), masks, 10)

    def backward() -> None:
        leaves = image.requires_grad_(), masks.requires_grad_()
        out = forward()
        torch.autograd.grad(out, leaves, torch.empty_like(out))

    def report(call: Callable[[], object], name: str) -> float:
        start = last = seconds()

        def compiled(*, src: object, **_: object) -> None:
            nonlocal last
            now = seconds()
            print(f"{now - last:6.2f}  {src.name}", flush=True)
            last = now

        triton.knobs.compilation.listener = compiled
        call()
        took = seconds() - start
        print(f"{took:6.2f}  {name}")
        return took

    total = report(forward, "forward") + report(backward, "gradients of masks and image, on top")
    print(f"{total:6.2f}  together")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.modelling.compiling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dilations", nargs="+", type=int, default=[1, 2, 4, 8, 12, 24])
    parser.add_argument("--classes", type=int, default=21)
    parser.add_argument("--capability", type=int, choices=CAPABILITIES, default=CAPABILITIES[0])
    arguments = parser.parse_args(argv)
    if stub.is_ready():
        measure(arguments.dilations, arguments.classes)
        return 0
    options = ["--dilations", *map(str, arguments.dilations), "--classes", str(arguments.classes)]
    return stub.in_child(__spec__.name, options, capability=arguments.capability)


if __name__ == "__main__":
    sys.exit(main())
