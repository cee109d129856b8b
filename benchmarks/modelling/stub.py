"""Run the operators without a GPU: Triton's JIT, compiler and launcher over a driver that does nothing.

Tensors are on the CPU, where memory that nobody touches costs nothing; kernels are compiled as on a GPU, with the
specialisations (alignment, multiples of 16, ones) of the real arguments. The driver library must be found when Triton
is loaded, so :func:`in_child` starts a process of its own for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
_FOLDER = "STUB_FOLDER"


class Launch(NamedTuple):
    """One launch as the driver saw it.

    Attributes:
        name: of the kernel.
        grid: programs.
        num_warps: of a program.
        arguments: scalars and constants by name; pointers are left out.
        types: the pointers' types by name.
        cubin: machine code.
        layouts: the compiler's last form in which loads and stores have layouts (``ttgir``).
    """

    name: str
    grid: int
    num_warps: int
    arguments: dict[str, Any]
    types: dict[str, str]
    cubin: bytes
    layouts: str


def in_child(module: str, arguments: Sequence[str], *, capability: int = 90) -> int:
    """Run ``python -m module arguments`` in a process that finds the stub; return its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        environment = prepare(Path(folder), capability)
        return subprocess.run([sys.executable, "-W", "ignore", "-m", module, *arguments], env=environment).returncode


def prepare(folder: Path, capability: int = 90) -> dict[str, str]:
    """Compile the stub and the cache simulator into ``folder``; return the environment of a process that uses them.

    Raises:
        FileNotFoundError: there is no C compiler ``cc``.
    """
    library = folder / "libcuda.so.1"
    options = ["-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["cc", *options, "-o", str(library), str(HERE / "driver.c")], check=True)
    subprocess.run(["cc", "-O2", "-o", str(folder / "cache"), str(HERE / "cache.c")], check=True)
    (folder / "libcuda.so").symlink_to(library.name)
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {
        "TRITON_CACHE_DIR": str(folder / "kernels"),
        **kept,
        _FOLDER: str(folder),
        "STUB_CAPABILITY": str(capability),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "OMP_NUM_THREADS": "1",
    }


def is_ready() -> bool:
    """Return whether this process was started by :func:`in_child` or in the environment of :func:`prepare`."""
    return _FOLDER in os.environ


class Driver:
    """The stub, installed as Triton's driver; every operator's ``backend="auto"`` means the kernels from then on.

    Args:
        l2_bytes: size of the L2 cache for which chunks are planned; None for the default.
        multiprocessors: as many programs of a cooperative launch run at the same time; it refuses more.
    """

    def __init__(self, l2_bytes: int | None = None, multiprocessors: int = 132) -> None:
        import triton.backends.nvidia.driver as nvidia
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver

        import dmsa_kernels.aspp.ops
        import dmsa_kernels.refine.ops
        from dmsa_kernels import compat, tuning

        if l2_bytes is not None:
            tuning.plan_chunks.__defaults__ = (2, l2_bytes)
        self.capability = int(os.environ["STUB_CAPABILITY"])
        self.folder = Path(os.environ[_FOLDER])
        self._library = ctypes.CDLL(str(self.folder / "libcuda.so.1"))
        self._library.stub_set_room(multiprocessors)
        self._recorded: list[Launch] | None = None
        target = GPUTarget("cuda", self.capability, 32)
        stub = self

        class Launcher(nvidia.CudaLauncher):
            def __init__(self, source: Any, metadata: Any):
                super().__init__(source, metadata)
                self.source, self.metadata = source, metadata

            def __call__(self, *arguments: Any) -> None:
                stub._record(self.source, self.metadata, arguments)
                super().__call__(*arguments)

        class Stub(nvidia.CudaDriver):
            def __init__(self) -> None:
                self.utils = nvidia.CudaUtils()
                self.launcher_cls = Launcher
                self.get_current_target = lambda: target
                self.get_device_capability = lambda device=0: divmod(stub.capability, 10)
                self.get_current_device = lambda: 0
                self.get_current_stream = lambda device: 0
                self.set_current_device = lambda device: None

        driver.set_active(Stub())
        compat.compute_capability = lambda device: divmod(stub.capability, 10)
        compat.cooperative_programs = lambda device: multiprocessors
        for ops in (dmsa_kernels.refine.ops, dmsa_kernels.aspp.ops):
            ops.resolve = lambda backend, *tensors: "triton"

    def _record(self, source: Any, metadata: Any, arguments: tuple) -> None:
        if self._recorded is None:
            return
        from triton.runtime.cache import get_cache_manager

        names = source.fn.arg_names
        values = dict(zip(names, arguments[-len(names) :], strict=True))
        files = get_cache_manager(metadata.hash).get_group(f"{metadata.name}.json")
        pointers = {name: kind for name, kind in source.signature.items() if str(kind).startswith("*")}
        self._recorded.append(
            Launch(
                metadata.name,
                arguments[0],
                metadata.num_warps,
                {name: value for name, value in values.items() if name not in pointers},
                pointers,
                Path(files[f"{metadata.name}.cubin"]).read_bytes(),
                Path(files[f"{metadata.name}.ttgir"]).read_text(encoding="utf-8"),
            )
        )

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Launch]]:
        """Keep every launch inside the block, which goes by way of the JIT."""
        with contextlib.suppress(ImportError):
            from dmsa_kernels import plans

            plans.clear()
        self._recorded = []
        try:
            yield self._recorded
        finally:
            self._recorded = None

    def launches(self, function: Callable[[], object]) -> int:
        """Return how many launches a call makes, counted by the driver."""
        before = self._library.stub_launches()
        function()
        return self._library.stub_launches() - before

    def cooperative_launches(self, function: Callable[[], object]) -> int:
        """Return how many of a call's launches are cooperative, counted by the driver."""
        before = self._library.stub_cooperative_launches()
        function()
        return self._library.stub_cooperative_launches() - before

    def bare_launch_seconds(self) -> float:
        """Return the host time of launching a kernel with one argument through Triton's JIT."""
        import torch

        from benchmarks.modelling.bare import bare_kernel

        tensor = torch.empty(1)
        return self.host_seconds(lambda: bare_kernel[(1,)](tensor, num_warps=1), calls=100)

    def host_seconds(self, function: Callable[[], object], calls: int = 30, rounds: int = 11) -> float:
        """Return the processor time of a call after the first two: the least mean of ``calls`` over ``rounds``."""
        function()
        function()
        found = []
        for _ in range(rounds):
            start = time.thread_time_ns()
            for _ in range(calls):
                function()
            found.append((time.thread_time_ns() - start) / calls / 1e9)
        return min(found)
