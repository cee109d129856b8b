"""All iterations in one launch: in the interpreter, with a process a program so that they can wait for each other."""

from __future__ import annotations

import functools
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels' modules are imported

from dmsa_kernels import backend, compat, plans, tuning, why_not_triton
from dmsa_kernels.compat import triton_version
from dmsa_kernels.refine import eager, reference
from dmsa_kernels.refine.spec import PAMR, PAR
from tests.refine import concurrent

pytestmark = pytest.mark.skipif(
    why_not_triton(torch.zeros(1)) is not None or (triton_version() or (0, 0)) < (3, 4) or not hasattr(os, "fork"),
    reason="needs Triton 3.4, TRITON_INTERPRET=1 before the first import, and fork",
)
DILATIONS = [1, 7]
SMALL = tuning.Config(4, 8, 8)


@pytest.fixture
def kernels():
    from dmsa_kernels.refine.triton import backward, propagate, resident

    return propagate, backward, resident


@pytest.fixture(autouse=True)
def fresh_plans():
    plans.clear()
    yield
    plans.clear()


@pytest.fixture
def together(kernels, monkeypatch):
    """Return ``together(call, **how)``, which runs a launcher's call with concurrent programs, on small tiles."""
    resident = kernels[2]
    monkeypatch.setattr(compat, "cooperative_programs", lambda device: 64)
    monkeypatch.setattr(resident, "PATIENCE", 100_000)

    def run(call, *, groups_each=None, teams=2, row_stride=2, **how):
        def plan(programs, dilations, width, count, groups, height, columns, num_iter, most_warps):
            assert programs == 64
            return tuning.Resident(SMALL, row_stride, groups_each or groups, teams)

        programs = []

        def start(schedule, tensors, *options):
            kernel = resident.propagate_resident_kernel
            programs.append(concurrent.run(schedule, tensors, *options, kernel=kernel, **how))

        with monkeypatch.context() as patch, backend.resident(True):
            patch.setattr(tuning, "plan_resident", plan)
            patch.setattr(plans, "run", start)
            result = call()
        assert programs[0] > 1
        return result

    return run


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(channels, *, batch=1, shape=(9, 13), dtype=torch.float32, spec=PAR, fast=False):
    constants = {name: getattr(spec, name) for name in ("exponent", "alpha", "sigma", "eps", "position_weight")}
    weights = reference.local_affinity(rand(batch, 3, *shape), DILATIONS, fast=fast, **constants)
    return weights, rand(batch, channels, *shape, seed=1, dtype=dtype)


@pytest.mark.parametrize(
    ("channels", "options"),
    [
        (3, {}),  # planes of one channel, the masks themselves
        (3, {"spec": PAMR, "batch": 2}),
        (4, {}),  # four side by side
        (4, {"fast": True}),
        (8, {"fast": True, "dtype": torch.float16}),  # eight
        (2, {"dtype": torch.bfloat16}),
    ],
)
@pytest.mark.parametrize("num_iter", [2, 5])
@pytest.mark.slow
def test_the_same_bits_as_a_launch_for_each_iteration(kernels, together, channels, options, num_iter):
    weights, masks = inputs(channels, **options)
    call = functools.partial(kernels[0].propagate, weights, masks, DILATIONS, num_iter, None)
    assert torch.equal(together(call), call())


@pytest.mark.parametrize(
    ("channels", "batch", "groups_each", "teams", "seed"),
    [
        (1, 3, 1, 2, 0),
        pytest.param(3, 3, 1, 4, 1, marks=pytest.mark.slow),
        pytest.param(3, 2, 2, 1, 2, marks=pytest.mark.slow),
        pytest.param(9, 2, 2, 3, 0, marks=pytest.mark.slow),
    ],
)
def test_stragglers_of_several_images_and_shares(
    kernels, together, monkeypatch, channels, batch, groups_each, teams, seed
):
    """Programs are late before and after they meet the others; teams do not wait for each other."""
    monkeypatch.setattr(kernels[2], "LATENESS", 5)
    weights, masks = inputs(channels, batch=batch)
    call = functools.partial(kernels[0].propagate, weights, masks, DILATIONS, 4, None)
    assert torch.equal(together(call, groups_each=groups_each, teams=teams, seed=seed, late_s=0.2), call())


@pytest.mark.slow
@pytest.mark.parametrize("channels", [3, 6])
def test_flags_and_anchors(kernels, together, channels):
    weights, masks = inputs(channels, batch=2)
    valid = rand(2, channels, seed=3) > 0.5
    valid[0], valid[1, 0] = False, True  # one image without a valid class: its team meets all the same
    masks = masks.masked_fill(~valid[:, :, None, None], float("nan"))
    anchor = 0.5 * rand(2, 1, 9, 13, seed=4)
    for arguments in ((valid, None), (None, anchor), (valid, anchor)):
        clean = masks if arguments[0] is not None else masks.nan_to_num(0.5)
        call = functools.partial(kernels[0].propagate, weights, clean, DILATIONS, 3, *arguments)
        assert torch.equal(together(call), call())


