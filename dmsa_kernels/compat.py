"""What differs between the supported versions of PyTorch and Triton; nothing else asks for a version.

Operators are registered with PyTorch from 2.4 on. Before, :func:`operator` makes an ``autograd.Function`` of the same
pieces: everything works but ``torch.compile`` without graph breaks and what needs fake tensors.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

OLDEST_TRITON = (3, 0)  # torch 2.4 brings it
TORCH = tuple(int(number) for number in torch.__version__.split("+")[0].split(".")[:2])
REGISTERS_OPERATORS = TORCH >= (2, 4)

_LIBRARY = torch.library.Library("dmsa_kernels", "FRAGMENT")


@functools.cache
def triton_version() -> tuple[int, int] | None:
    """Return Triton's major and minor version, or ``None`` where it is not installed. Does not import it."""
    if importlib.util.find_spec("triton") is None:
        return None
    for distribution in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            major, minor, *_ = importlib.metadata.version(distribution).split(".")
        except importlib.metadata.PackageNotFoundError:
            continue
        return int(major), int(minor)
    return OLDEST_TRITON  # importable without metadata: built by hand, so the import itself will tell


def triton_has_tuples() -> bool:
    """Whether a kernel may gather tensors in a tuple: from Triton 3.4 on."""
    return (triton_version() or OLDEST_TRITON) >= (3, 4)


def triton_splits_in_registers() -> bool:
    """Whether a kernel may load eight blocks at once and take them apart for free: from Triton 3.7 on."""
    return (triton_version() or OLDEST_TRITON) >= (3, 7)


