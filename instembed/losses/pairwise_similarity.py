"""The loss of deep metric learning over pairs of pixels (Fathi et al. 2017, arXiv 1703.10277)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from instembed import _arguments as arguments
from instembed import _native, _ops
from instembed._native import core, threads
from instembed._pixels import accumulation_dtype, empty_gradient, flat_embeddings
from instembed.losses._weighting import Reduction, reduced
from instembed.losses.sample_pixels import sample_pixels


def pairwise_similarity_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    samples: int = 16,
    background: int | None = 0,
    ignore_index: int | None = None,
    offsets: Tensor | None = None,
    generator: torch.Generator | None = None,
    max_instances: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Makes pixels of one instance similar, and pixels of two instances not (Fathi et al. 2017).

    :func:`sample_pixels` draws up to ``samples`` pixels of each instance. With the squared distance
    ``d = |e_p - e_q|^2`` and the similarity ``sigma = 2 / (1 + exp(d))`` of two of them, the loss of an
    image is the weighted mean over all its pairs of sampled pixels p, q, p != q, of

    - ``-log sigma = softplus(d) - log 2`` for pixels of one instance,
    - ``-log(1 - sigma) = -log tanh(d / 2)`` for pixels of two.

    The weight of a pair is inverse to the product of the numbers of pixels that were drawn of the two
    instances, and weights sum to 1: every two instances count alike. That is an estimate of the loss over all
    pixels with weights inverse to the sizes of the instances; weights inverse to the sizes here would
    favour small instances, as no instance has more than ``samples`` pixels in the sum.

    Args:
        embeddings: (B, D, *spatial) with 1 to 3 spatial dimensions, contiguous or channels-last, or points
            (N, D). float32, float64, float16 or bfloat16 (paper: D = 64). Coordinates added to two of the
            channels tell distant pixels apart from the first step.
        labels: (B, *spatial) or (N,) instance ids of any integer dtype and any value. Ids are per image.
        samples: the most pixels of an instance (paper: 16).
        background: the id that is no instance; None makes 0 an instance like any other.
        ignore_index: the id of pixels that take no part, for example 255.
        offsets: (B + 1,) for points: image b is points ``offsets[b]:offsets[b + 1]``. None is one image.
        generator: where the sample comes from, see :func:`sample_pixels`. None is torch's default.
        max_instances: capacity for the instances of an image. None: the largest number found; on a GPU a
            16th of the pixels, 64 to 4096, and the loss of an image with more is NaN.
        reduction: "mean" or "sum" over the images, "none" for (B,). Images without a pair are 0.

    Returns:
        A float32 (float64 for float64 embeddings) scalar, or (B,) with ``reduction="none"``. Differentiable
        once, with respect to ``embeddings``. Value and gradient are finite for any finite float32 or float64
        embeddings: for two instances d is at least 1e-6, with no gradient below, and coordinates beyond
        1e15 count as 1e15. (A gradient that a float16 cannot hold is infinite in float16.) Squared
        distances are sums of squared differences, so that nothing cancels for near pixels far from zero. NaN
        or infinity in a sampled pixel makes its image's loss NaN. With M sampled pixels, time grows with
        M^2 D, memory with M D.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
    """
    arguments.check_embeddings("embeddings", embeddings, points=True)
    arguments.check_integer_tensor("labels", labels)
    arguments.check_pixels("labels", labels, embeddings)
    indices, _ = sample_pixels(
        labels,
        samples,
        background=background,
        ignore_index=ignore_index,
        offsets=arguments.check_offsets(offsets, embeddings),
        generator=generator,
        max_instances=max_instances,
    )
    losses, _ = torch.ops.instembed.pairwise_similarity_loss(
        embeddings, indices, torch.is_grad_enabled() and embeddings.requires_grad
    )
    return reduced(losses, reduction)