@pytest.mark.slow
def test_labels(kernels, together):
    weights, masks = inputs(5, batch=2)
    valid = torch.tensor([[True, False, True, True, False]] * 2)
    for flags in (None, valid):
        call = functools.partial(kernels[0].propagate_labels, weights, masks, DILATIONS, 3, flags)
        assert all(torch.equal(a, b) for a, b in zip(together(call), call(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("num_iter", [2, 3, 4])
def test_gradients_recompute_the_planes_together(kernels, together, num_iter):
    """With two iterations the gradient recomputes one, with three it takes two slices, with four it fills a stack."""
    weights, masks = inputs(3)
    anchor = 0.5 * rand(1, 1, 9, 13, seed=4)
    grad = rand(1, 3, 9, 13, seed=2)
    for hold in (None, anchor):
        call = functools.partial(
            kernels[1].propagate_backward, grad, weights, masks, DILATIONS, num_iter, None,
            need_weights=True, need_masks=True, anchor=hold, need_anchor=True,
        )  # fmt: skip
        if num_iter == 2:
            with pytest.raises(AssertionError):  # nothing ran concurrently
                together(call)
            continue
        assert all(torch.equal(a, b) for a, b in zip(together(call), call(), strict=True))


@pytest.mark.slow
def test_against_double_precision(kernels, together):
    weights, masks = inputs(3)
    exact = reference.propagate(weights.double(), masks.double(), DILATIONS, 6, None)
    low = eager.propagate(weights, masks, DILATIONS, 6, None)
    got = together(functools.partial(kernels[0].propagate, weights, masks, DILATIONS, 6, None))
    budget = 2 * (low.double() - exact).abs().max() + 2.0**-23
    assert (got.double() - exact).abs().max() <= budget


def test_who_waits_in_vain_fails(kernels, together, monkeypatch):
    """A program that never comes is an error, not a hang."""
    monkeypatch.setattr(kernels[2], "PATIENCE", 500)
    weights, masks = inputs(3)
    call = functools.partial(kernels[0].propagate, weights, masks, DILATIONS, 3, None)
    with pytest.raises(RuntimeError, match="waited in vain"):
        together(call, absent=[2])


@pytest.mark.parametrize(
    "how",
    [
        "not at all",
        pytest.param("without waiting", marks=pytest.mark.slow),
        pytest.param("for all but one", marks=pytest.mark.slow),
        pytest.param("one slice of the ring", marks=pytest.mark.slow),
    ],
)
def test_what_the_tests_above_would_find(kernels, together, monkeypatch, how):
    """The bits differ where programs do not wait, wait for too few, or overwrite what others still read."""
    propagate, _, resident = kernels
    if how == "one slice of the ring":
        launch = resident.launch
        monkeypatch.setattr(
            resident, "launch", lambda trace, whole, planes, ring, *rest: launch(trace, whole, planes, ring[:1], *rest)
        )
    else:
        from tests.refine import mutants

        monkeypatch.setattr(resident, "meet", getattr(mutants, how.replace(" ", "_")))
    weights, masks = inputs(3)
    call = functools.partial(propagate.propagate, weights, masks, DILATIONS, 6, None)
    right = call()
    assert any(not torch.equal(together(call, seed=seed, late_s=0.4), right) for seed in range(6))


def test_nothing_waits_in_the_interpreter(kernels):
    """Its programs run one after another, so that asking for one launch changes nothing."""
    propagate, _, resident = kernels
    weights, masks = inputs(3)
    with backend.resident(True):
        assert "NVIDIA" in resident.choose(weights.device, (*masks.shape, 1), weights, (1, 7), 3)
        out = propagate.propagate(weights, masks, DILATIONS, 2, None)
    assert torch.equal(out, propagate.propagate(weights, masks, DILATIONS, 2, None))


def test_what_is_not_launched_together(kernels, monkeypatch):
    resident = kernels[2]
    monkeypatch.setattr(compat, "cooperative_programs", lambda device: 132)

    def choice(planes=(1, 3, 64, 64, 1), dilations=(1, 7), num_iter=5, has_valid=False):
        weights = torch.empty(planes[0], 8 * len(dilations), *planes[2:4], device="meta")
        return resident.choose(torch.device("meta"), planes, weights, dilations, num_iter, has_valid)

    assert isinstance(choice(), tuning.Resident)
    large = {"planes": (16, 1, 64, 64, 4), "dilations": (1, 2, 4, 8, 12, 24)}
    for capability, warps in (((9, 0), 16), ((10, 0), 8)):
        monkeypatch.setattr(compat, "compute_capability", lambda device, capability=capability: capability)
        assert choice(**large).config.num_warps == 16
        assert choice(**large, has_valid=True).config.num_warps == warps
    assert "two iterations" in choice(num_iter=1)
    assert "registers" in choice(dilations=tuple(range(1, 10)))
    assert "32 bits" in choice(planes=(30_000, 3, 64, 64, 1), num_iter=8)
    assert "tiles" in choice(planes=(1, 3, 1000, 1000, 1))


def test_a_refused_launch_names_the_switch(kernels, monkeypatch):
    resident = kernels[2]

    def refuse(*_):
        raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")

    monkeypatch.setattr(plans, "run", refuse)
    with backend.resident(True), pytest.raises(RuntimeError, match="DMSA_RESIDENT"):
        resident.run(None, ())
    with backend.resident(False), pytest.raises(RuntimeError, match="too many blocks"):
        resident.run(None, ())
