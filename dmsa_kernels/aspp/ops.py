"""The registered operators: schemas, fakes, autograd and autocast. Triton is imported inside the operator bodies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from dmsa_kernels.aspp.layout import empty_map
from dmsa_kernels.backend import resolve

_LIBRARY = torch.library.Library("dmsa_kernels", "FRAGMENT")


def _implementation(backend: str) -> ModuleType:
    if backend == "reference":
        from dmsa_kernels.aspp import reference

        return reference
    from dmsa_kernels.aspp import eager

    return eager


@torch.library.custom_op(
    "dmsa_kernels::multi_dilation_dwconv",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, SymInt[] dilations, str reduce, str backend) -> Tensor",
)
def multi_dilation_dwconv(x, weight, bias, dilations, reduce, backend):
    """Compute the branches ``[B, R * C, H, W]`` (``reduce="concat"``) or their sum ``[B, C, H, W]`` (``"sum"``)."""
    name = resolve(backend, *(tensor for tensor in (x, weight, bias) if tensor is not None))
    if name == "triton":
        from dmsa_kernels.aspp.triton import forward

        return forward.multi_dilation_dwconv(x, weight, bias, dilations, reduce)
    return _implementation(name).multi_dilation_dwconv(x, weight, bias, dilations, reduce)


@multi_dilation_dwconv.register_fake
def _(x, weight, bias, dilations, reduce, backend):
    return empty_map(x, x.shape[1] * (1 if reduce == "sum" else weight.shape[0]))


@torch.library.custom_op(
    "dmsa_kernels::multi_dilation_dwconv_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, SymInt[] dilations, str reduce, bool need_x, bool need_weight, "
    "bool need_bias, str backend) -> (Tensor, Tensor, Tensor)",
)
def multi_dilation_dwconv_backward(grad, x, weight, dilations, reduce, need_x, need_weight, need_bias, backend):
    """Compute the gradients of x, weight and bias; one that is not needed comes back empty, of shape ``[0]``."""
    name = resolve(backend, grad, x, weight)
    if name == "triton":
        from dmsa_kernels.aspp.triton import backward

        module = backward
    else:
        module = _implementation(name)
    return module.multi_dilation_dwconv_backward(
        grad, x, weight, dilations, reduce, need_x=need_x, need_weight=need_weight, need_bias=need_bias
    )


@multi_dilation_dwconv_backward.register_fake
def _(grad, x, weight, dilations, reduce, need_x, need_weight, need_bias, backend):
    grad_x = empty_map(x, x.shape[1]) if need_x else x.new_empty(0)
    grad_weight = weight.new_empty(weight.shape) if need_weight else weight.new_empty(0)
    grad_bias = weight.new_empty(weight.shape[:2]) if need_bias else weight.new_empty(0)
    return grad_x, grad_weight, grad_bias


def _setup_context(ctx, inputs, output):
    x, weight, _, dilations, reduce, backend = inputs
    ctx.save_for_backward(x, weight)
    ctx.dilations, ctx.reduce, ctx.backend = dilations, reduce, backend


def _backward(ctx, grad):
    x, weight = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    grads = multi_dilation_dwconv_backward(grad, x, weight, ctx.dilations, ctx.reduce, *needs, ctx.backend)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None


def _no_double_backward(ctx, *grads):
    raise RuntimeError("the multi-dilation depthwise convolution is differentiable once: use create_graph=False")


multi_dilation_dwconv.register_autograd(_backward, setup_context=_setup_context)
multi_dilation_dwconv_backward.register_autograd(_no_double_backward)


@torch.library.custom_op(
    "dmsa_kernels::fused_dwconv_project",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor projection, Tensor? offset, SymInt[] dilations, "
    "str backend) -> Tensor",
)
def fused_dwconv_project(x, weight, bias, projection, offset, dilations, backend):
    """Compute the projection ``[B, O, H, W]`` of the branches; on Triton they are never written to device memory."""
    tensors = x, weight, bias, projection, offset
    name = resolve(backend, *(tensor for tensor in tensors if tensor is not None))
    if name == "triton":
        from dmsa_kernels.aspp.triton import project

        return project.fused_dwconv_project(*tensors, dilations)
    return _implementation(name).fused_dwconv_project(*tensors, dilations)


@fused_dwconv_project.register_fake
def _(x, weight, bias, projection, offset, dilations, backend):
    return empty_map(x, projection.shape[0])


def _setup_project_context(ctx, inputs, output):
    x, weight, bias, projection, _, dilations, backend = inputs
    ctx.save_for_backward(x, weight, bias, projection)
    ctx.dilations, ctx.backend = dilations, backend


def _project_backward(ctx, grad):
    x, weight, bias, projection = ctx.saved_tensors
    need_x, need_weight, need_bias, need_projection, need_offset = ctx.needs_input_grad[:5]
    need_branches = need_x or need_weight or need_bias
    grad_x = grad_weight = grad_bias = grad_projection = grad_offset = None
    if need_branches or need_projection:
        # What the forward pass did not keep, through the unfused operators, in the forward pass's dtypes.
        with _without_autocast(grad.device.type):
            branches = x, weight, bias, ctx.dilations, "concat", ctx.backend
            y = multi_dilation_dwconv(*branches) if need_projection else None
            grad_y, grad_projection = _pointwise_backward(grad, y, projection, need_branches)
        if need_branches:
            needs = need_x, need_weight, need_bias
            grads = multi_dilation_dwconv_backward(grad_y, x, weight, ctx.dilations, "concat", *needs, ctx.backend)
            grad_x, grad_weight, grad_bias = (g if need else None for g, need in zip(grads, needs, strict=True))
    if need_offset:
        grad_offset = grad.sum((2, 3))
    return grad_x, grad_weight, grad_bias, grad_projection, grad_offset, None, None


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Switch autocast off on ``device_type``, which meta tensors do not know."""
    known = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if known else contextlib.nullcontext()