class PairwiseSimilarityLoss(nn.Module):
    """:func:`pairwise_similarity_loss` as a module; the arguments are the function's.

    ``forward(embeddings, labels, offsets=None, generator=None)`` returns the loss.
    """

    def __init__(
        self,
        *,
        samples: int = 16,
        background: int | None = 0,
        ignore_index: int | None = None,
        max_instances: int | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "samples": samples,
            "background": background,
            "ignore_index": ignore_index,
            "max_instances": max_instances,
            "reduction": reduction,
        }
        # A wrong option shows here rather than in the first step of a training.
        nothing = torch.zeros(0, 1, 1), torch.zeros(0, 1, dtype=torch.int64)
        pairwise_similarity_loss(*nothing, **self.options)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        offsets: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return pairwise_similarity_loss(
            embeddings, labels, offsets=offsets, generator=generator, **self.options
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


# The op, for pixels that are chosen already: indices (B, C, K), -1 for none. Its second output is the
# gradient (B, C, K, D) of each image's loss at these pixels, empty unless `differentiable`: finding it along
# with the loss costs less than distances and exponentials again, and no more memory than the pixels
# themselves.

_ops.define(
    "pairwise_similarity_loss(Tensor embeddings, Tensor indices, bool differentiable) "
    "-> (Tensor losses, Tensor slopes)"
)
# The embeddings are not read backward, but tell autograd that the result depends on them.
_ops.define(
    "pairwise_similarity_loss_backward(Tensor grad_losses, Tensor embeddings, Tensor slopes, Tensor indices) "
    "-> Tensor"
)


def _new_outputs(embeddings: Tensor, indices: Tensor, differentiable: bool) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(embeddings)
    shape = (*indices.shape, embeddings.shape[1]) if differentiable else (0,)
    return embeddings.new_empty(indices.shape[0], dtype=dtype), embeddings.new_empty(shape, dtype=dtype)


@_ops.cpu("pairwise_similarity_loss")
def _loss_cpu(embeddings: Tensor, indices: Tensor, differentiable: bool) -> tuple[Tensor, Tensor]:
    losses, slopes = _new_outputs(embeddings, indices, differentiable)
    core.pairwise_similarity_forward(
        flat_embeddings(embeddings),
        indices.contiguous(),
        losses,
        slopes if differentiable else None,
        threads=threads(),
    )
    return losses, slopes


@_ops.cuda("pairwise_similarity_loss")
def _loss_cuda(embeddings: Tensor, indices: Tensor, differentiable: bool) -> tuple[Tensor, Tensor]:
    cuda_core = _native.cuda_core()
    losses, slopes = _new_outputs(embeddings, indices, differentiable)
    flat, chosen = flat_embeddings(embeddings), indices.contiguous()
    bytes_needed = cuda_core.pairwise_similarity_cuda_workspace(flat, chosen)
    cuda_core.pairwise_similarity_forward_cuda(
        flat,
        chosen,
        losses,
        slopes if differentiable else None,
        embeddings.new_empty(bytes_needed, dtype=torch.uint8),
        stream=_native.stream_of(embeddings),
    )
    return losses, slopes


@_ops.fake("pairwise_similarity_loss")
def _loss_fake(embeddings: Tensor, indices: Tensor, differentiable: bool) -> tuple[Tensor, Tensor]:
    return _new_outputs(embeddings, indices, differentiable)


@_ops.cpu("pairwise_similarity_loss_backward")
def _backward_cpu(grad_losses: Tensor, embeddings: Tensor, slopes: Tensor, indices: Tensor) -> Tensor:
    gradient = empty_gradient(embeddings)
    core.pairwise_similarity_backward(
        grad_losses.contiguous(),
        slopes.contiguous(),
        indices.contiguous(),
        flat_embeddings(gradient),
        threads=threads(),
    )
    return gradient


@_ops.cuda("pairwise_similarity_loss_backward")
def _backward_cuda(grad_losses: Tensor, embeddings: Tensor, slopes: Tensor, indices: Tensor) -> Tensor:
    gradient = empty_gradient(embeddings)
    _native.cuda_core().pairwise_similarity_backward_cuda(
        grad_losses.contiguous(),
        slopes.contiguous(),
        indices.contiguous(),
        flat_embeddings(gradient),
        stream=_native.stream_of(gradient),
    )
    return gradient


@_ops.fake("pairwise_similarity_loss_backward")
def _backward_fake(grad_losses: Tensor, embeddings: Tensor, slopes: Tensor, indices: Tensor) -> Tensor:
    return empty_gradient(embeddings)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    embeddings, indices, _ = inputs
    slopes = output[1]
    ctx.mark_non_differentiable(slopes)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(embeddings, slopes, indices)


def _backward(ctx: Any, grad_losses: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    gradient = None
    if grad_losses is not None and ctx.needs_input_grad[0]:
        gradient = torch.ops.instembed.pairwise_similarity_loss_backward(grad_losses, *ctx.saved_tensors)
    return gradient, None, None


_ops.differentiable("pairwise_similarity_loss", _backward, _save_for_backward)
_ops.differentiable_once("pairwise_similarity_loss_backward", "pairwise_similarity_loss")
