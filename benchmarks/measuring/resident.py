"""May small maps take one launch for all iterations? Checks and times it on a GPU, and says so in its last line.

    python -m benchmarks.measuring.resident                 # exit status 1 if a check fails, 2 where it cannot run

Programs of that launch wait for each other, which no test without a GPU can vouch for. `benchmarks.gpu_suite` starts
this in a process of its own: a program that waits in vain takes the process's use of the GPU with it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring.cases import CASES, SIX
from benchmarks.measuring.gate import tensors
from benchmarks.measuring.machines import pick_device
from dmsa_kernels import backend, compat, local_affinity, plans, propagate, tuning

BIT_FOR_BIT = (
    # masks [B, C, H, W], dilations, T, options
    ((1, 3, 256, 256), SIX, 10, {}),
    ((1, 3, 224, 224), SIX, 10, {"spec": "pamr"}),
    ((4, 3, 200, 190), SIX, 5, {}),  # more images than run at the same time
    ((3, 21, 81, 81), SIX, 10, {}),
    ((2, 4, 96, 100), (8, 16), 10, {"spec": "pamr", "valid": True}),
    ((1, 8, 64, 90), (1, 2, 4), 7, {"precision": "fast"}),
    ((2, 3, 120, 130), (1, 2, 4, 8, 12, 24, 32, 64), 15, {"anchor": True}),
    ((1, 1, 33, 65), (1,), 2, {}),
)
LATENESS = 40
"""How often a late program asks in vain, half a microsecond or more each time; an iteration takes two."""

WHY_NOT_MEASURED: str | None = "benchmarks.gpu_suite measures it where its section `resident` has passed"

Call = Callable[[], Any]


class Checks:
    """The device, and what failed so far."""

    def __init__(self, device: torch.device):
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.failures: list[str] = []
        self._seed = 0

    def rand(self, *shape: int) -> Tensor:
        self._seed += 1
        return torch.rand(*shape, generator=torch.Generator().manual_seed(self._seed)).to(self.device)

    def expect(self, holds: bool, text: str) -> None:
        print(f"{'ok' if holds else 'FAILED'}: {text}", flush=True)
        if not holds:
            self.failures.append(text)


def both(call: Call) -> tuple[list[Tensor], list[Tensor], list[tuning.Resident | str]]:
    """Return a call's results with a launch for each iteration and with one, and what was chosen where it was asked."""
    from dmsa_kernels.refine.triton import resident

    choose = resident.choose
    chosen: list[tuning.Resident | str] = []

    def noted(*arguments: Any) -> tuning.Resident | str:
        chosen.append(choose(*arguments))
        return chosen[-1]

    plans.clear()
    with backend.resident(False):
        expected = tensors(call())
    resident.choose = noted
    try:
        with backend.resident(True):
            got = tensors(call())
    finally:
        resident.choose = choose
    return expected, got, chosen


def is_one_launch(chosen: Sequence[tuning.Resident | str]) -> bool:
    return bool(chosen) and all(isinstance(choice, tuning.Resident) for choice in chosen)


