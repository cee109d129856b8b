"""The registered operators: schema, fakes, autograd, autocast, compilation, determinism."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten

from dmsa_kernels import PAMR, PAR
from dmsa_kernels.compat import TORCH
from dmsa_kernels.refine import local_affinity, ops, propagate, refine
from tests.helpers import LargestTensor, registered, require_backend

OPS = torch.ops.dmsa_kernels
SPEC = ([1, 2], 2.0, 0.3, "neighbours", 0.3e-8, 0.01)


def _tensors(requires_grad=False, dtype=torch.float32):
    torch.manual_seed(0)
    image = torch.rand(2, 3, 7, 6, dtype=dtype, requires_grad=requires_grad)
    weights = torch.rand(2, 16, 7, 6, dtype=dtype, requires_grad=requires_grad)
    masks = torch.rand(2, 3, 7, 6, dtype=dtype, requires_grad=requires_grad)
    return image, weights, masks


VALID = torch.tensor([[True, False, True], [True, True, True]])


@registered
@pytest.mark.parametrize("backend", ["eager", "reference", "triton"])
@pytest.mark.parametrize("fast", [False, True])
def test_opcheck_affinity(backend, fast):
    require_backend(backend)
    image, weights, _ = _tensors(requires_grad=backend != "triton")
    torch.library.opcheck(OPS.local_affinity.default, (image, *SPEC, fast, backend))
    if backend == "reference":
        return  # its backward is torch.func's, whose wrapped tensors opcheck's schema mode cannot look into
    torch.library.opcheck(OPS.local_affinity_backward.default, (weights.detach(), image.detach(), *SPEC, backend))


@registered
@pytest.mark.parametrize("backend", ["eager", "reference", "triton"])
@pytest.mark.parametrize("valid", [None, VALID])
def test_opcheck_propagation(backend, valid):
    require_backend(backend)
    _, weights, masks = _tensors(requires_grad=backend != "triton")
    num_iter = 1 if backend == "triton" else 2  # each opcheck runs the kernels about ten times, interpreted
    torch.library.opcheck(OPS.propagate.default, (weights, masks, [1, 2], num_iter, valid, backend))
    weights, masks = weights.detach(), masks.detach()
    torch.library.opcheck(OPS.propagate_labels.default, (weights, masks, [1, 2], num_iter, valid, backend))
    if backend == "reference":
        return  # as above
    for needs in ((True, True),) if backend == "triton" else ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            OPS.propagate_backward.default, (masks, weights, masks, [1, 2], num_iter, valid, *needs, backend)
        )


@registered
@pytest.mark.parametrize("sigma", ["neighbours", "centred", "centre_once", "none"])
@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_gradcheck_affinity(sigma, exponent):
    image = torch.rand(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)

    def weights(x):
        return OPS.local_affinity(x, [1, 3], exponent, 0.4, sigma, 1e-3, 0.01, False, "eager")

    assert torch.autograd.gradcheck(weights, image, atol=1e-4)


@registered
@pytest.mark.parametrize("valid", [None, VALID[:1]])
@pytest.mark.parametrize("num_iter", [0, 1, 3])
def test_gradcheck_propagation(valid, num_iter):
    weights = torch.rand(1, 16, 4, 3, dtype=torch.float64, requires_grad=True)
    masks = torch.rand(1, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda w, m: OPS.propagate(w / 16, m, [1, 5], num_iter, valid, "eager"), (weights, masks)
    )


@registered
def test_only_the_needed_gradients_are_computed():
    image, _, masks = _tensors()
    affinity = local_affinity(image, [1])
    for leaf_of in ("masks", "weights"):
        weights = affinity.weights.clone().requires_grad_(leaf_of == "weights")
        leaf = masks.clone().requires_grad_(leaf_of == "masks")
        OPS.propagate(weights, leaf, [1], 2, None, "eager").sum().backward()
        assert (weights.grad is None) == (leaf_of == "masks")
        assert (leaf.grad is None) == (leaf_of == "weights")


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("leaf_of", ["image", "masks"])
def test_second_order_is_refused(backend, leaf_of):
    image, _, masks = _tensors()
    leaf = {"image": image, "masks": masks}[leaf_of].requires_grad_()
    refined = refine(image, masks, [1], 2, backend=backend)
    (grad,) = torch.autograd.grad(refined.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_labels_carry_no_gradient():
    image, _, masks = _tensors(requires_grad=True)
    labels, values = refine(image, masks, [1], 2, return_labels=True)
    assert not labels.requires_grad
    assert not values.requires_grad


@registered
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    image, _, masks = _tensors()

    def loss(image, masks):
        valid = masks.amax((2, 3)) > 0
        return refine(image, masks, [1, 2], 3, valid_classes=valid, resize="image").square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for x in (masks, torch.rand(2, 3, 5, 4)):
        leaves = [image.clone().requires_grad_(), x.clone().requires_grad_()]
        again = [image.clone().requires_grad_(), x.clone().requires_grad_()]
        actual, expected = compiled(*leaves), loss(*again)
        actual.backward()
        expected.backward()
        assert torch.allclose(actual, expected)
        for a, b in zip(leaves, again, strict=True):
            assert torch.allclose(a.grad, b.grad, atol=1e-5)


@registered
@pytest.mark.parametrize("backend", ["eager", "reference", "triton"])
def test_results_have_the_strides_that_the_fakes_promise(backend):
    require_backend(backend)
    image, weights, masks = (x.contiguous(memory_format=torch.channels_last) for x in _tensors())
    arguments = {
        "local_affinity": (image, *SPEC, False, backend),
        "local_affinity_backward": (weights, image, *SPEC, backend),
        "propagate": (weights, masks, [1, 2], 1, VALID, backend),
        "propagate_labels": (weights, masks, [1, 2], 1, VALID, backend),
        "propagate_backward": (masks, weights, masks, [1, 2], 1, VALID, True, True, backend),
    }
    for name, values in arguments.items():
        operator = getattr(OPS, name)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in values]
            promised = operator(*fakes)
        made = operator(*values)
        for real, fake in zip(tree_flatten(made)[0], tree_flatten(promised)[0], strict=True):
            assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride()), name


@registered
@pytest.mark.parametrize("module", [PAR([1, 2], 2), PAMR(2, [1, 2])], ids=["PAR", "PAMR"])
def test_modules_compile(module):
    """The compiler of torch 2.4 takes an inherited method of PAR for an overridden one, and breaks the graph there."""
    image, _, masks = _tensors()
    whole = TORCH >= (2, 6) or isinstance(module, PAMR)
    compiled = torch.compile(module, fullgraph=whole, backend="aot_eager")
    assert torch.equal(compiled(image, masks), module(image, masks))


@registered
def test_inductor_compiles_labels():
    image, _, masks = _tensors()
    compiled = torch.compile(lambda a, b: refine(a, b, [1], 2, return_labels=True), fullgraph=True)
    for actual, expected in zip(compiled(image, masks), refine(image, masks, [1], 2, return_labels=True), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_autocast_changes_nothing(dtype, precision):
    image, _, masks = _tensors()
    for image_dtype, mask_dtype in ((torch.float32, torch.float32), (dtype, dtype), (torch.float32, dtype)):
        a, b = image.to(image_dtype), masks.to(mask_dtype)
        expected = refine(a, b, [1, 2], 3, precision=precision)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = refine(a, b, [1, 2], 3, precision=precision)
        assert actual.dtype == expected.dtype == mask_dtype
        assert torch.equal(actual, expected)


def test_autocast_gradients_have_the_inputs_dtype():
    image, _, masks = (x.to(torch.bfloat16).requires_grad_() for x in _tensors())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refine(image, masks, [1], 2).float().sum().backward()
    assert image.grad.dtype == masks.grad.dtype == torch.bfloat16


def test_float64_stays_float64_under_autocast():
    image, _, masks = _tensors(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert local_affinity(image, [1]).weights.dtype == torch.float64
        assert torch.equal(refine(image, masks, [1], 2), refine(image, masks, [1], 2))


def test_deterministic_algorithms():
    image, _, masks = _tensors()
    grads = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            leaves = [image.clone().requires_grad_(), masks.clone().requires_grad_()]
            refine(*leaves, [1, 2], 3).square().sum().backward()
            grads.append([leaf.grad for leaf in leaves])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_label_chunks_cover_the_classes_evenly():
    # The workload that runs out of memory upstream: 1281 classes at 512 x 683.
    chunks = ops.label_chunks(1281, 1, 512, 683)
    assert [c.start for c in chunks[1:]] == [c.stop for c in chunks[:-1]]
    assert (chunks[0].start, chunks[-1].stop) == (0, 1281)
    sizes = [c.stop - c.start for c in chunks]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) * 512 * 683 <= ops.LABEL_ELEMENTS
    assert ops.label_chunks(3, 0, 5, 5) == [slice(0, 3)]


def test_labels_of_many_classes_never_hold_all_planes(monkeypatch):
    image, masks = torch.rand(1, 3, 24, 20), torch.rand(1, 40, 5, 4)
    planes = refine(image, masks, [1, 2], 2)
    monkeypatch.setattr(ops, "LABEL_ELEMENTS", 8 * 24 * 20)
    with LargestTensor() as largest:
        labels, values = refine(image, masks, [1, 2], 2, return_labels=True)
    assert largest.elements < 40 * 24 * 20
    best = planes.max(1)
    assert torch.allclose(values, best.values, rtol=0, atol=1e-6)
    clear = planes.topk(2, 1).values.diff(dim=1).abs()[:, 0] > 1e-5
    assert torch.equal(labels[clear], best.indices[clear])


def test_fakes_know_maps_beyond_two_to_the_31():
    image = torch.empty(1, 3, 20000, 20000, device="meta")
    affinity = local_affinity(image, [1, 2, 4])
    assert affinity.weights.shape == (1, 24, 20000, 20000)
    assert affinity.weights.numel() > 2**31
    masks = torch.empty(1, 8, 20000, 20000, device="meta", dtype=torch.float16)
    assert propagate(affinity, masks, 10).shape == masks.shape
    labels, values = propagate(affinity, masks, 10, return_labels=True)
    assert (labels.dtype, values.dtype) == (torch.int64, torch.float16)


def test_cuda_graph_capture():
    if not torch.cuda.is_available():
        pytest.skip("no GPU: a CUDA graph cannot be captured")
    image, _, masks = (x.cuda() for x in _tensors())
    valid = VALID.cuda()
    for backend in ("auto", "eager"):
        expected = refine(image, masks, [1, 2], 3, valid_classes=valid, backend=backend)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = refine(image, masks, [1, 2], 3, valid_classes=valid, backend=backend)
        graph.replay()
        assert torch.equal(captured, expected)
