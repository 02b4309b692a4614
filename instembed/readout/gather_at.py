"""Features at points: what a network says at keypoints, without a box around them."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from instembed import _arguments as arguments
from instembed import _native, _ops
from instembed._native import core, threads
from instembed._pixels import empty_gradient

Mode = Literal["nearest", "bilinear"]


def gather_at(
    features: Tensor, points: Tensor, *, valid: Tensor | None = None, mode: Mode = "nearest"
) -> Tensor:
    """Reads the features at points, in one native pass, with gradients.

    Args:
        features: (B, C, *spatial) with S = 1 to 3 spatial dimensions, with any strides (nothing is copied).
            float32, float64, float16 or bfloat16.
        points: (B, *P, S), any number of dimensions in between: x, then y, then z, in pixels, with pixel
            centres at whole numbers; x is the last spatial dimension. Any floating or integer dtype.
        valid: (B, *P) bool or of an integer dtype, where greater than 0 means valid; None: all are.
        mode: "nearest" reads the pixel that the point lies in (pixel 0 covers [-0.5, 0.5), ties go up),
            "bilinear" between the 2^S pixels around it, in 3-D and 1-D likewise. A point less than half a
            pixel beyond the outermost pixel centres reads what is there.

    Returns:
        (B, *P, C) of the features' dtype. Zero, without a gradient, at points that are not valid, have a
        coordinate outside of [-0.5, size - 0.5), or NaN.

        Differentiable once with respect to the features, and with ``mode="bilinear"`` to points of a floating
        dtype; "nearest" is constant in the points, which get no gradient. What several points send to one
        pixel is added up in float64 and rounded once. The result does not depend on the number of threads.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
    """
    arguments.check_embeddings("features", features, points=False)
    arguments.check_number_tensor("points", points)
    axes = features.dim() - 2
    if points.dim() < 2 or points.shape[0] != features.shape[0] or points.shape[-1] != axes:
        raise ValueError(
            f"points must be (B, *P, {axes}) with B = {features.shape[0]} for features of shape "
            f"{tuple(features.shape)}, got shape {tuple(points.shape)}"
        )
    arguments.check_same_device("points", points, "features", features)
    if valid is not None:
        arguments.check_valid(valid, "points", points)
    arguments.check_choice("mode", mode, ("nearest", "bilinear"))
    return torch.ops.instembed.gather_at(features, points, valid, mode == "bilinear", 1)


# The op. With groups > 1, the last dimension of *P has as many points as there are groups of channels, and
# each reads the channels of its own: (B, *P, C / groups).

_ops.define("gather_at(Tensor features, Tensor points, Tensor? valid, bool linear, int groups) -> Tensor")
_ops.define(
    "gather_at_backward(Tensor grad_values, Tensor features, Tensor points, Tensor? valid, bool linear, "
    "int groups, bool wants_features, bool wants_points) -> (Tensor, Tensor)"
)


def _new_values(features: Tensor, points: Tensor, groups: int) -> Tensor:
    return features.new_empty((*points.shape[:-1], features.shape[1] // groups))


def _by_group(tensor: Tensor, groups: int, last: int) -> Tensor:
    """(B, *P, last) -> (B, N, groups, last)."""
    count = math.prod(tensor.shape[1:-1]) // groups
    return tensor.reshape(tensor.shape[0], count, groups, last)


def _native_arguments(
    features: Tensor, points: Tensor, valid: Tensor | None, groups: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """features (B, G, C, *spatial), points (B, N, G, S) and valid (B, N, G)."""
    points = points.detach()
    flags = None if valid is None else _by_group(valid.unsqueeze(-1), groups, 1).squeeze(-1)
    return _channels_by_group(features, groups), _by_group(points, groups, points.shape[-1]), flags


def _channels_by_group(features: Tensor, groups: int) -> Tensor:
    return features.detach().unflatten(1, (groups, features.shape[1] // groups))


@_ops.cpu("gather_at")
def _gather_at_cpu(
    features: Tensor, points: Tensor, valid: Tensor | None, linear: bool, groups: int
) -> Tensor:
    values = _new_values(features, points, groups)
    core.gather_at_forward(
        *_native_arguments(features, points, valid, groups),
        _by_group(values, groups, values.shape[-1]),
        linear=linear,
        threads=threads(),
    )
    return values


def _new_gradients(
    features: Tensor, points: Tensor, wants_features: bool, wants_points: bool
) -> tuple[Tensor, Tensor]:
    """Empty where a gradient is not wanted."""
    return (
        empty_gradient(features) if wants_features else features.new_empty(0),
        points.new_empty(points.shape if wants_points else 0),
    )


@_ops.cpu("gather_at_backward")
def _gather_at_backward_cpu(
    grad_values: Tensor,
    features: Tensor,
    points: Tensor,
    valid: Tensor | None,
    linear: bool,
    groups: int,
    wants_features: bool,
    wants_points: bool,
) -> tuple[Tensor, Tensor]:
    gradients = _new_gradients(features, points, wants_features, wants_points)
    core.gather_at_backward(
        _by_group(grad_values.contiguous(), groups, grad_values.shape[-1]),
        *_native_arguments(features, points, valid, groups),
        _channels_by_group(gradients[0], groups) if wants_features else None,
        gradients[1] if wants_points else None,
        linear=linear,
        threads=threads(),
    )
    return gradients


@_ops.cuda("gather_at")
def _gather_at_cuda(
    features: Tensor, points: Tensor, valid: Tensor | None, linear: bool, groups: int
) -> Tensor:
    values = _new_values(features, points, groups)
    _native.cuda_core().gather_at_forward_cuda(
        *_native_arguments(features, points, valid, groups),
        _by_group(values, groups, values.shape[-1]),
        linear=linear,
        stream=_native.stream_of(features),
    )
    return values


@_ops.cuda("gather_at_backward")
def _gather_at_backward_cuda(
    grad_values: Tensor,
    features: Tensor,
    points: Tensor,
    valid: Tensor | None,
    linear: bool,
    groups: int,
    wants_features: bool,
    wants_points: bool,
) -> tuple[Tensor, Tensor]:
    cuda_core = _native.cuda_core()
    gradients = _new_gradients(features, points, wants_features, wants_points)
    arguments = _native_arguments(features, points, valid, groups)
    bytes_needed = cuda_core.gather_at_cuda_workspace(*arguments, linear=linear) if wants_features else 0
    cuda_core.gather_at_backward_cuda(
        _by_group(grad_values.contiguous(), groups, grad_values.shape[-1]),
        *arguments,
        _channels_by_group(gradients[0], groups) if wants_features else None,
        _by_group(gradients[1], groups, points.shape[-1]) if wants_points else None,
        features.new_empty(bytes_needed, dtype=torch.uint8),
        linear=linear,
        stream=_native.stream_of(features),
    )
    return gradients


@_ops.fake("gather_at")
def _gather_at_fake(
    features: Tensor, points: Tensor, valid: Tensor | None, linear: bool, groups: int
) -> Tensor:
    return _new_values(features, points, groups)


@_ops.fake("gather_at_backward")
def _gather_at_backward_fake(
    grad_values: Tensor, features: Tensor, points: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    return _new_gradients(features, points, *others[-2:])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, points, valid, linear, groups = inputs
    ctx.save_for_backward(features, points, valid)
    ctx.set_materialize_grads(False)
    ctx.linear, ctx.groups = linear, groups


def _gather_at_backward(ctx: Any, grad_values: Tensor | None) -> tuple[Tensor | None, ...]:
    features_grad = points_grad = None
    wants_features, wants_points = ctx.needs_input_grad[0], ctx.needs_input_grad[1] and ctx.linear
    if grad_values is not None and (wants_features or wants_points):
        gradients = torch.ops.instembed.gather_at_backward(
            grad_values, *ctx.saved_tensors, ctx.linear, ctx.groups, wants_features, wants_points
        )
        features_grad = gradients[0] if wants_features else None
        points_grad = gradients[1] if wants_points else None
    return features_grad, points_grad, None, None, None


_ops.differentiable("gather_at", _gather_at_backward, _save_for_backward)
_ops.differentiable_once("gather_at_backward", "gather_at")
