"""Choice of the seeds that instances grow from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from instembed import _arguments as arguments
from instembed import _native, _ops
from instembed._native import core, threads
from instembed._pixels import accumulation_dtype, flat_embeddings, flat_pixels


class Seeds(NamedTuple):
    """Pixels that instances may grow from, in the order in which they were chosen."""

    indices: Tensor
    """(B, S) int64 pixels over the flattened spatial dimensions, -1 beyond an image's seeds."""
    scores: Tensor
    """(B, S) float32 (float64 for float64 seediness): the seediness there, 0 beyond an image's seeds."""


def select_seeds(
    embeddings: Tensor,
    seediness: Tensor,
    num_seeds: int,
    *,
    diversity: float = 0.3,
    min_seediness: float = 0.0,
    mask: Tensor | None = None,
) -> Seeds:
    r"""Picks pixels that make good seeds and differ from each other (Fathi et al. 2017, arXiv 1703.10277).

    The first seed is the pixel with the largest seediness S. Each further one maximises::

        log S_p + diversity log( min_t |e_p - e_t|^2 )

    over the seeds t before it. Of equals the lowest index is taken. The rule is followed exactly, with
    squared distances in float64 and channels added in order, though few pixels are looked at for most seeds.

    Args:
        embeddings: (B, D, *spatial) with 1 to 3 spatial dimensions, contiguous or channels-last. float32,
            float64, float16 or bfloat16.
        seediness: (B, *spatial) of a floating dtype and any scale, usually the maximum over thresholds and
            classes, without background, of what a :class:`SeedinessHead` gives after a softmax.
        num_seeds: S, the most that are chosen.
        diversity: weight of the distance from earlier seeds (paper: 0.3). 0 takes the seediest pixels.
        min_seediness: pixels below are no seeds.
        mask: (B, *spatial), bool or of an integer dtype where 0 is background: only other pixels are seeds.

    Returns:
        :class:`Seeds`, without gradients. No pixel is a seed whose seediness is 0, negative, NaN or
        infinite, whose embedding has a NaN or an infinity, or whose embedding is equal to that of an earlier
        seed. Where no pixel is left, the rest of an image's indices is -1. The result depends on the input
        alone, not on threads; objectives that differ in the last bit of a logarithm only may be ordered
        otherwise on a GPU.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
    """
    arguments.check_embeddings("embeddings", embeddings, points=False)
    arguments.check_floating_tensor("seediness", seediness)
    arguments.check_pixels("seediness", seediness, embeddings)
    return Seeds(
        *torch.ops.instembed.select_seeds(
            embeddings,
            seediness,
            check_mask(mask, embeddings),
            arguments.check_capacity("num_seeds", num_seeds),
            arguments.check_number("diversity", diversity, at_least=0),
            arguments.check_number("min_seediness", min_seediness),
        )
    )


def check_mask(mask: object, embeddings: Tensor) -> Tensor | None:
    """(B, *spatial) bool."""
    if mask is None:
        return None
    tensor = arguments.check_tensor("mask", mask)
    if tensor.dtype != torch.bool:
        arguments.check_integer_tensor("mask", tensor)
    arguments.check_pixels("mask", tensor, embeddings)
    return tensor if tensor.dtype == torch.bool else tensor != 0


_ops.define(
    "select_seeds(Tensor embeddings, Tensor seediness, Tensor? mask, SymInt num_seeds, float diversity, "
    "float min_seediness) -> (Tensor indices, Tensor scores)"
)


def _new_seeds(embeddings: Tensor, seediness: Tensor, num_seeds: int) -> tuple[Tensor, Tensor]:
    indices = embeddings.new_empty((embeddings.shape[0], num_seeds), dtype=torch.int64)
    return indices, torch.empty_like(indices, dtype=accumulation_dtype(seediness))


@_ops.cpu("select_seeds")
def _select_cpu(
    embeddings: Tensor,
    seediness: Tensor,
    mask: Tensor | None,
    num_seeds: int,
    diversity: float,
    min_seediness: float,
) -> tuple[Tensor, Tensor]:
    indices, scores = _new_seeds(embeddings, seediness, num_seeds)
    core.select_seeds(
        flat_embeddings(embeddings),
        flat_pixels(seediness, embeddings),
        None if mask is None else flat_pixels(mask, embeddings),
        indices,
        scores,
        diversity=diversity,
        min_seediness=min_seediness,
        threads=threads(),
    )
    return indices, scores


@_ops.cuda("select_seeds")
def _select_cuda(
    embeddings: Tensor,
    seediness: Tensor,
    mask: Tensor | None,
    num_seeds: int,
    diversity: float,
    min_seediness: float,
) -> tuple[Tensor, Tensor]:
    cuda_core = _native.cuda_core()
    indices, scores = _new_seeds(embeddings, seediness, num_seeds)
    flat = flat_embeddings(embeddings)
    cuda_core.select_seeds_cuda(
        flat,
        flat_pixels(seediness, embeddings),
        None if mask is None else flat_pixels(mask, embeddings),
        indices,
        scores,
        embeddings.new_empty(cuda_core.select_seeds_cuda_workspace(flat), dtype=torch.uint8),
        diversity=diversity,
        min_seediness=min_seediness,
        stream=_native.stream_of(embeddings),
    )
    return indices, scores


@_ops.fake("select_seeds")
def _select_fake(
    embeddings: Tensor, seediness: Tensor, mask: Tensor | None, num_seeds: int, *_: float
) -> tuple[Tensor, Tensor]:
    return _new_seeds(embeddings, seediness, num_seeds)


_ops.not_differentiable("select_seeds")
