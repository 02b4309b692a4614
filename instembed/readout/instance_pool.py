"""Features of instances, pooled over their own pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from instembed import _arguments as arguments
from instembed import _native, _ops
from instembed._native import core, threads
from instembed._pixels import (
    accumulation_dtype,
    cuda_capacity,
    fake_capacity,
    flat_embeddings,
    flat_pixels,
    is_channels_last,
    memory_format,
    number_of_images,
)

Reduce = Literal["mean", "sum", "max"]


class InstanceFeatures(NamedTuple):
    """What :func:`instance_pool` found. Rows beyond an image's instances are zero."""

    features: Tensor
    """(B, M, C) float32 (float64 for float64 features): a row an instance, in ascending order of id."""
    valid: Tensor
    """(B, M) bool: whether the row is an instance's; an image's come first."""


class InstanceFeaturesWithIds(NamedTuple):
    """:class:`InstanceFeatures`, and whose they are."""

    features: Tensor
    valid: Tensor
    ids: Tensor
    """(B, M) int64, ascending in each image."""
    counts: Tensor
    """(B, M) int64: pixels."""


@overload
def instance_pool(
    features: Tensor,
    labels: Tensor,
    *,
    reduce: Reduce = ...,
    max_instances: int | None = ...,
    background: int | None = ...,
    ignore_index: int | None = ...,
    offsets: Tensor | None = ...,
    return_ids: Literal[False] = ...,
) -> InstanceFeatures: ...


@overload
def instance_pool(
    features: Tensor,
    labels: Tensor,
    *,
    reduce: Reduce = ...,
    max_instances: int | None = ...,
    background: int | None = ...,
    ignore_index: int | None = ...,
    offsets: Tensor | None = ...,
    return_ids: Literal[True],
) -> InstanceFeaturesWithIds: ...


def instance_pool(
    features: Tensor,
    labels: Tensor,
    *,
    reduce: Reduce = "mean",
    max_instances: int | None = None,
    background: int | None = 0,
    ignore_index: int | None = None,
    offsets: Tensor | None = None,
    return_ids: bool = False,
) -> InstanceFeatures | InstanceFeaturesWithIds:
    """Mean, sum or maximum of the features of each instance, over exactly the pixels that carry its id.

    No box is involved, so that nothing of a neighbour or of the background gets in. Features are read once,
    and nothing of them is kept for the gradient, which is written once from the labels.

    Args:
        features: (B, C, *spatial) with 1 to 3 spatial dimensions, contiguous or channels-last (neither is
            copied), or points (N, C). float32, float64, float16 or bfloat16.
        labels: (B, *spatial) or (N,) instance ids of any integer dtype and any value. Ids are per image. An
            instance need not be connected. For features at a stride, take labels at that stride.
        reduce: "mean", "sum" or "max" over an instance's pixels, each channel on its own.
        max_instances: capacity M of the outputs. None: the largest number found in an image; on a GPU, which
            cannot wait for that, a 16th of an image's pixels, 64 to 4096 (with ``offsets``: of all points'
            mean, times 16).
        background: the id that is no instance; None makes 0 an instance like any other.
        ignore_index: another id that is no instance, for example 255.
        offsets: (B + 1,) for points: image b is points ``offsets[b]:offsets[b + 1]``. None is one image.
        return_ids: whether ids and numbers of pixels come too.

    Returns:
        :class:`InstanceFeatures` ``(features, valid)``, or :class:`InstanceFeaturesWithIds` ``(features,
        valid, ids, counts)``: rows in ascending order of id, those of :func:`label_statistics`. uint64 ids
        are given, and ordered, as the int64 of the same bits.

        Sums are taken in float32 or better (float64 for float64), and 16-bit features give float32, also
        under autocast: a sum over an instance need not fit 16 bits. The result does not depend on the number
        of threads. ``features`` is differentiable any number of times with respect to ``features``, whose
        gradient has their type: "mean" and "sum" give every pixel its instance's gradient (for "mean" divided
        by its pixels), "max" gives all of it to the pixel of the maximum, of equals to the first. Pixels of
        no instance get zero. A NaN shows in its instance's channel and nowhere else; to "max" it is larger
        than any number.

        On a GPU an image with more instances than M has features of NaN, none of them valid, and sends no
        gradient (see :func:`set_overflow_checks`).

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value, or an image has
            more instances than ``max_instances`` (on a GPU: under :func:`set_overflow_checks`).
    """
    arguments.check_embeddings("features", features, points=True)
    arguments.check_integer_tensor("labels", labels)
    arguments.check_pixels("labels", labels, features, of="features")
    offsets = arguments.check_offsets(offsets, features, of="features")
    arguments.check_choice("reduce", reduce, ("mean", "sum", "max"))
    if max_instances is not None:
        arguments.check_capacity("max_instances", max_instances)
    arguments.check_bool("return_ids", return_ids)
    outputs = torch.ops.instembed.instance_pool(
        features,
        labels,
        offsets,
        reduce,
        max_instances,
        arguments.check_label_id("background", background),
        arguments.check_label_id("ignore_index", ignore_index),
    )
    return InstanceFeaturesWithIds(*outputs[:4]) if return_ids else InstanceFeatures(*outputs[:2])


