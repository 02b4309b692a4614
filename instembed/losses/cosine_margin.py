"""The cosine margin loss of Kong and Fowlkes (2018), arXiv 1712.08273."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from instembed import _arguments as arguments
from instembed import _native, _ops
from instembed._native import core, threads
from instembed._pixels import empty_gradient, flat_embeddings, flat_pixels, number_of_images
from instembed._sphere import ALL, sampling, unit_vectors
from instembed.losses._weighting import Reduction, reduced

Samples = int | float | tuple[float, int]


def cosine_margin_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.5,
    samples: Samples | None = None,
    squared: bool = False,
    background: int | None = 0,
    ignore_index: int | None = None,
    offsets: Tensor | None = None,
    normalize: bool = True,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Pulls pixels of one instance together on the unit sphere, and apart those of two.

    With unit vectors x_i of an image's pixels, each in one of C instances, of N_i pixels::

        s_ij = (1 + x_i . x_j) / 2           1 for equal, 1/2 for orthogonal, 0 for opposite vectors
        w_i  = 1 / (C N_i)                   their sum is 1
        loss = sum_ij w_i w_j (1 - s_ij)             over pairs of one instance
             + sum_ij w_i w_j [ s_ij - margin ]+     over pairs of different instances

    The first sum is taken over instances, the second over tiles of pixels; no N x N matrix is stored.

    Args:
        embeddings: (B, D, *spatial) with 1 to 3 spatial dimensions, contiguous or channels-last, or points
            (N, D). float32, float64, float16 or bfloat16; 16-bit types are taken as float32.
        labels: (B, *spatial) or (N,) instance ids of any integer dtype and any value. Ids are per image.
        margin: similarity above which different instances push each other, from 0 to 1 (paper: 0.5, so
            that instances end at 90 degrees or more).
        samples: how many pixels of an image take part, drawn anew in each call among those that belong to
            instances: a float is a share of them (rounded up), an int a number at most, and a pair is both.
            The paper draws ``(0.35, 4000)``. None: all of them. Sizes N_i count the pixels drawn.
        squared: whether the hinge over pairs of different instances is squared, so that its gradient
            vanishes at the margin. The paper does not; pairs of one instance count as before.
        background: the id that is no instance; None makes 0 an instance like any other.
        ignore_index: the id of pixels that take no part in anything.
        offsets: (B + 1,) for points: image b is points ``offsets[b]:offsets[b + 1]``. None is one image.
        normalize: whether embeddings are scaled to unit vectors first. A vector with all elements within
            1e-12 of zero becomes zero: its similarity to everything is 1/2, and it gets no gradient. False
            takes embeddings as they are, for the iterates of :func:`recurrent_mean_shift`.
        generator: of the labels' device, draws the samples; None is torch's default. The same state draws the
            same pixels.
        reduction: "mean" or "sum" over the images, "none" for (B,). Images without instances are 0.

    Returns:
        A float32 (float64 for float64 embeddings) scalar, or (B,) with ``reduction="none"``. Differentiable
        once, with respect to ``embeddings``. NaN or infinity in an embedding that takes part makes its
        image's loss NaN, and so does a length above 1e9 with ``normalize=False``. The same bits on any
        number of threads.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value. On a GPU offsets
            that are none give NaN.
    """
    arguments.check_embeddings("embeddings", embeddings, points=True)
    arguments.check_integer_tensor("labels", labels)
    arguments.check_pixels("labels", labels, embeddings)
    offsets = arguments.check_offsets(offsets, embeddings)
    margin = arguments.check_number("margin", margin, at_least=0)
    if margin > 1:
        raise ValueError(f"margin must be at most 1, got {margin}")
    arguments.check_bool("squared", squared)
    arguments.check_bool("normalize", normalize)
    keys, fraction, most = None, 1.0, ALL
    choice = sampling(_checked_samples(samples))
    arguments.check_generator(generator, labels.device)
    if choice is not None:
        fraction, most = choice
        keys = torch.rand(labels.shape, generator=generator, device=labels.device)
    if normalize:
        points = unit_vectors(embeddings)
    else:
        points = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    losses, _ = torch.ops.instembed.cosine_margin_loss(
        points,
        labels,
        offsets,
        keys,
        fraction,
        most,
        margin,
        squared,
        arguments.check_label_id("background", background),
        arguments.check_label_id("ignore_index", ignore_index),
        torch.is_grad_enabled() and points.requires_grad,
    )
    return reduced(losses, reduction)


