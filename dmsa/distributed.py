"""Processes: started by torchrun or alone, the same calls work in both cases.

Nothing here needs `torch.distributed` to be initialised; with one process every function is the identity.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def is_initialized() -> bool:
    """Return whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return this process's number, 0 without a process group."""
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    """Return the number of processes, 1 without a process group."""
    return dist.get_world_size() if is_initialized() else 1


def is_main() -> bool:
    """Return whether this is the process that writes files and prints."""
    return rank() == 0


def local_device() -> torch.device:
    """Return this process's GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("cpu")


@contextlib.contextmanager
def process_group(timeout_seconds: float = 1800.0) -> Iterator[torch.device]:
    """Join the processes that torchrun started (none: do nothing) and yield this process's device.

    nccl between GPUs, gloo between CPUs. A process that leaves by an exception does not wait for the others: its error
    ends it, and the launcher and the broken connections end them.

    Raises:
        RuntimeError: torchrun's environment is set, but not every process came within the time limit.
    """
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    started_by_launcher = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if not started_by_launcher or is_initialized():
        yield device
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    try:
        store, number, processes = next(dist.rendezvous("env://", timeout=timeout))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # One launcher restarts all processes on its own store, where the addresses of the dead ones still stand.
            store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(
            backend,
            store=store,
            rank=number,
            world_size=processes,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not join the others "
            f"at {os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')} "
            f"within {timeout_seconds:.0f} s: a process is missing, or its host cannot be reached; "
            f"start all of them with torchrun ({error})"
        ) from error
    yield device
    dist.destroy_process_group()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all processes, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


def broadcast_object(value: T) -> T:
    """Return rank 0's `value` (anything picklable) in every process."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=_object_device())
    return box[0]


def broadcast_state(state: Any) -> Any:
    """Return rank 0's `state` of tensors and plain values in every process, as `torch.save` carries it."""
    if world_size() == 1:
        return state
    stream = io.BytesIO()
    if is_main():
        torch.save(state, stream)
    return torch.load(io.BytesIO(broadcast_object(stream.getvalue())), map_location="cpu", weights_only=True)


def gather_objects(value: T) -> list[T]:
    """Return every process's `value`, in the order of ranks, in every process."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def on_main(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its result in every process; if it fails there, every process raises.

    Raises:
        RuntimeError: in the other processes, naming rank 0's error (which rank 0 raises itself).
    """
    if world_size() == 1:
        return work()
    result, error = None, None
    if is_main():
        try:
            result = work()
        except Exception as raised:
            error = raised
    result, message = broadcast_object((result, None if error is None else f"{type(error).__name__}: {error}"))
    if error is not None:
        raise error
    if message is not None:
        raise RuntimeError(f"rank 0 failed: {message}")
    return result


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Let rank 0 run the block before the others do, so that they find what it has cached."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def shard(length: int) -> range:
    """Return this process's contiguous part of `range(length)`; the parts differ in length by one at most."""
    return range(rank() * length // world_size(), (rank() + 1) * length // world_size())


def _object_device() -> torch.device:
    return local_device() if dist.get_backend() == "nccl" else torch.device("cpu")
