"""The associative embedding loss of Newell, Huang and Deng (2017), arXiv 1611.05424."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from instembed import _arguments as arguments
from instembed import _native, _ops
from instembed._native import core, threads
from instembed._pixels import accumulation_dtype, empty_gradient
from instembed.losses._weighting import Reduction, weighted_loss

Kind = Literal["exp", "hinge"]

SIGMA = math.sqrt(0.5)  # 2 sigma^2 = 1


class AssociativeEmbeddingTerms(NamedTuple):
    """The unweighted terms of the loss, each of shape (B,)."""

    pull: Tensor
    push: Tensor


def associative_embedding_loss(
    tags: Tensor,
    keypoints: Tensor | None,
    visible: Tensor,
    *,
    kind: Kind = "exp",
    sigma: float = SIGMA,
    margin: float = 1.0,
    pull_weight: float = 1.0,
    push_weight: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Pulls the tags of a person's joints to their mean and pushes the means of people apart.

    For an image with people n = 1..N, tags h_k at the K_n visible joints of each and their mean hbar_n::

        pull = 1/N sum_n 1/K_n sum_k |h_k - hbar_n|^2
        push = 0.5/(N (N-1)) sum_{n != m} exp(-|hbar_n - hbar_m|^2 / (2 sigma^2))    kind="exp"
             = 0.5/(N (N-1)) sum_{n != m} [ margin - |hbar_n - hbar_m| ]+            kind="hinge"
        loss = pull_weight pull + push_weight push

    Only the tags at the joints are read. What is kept for the backward pass grows with people x joints.

    Args:
        tags: (B, K L, H, W) maps, contiguous, channels-last or with any strides: tags of L >= 1 dimensions
            for each of K joints, joint after joint, so that joint k has channels ``k L`` to ``k L + L - 1``.
            Or tags (B, P, K, L) that were gathered, with ``keypoints=None``. float32, float64, float16 or
            bfloat16; sums are taken in float64.
        keypoints: (B, P, K, 2), x and y in pixels of the tag maps, of any floating or integer dtype. The tag
            is read at the nearest pixel: pixel 0 covers [-0.5, 0.5). A joint outside the map, or at NaN,
            counts as not visible. Has no gradient. None: ``tags`` are gathered.
        visible: (B, P, K) bool or of an integer dtype; a joint counts where it is greater than 0, as
            visibilities in COCO. People without a joint that counts, padding for example, take no part.
        kind: "exp" (paper) or "hinge" (CornerNet).
        sigma: for "exp", the distance of tags within which people push each other (2 sigma^2 = 1).
        margin: for "hinge", the distance beyond which nothing pushes (1).
        pull_weight, push_weight: weights of the terms.
        reduction: "mean" or "sum" over the images, "none" for (B,). Images without people are 0; one person
            has no push.

    Returns:
        A float32 (float64 for float64 tags) scalar, or (B,) with ``reduction="none"``. Differentiable once,
        with respect to ``tags``; a distance of zero has subgradient zero. NaN or infinity in a tag that is
        read makes its image's loss NaN.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
    """
    terms = _checked_terms(tags, keypoints, visible, kind=kind, sigma=sigma, margin=margin)
    weights = [
        arguments.check_number("pull_weight", pull_weight),
        arguments.check_number("push_weight", push_weight),
    ]
    return weighted_loss(terms, weights, reduction)


def associative_embedding_terms(
    tags: Tensor,
    keypoints: Tensor | None,
    visible: Tensor,
    *,
    kind: Kind = "exp",
    sigma: float = SIGMA,
    margin: float = 1.0,
) -> AssociativeEmbeddingTerms:
    """The two terms of :func:`associative_embedding_loss`, unweighted and per image.

    Arguments, shapes and errors are those of :func:`associative_embedding_loss`. Returns (B,) each, to be
    logged, weighted or reduced at will; differentiable once.
    """
    terms = _checked_terms(tags, keypoints, visible, kind=kind, sigma=sigma, margin=margin)
    return AssociativeEmbeddingTerms(terms[:, 0], terms[:, 1])