# The op. Its fifth output is, for max, the (B, M, C) pixel of each maximum, counted over a whole image or
# over all points, -1 in rows of no instance; else it is empty. Without max_instances the capacity M of its
# outputs depends on the data. The backward op needs of the features only their shape, type and format.

_ops.define(
    "instance_pool(Tensor features, Tensor labels, Tensor? offsets, str reduce, int? max_instances, "
    "int? background, int? ignore_index) "
    "-> (Tensor pooled, Tensor valid, Tensor ids, Tensor counts, Tensor argmax)"
)
_ops.define(
    "instance_pool_backward(Tensor grad, Tensor argmax, Tensor labels, Tensor? offsets, str reduce, "
    "int? background, int? ignore_index, SymInt[] shape, ScalarType dtype, bool channels_last) -> Tensor"
)


def _new_outputs(
    features: Tensor, offsets: Tensor | None, reduce: str, capacity: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = (number_of_images(features, offsets), capacity)
    pooled = features.new_empty((*shape, features.shape[1]), dtype=accumulation_dtype(features))
    valid = features.new_empty(shape, dtype=torch.bool)
    ids = features.new_empty(shape, dtype=torch.int64)
    argmax = ids.new_empty(pooled.shape if reduce == "max" else (0,))
    return pooled, valid, ids, torch.empty_like(ids), argmax


def _instances(
    labels: Tensor, features: Tensor, offsets: Tensor | None, background: int | None, ignore_index: int | None
) -> Any:
    return core.PoolInstances(
        flat_pixels(labels, features),
        offsets,
        background=background,
        ignore_index=ignore_index,
        threads=threads(),
    )


@_ops.cpu("instance_pool")
def _pool_cpu(
    features: Tensor,
    labels: Tensor,
    offsets: Tensor | None,
    reduce: str,
    max_instances: int | None,
    background: int | None,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    instances = _instances(labels, features, offsets, background, ignore_index)
    if max_instances is not None and instances.largest > max_instances:
        raise ValueError(
            f"max_instances={max_instances} is too small: an image has {instances.largest} instances"
        )
    capacity = instances.largest if max_instances is None else max_instances
    outputs = _new_outputs(features, offsets, reduce, capacity)
    instances.pool(
        flat_embeddings(features),
        offsets,
        getattr(core.Reduce, reduce),
        *outputs[:4],
        outputs[4] if reduce == "max" else None,
        threads=threads(),
    )
    return outputs


@_ops.cuda("instance_pool")
def _pool_cuda(
    features: Tensor,
    labels: Tensor,
    offsets: Tensor | None,
    reduce: str,
    max_instances: int | None,
    background: int | None,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    cuda_core = _native.cuda_core()
    capacity = cuda_capacity(features, offsets, max_instances)
    outputs = _new_outputs(features, offsets, reduce, capacity)
    flat, how = flat_embeddings(features), getattr(core.Reduce, reduce)
    num_instances = outputs[2].new_empty(outputs[2].shape[0])
    bytes_needed = cuda_core.instance_pool_workspace(flat, offsets, how, capacity)
    cuda_core.instance_pool_cuda(
        flat,
        flat_pixels(labels, features),
        offsets,
        how,
        *outputs[:4],
        outputs[4] if reduce == "max" else None,
        num_instances,
        features.new_empty(bytes_needed, dtype=torch.uint8),
        background=background,
        ignore_index=ignore_index,
        stream=_native.stream_of(features),
    )
    _native.check_overflow(num_instances, capacity)
    return outputs


@_ops.fake("instance_pool")
def _pool_fake(
    features: Tensor, labels: Tensor, offsets: Tensor | None, reduce: str, max_instances: int | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _new_outputs(features, offsets, reduce, fake_capacity(features, offsets, max_instances))


def _new_gradient(grad: Tensor, shape: Sequence[int], dtype: torch.dtype, channels_last: bool) -> Tensor:
    form = memory_format(len(shape), channels_last)
    return torch.empty(shape, dtype=dtype, device=grad.device, memory_format=form)


@_ops.cpu("instance_pool_backward")
def _backward_cpu(
    grad: Tensor,
    argmax: Tensor,
    labels: Tensor,
    offsets: Tensor | None,
    reduce: str,
    background: int | None,
    ignore_index: int | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    gradient = _new_gradient(grad, shape, dtype, channels_last)
    grad, flat = grad.contiguous(), flat_embeddings(gradient)
    if reduce == "max":
        core.spread_max(grad, argmax.contiguous(), offsets, flat, threads=threads())
    else:
        instances = _instances(labels, gradient, offsets, background, ignore_index)
        instances.spread(grad, offsets, getattr(core.Reduce, reduce), flat, threads=threads())
    return gradient


@_ops.cuda("instance_pool_backward")
def _backward_cuda(
    grad: Tensor,
    argmax: Tensor,
    labels: Tensor,
    offsets: Tensor | None,
    reduce: str,
    background: int | None,
    ignore_index: int | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    cuda_core = _native.cuda_core()
    gradient = _new_gradient(grad, shape, dtype, channels_last)
    grad, flat, stream = grad.contiguous(), flat_embeddings(gradient), _native.stream_of(grad)
    if reduce == "max":
        cuda_core.instance_spread_max_cuda(grad, argmax.contiguous(), offsets, flat, stream=stream)
    else:
        bytes_needed = cuda_core.instance_spread_workspace(flat, offsets, grad.shape[1])
        cuda_core.instance_spread_cuda(
            grad,
            flat_pixels(labels, gradient),
            offsets,
            getattr(core.Reduce, reduce),
            flat,
            grad.new_empty(bytes_needed, dtype=torch.uint8),
            background=background,
            ignore_index=ignore_index,
            stream=stream,
        )
    return gradient


@_ops.fake("instance_pool_backward")
def _backward_fake(grad: Tensor, *options: Any) -> Tensor:
    return _new_gradient(grad, *options[-3:])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, labels, offsets, reduce, _, background, ignore_index = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[4], labels, offsets)
    ctx.options = (
        (reduce, background, ignore_index),
        (features.shape, features.dtype, is_channels_last(features)),
    )


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    gradient = None
    if grad is not None and ctx.needs_input_grad[0]:
        rules, form = ctx.options
        gradient = torch.ops.instembed.instance_pool_backward(grad, *ctx.saved_tensors, *rules, *form)
    return gradient, *[None] * 6


# The gradient is linear in what comes back: its own gradient pools again, or takes what lies at the maxima.


def _save_for_double_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, argmax, labels, offsets, *options = inputs
    ctx.save_for_backward(argmax, labels, offsets)
    ctx.shape, ctx.dtype = grad.shape, grad.dtype
    ctx.options = options[:3]


def _double_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    argmax, labels, offsets = ctx.saved_tensors
    reduce, *rules = ctx.options
    if grad.numel() == 0:
        taken = grad.new_zeros(ctx.shape)
    elif reduce == "max":
        points = grad.t()[None] if grad.dim() == 2 else grad.flatten(2)  # (1 or B, C, N)
        points = points.expand(len(argmax), -1, -1).mT
        taken = torch.where(argmax < 0, 0, points.gather(1, argmax.clamp(min=0)))
    else:
        pooled, valid, *_ = torch.ops.instembed.instance_pool(
            grad, labels, offsets, reduce, ctx.shape[1], *rules
        )
        taken = torch.where(valid[..., None], pooled, 0)
    return taken.to(ctx.dtype), *[None] * 9


_ops.differentiable("instance_pool", _backward, _save_for_backward)
_ops.differentiable("instance_pool_backward", _double_backward, _save_for_double_backward)