def operator(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Make the operator ``dmsa_kernels::<schema>`` and return what calls it, with positional arguments.

    A call that the dispatcher would only hand on to ``implementation`` goes there at once (:func:`_is_direct`).

    Args:
        schema: name, arguments and results in PyTorch's schema language.
        implementation: computes the results, on any device.
        fake: allocates them with their shapes, strides and dtypes.
        setup: ``setup(ctx, inputs, output)`` keeps what ``backward`` needs.
        backward: ``backward(ctx, *grads)`` returns one gradient, or ``None``, for each input.
    """
    if not REGISTERS_OPERATORS:
        return _function(schema, implementation, fake, setup, backward)
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dmsa_kernels::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"dmsa_kernels::{name}", backward, setup_context=setup, lib=_LIBRARY)
    registered = getattr(torch.ops.dmsa_kernels, name).default

    @functools.wraps(implementation)
    def call(*args: Any) -> Any:
        return implementation(*args) if _is_direct(args) else registered(*args)

    return call


def _is_direct(args: Sequence[Any]) -> bool:
    """Whether nobody asks for a gradient of the call, traces, transforms, profiles or fakes it; it saves 30 us."""
    if is_compiling() or _is_watched():
        return False
    graph = torch.is_grad_enabled()
    for arg in args:
        if isinstance(arg, Tensor) and (
            type(arg) not in (Tensor, torch.nn.Parameter)
            or not (arg.is_cpu or arg.is_cuda)
            or (graph and arg.requires_grad)
            or arg.is_neg()
        ):
            return False
    return True


def _is_watched() -> bool:
    """Whether a mode, a transform of ``torch.func``, a tracer or the profiler is on. These names are not public."""
    try:
        return bool(
            torch._C._len_torch_dispatch_stack()
            or torch._C._functorch.peek_interpreter_stack() is not None
            or torch._C._get_tracing_state() is not None
            or torch._C._autograd._profiler_enabled()
        )
    except AttributeError:
        return True


def _function(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    setup: Callable[..., None] | None,
    backward: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """:func:`operator` without registration."""

    def run(*args: Any) -> Any:
        on_meta = any(isinstance(arg, Tensor) and arg.is_meta for arg in args)
        return fake(*args) if on_meta else implementation(*args)

    if backward is None:
        return torch.no_grad()(run)

    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        """One call for each entry of the batch, as for a registered operator."""
        results = [
            apply(
                *(
                    arg if not isinstance(arg, Tensor) or d is None else arg.select(d, i)
                    for arg, d in zip(args, in_dims)
                )
            )
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results))), (0,) * len(results[0])

    members = {
        "forward": staticmethod(run),
        "setup_context": staticmethod(setup or (lambda ctx, inputs, output: None)),
        "backward": staticmethod(backward),
        "vmap": staticmethod(vmap),
    }
    apply = type(schema.partition("(")[0], (torch.autograd.Function,), members).apply  # type: ignore[attr-defined]
    return apply


def is_compiling() -> bool:
    """Whether ``torch.compile`` traces this code; torch before 2.3 cannot tell."""
    ask = getattr(torch.compiler, "is_compiling", None)
    return ask is not None and ask()


def tangent(x: Tensor) -> Tensor | None:
    """Return the forward-mode derivative that ``x`` carries; the compiler traces without."""
    return None if is_compiling() else forward_ad.unpack_dual(x).tangent


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype to which autocast brings floating-point arguments on the device of ``x``, or ``None``."""
    # The name of a device is slow to make, but what the compiler can trace.
    device_type = "cpu" if not is_compiling() and x.is_cpu else x.device.type
    if device_type not in ("cpu", "cuda"):  # meta tensors know none
        return None
    if TORCH >= (2, 4):
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    if device_type == "cpu":
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
    return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Switch autocast off on the device of ``x``, if it is on."""
    if autocast_dtype(x) is None:
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def warp_size(device: torch.device) -> int:
    """Return the threads of a warp: 32, on most AMD GPUs 64."""
    if device.type != "cuda":
        return 32
    size = getattr(torch.cuda.get_device_properties(device), "warp_size", None)
    return size if size is not None else 32 if torch.version.hip is None else 64


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Return the CUDA compute capability of a device, or ``None`` where it has none."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def cooperative_programs(device: torch.device) -> int:
    """Return how many programs of a launch are sure to run at the same time: as many as there are multiprocessors.

    A program that can run at all fits one of them. 0 where a launch cannot ask for it: not on CUDA, or before Triton
    3.4.
    """
    if device.type != "cuda" or torch.version.hip is not None or (triton_version() or OLDEST_TRITON) < (3, 4):
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def direct_launch(compiled: Any, grid: int) -> Callable[[int, tuple], None] | None:
    """Return ``launch(stream, arguments)``, which repeats a launch of ``grid`` programs by Triton's C function.

    Args:
        compiled: what the first launch returned; None from the interpreter.
        grid: programs.

    Returns:
        None where the C function's arguments are not known (before Triton 3.8, on ROCm), or the kernel needs more.
    """
    if compiled is None or (triton_version() or OLDEST_TRITON) < (3, 8):
        return None
    from triton.backends.nvidia.driver import CudaLauncher

    launcher = compiled.run
    names = ("launch", "arg_annotations", "kernel_signature", "launch_cooperative_grid", "launch_pdl")
    if not isinstance(launcher, CudaLauncher) or not all(hasattr(launcher, name) for name in names):
        return None
    if any(getattr(launcher, name, 0) for name in ("global_scratch_size", "profile_scratch_size", "gsan_enabled")):
        return None
    launch, annotations, signature, cooperative, dependent = (getattr(launcher, name) for name in names)
    function, metadata = compiled.function, compiled.packed_metadata

    def by_c(stream: int, arguments: tuple) -> None:
        # the Nones: launch metadata, hooks, scratch memory
        launch(
            *(grid, 1, 1, stream, function, cooperative, dependent, metadata),
            *(None, None, None, None, None, annotations, signature, arguments),
        )

    return by_c


def has_launch_hooks() -> bool:
    """Return whether a profiler or the like wants to know of every launch; asked for launches by the C function."""
    import triton

    runtime = triton.knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    return any(getattr(hook, "calls", hook is not None) for hook in hooks)


def specialisation() -> object:
    """Return the settings, beside the arguments, for which Triton's JIT compiles a kernel of its own."""
    import triton

    return triton.knobs.runtime.debug if hasattr(triton, "knobs") else None


@contextlib.contextmanager
def no_compilation(message: str) -> Iterator[None]:
    """Raise ``RuntimeError(message)`` where Triton's JIT would compile a kernel."""
    import triton

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(message)

    # before Triton 3.4 the hook was an attribute of the class
    has_knobs = hasattr(triton, "knobs")
    owner, name = (triton.knobs.runtime, "jit_cache_hook") if has_knobs else (triton.JITFunction, "cache_hook")
    before = getattr(owner, name)
    setattr(owner, name, refuse)
    try:
        yield
    finally:
        setattr(owner, name, before)
