"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before triton is imported."""

import dataclasses
import os
from collections.abc import Iterator

import pytest
import torch

from dmsa_kernels.compat import OLDEST_TRITON, triton_version

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Several workers share the cores, and so do the programs that they start.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())


def pytest_configure() -> None:
    """Leave out what the interpreter computes for nothing, more than half of its time.

    It repeats every sum, difference and product of integers in 64 bits and compares, for an assertion that it drops
    unless its options say ``debug``.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or (triton_version() or (0, 0)) < OLDEST_TRITON:
        return
    from triton.runtime.interpreter import interpreter_builder

    options = interpreter_builder.options
    if getattr(options, "sanitize_overflow", False) and not options.debug:
        interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


# Forward and gradients of every operator against golden data or the definition, labels, ragged class sets.
QUICK_INTERPRETED = (
    "aspp/test_project.py::test_without_bias_and_offset_and_with_an_expanded_gradient",
    "refine/test_anchor.py::test_the_formula",
    "refine/test_edge_cases.py::test_labels_are_the_argmax",
    "refine/test_golden.py::test_forward",
    "refine/test_golden.py::test_gradients",
    "refine/test_valid_classes.py::test_labels_are_of_the_valid_classes",
)


# Files with the longest tests.
LONGEST = ("test_offline_compile.py", "test_documented_commands.py")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Mark the slow cases; then let each of two workers, which get a half of the tests each, start with long ones.

    Interpreted kernels take milliseconds a program: but for `QUICK_INTERPRETED`, their cases are slow ones. A worker
    cannot take the last two tests of the other one, so that those should be short.
    """
    for item in items if os.environ.get("TRITON_INTERPRET") == "1" else ():
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        quick = any(f"tests/{name}" in item.nodeid for name in QUICK_INTERPRETED)
        if parameters.get("backend") == "triton" and not quick:
            item.add_marker(pytest.mark.slow)
    yield  # where what is not asked for is left out
    if not workers:
        return
    first, second = ([item for item in items if item.path.name == name] for name in LONGEST)
    others = [item for item in items if item.path.name not in LONGEST]
    middle = max(0, len(items) // 2 - len(first))
    items[:] = first + others[:middle] + second + others[middle:]
