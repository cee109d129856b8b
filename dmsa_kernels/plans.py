"""Launch plans: what Python decides for a shape is decided once, later calls go straight to the compiled kernels.

A *schedule* is a function that issues a call's launches: ``schedule(trace, *tensors, *options)``. It runs once for a
shape, on meta tensors: it slices them, takes buffers from the trace and names each launch. The plan that comes of it
holds no memory and no addresses. Its first run on a device goes through Triton's JIT, which compiles what is missing;
later runs call the C launcher with a ready tuple, in a tenth of the host's time.

A plan is found by all that the schedule can see: shapes, strides, dtypes, device, options, the tuning in force. Its
kernels are found by what the JIT specialises on besides, device, 16-byte alignment and debugging; the stream is asked
for at every call. Only running imports Triton.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmsa_kernels import compat, tuning

MAX_PLANS = 512


class Launch(NamedTuple):
    """One launch: a kernel whose parameters are its pointers, then everything else.

    Attributes:
        kernel: the jitted function.
        grid: programs.
        pointers: for each pointer the tensor it belongs to, counted over inputs and buffers, and the view of it (meta).
        arguments: the other parameters by name, constants included.
        options: what Triton's launch takes besides, such as ``num_warps``.
    """

    kernel: Any
    grid: int
    pointers: tuple[tuple[int, Tensor], ...]
    arguments: dict[str, Any]
    options: dict[str, Any]


class Trace:
    """What a schedule writes down.

    Attributes:
        device: where the plan will run.
    """

    def __init__(self, tensors: Sequence[Tensor | None], device: torch.device):
        self.device = device
        self.launches: list[Launch] = []
        self.buffers: list[tuple[tuple[int, ...], torch.dtype]] = []
        self._owners = {_storage(tensor): i for i, tensor in enumerate(tensors) if tensor is not None}
        self._inputs = len(tensors)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a buffer that lives as long as a run, as a meta tensor."""
        buffer = torch.empty(tuple(shape), dtype=dtype, device="meta")
        self._owners[_storage(buffer)] = self._inputs + len(self.buffers)
        self.buffers.append((tuple(shape), dtype))
        return buffer

    def launch(
        self, kernel: Any, grid: int, *, num_warps: int, options: dict[str, Any] | None = None, **arguments: Any
    ) -> None:
        """Write down one launch; tensors among ``arguments`` are views of inputs or buffers.

        ``num_warps`` counts warps of 32 threads; where they are wider, a program has as many threads in fewer.
        """
        num_warps = max(1, num_warps * 32 // compat.warp_size(self.device))
        pointers = []
        for name in kernel.arg_names:
            if isinstance(arguments.get(name), Tensor):
                view = arguments.pop(name)
                pointers.append((self._owners[_storage(view)], view))
        if grid:
            self.launches.append(
                Launch(kernel, grid, tuple(pointers), arguments, (options or {}) | {"num_warps": num_warps})
            )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Ready(NamedTuple):
    """A launch whose kernel is compiled.

    Attributes:
        launch: of :func:`dmsa_kernels.compat.direct_launch`.
        pointers: tensor and byte offset of each.
        rest: the arguments behind the pointers.
    """

    launch: Callable[[int, tuple], None]
    pointers: tuple[tuple[int, int], ...]
    rest: tuple[Any, ...]


class Plan:
    """The launches of one call for one shape."""

    def __init__(self, trace: Trace):
        self._launches = tuple(trace.launches)
        self._buffers = tuple(trace.buffers)
        self._ready: dict[Hashable, list[_Ready]] = {}

    def run(self, tensors: Sequence[Tensor | None], device: torch.device) -> None:
        """Launch everything on the current stream of ``device``.

        Raises:
            RuntimeError: a kernel would have to be compiled while a CUDA graph is captured.
        """
        if device.type == "cuda" and torch.cuda.current_device() != device.index:
            with torch.cuda.device(device):
                return self.run(tensors, device)
        owners = [*tensors, *[torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self._buffers]]
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in owners]
        key = (device, compat.specialisation(), *[address & 15 == 0 for address in addresses])
        ready = self._ready.get(key)
        if ready is None or compat.has_launch_hooks():
            return self._run_by_jit(owners, device, key)
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        for launch, pointers, rest in ready:
            launch(stream, (*[addresses[owner] + offset for owner, offset in pointers], *rest))

    def _run_by_jit(self, owners: Sequence[Tensor | None], device: torch.device, key: Hashable) -> None:
        ready: list[_Ready] = []
        with compat.no_compilation(_UNCOMPILED) if _is_capturing(device) else contextlib.nullcontext():
            for kernel, grid, pointers, arguments, options in self._launches:
                views = {name: _view_of(owners[owner], view) for name, (owner, view) in zip(kernel.arg_names, pointers)}
                compiled = kernel[(grid,)](**views, **arguments, **options)
                launch = compat.direct_launch(compiled, grid)
                if launch is not None:
                    offsets = tuple(
                        (owner, int(view.storage_offset()) * view.element_size()) for owner, view in pointers
                    )
                    ready.append(
                        _Ready(launch, offsets, tuple(arguments[n] for n in kernel.arg_names[len(pointers) :]))
                    )
        if len(ready) == len(self._launches):
            self._ready[key] = ready


_UNCOMPILED = (
    "a CUDA graph is being captured and a kernel would have to be compiled for this call; run it once before, or"
    " dmsa_kernels.warmup(...), with the same shapes, strides and options"
)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _view_of(owner: Tensor | None, view: Tensor) -> Tensor:
    assert owner is not None  # it was there when the plan was traced
    return owner.as_strided(view.shape, view.stride(), owner.storage_offset() + view.storage_offset())


def run(schedule: Callable[..., None], tensors: Sequence[Tensor | None], *options: Hashable) -> None:
    """Run ``schedule`` on ``tensors``, the first of which is there: as it was traced for such tensors and options."""
    first = tensors[0]
    assert first is not None
    layouts = tuple([t if t is None else (t.shape, t.stride(), t.dtype) for t in tensors])
    _plan(schedule, layouts, first.device, options, tuning.version()).run(tensors, first.device)


@functools.lru_cache(maxsize=MAX_PLANS)
def _plan(
    schedule: Callable[..., None],
    layouts: tuple[tuple | None, ...],
    device: torch.device,
    options: tuple[Hashable, ...],
    version: int,
) -> Plan:
    tensors = [
        None if layout is None else torch.empty_strided(layout[0], layout[1], dtype=layout[2], device="meta")
        for layout in layouts
    ]
    trace = Trace(tensors, device)
    schedule(trace, *tensors, *options)
    return Plan(trace)


def clear() -> None:
    """Forget all plans; for tests that change what a schedule decides."""
    _plan.cache_clear()