class AssociativeEmbeddingLoss(nn.Module):
    """:func:`associative_embedding_loss` as a module; the arguments are the function's.

    ``forward(tags, keypoints, visible)`` returns the loss.
    """

    def __init__(
        self,
        *,
        kind: Kind = "exp",
        sigma: float = SIGMA,
        margin: float = 1.0,
        pull_weight: float = 1.0,
        push_weight: float = 1.0,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "kind": kind,
            "sigma": sigma,
            "margin": margin,
            "pull_weight": pull_weight,
            "push_weight": push_weight,
            "reduction": reduction,
        }
        # A wrong option shows here rather than in the first step of a training.
        nobody = torch.zeros(0, 0, 1, 1)
        associative_embedding_loss(nobody, None, nobody[..., 0].bool(), **self.options)

    def forward(self, tags: Tensor, keypoints: Tensor | None, visible: Tensor) -> Tensor:
        return associative_embedding_loss(tags, keypoints, visible, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _checked_terms(
    tags: Tensor, keypoints: Tensor | None, visible: Tensor, *, kind: Kind, sigma: float, margin: float
) -> Tensor:
    arguments.check_floating_tensor("tags", tags)
    arguments.check_flags("visible", visible)
    if tags.dim() != 4:
        expected = "(B, P, K, L) without keypoints" if keypoints is None else "(B, K L, H, W)"
        raise ValueError(f"tags must be {expected}, got shape {tuple(tags.shape)}")
    if visible.dim() != 3 or visible.shape[0] != tags.shape[0]:
        raise ValueError(
            f"visible must be (B, P, K) with B = {tags.shape[0]} images, got shape {tuple(visible.shape)}"
        )
    arguments.check_same_device("visible", visible, "tags", tags)
    joints = visible.shape[2]
    if joints < 1:
        raise ValueError(f"visible must have at least one joint, got shape {tuple(visible.shape)}")
    if keypoints is None:
        if tags.shape[:3] != visible.shape or tags.shape[3] < 1:
            raise ValueError(
                "tags must be (B, P, K, L) without keypoints, with L at least 1 and the shape "
                f"{tuple(visible.shape)} of visible, got {tuple(tags.shape)}"
            )
    else:
        arguments.check_number_tensor("keypoints", keypoints)
        if keypoints.shape != (*visible.shape, 2):
            raise ValueError(
                f"keypoints must have shape {(*visible.shape, 2)} for visible of shape "
                f"{tuple(visible.shape)}, got {tuple(keypoints.shape)}"
            )
        arguments.check_same_device("keypoints", keypoints, "tags", tags)
        if tags.shape[1] < 1 or tags.shape[1] % joints != 0:
            raise ValueError(
                f"tags must have K L channels, K = {joints} joints with tags of L >= 1 dimensions each, "
                f"got shape {tuple(tags.shape)}"
            )
    arguments.check_choice("kind", kind, ("exp", "hinge"))
    outputs = torch.ops.instembed.associative_embedding_terms(
        tags,
        keypoints,
        visible,
        kind == "hinge",
        arguments.check_number("sigma", sigma, above=0),
        arguments.check_number("margin", margin, above=0),
    )
    return outputs[0]


# The op. Its first output is the (B, 2) terms: pull, push. The rest are what backward needs besides its
# inputs (csrc/associative_embedding/associative_embedding.h, State).

_ops.define(
    "associative_embedding_terms(Tensor tags, Tensor? keypoints, Tensor visible, bool hinge, float sigma, "
    "float margin) -> (Tensor terms, Tensor pixels, Tensor means, Tensor pushes)"
)
_ops.define(
    "associative_embedding_terms_backward(Tensor grad_terms, Tensor tags, Tensor pixels, Tensor means, "
    "Tensor pushes, bool gathered) -> Tensor"
)


def _new_outputs(
    tags: Tensor, keypoints: Tensor | None, visible: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, people, joints = visible.shape
    dimensions = tags.shape[3] if keypoints is None else tags.shape[1] // joints
    means = tags.new_empty((images, people, dimensions), dtype=torch.float64)
    return (
        tags.new_empty((images, 2), dtype=accumulation_dtype(tags)),
        tags.new_empty((images, people, joints), dtype=torch.int64),
        means,
        torch.empty_like(means),
    )


@_ops.cpu("associative_embedding_terms")
def _terms_cpu(
    tags: Tensor, keypoints: Tensor | None, visible: Tensor, hinge: bool, sigma: float, margin: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _new_outputs(tags, keypoints, visible)
    core.associative_embedding_forward(
        tags, keypoints, visible, *outputs, hinge=hinge, sigma=sigma, margin=margin, threads=threads()
    )
    return outputs


@_ops.cpu("associative_embedding_terms_backward")
def _terms_backward_cpu(
    grad_terms: Tensor, tags: Tensor, pixels: Tensor, means: Tensor, pushes: Tensor, gathered: bool
) -> Tensor:
    gradient = empty_gradient(tags)
    core.associative_embedding_backward(
        grad_terms.contiguous(), tags, pixels, means, pushes, gradient, gathered=gathered, threads=threads()
    )
    return gradient


def _new_workspace(tags: Tensor, people: int) -> Tensor:
    bytes_needed = _native.cuda_core().associative_embedding_cuda_workspace(tags.shape[0], people)
    return tags.new_empty(bytes_needed, dtype=torch.uint8)


@_ops.cuda("associative_embedding_terms")
def _terms_cuda(
    tags: Tensor, keypoints: Tensor | None, visible: Tensor, hinge: bool, sigma: float, margin: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = _new_outputs(tags, keypoints, visible)
    _native.cuda_core().associative_embedding_forward_cuda(
        tags.detach(),
        None if keypoints is None else keypoints.detach(),
        visible,
        *outputs,
        _new_workspace(tags, visible.shape[1]),
        hinge=hinge,
        sigma=sigma,
        margin=margin,
        stream=_native.stream_of(tags),
    )
    return outputs


@_ops.cuda("associative_embedding_terms_backward")
def _terms_backward_cuda(
    grad_terms: Tensor, tags: Tensor, pixels: Tensor, means: Tensor, pushes: Tensor, gathered: bool
) -> Tensor:
    gradient = empty_gradient(tags)
    _native.cuda_core().associative_embedding_backward_cuda(
        grad_terms.contiguous(),
        tags.detach(),
        pixels,
        means,
        pushes,
        gradient,
        _new_workspace(tags, pixels.shape[1]),
        gathered=gathered,
        stream=_native.stream_of(tags),
    )
    return gradient


@_ops.fake("associative_embedding_terms")
def _terms_fake(
    tags: Tensor, keypoints: Tensor | None, visible: Tensor, hinge: bool, sigma: float, margin: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _new_outputs(tags, keypoints, visible)


@_ops.fake("associative_embedding_terms_backward")
def _terms_backward_fake(
    grad_terms: Tensor, tags: Tensor, pixels: Tensor, means: Tensor, pushes: Tensor, gathered: bool
) -> Tensor:
    return empty_gradient(tags)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tags, keypoints, *_ = inputs
    state = output[1:]
    ctx.mark_non_differentiable(*state)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(tags, *state)
    ctx.gathered = keypoints is None


def _terms_backward(ctx: Any, grad_terms: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    gradient = None
    if grad_terms is not None and ctx.needs_input_grad[0]:
        gradient = torch.ops.instembed.associative_embedding_terms_backward(
            grad_terms, *ctx.saved_tensors, ctx.gathered
        )
    return gradient, *[None] * 5


_ops.differentiable("associative_embedding_terms", _terms_backward, _save_for_backward)
_ops.differentiable_once("associative_embedding_terms_backward", "associative_embedding_loss")
