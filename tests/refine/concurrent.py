"""Run a schedule through the interpreter with every program of a resident launch truly beside the others.

The interpreter runs the programs of a launch one after another, so that one that waits for the others would wait for
ever. Here each has a process of its own, all tensors are in shared memory, and atomic additions are those of the CPU.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dmsa_kernels import plans

DEADLINE_S = 120.0


def run(
    schedule: Callable[..., None],
    tensors: Sequence[Tensor | None],
    *options: object,
    kernel: object,
    seed: int = 0,
    late_s: float = 0.0,
    absent: Collection[int] = (),
) -> int:
    """Trace and run ``schedule`` as ``plans.run`` does, the launches of ``kernel`` with concurrent programs.

    Args:
        kernel: whose launches are concurrent.
        seed: of the order in which programs start, and of the stragglers.
        late_s: how long a program sleeps at every sixth block barrier, and so before it meets the others or after.
        absent: numbers of the programs that are left out of such launches.

    Returns:
        The programs that ran concurrently.

    Raises:
        RuntimeError: with what a program raised.
    """
    shared = [None if tensor is None else _shared(tensor) for tensor in tensors]
    metas = [
        None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in shared
    ]
    trace = plans.Trace(metas, torch.device("cpu"))
    schedule(trace, *metas, *options)
    owners = [*shared, *[_poisoned(shape, dtype) for shape, dtype in trace.buffers]]
    count = 0
    for launch in trace.launches:
        pointers = zip(launch.kernel.arg_names, launch.pointers, strict=False)  # the first parameters
        views = {name: plans._view_of(owners[owner], view) for name, (owner, view) in pointers}
        arguments = {**views, **launch.arguments, **launch.options}
        if launch.kernel is kernel:
            order = [i for i in range(launch.grid) if i not in absent]
            random.Random(seed).shuffle(order)
            fork(order, launch.grid, lambda: kernel[(1,)](**arguments), seed, late_s)  # noqa: B023 (called at once)
            count += launch.grid
        else:
            launch.kernel[(launch.grid,)](**arguments)
    for tensor, result in zip(tensors, shared, strict=True):
        if tensor is not None and not torch.equal(tensor, result):  # an output; an input may not be writable
            tensor.copy_(result)
    return count


def _shared(tensor: Tensor) -> Tensor:
    """Return a copy in shared memory with the same strides, or a contiguous one of an expanded tensor."""
    copy = torch.empty_like(tensor, memory_format=torch.preserve_format).copy_(tensor)
    return copy.share_memory_()


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    buffer = torch.empty(shape, dtype=dtype).fill_(float("nan") if dtype.is_floating_point else -7)
    return buffer.share_memory_()


def fork(order: Sequence[int], grid: int, launch: Callable[[], object], seed: int, late_s: float) -> None:
    """Call ``launch``, which launches one program, in a process for each number in ``order``, all at once.

    Without sleep they would keep in step: the operating system gives each a few milliseconds in turn.

    Raises:
        RuntimeError: with what a process raised, or where one is still at work after ``DEADLINE_S``.
    """
    with tempfile.TemporaryDirectory() as folder:

        def straggling(program: int) -> None:
            draw = random.Random(100 * seed + program)
            sleep_at_barriers(lambda: late_s * (draw.random() < 1 / 6))
            launch()

        children = {_start(program, grid, lambda p=program: straggling(p), Path(folder)): program for program in order}
        deadline = time.monotonic() + DEADLINE_S
        late = set(children)
        while late and time.monotonic() < deadline:
            late -= {child for child in late if os.waitpid(child, os.WNOHANG)[0]}
            time.sleep(0.002)
        for child in late:
            os.kill(child, 9)
            os.waitpid(child, 0)
        if late:
            raise RuntimeError(f"programs {sorted(children[child] for child in late)} of {grid} never ended")
        errors = {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}
        if errors:
            raise RuntimeError(f"programs {list(errors)} of {grid} failed: {next(iter(errors.values()))}")


def sleep_at_barriers(seconds: Callable[[], float]) -> None:
    """Make ``tl.debug_barrier`` sleep in this process."""
    from triton.runtime import interpreter

    interpreter.interpreter_builder.create_barrier = lambda: time.sleep(seconds())


def _start(program: int, grid: int, launch: Callable[[], object], folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        from triton.runtime import interpreter

        builder = interpreter.interpreter_builder
        index, dimensions = builder.set_grid_idx, builder.set_grid_dim
        builder.set_grid_idx = lambda *_: index(program, 0, 0)
        builder.set_grid_dim = lambda *_: dimensions(grid, 1, 1)
        # it would write all that this process has read back over what others have written since
        interpreter.GridExecutor._restore_args_dev = lambda *_: None
        launch()
    except BaseException as error:
        (folder / str(program)).write_text(repr(error), encoding="utf-8")
    finally:
        os._exit(0)
