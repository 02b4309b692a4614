"""The discriminative loss of De Brabandere, Neven and Van Gool (2017), arXiv 1708.02551."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from instembed import _arguments as arguments
from instembed import _native, _ops
from instembed._native import core, threads
from instembed._pixels import (
    accumulation_dtype,
    cuda_capacity,
    empty_gradient,
    flat_embeddings,
    flat_pixels,
    number_of_images,
)
from instembed.losses._weighting import Reduction, weighted_loss

Variance = Literal["instance", "pixel"]


class DiscriminativeTerms(NamedTuple):
    """The unweighted terms of the loss, each of shape (B,)."""

    variance: Tensor
    distance: Tensor
    regularization: Tensor


def discriminative_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    offsets: Tensor | None = None,
    delta_var: float = 0.5,
    delta_dist: float = 1.5,
    norm: int = 2,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 0.001,
    background: int | None = 0,
    ignore_index: int | None = None,
    variance: Variance = "instance",
    background_push: float = 0.0,
    reduction: Reduction = "mean",
    max_instances: int | None = None,
) -> Tensor:
    r"""Pulls the embeddings of an instance to their mean and pushes the means of instances apart.

    For an image with instances c = 1..C, of N_c pixels x_i and mean mu_c each::

        variance       = 1/C sum_c 1/N_c sum_i [ |mu_c - x_i| - delta_var ]+^2
        distance       = 1/(C (C-1)) sum_{a != b} [ 2 delta_dist - |mu_a - mu_b| ]+^2
        regularization = 1/C sum_c |mu_c|
        loss           = alpha variance + beta distance + gamma regularization

    Args:
        embeddings: (B, D, *spatial) with 1 to 3 spatial dimensions, contiguous or channels-last, or points
            (N, D). float32, float64, float16 or bfloat16; sums are taken in float32 (float64 for float64).
        labels: (B, *spatial) or (N,) instance ids of any integer dtype and any value. Ids are per image.
        offsets: (B + 1,) for points: image b is points ``offsets[b]:offsets[b + 1]``. None is one image.
        delta_var: radius, in units of the embedding, within which nothing pulls (paper: 0.5).
        delta_dist: half the distance beyond which nothing pushes two means apart (paper: 1.5).
        norm: 2 (paper) or 1, of the three distances.
        alpha, beta, gamma: weights of the terms (paper: 1, 1, 0.001).
        background: the id that is no instance; None makes 0 an instance like any other.
        ignore_index: the id of pixels that take no part in anything.
        variance: "instance" is a mean over instances of means over pixels (paper), "pixel" one mean over all
            pixels of instances, so that large instances weigh more.
        background_push: weight of 1/C sum_c mean_{i in background} [ delta_dist - |x_i - mu_c| ]+^2, which
            keeps background pixels away from the instances (0 in the paper). Time grows with
            background pixels x instances.
        reduction: "mean" or "sum" over the images, "none" for (B,). Images without instances are 0.
        max_instances: on a GPU, the instances for which there is room in every image. None: a 16th of the
            image's pixels, but 64 to 4096 (with offsets, the mean number of points in place of a 16th). An
            image with more has a loss and gradients of NaN. The CPU needs no bound and ignores it.

    Returns:
        A float32 (float64 for float64 embeddings) scalar, or (B,) with ``reduction="none"``. Differentiable
        once, with respect to ``embeddings``; a distance of zero has subgradient zero. NaN or infinity in an
        embedding that takes part makes its image's loss NaN.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value. On a GPU,
            offsets that are none and too many instances raise only under
            :func:`instembed.set_overflow_checks`; the loss is NaN otherwise.
    """
    terms = _checked_terms(
        embeddings,
        labels,
        offsets=offsets,
        delta_var=delta_var,
        delta_dist=delta_dist,
        norm=norm,
        background=background,
        ignore_index=ignore_index,
        variance=variance,
        background_push=arguments.check_number("background_push", background_push, at_least=0) > 0,
        max_instances=max_instances,
    )
    weights = [
        arguments.check_number("alpha", alpha),
        arguments.check_number("beta", beta),
        arguments.check_number("gamma", gamma),
        float(background_push),
    ]
    return weighted_loss(terms, weights, reduction)


def discriminative_terms(
    embeddings: Tensor,
    labels: Tensor,
    *,
    offsets: Tensor | None = None,
    delta_var: float = 0.5,
    delta_dist: float = 1.5,
    norm: int = 2,
    background: int | None = 0,
    ignore_index: int | None = None,
    variance: Variance = "instance",
    max_instances: int | None = None,
) -> DiscriminativeTerms:
    """The three terms of :func:`discriminative_loss`, unweighted and per image.

    Arguments, shapes and errors are those of :func:`discriminative_loss`. Returns (B,) each, to be
    logged, weighted or reduced at will; differentiable once.
    """
    terms = _checked_terms(
        embeddings,
        labels,
        offsets=offsets,
        delta_var=delta_var,
        delta_dist=delta_dist,
        norm=norm,
        background=background,
        ignore_index=ignore_index,
        variance=variance,
        background_push=False,
        max_instances=max_instances,
    )
    return DiscriminativeTerms(terms[:, 0], terms[:, 1], terms[:, 2])


class DiscriminativeLoss(nn.Module):
    """:func:`discriminative_loss` as a module; the arguments are the function's.

    ``forward(embeddings, labels, offsets=None)`` returns the loss.
    """

    def __init__(
        self,
        *,
        delta_var: float = 0.5,
        delta_dist: float = 1.5,
        norm: int = 2,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 0.001,
        background: int | None = 0,
        ignore_index: int | None = None,
        variance: Variance = "instance",
        background_push: float = 0.0,
        reduction: Reduction = "mean",
        max_instances: int | None = None,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "delta_var": delta_var,
            "delta_dist": delta_dist,
            "norm": norm,
            "alpha": alpha,
            "beta": beta,
            "gamma": gamma,
            "background": background,
            "ignore_index": ignore_index,
            "variance": variance,
            "background_push": background_push,
            "reduction": reduction,
            "max_instances": max_instances,
        }
        # A wrong option shows here rather than in the first step of a training.
        discriminative_loss(torch.zeros(0, 1, 1), torch.zeros(0, 1, dtype=torch.int64), **self.options)

    def forward(self, embeddings: Tensor, labels: Tensor, offsets: Tensor | None = None) -> Tensor:
        return discriminative_loss(embeddings, labels, offsets=offsets, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _checked_terms(
    embeddings: Tensor,
    labels: Tensor,
    *,
    offsets: Tensor | None,
    delta_var: float,
    delta_dist: float,
    norm: int,
    background: int | None,
    ignore_index: int | None,
    variance: Variance,
    background_push: bool,
    max_instances: int | None,
) -> Tensor:
    arguments.check_embeddings("embeddings", embeddings, points=True)
    arguments.check_integer_tensor("labels", labels)
    arguments.check_pixels("labels", labels, embeddings)
    offsets = arguments.check_offsets(offsets, embeddings)
    if max_instances is not None:
        arguments.check_capacity("max_instances", max_instances)
    arguments.check_choice("norm", norm, (1, 2))
    arguments.check_choice("variance", variance, ("instance", "pixel"))
    outputs = torch.ops.instembed.discriminative_terms(
        embeddings,
        labels,
        offsets,
        arguments.check_number("delta_var", delta_var, above=0),
        arguments.check_number("delta_dist", delta_dist, above=0),
        norm,
        arguments.check_label_id("background", background),
        arguments.check_label_id("ignore_index", ignore_index),
        variance == "pixel",
        background_push,
        max_instances,
        torch.is_grad_enabled() and embeddings.requires_grad,
    )
    return outputs[0]


# The op. Its first output is the (B, 4) terms: variance, distance, regularization, background push. The rest
# are what backward needs besides its inputs (csrc/discriminative/discriminative.h, State), empty unless
# `differentiable`.

_OPTIONS = (
    "float delta_var, float delta_dist, int norm, int? background, int? ignore_index, bool pooled_variance, "
    "bool background_push, int? max_instances"
)
_ops.define(
    f"discriminative_terms(Tensor embeddings, Tensor labels, Tensor? offsets, {_OPTIONS}, "
    "bool differentiable) -> (Tensor terms, Tensor first, Tensor counts, Tensor vectors, Tensor runs)"
)
_ops.define(
    f"discriminative_terms_backward(Tensor grad_terms, Tensor embeddings, Tensor labels, Tensor? offsets, "
    f"{_OPTIONS}, Tensor first, Tensor counts, Tensor vectors, Tensor runs) -> Tensor"
)

# What the state may take of the size of the embeddings: the code of the labels, and vectors of instances.
# Labels or instances that need more are found again in the backward pass. Two bytes a pixel are enough for
# any labels with fewer than 2^16 - 2 instances an image: the state has them where that is little, else room
# for runs.
_PIXELS_PER_MILLE = 70
_RUNS_PER_MILLE = 25
_INSTANCES_PER_MILLE = 10
_SMALL = 1024  # instances, and words, for which there is always room


def _state_sizes(embeddings: Tensor, images: int) -> tuple[int, int]:
    """Capacities of the state: instances, and words of the code of label runs."""
    channels = embeddings.shape[1]
    pixels = embeddings.numel() // channels
    size = embeddings.numel() * embeddings.element_size()
    instance_bytes = 8 + 4 * channels * accumulation_dtype(embeddings).itemsize
    instances = max(min(pixels, _SMALL), _INSTANCES_PER_MILLE * size // (1000 * instance_bytes))
    tiles = images + pixels // 64  # at most: a tile has 64 pixels or more, but for each image's last
    code = 2 * pixels if 2000 * pixels <= _PIXELS_PER_MILLE * size else _RUNS_PER_MILLE * size // 1000
    return instances, tiles + 1 + max(_SMALL, (code + 3) // 4)


def _new_outputs(
    embeddings: Tensor, offsets: Tensor | None, differentiable: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    images = number_of_images(embeddings, offsets)
    instances, words = _state_sizes(embeddings, images) if differentiable else (0, 0)
    dtype = accumulation_dtype(embeddings)
    return (
        embeddings.new_empty((images, 4), dtype=dtype),
        embeddings.new_empty(images + 1 if differentiable else 0, dtype=torch.int64),
        embeddings.new_empty(instances, dtype=torch.int64),
        embeddings.new_empty((4, instances, embeddings.shape[1]), dtype=dtype),
        embeddings.new_empty(words, dtype=torch.int32),
    )


def _native_options(
    delta_var: float,
    delta_dist: float,
    norm: int,
    background: int | None,
    ignore_index: int | None,
    pooled_variance: bool,
    background_push: bool,
    max_instances: int | None,
) -> Any:
    return core.DiscriminativeOptions(
        delta_var=delta_var,
        delta_dist=delta_dist,
        norm=norm,
        background=background,
        ignore_index=ignore_index,
        pooled_variance=pooled_variance,
        background_push=background_push,
        threads=threads(),
    )


@_ops.cpu("discriminative_terms")
def _terms_cpu(
    embeddings: Tensor, labels: Tensor, offsets: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *rules, differentiable = options
    outputs = _new_outputs(embeddings, offsets, differentiable)
    core.discriminative_forward(
        flat_embeddings(embeddings),
        flat_pixels(labels, embeddings),
        offsets,
        _native_options(*rules),
        *(outputs if differentiable else outputs[:1]),
    )
    return outputs


@_ops.cpu("discriminative_terms_backward")
def _terms_backward_cpu(
    grad_terms: Tensor, embeddings: Tensor, labels: Tensor, offsets: Tensor | None, *options: Any
) -> Tensor:
    rules, state = options[:-4], options[-4:]
    gradient = empty_gradient(embeddings)
    core.discriminative_backward(
        flat_embeddings(embeddings),
        flat_pixels(labels, embeddings),
        offsets,
        _native_options(*rules),
        grad_terms.contiguous(),
        *state,
        flat_embeddings(gradient),
    )
    return gradient


# On CUDA the state is another (csrc/discriminative/cuda.h, CudaState), and always needed.


def _cuda_capacity(embeddings: Tensor, offsets: Tensor | None, max_instances: int | None) -> int:
    """Instances an image; no more than one has pixels."""
    pixels = embeddings.numel() // embeddings.shape[1]
    largest = pixels // (1 if offsets is not None else max(number_of_images(embeddings, None), 1))
    return max(min(cuda_capacity(embeddings, offsets, max_instances), largest), 1)


def _new_cuda_state(
    embeddings: Tensor, offsets: Tensor | None, capacity: int, background_push: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images = number_of_images(embeddings, offsets)
    pixels = embeddings.numel() // embeddings.shape[1]
    slot_bytes = 2 if capacity <= 8192 else 4
    return (
        embeddings.new_empty(2 * images + 1, dtype=torch.int64),
        embeddings.new_empty(images * capacity, dtype=torch.int64),
        embeddings.new_empty(
            (3 + background_push, images * capacity, embeddings.shape[1]),
            dtype=accumulation_dtype(embeddings),
        ),
        embeddings.new_empty((pixels * slot_bytes + 3) // 4, dtype=torch.int32),
    )


def _new_cuda_outputs(
    embeddings: Tensor, offsets: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, background_push, max_instances, differentiable = options
    terms = embeddings.new_empty(
        (number_of_images(embeddings, offsets), 4), dtype=accumulation_dtype(embeddings)
    )
    capacity = _cuda_capacity(embeddings, offsets, max_instances)
    if differentiable:
        return terms, *_new_cuda_state(embeddings, offsets, capacity, background_push)
    integers = embeddings.new_empty(0, dtype=torch.int64)
    return terms, integers, torch.empty_like(integers), torch.empty_like(terms[:0]), integers.int()


@_ops.cuda("discriminative_terms")
def _terms_cuda(
    embeddings: Tensor, labels: Tensor, offsets: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    cuda_core = _native.cuda_core()
    *rules, differentiable = options
    *_, background_push, max_instances = rules
    outputs = _new_cuda_outputs(embeddings, offsets, *options)
    capacity = _cuda_capacity(embeddings, offsets, max_instances)
    state = outputs[1:] if differentiable else _new_cuda_state(embeddings, offsets, capacity, background_push)
    flat, native_options = flat_embeddings(embeddings), _native_options(*rules)
    bytes_needed = cuda_core.discriminative_cuda_workspace(
        flat, offsets, native_options, capacity, backward=False
    )
    cuda_core.discriminative_forward_cuda(
        flat,
        flat_pixels(labels, embeddings),
        offsets,
        native_options,
        outputs[0],
        *state,
        embeddings.new_empty(bytes_needed, dtype=torch.uint8),
        stream=_native.stream_of(embeddings),
    )
    _check_cuda_state(state[0], capacity)
    return outputs


def _check_cuda_state(images: Tensor, capacity: int) -> None:
    """Under set_overflow_checks: what the CPU finds out before it starts."""
    if not _native.overflow_checks():
        return
    if images[-1].item() != 0:
        raise ValueError("offsets must rise from 0 to the number of points")
    found = images[: images.numel() // 2]
    _native.check_overflow(torch.where(found < 0, capacity + 1, found), capacity)


@_ops.cuda("discriminative_terms_backward")
def _terms_backward_cuda(
    grad_terms: Tensor, embeddings: Tensor, labels: Tensor, offsets: Tensor | None, *options: Any
) -> Tensor:
    cuda_core = _native.cuda_core()
    rules, state = options[:-4], options[-4:]
    gradient = empty_gradient(embeddings)
    flat, native_options = flat_embeddings(embeddings), _native_options(*rules)
    capacity = _cuda_capacity(embeddings, offsets, rules[-1])
    bytes_needed = cuda_core.discriminative_cuda_workspace(
        flat, offsets, native_options, capacity, backward=True
    )
    cuda_core.discriminative_backward_cuda(
        flat,
        offsets,
        native_options,
        grad_terms.contiguous(),
        *state,
        flat_embeddings(gradient),
        embeddings.new_empty(bytes_needed, dtype=torch.uint8),
        stream=_native.stream_of(embeddings),
    )
    return gradient


@_ops.fake("discriminative_terms")
def _terms_fake(
    embeddings: Tensor, labels: Tensor, offsets: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if embeddings.device.type == "cuda":
        return _new_cuda_outputs(embeddings, offsets, *options)
    return _new_outputs(embeddings, offsets, differentiable=options[-1])


@_ops.fake("discriminative_terms_backward")
def _terms_backward_fake(grad_terms: Tensor, embeddings: Tensor, *others: Any) -> Tensor:
    return empty_gradient(embeddings)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    embeddings, labels, offsets, *options, _ = inputs
    state = output[1:]
    ctx.mark_non_differentiable(*state)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(embeddings, labels, offsets, *state)
    ctx.options = options


def _terms_backward(ctx: Any, grad_terms: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    gradient = None
    if grad_terms is not None and ctx.needs_input_grad[0]:
        embeddings, labels, offsets, *state = ctx.saved_tensors
        gradient = torch.ops.instembed.discriminative_terms_backward(
            grad_terms, embeddings, labels, offsets, *ctx.options, *state
        )
    return gradient, *[None] * (3 + len(ctx.options))


_ops.differentiable("discriminative_terms", _terms_backward, _save_for_backward)
_ops.differentiable_once("discriminative_terms_backward", "discriminative_loss")