def same(got: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def workloads(checks: Checks) -> Iterator[tuple[str, Call]]:
    """Yield what is compared bit by bit."""
    for shape, dilations, num_iter, options in BIT_FOR_BIT:
        if not checks.on_gpu:
            shape = (*shape[:2], *(side // 16 + 1 for side in shape[2:]))
        image, masks = checks.rand(shape[0], 3, *shape[2:]), checks.rand(*shape)
        made = {name: options[name] for name in ("spec", "precision") if name in options}
        affinity = local_affinity(image, dilations, **made)
        extra = {}
        if "valid" in options:
            extra["valid_classes"] = checks.rand(*shape[:2]) > 0.4
        if "anchor" in options:
            extra["anchor"] = 0.5 * checks.rand(shape[0], 1, *shape[2:])

        def run(affinity=affinity, masks=masks, num_iter=num_iter, extra=extra) -> Tensor:
            return propagate(affinity, masks, num_iter, **extra)

        yield f"{shape}, {list(dilations)}, T={num_iter}, {options}", run


def check_bits(checks: Checks) -> None:
    """The same bits as with a launch for each iteration; again with late programs, and many times."""
    from dmsa_kernels.refine.triton import resident

    most = tuning._MOST_RESIDENT_WORK
    for name, call in workloads(checks):
        tuning._MOST_RESIDENT_WORK = float("inf")  # also where it is not thought to be faster
        try:
            expected, got, chosen = both(call)
            if not is_one_launch(chosen):
                print(f"a launch for each iteration: {name}: {', '.join(map(str, chosen))}", flush=True)
            checks.expect(same(got, expected), f"{name}: the same bits")
            resident.LATENESS = LATENESS
            plans.clear()
            with backend.resident(True):
                late = all(same(tensors(call()), expected) for _ in range(5))
        finally:
            tuning._MOST_RESIDENT_WORK = most
            resident.LATENESS = 0
            plans.clear()
        checks.expect(late, f"{name}: the same bits when every fifth program is late")
    name, call = next(workloads(checks))
    with backend.resident(False):
        expected = tensors(call())
    wrong = torch.zeros((), dtype=torch.int64, device=checks.device)
    with backend.resident(True):
        for _ in range(500 if checks.on_gpu else 2):
            for a, b in zip(tensors(call()), expected, strict=True):
                wrong += (a != b).sum()
    checks.expect(wrong.item() == 0, f"{name}: the same bits many times in a row")


def check_gradients(checks: Checks) -> None:
    """Labels, and the gradients of image and masks."""
    side = 128 if checks.on_gpu else 12
    image, masks, grad = checks.rand(2, 3, side, side), checks.rand(2, 3, side, side), checks.rand(2, 3, side, side)

    def gradients() -> tuple[Tensor, ...]:
        leaves = [image.detach().requires_grad_(), masks.detach().requires_grad_()]
        out = propagate(local_affinity(leaves[0], SIX), leaves[1], 6)
        return torch.autograd.grad(out, leaves, grad)

    expected, got, chosen = both(gradients)
    checks.expect(same(got, expected), f"gradients: the same bits, launched together {len(chosen)} times")
    checks.expect(not checks.on_gpu or (is_one_launch(chosen) and len(chosen) == 2), f"gradients: chosen {chosen}")
    affinity = local_affinity(image, SIX)
    expected, got, _ = both(lambda: propagate(affinity, masks, 6, return_labels=True))
    checks.expect(same(got, expected), "labels: the same")


def check_streams(checks: Checks) -> None:
    """On two streams at once, beside kernels that keep the device busy, and replayed as a graph."""
    affinity = local_affinity(checks.rand(1, 3, 256, 256), SIX)
    masks = [checks.rand(1, 3, 256, 256) for _ in range(2)]
    with backend.resident(False):
        expected = [propagate(affinity, m, 10) for m in masks]
    busy = checks.rand(4096, 4096)
    streams = [torch.cuda.Stream() for _ in range(3)]
    wrong = torch.zeros((), dtype=torch.int64, device=checks.device)
    torch.cuda.synchronize()
    with backend.resident(True):
        kept: list[list[Tensor]] = [[], []]
        for _ in range(100):
            with torch.cuda.stream(streams[2]):
                busy @ busy
            for i in range(2):
                with torch.cuda.stream(streams[i]):
                    kept[i].append(propagate(affinity, masks[i], 10))
        torch.cuda.synchronize()
        for i in range(2):
            for out in kept[i]:
                wrong += (out != expected[i]).sum()
        checks.expect(wrong.item() == 0, "two streams beside a busy third: the same bits")

        static = masks[0].clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            propagate(affinity, static, 10)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = propagate(affinity, static, 10)
        for i in (1, 0, 1):
            static.copy_(masks[i])
            graph.replay()
            torch.cuda.synchronize()
            checks.expect(torch.equal(captured, expected[i]), "a replayed graph: the same bits")


def check_refusal(checks: Checks) -> None:
    """A launch of more programs than the device can run at once is an error, not a hang."""
    programs = compat.cooperative_programs
    affinity = local_affinity(checks.rand(1, 3, 1024, 1024), SIX)
    masks = checks.rand(1, 3, 1024, 1024)
    compat.cooperative_programs = lambda device: 1 << 20
    plans.clear()
    refused = ""
    try:
        with backend.resident(True):
            propagate(affinity, masks, 10)
            torch.cuda.synchronize()
    except RuntimeError as error:
        refused = str(error)
    finally:
        compat.cooperative_programs = programs
        plans.clear()
    checks.expect("DMSA_RESIDENT" in refused, f"too many programs are refused: {refused or 'nothing was raised'}")


def microseconds(call: Call, device: torch.device, repeats: int = 60, inner: int = 20) -> float:
    """Return the median time of a call, of those that follow each other without waiting."""
    for _ in range(5):
        call()
    samples = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(inner):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        samples.append((time.perf_counter() - start) / inner)
    return 1e6 * statistics.median(samples)


def times(checks: Checks) -> list[tuple[str, float, float]]:
    """Return name, microseconds with a launch for each iteration and with one, of the rows that launches dominate."""
    found = []
    for case in CASES:
        if not case.launch_bound:
            continue
        height, width = (case.height, case.width) if checks.on_gpu else (16, 16)
        image, masks = checks.rand(case.batch, 3, height, width), checks.rand(case.batch, case.classes, height, width)

        def call(image=image, masks=masks, case=case) -> Tensor:
            affinity = local_affinity(image, case.dilations, spec=case.spec)
            return propagate(affinity, masks, case.num_iter)

        pair = []
        repeats, inner = (60, 20) if checks.on_gpu else (2, 1)
        for on in (False, True):
            with backend.resident(on):
                pair.append(microseconds(call, checks.device, repeats, inner))
        if is_one_launch(both(call)[2]) or not checks.on_gpu:
            found.append((case.name, *pair))
    return found


def verdict(failures: Sequence[str], found: Sequence[tuple[str, float, float]]) -> str:
    """Say whether one launch for all iterations should be the default."""
    if failures:
        return f"keep DMSA_RESIDENT off: {len(failures)} checks failed"
    if not found:
        return "keep DMSA_RESIDENT off: no map of the rows fits this device"
    slower = [name for name, each, together in found if together >= each]
    if slower:
        return f"keep DMSA_RESIDENT off: nothing failed, but {', '.join(slower)} is not faster"
    return "turn DMSA_RESIDENT on for this device: nothing failed and every row is faster"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measuring.resident", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto (the GPU if there is one), cuda or cpu (a dry run)")
    checks = Checks(pick_device(parser.parse_args(argv).device))
    if checks.on_gpu and compat.cooperative_programs(checks.device) == 0:
        print("not run: programs cannot wait for each other without an NVIDIA GPU and Triton 3.4")
        return 2
    check_bits(checks)
    check_gradients(checks)
    if checks.on_gpu:
        check_streams(checks)
        check_refusal(checks)
    found = times(checks)
    for name, each, together in found:
        print(f"{name}: {each:.1f} us with a launch for each iteration, {together:.1f} us with one", flush=True)
    print(verdict(checks.failures, found) if checks.on_gpu else "a dry run: programs cannot wait for each other here")
    return int(bool(checks.failures))


if __name__ == "__main__":
    sys.exit(main())
