"""Recurrent mean-shift grouping on the sphere, of Kong and Fowlkes (2018), arXiv 1712.08273."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from instembed import _arguments as arguments
from instembed import _native, _ops
from instembed._native import core, threads
from instembed._pixels import empty_gradient, flat_embeddings, flat_pixels
from instembed._sphere import moved_by_a_constant, unit_vectors


def recurrent_mean_shift(
    embeddings: Tensor,
    bandwidth: float,
    *,
    iterations: int = 5,
    step: float = 1.0,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    tolerance: float = 1e-6,
    return_all: bool = False,
    backprop_iterations: int | None = None,
    recompute: bool = False,
) -> Tensor:
    r"""Moves embeddings on the unit sphere towards the modes of their density, differentiably.

    The embeddings are scaled to unit vectors x_i. An iteration is, over all points of an image::

        K_ij = exp((x_i . x_j - 1) / bandwidth^2)
        y_i  = sum_j K_ij x_j / sum_j K_ij
        x_i  <- normalise(step y_i + (1 - step) x_i)

    Neither the matrix K nor anything of its size is stored, forward or backward.

    Args:
        embeddings: (B, D, *spatial) with 1 to 3 spatial dimensions, contiguous or channels-last, or points
            (N, D). float32, float64, float16 or bfloat16. A vector with all elements within 1e-12 of zero
            becomes zero; it takes no part and gets a gradient of zero. One with a NaN or an infinity becomes
            NaN and takes no part: other points are what they would be without it.
        bandwidth: of the kernel, in radians for small angles. float32 resolves a logarithm of K to about
            1e-7 / bandwidth^2: below 0.01 use float64.
        iterations: how often the points move (0: they are only scaled).
        step: share of the mean in the new point; 1 is mean shift, less is damped, 0 leaves points alone.
        mask: (B, *spatial) or (N,), bool or of an integer dtype. Where it is 0, a point takes no part: it
            is scaled to a unit vector, moves nobody and stays.
        offsets: (B + 1,) for points: image b is points ``offsets[b]:offsets[b + 1]``. None is one image.
        tolerance: kernel values below tolerance / 64 may be left out, and are where that saves time: of a
            tile of 64 points a row then misses less than ``tolerance``. At least 0, less than 1. A mean y_i
            is off by at most ``2 e_i / sum_j K_ij``, where e_i is the sum of the values of row i that are
            below tolerance / 64. That is at most ``N tolerance / 32``, since K_ii = 1, and far less where the
            density is smooth on the scale of the bandwidth. 0 leaves out what float32 cannot hold.
        return_all: whether to return all iterates, to apply a loss to each (paper).
        backprop_iterations: gradients go through the last so many iterations only. Those before count as a
            constant displacement: the gradient at the point where they ended is taken to where they began.
            None: through all of them.
        recompute: keep only the embeddings for the backward pass, and iterate again there: 1 / iterations
            of the memory between the passes, for one more forward pass. The gradient has the same bits.

    Returns:
        Unit vectors of the embeddings' shape and memory format, float32 (float64 for float64 embeddings); or
        (iterations + 1, \*shape) with ``return_all``, first the embeddings themselves as unit vectors.
        Differentiable once. The same bits on any number of threads.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value. On a GPU offsets
            that are none give NaN.
    """
    arguments.check_embeddings("embeddings", embeddings, points=True)
    if mask is not None:
        arguments.check_flags("mask", mask)
        arguments.check_pixels("mask", mask, embeddings)
    offsets = arguments.check_offsets(offsets, embeddings)
    bandwidth = arguments.check_number("bandwidth", bandwidth, above=0)
    step = arguments.check_number("step", step)
    if arguments.check_number("tolerance", tolerance, at_least=0) >= 1:
        raise ValueError(f"tolerance must be less than 1, got {tolerance}")
    arguments.check_integer("iterations", iterations, at_least=0)
    arguments.check_bool("return_all", return_all)
    arguments.check_bool("recompute", recompute)
    constant = 0
    if backprop_iterations is not None:
        arguments.check_integer("backprop_iterations", backprop_iterations, at_least=0)
        constant = max(iterations - backprop_iterations, 0)

    def shift(points: Tensor) -> Tensor:
        shifted, _, _ = torch.ops.instembed.recurrent_mean_shift(
            points, mask, offsets, bandwidth, step, float(tolerance)
        )
        return shifted

    def iterate(embeddings: Tensor) -> list[Tensor]:
        start = unit_vectors(embeddings)
        iterates = [start]
        for iteration in range(iterations):
            if iteration < constant:
                points = moved_by_a_constant(start, shift(iterates[-1].detach()))
            else:
                points = shift(iterates[-1])
            iterates = [*iterates, points] if return_all else [points]
        return iterates

    if recompute:  # nothing in it is random
        iterates = checkpoint(iterate, embeddings, use_reentrant=False, preserve_rng_state=False)
    else:
        iterates = iterate(embeddings)
    return torch.stack(iterates) if return_all else iterates[0]


class RecurrentMeanShift(nn.Module):
    """:func:`recurrent_mean_shift` as a module; the arguments are the function's.

    ``forward(embeddings, mask=None, offsets=None)`` returns the points, or all iterates.
    """

    def __init__(
        self,
        bandwidth: float,
        *,
        iterations: int = 5,
        step: float = 1.0,
        tolerance: float = 1e-6,
        return_all: bool = False,
        backprop_iterations: int | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "bandwidth": bandwidth,
            "iterations": iterations,
            "step": step,
            "tolerance": tolerance,
            "return_all": return_all,
            "backprop_iterations": backprop_iterations,
            "recompute": recompute,
        }
        # A wrong option shows here rather than in the first step of a training.
        recurrent_mean_shift(torch.zeros(0, 1), **self.options)

    def forward(
        self, embeddings: Tensor, mask: Tensor | None = None, offsets: Tensor | None = None
    ) -> Tensor:
        return recurrent_mean_shift(embeddings, mask=mask, offsets=offsets, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


# The op is one iteration over unit vectors. Its last two outputs, (B, *spatial) or (N,), are what backward
# needs besides points and shifted (csrc/recurrent_mean_shift/recurrent_mean_shift.h, State).

_RULE = "Tensor? mask, Tensor? offsets, float bandwidth, float step, float tolerance"
_ops.define(
    f"recurrent_mean_shift(Tensor points, {_RULE}) -> (Tensor shifted, Tensor norms, Tensor denominators)"
)
_ops.define(
    f"recurrent_mean_shift_backward(Tensor grad_shifted, Tensor points, {_RULE}, "
    "Tensor shifted, Tensor norms, Tensor denominators) -> Tensor"
)


def _new_outputs(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    norms = points.new_empty(points.shape[:1] if points.dim() == 2 else points.shape[:1] + points.shape[2:])
    return empty_gradient(points), norms, torch.empty_like(norms)


@_ops.cpu("recurrent_mean_shift")
def _shift_cpu(
    points: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None,
    bandwidth: float,
    step: float,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shifted, norms, denominators = _new_outputs(points)
    core.recurrent_mean_shift_forward(
        flat_embeddings(points),
        None if mask is None else flat_pixels(mask, points),
        offsets,
        flat_embeddings(shifted),
        flat_pixels(norms, points),
        flat_pixels(denominators, points),
        bandwidth=bandwidth,
        step=step,
        tolerance=tolerance,
        threads=threads(),
    )
    return shifted, norms, denominators


@_ops.cpu("recurrent_mean_shift_backward")
def _shift_backward_cpu(
    grad_shifted: Tensor,
    points: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None,
    bandwidth: float,
    step: float,
    tolerance: float,
    shifted: Tensor,
    norms: Tensor,
    denominators: Tensor,
) -> Tensor:
    gradient = empty_gradient(points)
    core.recurrent_mean_shift_backward(
        flat_embeddings(grad_shifted),
        flat_embeddings(points),
        None if mask is None else flat_pixels(mask, points),
        offsets,
        flat_embeddings(shifted),
        flat_pixels(norms, points),
        flat_pixels(denominators, points),
        flat_embeddings(gradient),
        bandwidth=bandwidth,
        step=step,
        tolerance=tolerance,
        threads=threads(),
    )
    return gradient


@_ops.cuda("recurrent_mean_shift")
def _shift_cuda(
    points: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None,
    bandwidth: float,
    step: float,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    cuda_core = _native.cuda_core()
    shifted, norms, denominators = _new_outputs(points)
    flat = flat_embeddings(points)
    bytes_needed = cuda_core.recurrent_mean_shift_cuda_workspace(flat, offsets, backward=False)
    cuda_core.recurrent_mean_shift_forward_cuda(
        flat,
        None if mask is None else flat_pixels(mask, points),
        offsets,
        flat_embeddings(shifted),
        flat_pixels(norms, points),
        flat_pixels(denominators, points),
        points.new_empty(bytes_needed, dtype=torch.uint8),
        bandwidth=bandwidth,
        step=step,
        tolerance=tolerance,
        stream=_native.stream_of(points),
    )
    return shifted, norms, denominators


@_ops.cuda("recurrent_mean_shift_backward")
def _shift_backward_cuda(
    grad_shifted: Tensor,
    points: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None,
    bandwidth: float,
    step: float,
    tolerance: float,
    shifted: Tensor,
    norms: Tensor,
    denominators: Tensor,
) -> Tensor:
    cuda_core = _native.cuda_core()
    gradient = empty_gradient(points)
    flat = flat_embeddings(points)
    bytes_needed = cuda_core.recurrent_mean_shift_cuda_workspace(flat, offsets, backward=True)
    cuda_core.recurrent_mean_shift_backward_cuda(
        flat_embeddings(grad_shifted),
        flat,
        None if mask is None else flat_pixels(mask, points),
        offsets,
        flat_embeddings(shifted),
        flat_pixels(norms, points),
        flat_pixels(denominators, points),
        flat_embeddings(gradient),
        points.new_empty(bytes_needed, dtype=torch.uint8),
        bandwidth=bandwidth,
        step=step,
        tolerance=tolerance,
        stream=_native.stream_of(points),
    )
    return gradient


@_ops.fake("recurrent_mean_shift")
def _shift_fake(points: Tensor, *rule: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _new_outputs(points)


@_ops.fake("recurrent_mean_shift_backward")
def _shift_backward_fake(grad_shifted: Tensor, points: Tensor, *others: Any) -> Tensor:
    return empty_gradient(points)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    points, mask, offsets, *rule = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(points, mask, offsets, *output)
    ctx.rule = rule


def _shift_backward(ctx: Any, grad_shifted: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    gradient = None
    if grad_shifted is not None and ctx.needs_input_grad[0]:
        points, mask, offsets, *state = ctx.saved_tensors
        gradient = torch.ops.instembed.recurrent_mean_shift_backward(
            grad_shifted, points, mask, offsets, *ctx.rule, *state
        )
    return gradient, *[None] * 5


_ops.differentiable("recurrent_mean_shift", _shift_backward, _save_for_backward)
_ops.differentiable_once("recurrent_mean_shift_backward", "recurrent_mean_shift")