class CosineMarginLoss(nn.Module):
    """:func:`cosine_margin_loss` as a module; the arguments are the function's.

    ``forward(embeddings, labels, offsets=None, generator=None)`` returns the loss.
    """

    def __init__(
        self,
        *,
        margin: float = 0.5,
        samples: Samples | None = None,
        squared: bool = False,
        background: int | None = 0,
        ignore_index: int | None = None,
        normalize: bool = True,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "margin": margin,
            "samples": samples,
            "squared": squared,
            "background": background,
            "ignore_index": ignore_index,
            "normalize": normalize,
            "reduction": reduction,
        }
        # A wrong option shows here rather than in the first step of a training.
        cosine_margin_loss(torch.zeros(0, 1, 1), torch.zeros(0, 1, dtype=torch.int64), **self.options)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        offsets: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return cosine_margin_loss(embeddings, labels, offsets=offsets, generator=generator, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _checked_samples(samples: Any) -> Any:
    if samples is None:
        return None
    share, most = samples if isinstance(samples, tuple) and len(samples) == 2 else (samples, samples)
    if isinstance(samples, (float, tuple)):
        share = arguments.check_number("samples", share, above=0)
        if share > 1:
            raise ValueError(f"samples must be a share of at most 1.0, or an integer, got {samples}")
        samples = share if isinstance(samples, float) else (share, most)
    if not isinstance(samples, float) and arguments.check_integer("samples", most, at_least=1) > ALL:
        raise ValueError(f"samples must be at most 2^62, got {most}")
    return samples


# The op, over unit vectors. The gradient of each image's loss comes with it, like points in shape: it takes
# the same similarities. It is empty unless `differentiable`.

_ops.define(
    "cosine_margin_loss(Tensor points, Tensor labels, Tensor? offsets, Tensor? keys, float fraction, "
    "int most, float margin, bool squared, int? background, int? ignore_index, bool differentiable) "
    "-> (Tensor losses, Tensor gradient)"
)
# The points themselves are not read backward, but tell autograd that the result depends on them.
_ops.define(
    "cosine_margin_loss_backward(Tensor grad_losses, Tensor points, Tensor gradient, Tensor? offsets) "
    "-> Tensor"
)


def _new_outputs(points: Tensor, offsets: Tensor | None, differentiable: bool) -> tuple[Tensor, Tensor]:
    losses = points.new_empty(number_of_images(points, offsets))
    return losses, empty_gradient(points) if differentiable else points.new_empty(0)


@_ops.cpu("cosine_margin_loss")
def _loss_cpu(
    points: Tensor,
    labels: Tensor,
    offsets: Tensor | None,
    keys: Tensor | None,
    fraction: float,
    most: int,
    margin: float,
    squared: bool,
    background: int | None,
    ignore_index: int | None,
    differentiable: bool,
) -> tuple[Tensor, Tensor]:
    losses, gradient = _new_outputs(points, offsets, differentiable)
    core.cosine_margin_forward(
        flat_embeddings(points),
        flat_pixels(labels, points),
        offsets,
        None if keys is None else flat_pixels(keys, points),
        losses,
        flat_embeddings(gradient) if differentiable else None,
        fraction=fraction,
        most=most,
        margin=margin,
        squared=squared,
        background=background,
        ignore_index=ignore_index,
        threads=threads(),
    )
    return losses, gradient


@_ops.cpu("cosine_margin_loss_backward")
def _loss_backward_cpu(
    grad_losses: Tensor, points: Tensor, gradient: Tensor, offsets: Tensor | None
) -> Tensor:
    factors = grad_losses.detach()
    if offsets is not None:
        factors = factors.repeat_interleave(offsets.diff())
    elif gradient.dim() == 2:
        factors = factors.expand(len(gradient))
    scaled = empty_gradient(gradient)
    return torch.mul(gradient.detach(), factors.view(-1, *[1] * (gradient.dim() - 1)), out=scaled)


@_ops.cuda("cosine_margin_loss")
def _loss_cuda(
    points: Tensor,
    labels: Tensor,
    offsets: Tensor | None,
    keys: Tensor | None,
    fraction: float,
    most: int,
    margin: float,
    squared: bool,
    background: int | None,
    ignore_index: int | None,
    differentiable: bool,
) -> tuple[Tensor, Tensor]:
    cuda_core = _native.cuda_core()
    losses, gradient = _new_outputs(points, offsets, differentiable)
    flat = flat_embeddings(points)
    flat_keys = None if keys is None else flat_pixels(keys, points)
    bytes_needed = cuda_core.cosine_margin_cuda_workspace(
        flat, offsets, flat_keys, fraction=fraction, most=most, gradient=differentiable
    )
    cuda_core.cosine_margin_forward_cuda(
        flat,
        flat_pixels(labels, points),
        offsets,
        flat_keys,
        losses,
        flat_embeddings(gradient) if differentiable else None,
        points.new_empty(bytes_needed, dtype=torch.uint8),
        fraction=fraction,
        most=most,
        margin=margin,
        squared=squared,
        background=background,
        ignore_index=ignore_index,
        stream=_native.stream_of(points),
    )
    return losses, gradient


@_ops.cuda("cosine_margin_loss_backward")
def _loss_backward_cuda(
    grad_losses: Tensor, points: Tensor, gradient: Tensor, offsets: Tensor | None
) -> Tensor:
    factors = grad_losses.detach()
    if offsets is not None:  # repeat_interleave would wait for the device, and trust the offsets
        images = torch.bucketize(torch.arange(len(gradient), device=offsets.device), offsets[1:], right=True)
        factors = torch.cat([factors, factors.new_full((1,), torch.nan)])[images]
    elif gradient.dim() == 2:
        factors = factors.expand(len(gradient))
    scaled = empty_gradient(gradient)
    return torch.mul(gradient.detach(), factors.view(-1, *[1] * (gradient.dim() - 1)), out=scaled)


@_ops.fake("cosine_margin_loss")
def _loss_fake(
    points: Tensor, labels: Tensor, offsets: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    return _new_outputs(points, offsets, differentiable=options[-1])


@_ops.fake("cosine_margin_loss_backward")
def _loss_backward_fake(
    grad_losses: Tensor, points: Tensor, gradient: Tensor, offsets: Tensor | None
) -> Tensor:
    return empty_gradient(gradient)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    points, _, offsets, *_ = inputs
    ctx.save_for_backward(points, output[1], offsets)
    ctx.inputs = len(inputs)


def _loss_backward(ctx: Any, grad_losses: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    gradient = None
    if grad_losses is not None and ctx.needs_input_grad[0]:
        gradient = torch.ops.instembed.cosine_margin_loss_backward(grad_losses, *ctx.saved_tensors)
    return gradient, *[None] * (ctx.inputs - 1)


_ops.differentiable("cosine_margin_loss", _loss_backward, _save_for_backward)
_ops.differentiable_once("cosine_margin_loss_backward", "cosine_margin_loss")