def _pointwise_backward(grad, y, projection, need_y):
    """Return the gradients of the branches ``[B, R * C, H, W]`` and, unless ``y`` is ``None``, of the projection."""
    filters = projection[:, :, None, None]
    grad_y = torch.nn.functional.conv_transpose2d(grad, filters) if need_y else None
    if y is None:
        return grad_y, None
    options = [1, 1], [0, 0], [1, 1], False, [0, 0], 1  # stride, padding, dilation, transposed, output padding, groups
    grad_filters = torch.ops.aten.convolution_backward(grad, y, filters, None, *options, [False, True, False])[1]
    return grad_y, grad_filters[:, :, 0, 0]


fused_dwconv_project.register_autograd(_project_backward, setup_context=_setup_project_context)


def _register_autocast(operator: Callable[..., object], name: str, device_type: str, *, cast: bool) -> None:
    """Keep autocast on ``device_type`` out of ``operator``, whose floating-point arguments it casts first or not."""
    key = "Autocast" + {"cpu": "CPU", "cuda": "CUDA"}[device_type]
    keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*args: object) -> object:
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return operator(*(_cast(arg, dtype) for arg in args) if cast else args)

    _LIBRARY.impl(name, kernel, key)


def _cast(arg: object, dtype: torch.dtype) -> object:
    # Double precision is a choice of the caller that autocast respects in every library operator.
    if not isinstance(arg, Tensor) or not arg.is_floating_point() or arg.dtype == torch.float64:
        return arg
    return arg.to(dtype)


for _device_type in ("cpu", "cuda"):
    _register_autocast(multi_dilation_dwconv, "multi_dilation_dwconv", _device_type, cast=True)
    _register_autocast(fused_dwconv_project, "fused_dwconv_project", _device_type, cast=True)
    # The dtypes of a backward pass are those of its forward pass, wherever it runs.
    _register_autocast(multi_dilation_dwconv_backward, "multi_dilation_dwconv_backward", _device_type, cast=False)
