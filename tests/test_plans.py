"""Launch plans: traced once a shape, run by the JIT once a specialisation, then without Triton's Python."""

from __future__ import annotations

import pytest
import torch

from dmsa_kernels import compat, plans, tuning


class Compiled:
    """What a first launch returns: repeats itself through `compat.direct_launch`, which the test replaces."""


class Kernel:
    """A kernel with two pointers that copies its first argument's corner into its second, `scale` times."""

    arg_names = ("source_ptr", "target_ptr", "scale")

    def __init__(self):
        self.by_jit = []

    def __getitem__(self, grid):
        def launch(*, source_ptr, target_ptr, scale, num_warps):
            self.by_jit.append((grid, tuple(source_ptr.shape), scale, num_warps))
            target_ptr.copy_(source_ptr * scale)
            return Compiled()

        return launch


@pytest.fixture
def kernel(monkeypatch):
    plans.clear()
    direct = []
    kernel = Kernel()
    kernel.direct = direct
    monkeypatch.setattr(compat, "direct_launch", lambda compiled, grid: lambda stream, args: direct.append(args))
    monkeypatch.setattr(compat, "has_launch_hooks", lambda: False)
    monkeypatch.setattr(compat, "specialisation", lambda: None)
    traced = []
    kernel.traced = traced

    def schedule(trace, source, target, scale):
        traced.append((tuple(source.shape), scale))
        assert source.device.type == "meta"
        buffer = trace.empty(source[:, 1:].shape, source.dtype)
        trace.launch(kernel, 3, num_warps=4, source_ptr=source[:, 1:], target_ptr=buffer, scale=scale)
        trace.launch(kernel, 3, num_warps=4, source_ptr=buffer, target_ptr=target[:, :-1], scale=1)

    kernel.run = lambda source, target, scale=2: plans.run(schedule, (source, target), scale)
    yield kernel
    plans.clear()


def tensors(rows=2, columns=5):
    return torch.rand(rows, columns), torch.zeros(rows, columns)


def test_the_first_run_is_the_jits_the_second_is_direct(kernel):
    source, target = tensors()
    kernel.run(source, target)
    assert torch.equal(target[:, :-1], 2 * source[:, 1:])
    assert kernel.by_jit == [((3,), (2, 4), 2, 4), ((3,), (2, 4), 1, 4)]
    assert not kernel.direct
    kernel.run(source, target)
    assert len(kernel.by_jit) == 2
    first, second = kernel.direct
    # the view's byte offset, the buffer's address in both launches, and what is not a pointer
    assert first[0] == source.data_ptr() + 4
    assert first[1] == second[0]
    assert second[1] == target.data_ptr()
    assert (first[2], second[2]) == (2, 1)
    assert len(kernel.traced) == 1


def test_addresses_are_those_of_the_call(kernel):
    kernel.run(*tensors())
    source, target = tensors()
    kernel.run(source, target)
    assert kernel.direct[0][0] == source.data_ptr() + 4
    assert kernel.direct[1][1] == target.data_ptr()


@pytest.mark.parametrize("change", ["shape", "strides", "dtype", "option"])
def test_what_a_schedule_sees_makes_a_new_plan(kernel, change):
    source, target = tensors()
    kernel.run(source, target)
    option = 2
    if change == "shape":
        source, target = tensors(3)
    elif change == "strides":
        source = torch.rand(5, 2).t()
    elif change == "dtype":
        source, target = source.double(), target.double()
    else:
        option = 3
    kernel.run(source, target, option)
    assert len(kernel.traced) == 2
    assert not kernel.direct
    assert torch.equal(target[:, :-1], option * source[:, 1:])


def test_a_measured_configuration_makes_a_new_plan(kernel, monkeypatch):
    monkeypatch.setattr(tuning, "_CHOSEN", {})
    kernel.run(*tensors())
    tuning.remember("propagate_fwd", "key", tuning.Config(8, 32, 8))
    kernel.run(*tensors())
    assert len(kernel.traced) == 2


def test_alignment_and_settings_make_new_kernels_not_new_plans(kernel, monkeypatch):
    source, target = tensors()
    kernel.run(source, target)
    memory = torch.rand(11)
    unaligned = memory[1:].view(2, 5)
    assert unaligned.data_ptr() % 16
    kernel.run(unaligned, target)
    assert len(kernel.by_jit) == 4
    monkeypatch.setattr(compat, "specialisation", lambda: "debug")
    kernel.run(source, target)
    assert len(kernel.by_jit) == 6
    assert not kernel.direct
    assert len(kernel.traced) == 1


def test_a_profilers_hooks_see_every_launch(kernel, monkeypatch):
    kernel.run(*tensors())
    monkeypatch.setattr(compat, "has_launch_hooks", lambda: True)
    kernel.run(*tensors())
    assert len(kernel.by_jit) == 4
    assert not kernel.direct


def test_where_launches_cannot_be_repeated_the_jit_goes_on(kernel, monkeypatch):
    monkeypatch.setattr(compat, "direct_launch", lambda compiled, grid: None)
    for _ in range(3):
        kernel.run(*tensors())
    assert len(kernel.by_jit) == 6


def test_nothing_is_compiled_inside_a_graph_capture(kernel, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(plans, "_is_capturing", lambda device: True)
    hook = []

    class Compiling(Kernel):
        def __getitem__(self, grid):
            def launch(**_):
                hook.append(triton.knobs.runtime.jit_cache_hook)
                hook[-1](key="key", repr="kernel")

            return launch

    uncompiled = Compiling()

    def schedule(trace, source):
        trace.launch(uncompiled, 1, num_warps=4, source_ptr=source, target_ptr=source, scale=1)

    before = triton.knobs.runtime.jit_cache_hook
    with pytest.raises(RuntimeError, match="warmup"):
        plans.run(schedule, (torch.zeros(1),))
    assert len(hook) == 1
    assert triton.knobs.runtime.jit_cache_hook is before


def test_a_launch_without_programs_is_left_out(kernel):
    def schedule(trace, source):
        trace.launch(kernel, 0, num_warps=4, source_ptr=source, target_ptr=source, scale=1)

    plans.run(schedule, (torch.zeros(1),))
    assert not kernel.by_jit


def test_plans_hold_no_memory(kernel):
    import gc
    import weakref

    source, target = tensors()
    storage = weakref.ref(source)
    kernel.run(source, target)
    kernel.run(source, target)
    del source, target
    gc.collect()
    assert storage() is None


def test_wide_warps_halve_their_number(kernel, monkeypatch):
    monkeypatch.setattr(compat, "warp_size", lambda device: 64)
    kernel.run(*tensors())
    assert {launch[3] for launch in kernel.by_jit} == {2}
