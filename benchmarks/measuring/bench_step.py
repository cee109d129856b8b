"""What one training step costs, part by part, against the same step made of what people use today: the refinement that
materialises every shifted map, and one backward pass through the network for every class's activation map.

    python -m benchmarks.measuring.bench_step                 # prints parts, memory and the ratio
    python -m benchmarks.measuring.bench_step --memory 86     # what a step of 86 images would need
    pytest benchmarks/measuring/bench_step.py --benchmark-only

Random weights and pictures: speed does not depend on them. The optimiser's rate is 0, so that every repetition computes
the same; both steps must then give the same labels and losses, else no ratio is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dmsa_kernels
from benchmarks.measuring.baselines import materialising
from benchmarks.measuring.bench_cam import BACKBONE, encoder, maps_by_loop
from benchmarks.measuring.machines import pick_device
from benchmarks.measuring.memory import peak_memory
from benchmarks.measuring.results import human_bytes
from benchmarks.measuring.rows import Candidate, Row
from dmsa.config import Config, load_preset
from dmsa.data.base import colour_map
from dmsa.data.classes import Classes
from dmsa.data.transforms import TrainTransform
from dmsa.training import task as training_task
from dmsa.training.setup import PRECISIONS, build_optimizer
from dmsa.training.task import Prepared, Task

EPOCH = 5
"""An epoch with a teacher and negative labels."""


class Step:
    """A whole training step on random pictures of a data set of things.

    Args:
        device: where to run.
        classes: things, besides the background.
        batch: images.
    """

    def __init__(self, device: torch.device, classes: int, batch: int) -> None:
        self.device, self.batch = device, batch
        preset = load_preset("voc")
        self.config: Config = replace(preset, model=replace(preset.model, weights="random"))
        names = ("background", *(f"thing {n}" for n in range(classes)))
        kinds = Classes("step", names, colour_map(len(names)), True, classes, 0)
        net = encoder(BACKBONE, device)
        generator = torch.Generator().manual_seed(0)
        centroids = torch.randn(classes, net.embed_dim, generator=generator)
        torch.manual_seed(0)
        self.task = Task(self.config, kinds, net, centroids)
        self.task.start_epoch(EPOCH)
        self.optimizer = build_optimizer(self.task.student, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self.transform = TrainTransform(self.config.data)
        self.picture = np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8)

    def samples(self, seed: int) -> dict[str, Tensor]:
        """Return a batch from pictures of VOC's size."""
        drawn = [self.transform(self.picture, None, index=i, epoch=seed) for i in range(self.batch)]
        return {key: torch.stack([item[key] for item in drawn]).to(self.device) for key in ("image", "guide")}

    def prepare(self, batch: dict[str, Tensor]) -> Prepared:
        """Return the pseudo labels."""
        return self.task.prepare(batch, EPOCH, 0)

    def run(self, batch: dict[str, Tensor]) -> Tensor:
        """Do the step and return its losses."""
        prepared = self.prepare(batch)
        losses = self.task.losses(prepared, prepared.counts, EPOCH)
        self.optimizer.zero_grad(set_to_none=True)
        losses["total"].backward()
        nn.utils.clip_grad_value_(self.task.student.parameters(), self.config.train.clip_value)
        self.optimizer.step()
        return torch.stack([losses[name].detach() for name in ("seg", "ce", "un", "cls", "total")])


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put `value` in the place of an attribute (or of a dict's entry) for a while."""
    if isinstance(owner, dict):
        before, owner[name] = owner[name], value
        try:
            yield
        finally:
            owner[name] = before
    else:
        before = getattr(owner, name)
        setattr(owner, name, value)
        try:
            yield
        finally:
            setattr(owner, name, before)


@contextlib.contextmanager
def as_today(batch: dict[str, Tensor], whole_network: bool = True) -> Iterator[None]:
    """Let steps on `batch` use the per-class loop and the materialising refinement.

    `whole_network=False` is kinder than the public code: the loop's backward passes then stop at the last block.
    """

    def loop(net: nn.Module, attended: Any, centroids: Tensor) -> Tensor:
        with torch.enable_grad():
            return maps_by_loop(batch["image"], centroids, whole_network=whole_network)

    def refine(image: Tensor, masks: Tensor, dilations: Any, num_iter: int, *, resize: str) -> Tensor:
        masks = F.interpolate(masks, image.shape[-2:], mode="bilinear", align_corners=True)
        return materialising(image, masks, dilations, num_iter, "par")

    with replaced(training_task.CAMS, "attention_grad", loop), replaced(dmsa_kernels.refine, "refine", refine):
        yield


def run_today(step: Step, batch: dict[str, Tensor], whole_network: bool = True) -> Tensor:
    """The step of today."""
    with as_today(batch, whole_network):
        return step.run(batch)


@contextlib.contextmanager
def timed_parts(step: Step, spent: dict[str, float]) -> Iterator[None]:
    """Add up in `spent` what each part of a step takes, in seconds."""

    def watch(owner: Any, name: str, part: str) -> contextlib.AbstractContextManager[None]:
        function = owner[name] if isinstance(owner, dict) else getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            start = _now(step.device)
            try:
                return function(*arguments, **options)
            finally:
                spent[part] += _now(step.device) - start

        return replaced(owner, name, timed)

    with contextlib.ExitStack() as stack:
        for owner, name, part in (
            (step, "samples", "data"),
            (step.task.encoder, "features", "frozen blocks"),
            (training_task.CAMS, "attention_grad", "CAM"),
            (step.task.teacher, "logits", "teacher"),
            (dmsa_kernels.refine, "refine", "PAR"),
            (step.task, "forward", "pyramid and decoder"),
            (step.task, "_losses", "losses"),
            (Tensor, "backward", "backward"),
            (step.optimizer, "step", "optimiser"),
        ):
            stack.enter_context(watch(owner, name, part))
        yield


def parts(step: Step, today: bool, whole_network: bool = True) -> dict[str, float]:
    """Return the seconds of each part of one step, and of the whole (`step`)."""
    spent: dict[str, float] = defaultdict(float)
    with contextlib.ExitStack() as stack:
        batch = step.samples(0)
        if today:
            stack.enter_context(as_today(batch, whole_network))
        stack.enter_context(timed_parts(step, spent))
        step.samples(0)
        start = _now(step.device)
        step.run(batch)
        whole = _now(step.device) - start
    if today and whole_network:
        # The loop's backward passes belong to the activation maps.
        spent["backward"] = max(0.0, spent["backward"] - _inside(step, batch))
    return {**spent, "step": whole}


def _inside(step: Step, batch: dict[str, Tensor]) -> float:
    """Return the seconds that the per-class loop spends in backward passes."""
    spent: dict[str, float] = defaultdict(float)
    backward = Tensor.backward

    def timed(*arguments: Any, **options: Any) -> None:
        start = _now(step.device)
        backward(*arguments, **options)
        spent["backward"] += _now(step.device) - start

    with replaced(Tensor, "backward", timed):
        maps_by_loop(batch["image"], step.task.centroids, whole_network=True)
    return spent["backward"]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@functools.cache
def shared_step(device: torch.device, classes: int, batch: int) -> Step:
    """One step a size, however many rows use it."""
    return Step(device, classes, batch)


def rows(device: torch.device, *, full: bool) -> list[Row]:
    """One step at VOC's 20 classes; on a CPU one image and four classes."""
    classes, batch = (20, 32) if full else (4, 1)

    def today(pictures: dict[str, Tensor]) -> Tensor:
        return run_today(shared_step(device, classes, batch), pictures)

    return [
        Row(
            family="step",
            workload=f"vit_s8_160_k{classes}",
            variant="training step",
            dtype="float32",
            shape=f"{batch},3,160,160",
            inputs=lambda _, seed: (shared_step(device, classes, batch).samples(seed),),
            candidates=(
                Candidate("ours", lambda pictures: shared_step(device, classes, batch).run(pictures), ours=True),
                Candidate("materialising PAR, backward pass per class", today),
            ),
            reference=today,
            tolerance=1e-2,
            items=batch,
            scaled_from="" if full else "32,3,160,160, 20 classes",
        )
    ]


def test_step(measure, row):
    """The step through the harness."""
    measure(row)


def table(columns: dict[str, dict[str, float]]) -> str:
    """Return seconds by part as a table in milliseconds."""
    names = [name for name in next(iter(columns.values())) if name != "step"]
    lines = [f"{'part':<22}" + "".join(f"{title:>16}" for title in columns)]
    for name in [*names, "step"]:
        lines.append(
            f"{name:<22}" + "".join(f"{1000 * column.get(name, 0.0):>13.1f} ms" for column in columns.values())
        )
    return "\n".join(lines)


def compare(step: Step, repeats: int, whole_network: bool = True) -> str:
    """Measure both steps, interleaved, and return the printed result.

    Raises:
        RuntimeError: the two steps disagree on labels or losses.
    """
    batch = step.samples(0)
    ours, label = step.run(batch), step.prepare(batch).label
    with as_today(batch, whole_network):
        theirs, other = step.run(batch), step.prepare(batch).label
    agreement = float((label == other).double().mean())
    if agreement < 0.99 or not torch.allclose(ours, theirs, rtol=1e-2):
        raise RuntimeError(f"the steps disagree: {agreement=:.4f}, losses {ours.tolist()} and {theirs.tolist()}")
    measured: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    for _ in range(repeats):
        for today in (False, True):
            measured[today].append(parts(step, today, whole_network))
    medians = {
        today: {name: statistics.median(run.get(name, 0.0) for run in runs) for name in runs[0]}
        for today, runs in measured.items()
    }
    ratio = statistics.median(b["step"] / a["step"] for a, b in zip(measured[False], measured[True], strict=True))
    memory = [
        peak_memory(run, step.device)[0]
        for run in (lambda: step.run(batch), lambda: run_today(step, batch, whole_network))
    ]
    return (
        f"{table({'ours': medians[False], 'today': medians[True]})}\n"
        f"labels agree on {100 * agreement:.2f} % of the tokens\n"
        f"peak memory beyond the inputs: ours {human_bytes(memory[0])}, today {human_bytes(memory[1])}\n"
        f"the step is {ratio:.1f}x as fast"
    )


def memory_of(device: torch.device, classes: int, images: int, precision: str) -> str:
    """Measure steps of four and eight images and say what one of `images` needs, weights and optimiser included."""
    dtype = PRECISIONS[precision]
    peaks = []
    for batch in (4, 8):
        step = Step(device, classes, batch)
        pictures = step.samples(0)

        def run(step: Step = step, pictures: dict[str, Tensor] = pictures) -> None:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                step.run(pictures)

        run()  # so that gradients and the optimiser's state are there
        peaks.append(peak_memory(run, device)[0])
    an_image = (peaks[1] - peaks[0]) / 4
    student, teacher = step.task.student, step.task.teacher.model
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in step.task.encoder.parameters())
    copies = sum(v.numel() for v in teacher.trainable_state().values())
    # Trained weights with gradients and Adam's two moments, the backbone, teacher and initial weights.
    fixed = 4 * (4 * trained + frozen + 2 * copies)
    inputs = images * 2 * 3 * step.config.data.crop**2 * 4
    whole = peaks[0] + an_image * (images - 4) + fixed + inputs
    shown = [human_bytes(value) for value in (*peaks, an_image, inputs, fixed, whole)]
    return (
        f"{classes} things, {precision}: a step takes {shown[0]} at 4 images and {shown[1]} at 8, {shown[2]} more an "
        f"image;\nat {images} images, with inputs ({shown[3]}), weights and optimiser ({shown[4]}): {shown[5]}"
    )


def main() -> None:
    """Print the comparison, or what memory a step needs."""
    parser = argparse.ArgumentParser(description="Cost of one training step, part by part.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, default=2, help="images")
    parser.add_argument("--classes", type=int, default=20, help="things, besides the background")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=int, metavar="IMAGES", help="only say what memory a step of IMAGES needs")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="bf16", help="of --memory")
    parser.add_argument(
        "--loop",
        choices=("whole-network", "last-block"),
        default="whole-network",
        help="how far the loop's backward passes go: through the network, as in public code, or through its last block",
    )
    options = parser.parse_args()
    device = pick_device(options.device)
    if options.memory:
        print(memory_of(device, options.classes, options.memory, options.precision))
        return
    print(f"ViT-S/8, {options.batch} x 160 px, {options.classes} classes and a background, {device}")
    print(
        f"today: materialising PAR, one backward pass per class ({options.loop}); "
        f"medians of {options.repeats} interleaved repeats"
    )
    print(compare(Step(device, options.classes, options.batch), options.repeats, options.loop == "whole-network"))


if __name__ == "__main__":
    main()
