"""The registered operators: schemas, fakes and autograd. Triton is imported inside the operator bodies.

Arguments come in one dtype, in which the result is: whether autocast is on around an operator, or around its backward
pass, makes no difference.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from dmsa_kernels.aspp import eager, reference
from dmsa_kernels.aspp.layout import empty_map
from dmsa_kernels.backend import resolve
from dmsa_kernels.compat import operator, tangent, without_autocast


def _implementation(backend: str) -> ModuleType:
    return reference if backend == "reference" else eager


def _forward(x, weight, bias, dilations, reduce, backend):
    """Compute the branches ``[B, R * C, H, W]`` (``reduce="concat"``) or their sum ``[B, C, H, W]`` (``"sum"``)."""
    name = resolve(backend, *(tensor for tensor in (x, weight, bias) if tensor is not None))
    if name == "triton":
        from dmsa_kernels.aspp.triton import forward

        return forward.multi_dilation_dwconv(x, weight, bias, dilations, reduce)
    with without_autocast(x):
        return _implementation(name).multi_dilation_dwconv(x, weight, bias, dilations, reduce)


def _forward_fake(x, weight, bias, dilations, reduce, backend):
    return empty_map(x, x.shape[1] * (1 if reduce == "sum" else weight.shape[0]))


def _forward_setup(ctx, inputs, output):
    x, weight, _, dilations, reduce, backend = inputs
    ctx.save_for_backward(x, weight)
    ctx.dilations, ctx.reduce, ctx.backend = dilations, reduce, backend


def _forward_autograd(ctx, grad):
    x, weight = ctx.saved_tensors
    _refuse_forward_over_reverse(grad)
    needs = ctx.needs_input_grad[:3]
    grads = multi_dilation_dwconv_backward(grad, x, weight, ctx.dilations, ctx.reduce, *needs, ctx.backend)
    return *_wanted(grads, needs), None, None, None


def _backward(grad, x, weight, dilations, reduce, need_x, need_weight, need_bias, backend):
    """Compute the gradients of x, weight and bias; one that is not needed comes back empty, of shape ``[0]``."""
    name = resolve(backend, grad, x, weight)
    needs = {"need_x": need_x, "need_weight": need_weight, "need_bias": need_bias}
    if name == "triton":
        from dmsa_kernels.aspp.triton import backward

        return backward.multi_dilation_dwconv_backward(grad, x, weight, dilations, reduce, **needs)
    with without_autocast(x):
        module = _implementation(name)
        return module.multi_dilation_dwconv_backward(grad, x, weight, dilations, reduce, **needs)


def _backward_fake(grad, x, weight, dilations, reduce, need_x, need_weight, need_bias, backend):
    grad_x = empty_map(x, x.shape[1]) if need_x else x.new_empty(0)
    grad_weight = weight.new_empty(weight.shape) if need_weight else weight.new_empty(0)
    grad_bias = weight.new_empty(weight.shape[:2]) if need_bias else weight.new_empty(0)
    return grad_x, grad_weight, grad_bias


def _no_double_backward(ctx, *grads):
    raise RuntimeError("the multi-dilation depthwise convolution is differentiable once: use create_graph=False")


def _refuse_forward_over_reverse(grad):
    if tangent(grad) is not None:
        raise RuntimeError(
            "the multi-dilation depthwise convolution is differentiable once: its backward pass got a forward-mode"
            " derivative (jvp of a gradient), which it would drop"
        )


def _project(x, weight, bias, projection, offset, dilations, backend):
    """Compute the projection ``[B, O, H, W]`` of the branches; on Triton they are never written to device memory."""
    tensors = x, weight, bias, projection, offset
    name = resolve(backend, *(tensor for tensor in tensors if tensor is not None))
    if name == "triton":
        from dmsa_kernels.aspp.triton import project

        return project.fused_dwconv_project(*tensors, dilations)
    with without_autocast(x):
        return _implementation(name).fused_dwconv_project(*tensors, dilations)


def _project_fake(x, weight, bias, projection, offset, dilations, backend):
    return empty_map(x, projection.shape[0])


def _project_setup(ctx, inputs, output):
    x, weight, bias, projection, _, dilations, backend = inputs
    ctx.save_for_backward(x, weight, bias, projection)
    ctx.dilations, ctx.backend = dilations, backend


def _project_autograd(ctx, grad):
    x, weight, bias, projection = ctx.saved_tensors
    _refuse_forward_over_reverse(grad)
    need_x, need_weight, need_bias, need_projection, need_offset = ctx.needs_input_grad[:5]
    need_branches = need_x or need_weight or need_bias
    grad_x = grad_weight = grad_bias = grad_projection = grad_offset = None
    if need_branches or need_projection:
        # What the forward pass did not keep, through the unfused operators, in the forward pass's dtypes.
        with without_autocast(grad):
            branches = x, weight, bias, ctx.dilations, "concat", ctx.backend
            y = multi_dilation_dwconv(*branches) if need_projection else None
            grad_y, grad_projection = _pointwise_backward(grad, y, projection, need_branches)
        if need_branches:
            needs = need_x, need_weight, need_bias
            grads = multi_dilation_dwconv_backward(grad_y, x, weight, ctx.dilations, "concat", *needs, ctx.backend)
            grad_x, grad_weight, grad_bias = _wanted(grads, needs)
    if need_offset:
        grad_offset = grad.sum((2, 3))
    return grad_x, grad_weight, grad_bias, grad_projection, grad_offset, None, None


def _wanted(grads: tuple[Tensor, ...], needs: tuple[bool, ...]) -> list[Tensor | None]:
    return [grad if need else None for grad, need in zip(grads, needs)]


def _pointwise_backward(grad, y, projection, need_y):
    """Return the gradients of the branches ``[B, R * C, H, W]`` and, unless ``y`` is ``None``, of the projection."""
    filters = projection[:, :, None, None]
    grad_y = torch.nn.functional.conv_transpose2d(grad, filters) if need_y else None
    if y is None:
        return grad_y, None
    options = [1, 1], [0, 0], [1, 1], False, [0, 0], 1  # stride, padding, dilation, transposed, output padding, groups
    grad_filters = torch.ops.aten.convolution_backward(grad, y, filters, None, *options, [False, True, False])[1]
    return grad_y, grad_filters[:, :, 0, 0]


multi_dilation_dwconv = operator(
    "multi_dilation_dwconv(Tensor x, Tensor weight, Tensor? bias, SymInt[] dilations, str reduce, str backend)"
    " -> Tensor",
    _forward,
    _forward_fake,
    setup=_forward_setup,
    backward=_forward_autograd,
)
multi_dilation_dwconv_backward = operator(
    "multi_dilation_dwconv_backward(Tensor grad, Tensor x, Tensor weight, SymInt[] dilations, str reduce, bool need_x,"
    " bool need_weight, bool need_bias, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    backward=_no_double_backward,
)
fused_dwconv_project = operator(
    "fused_dwconv_project(Tensor x, Tensor weight, Tensor? bias, Tensor projection, Tensor? offset,"
    " SymInt[] dilations, str backend) -> Tensor",
    _project,
    _project_fake,
    setup=_project_setup,
    backward=_project_autograd,
)
