"""Processes: started by torchrun or alone, the same calls work in both cases.

Nothing here needs `torch.distributed` to be initialised; with one process every function is the identity. Whatever a
rank's part of the work is, it is `part`: contiguous, and one longer than another's at most.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

BEAT_SECONDS = 1.0
"""Time between two signs of life of a process."""
ANSWER_SECONDS = 5.0
"""How long the store that the processes share may take to answer."""
EXCHANGE_SECONDS = 6 * 3600.0
"""How long a backend waits for the others: long, because it cannot tell whether they work or are lost."""
_CONNECTION_WORDS = ("gloo", "nccl", "connection", "processgroup", "tcpstore")
_watch: _Watch | None = None


class ElsewhereError(RuntimeError):
    """Another rank failed, and has said so itself."""


class LostRankError(RuntimeError):
    """A rank was not heard of: it ended, or cannot be reached."""


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


def launched() -> tuple[int, int]:
    """Return number and count of processes that the launcher's environment names, (0, 1) without a launcher."""
    if started_by_launcher():
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def started_by_launcher() -> bool:
    """Return whether a launcher's environment says that this is one of several processes."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def local_device() -> torch.device:
    """Return this process's GPU if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("cpu")


@contextlib.contextmanager
def process_group(timeout_seconds: float = 1800.0, *, consequence: Callable[[], str] = str) -> Iterator[torch.device]:
    """Join the processes that torchrun started (none: do nothing) and yield this process's device.

    nccl between GPUs, gloo between CPUs. A process that leaves by an exception does not wait for the others: its error
    ends it, and the launcher and the broken connections end them.

    Args:
        timeout_seconds: how long a process waits here for the others.
        consequence: what is said after the name of a rank that was not heard of, such as how to go on.

    Raises:
        LostRankError: torchrun's environment is set, but not every process came within the time limit; or one that had
            joined ended or cannot be reached.
    """
    global _watch
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not started_by_launcher() or is_initialized():
        yield device
        return
    number, processes = launched()
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    try:
        store, number, processes = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(_meet(store, number, processes, timeout_seconds), store)
        dist.init_process_group(
            backend,
            store=store,
            rank=number,
            world_size=processes,
            timeout=datetime.timedelta(seconds=EXCHANGE_SECONDS),
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        raise LostRankError(
            f"rank {number} of {processes} could not join the others "
            f"at {os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')} "
            f"within {timeout_seconds:.0f} s: a process is missing, or its host cannot be reached; "
            f"start all of them with torchrun ({error})"
        ) from error
    _watch = _Watch(store, consequence) if processes > 1 else None
    try:
        yield device
    except RuntimeError as error:
        lost = _watch.lost(3 * BEAT_SECONDS) if _watch is not None and _is_connection_error(error) else None
        if lost is None:
            raise
        raise lost from error
    finally:
        if _watch is not None:
            _watch.close()
            _watch = None
    dist.destroy_process_group()


def _meet(store: dist.Store, number: int, processes: int, timeout_seconds: float) -> str:
    """Return a name that all processes of this attempt share and no earlier attempt has used.

    Launchers restart their processes on the same store, where what the dead ones wrote still stands, and number their
    attempts each for itself. So every process greets with a word of its own, and the first answers until all of them
    have confirmed; the greeting of a dead process is answered in vain until its successor's takes its place.
    """
    own = uuid.uuid4().hex
    if number:
        store.set(f"hello/{number}", own)
        name = store.get(f"welcome/{own}").decode()
        store.set(f"here/{name}/{number}", "")
        return name
    missing = set(range(1, processes))
    deadline = time.monotonic() + timeout_seconds
    while missing:
        if time.monotonic() > deadline:
            raise RuntimeError(f"not heard of: {_ranks(missing)}")
        for other in sorted(missing):
            if store.check([f"here/{own}/{other}"]):
                missing.discard(other)
            elif store.check([f"hello/{other}"]):
                store.set(f"welcome/{store.get(f'hello/{other}').decode()}", own)
        time.sleep(0.01)
    return own


def part(length: int, number: int, parts: int) -> range:
    """Return part `number` of `range(length)` cut into `parts`; they differ in length by one at most."""
    return range(number * length // parts, (number + 1) * length // parts)


def shard(length: int) -> range:
    """Return this process's part of `range(length)`."""
    return part(length, rank(), world_size())


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all processes, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


class _Joined(torch.autograd.Function):
    """The rows of all processes from each one's own; its share of the gradient comes back, times the processes."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, length: int) -> Tensor:
        ctx.rows = shard(length)
        whole = own.new_zeros(length, *own.shape[1:])
        whole[ctx.rows.start : ctx.rows.stop] = own
        return all_reduce_sum(whole)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][ctx.rows.start : ctx.rows.stop] * world_size(), None


def by_parts(work: Callable[[slice], tuple[Tensor, ...]], length: int) -> tuple[Tensor, ...]:
    """Let each process do its part of a batch and return the results for all of it, the same in every process.

    Whatever comes after sees the whole batch in every process; gradients are then to be averaged (`average_gradients`):
    of what `work` uses they add up to the whole batch's, of what comes after they are the whole batch's already.

    Args:
        work: takes the slice of its images and returns tensors `[own images, ...]`.
        length: images of the batch.

    Raises:
        ValueError: more processes than images.
    """
    if world_size() == 1:
        return work(slice(0, length))
    if world_size() > length:
        raise ValueError(f"{world_size()} processes cannot share a batch of {length} images; start at most {length}")
    own = shard(length)
    return tuple(_Joined.apply(result, length) for result in work(slice(own.start, own.stop)))


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Average gradients over processes, in place."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if world_size() == 1 or not gradients:
        return
    flat = all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients])) / world_size()
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


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
        ElsewhereError: in the other processes, naming rank 0's error (which rank 0 raises itself).
    """
    if world_size() == 1:
        return work()
    result: T | None = None
    error: Exception | None = None
    if is_main():
        try:
            result = work()
        except Exception as raised:
            error = raised
    result, message = broadcast_object((result, None if error is None else f"{type(error).__name__}: {error}"))
    if error is not None:
        raise error
    if message is not None:
        raise ElsewhereError(f"rank 0 failed: {message}")
    return cast(T, result)


def together(work: Callable[[], T], *, main_first: bool = False) -> T:
    """Run `work`, which exchanges nothing, in every process; if it fails in one of them, every process raises.

    Args:
        work: what to run; its result is returned.
        main_first: rank 0 runs it before the others do, so that they find what it has cached.

    Raises:
        ElsewhereError: in all processes but the first one that failed, naming that and its error.
    """
    if world_size() == 1:
        return work()
    result, error = None, None
    if main_first and not is_main():
        barrier()
    try:
        result = work()
    except Exception as raised:
        error = raised
    if main_first and is_main():
        barrier()
    failed = [
        (number, message)
        for number, message in enumerate(gather_objects(None if error is None else f"{type(error).__name__}: {error}"))
        if message is not None
    ]
    if not failed:
        return result  # type: ignore[return-value]
    first, message = failed[0]
    if error is not None and first == rank():
        raise error
    raise ElsewhereError(f"rank {first} failed: {message}")


def _object_device() -> torch.device:
    return local_device() if dist.get_backend() == "nccl" else torch.device("cpu")


@contextlib.contextmanager
def first_of_host_speaks() -> Iterator[None]:
    """Let only the first process of a host print in the block, where all of them would print the same."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        yield
        return
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def complain(error: BaseException, program: str | None = None) -> None:
    """Print `error` as one line that names program and rank, and leave it with the launcher for its own report.

    Args:
        error: nothing is printed of one that another rank has told already.
        program: begins the line; the process's own name if None.
    """
    number, processes = launched()
    # Until they have joined, the processes of a host fail alike, and the first one says it.
    alike = not is_initialized() and int(os.environ.get("LOCAL_RANK", 0)) > 0 and not isinstance(error, RuntimeError)
    if not alike and not isinstance(error, ElsewhereError):
        text = str(error) or type(error).__name__
        if text.startswith("Caught "):  # a data loader's worker sends its whole traceback as the message
            text = text.strip().splitlines()[-1]
        where = f"rank {number} of {processes}: " if processes > 1 else ""
        line = f"{program or f'{Path(sys.argv[0]).name}: error'}: {where}{text}"
        if "tqdm" in sys.modules:
            sys.modules["tqdm"].tqdm.write(line, file=sys.stderr)  # on a line of its own, above progress bars
        else:
            print(line, file=sys.stderr)
        sys.stderr.flush()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _is_connection_error(error: BaseException) -> bool:
    """Return whether `error` says that another process could not be reached."""
    if isinstance(error, (ElsewhereError, LostRankError)):
        return False
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _CONNECTION_WORDS)


class _Watch:
    """Shows the others that this process lives, and ends it with one line when one of them does not any more.

    A broken link shows in no exchange between processes: packets just stop, and backends wait for their own long time
    or, with nccl, hang where Python cannot see it. So threads look at the clock and at each other's beats, in the store
    that the processes share. Who beats may work for as long as it likes.
    """

    def __init__(self, store: dist.Store, consequence: Callable[[], str]) -> None:
        # A client waits for its answers one after the other, even for one that never comes: two threads, two clients.
        self._written, self._read, self._consequence = store.clone(), store.clone(), consequence
        self._limit, self._since = float("inf"), time.monotonic()
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=run, name="watch", daemon=True) for run in (self._beat, self._look)]
        for thread in self._threads:
            thread.start()

    def expect(self, seconds: float | None) -> None:
        self._limit = self._limit if seconds is None else seconds
        self._since = time.monotonic()

    def close(self) -> None:
        """Stop, and wait for the threads: one that comes back from the store while Python ends aborts the process."""
        self._closed.set()
        for thread in self._threads:
            thread.join(ANSWER_SECONDS)  # longer only where the store's host is lost

    def lost(self, seconds: float, since: str = "") -> LostRankError | None:
        """Return the error that names who gives no sign of life within `seconds`; None as soon as all have."""
        deadline = time.monotonic() + seconds
        keys = [f"beat/{number}" for number in range(world_size())]
        before: list[bytes] | None = None
        beats: list[bytes] | None = None
        while time.monotonic() < deadline and not self._closed.is_set():
            beats = _within(ANSWER_SECONDS, lambda: self._read.multi_get(keys))
            before = before or beats
            if before and beats and all(old != new for old, new in zip(before, beats, strict=True)):
                return None
            time.sleep(BEAT_SECONDS / 4)
        if before and beats:
            still = {number for number, (old, new) in enumerate(zip(before, beats, strict=True)) if old == new}
            missing = f"{_ranks(still)} {'was' if len(still) == 1 else 'were'}"
        else:
            address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
            missing = f"the host of rank 0 ({address}) was"
        return LostRankError("; ".join(filter(None, (f"{missing} not heard of{since}", self._consequence()))))

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError):  # without the store's host the end is near, and `_look` tells it
            number = 0
            while not self._closed.is_set():
                self._written.set(f"beat/{rank()}", str(number := number + 1))
                self._closed.wait(BEAT_SECONDS)

    def _look(self) -> None:
        while not self._closed.wait(BEAT_SECONDS / 4):
            limit = self._limit
            if time.monotonic() - self._since < limit / 2:
                continue
            error = self.lost(limit / 2, f" for {limit:g} s")
            if error is not None and not self._closed.is_set() and time.monotonic() - self._since >= limit:
                complain(error)
                os._exit(1)
            if error is None:
                self.expect(None)


def expect(seconds: float | None = None) -> None:
    """Begin to count: unless this is called again in time, this process ends if another one gives no sign of life.

    Args:
        seconds: from this call on; as before if unset.
    """
    if _watch is not None:
        _watch.expect(seconds)


def _within(seconds: float, work: Callable[[], T]) -> T | None:
    """Return what `work` returns; None if that takes longer, or fails because of the connection."""
    results: list[T] = []

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            results.append(work())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None


def _ranks(numbers: set[int]) -> str:
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(map(str, sorted(numbers)))}"
