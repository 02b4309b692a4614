"""The cosine margin loss against blocks of the matrix that are computed again, and the whole matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

import instembed
from benchmarks.harness import OURS, Entry, Row, Settings, compare, each
from benchmarks.machine import Work
from benchmarks.timing import Call

MARGIN = 0.5
BLOCK = 1024  # rows and columns of the matrix that "blocks" holds


class Workload(NamedTuple):
    points: int
    channels: int
    instances: int
    noise: float | None  # a coordinate, around the instance's direction; None: no direction at all


WORKLOADS = {
    "random": Workload(16_384, 64, 30, None),  # before training: half of all pairs push
    "cone": Workload(16_384, 64, 30, None),  # the same with a common direction: all pairs push
    "trained": Workload(16_384, 64, 30, 0.02),
    "16": Workload(16_384, 16, 30, 0.08),
    "sampled": Workload(4_000, 64, 30, 0.08),  # as many pixels as the paper draws
}

Loss = Callable[[Tensor, Tensor], Tensor]


@functools.lru_cache(maxsize=1)
def batch_of(workload: str) -> tuple[Tensor, Tensor]:
    """(N, D) points of any length and their labels, in no order."""
    count, channels, instances, noise = WORKLOADS[workload]
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(count, channels, generator=generator)
    labels = torch.randint(1, instances + 1, (count,), generator=generator)
    if noise is not None:
        centers = normalize(torch.randn(instances + 1, channels, generator=generator), dim=1)
        points = centers[labels] + noise * points
    if workload == "cone":
        points[:, 0] += 20
    return points, labels


def ours(embeddings: Tensor, labels: Tensor) -> Tensor:
    return instembed.cosine_margin_loss(embeddings, labels, margin=MARGIN)


def _weights(labels: Tensor) -> tuple[Tensor, Tensor]:
    _, ids, counts = labels.unique(return_inverse=True, return_counts=True)
    return ids, 1 / (len(counts) * counts)[ids]


def matrix(embeddings: Tensor, labels: Tensor) -> Tensor:
    points, (ids, weights) = normalize(embeddings, dim=1), _weights(labels)
    similarity = (1 + points @ points.T) / 2
    pairs = torch.where(ids[:, None] == ids, 1 - similarity, (similarity - MARGIN).relu())
    return weights @ pairs @ weights


def blocks(push: Callable[..., Tensor]) -> Loss:
    """Pairs of one instance by sums over instances, the others by blocks on and above the diagonal."""

    def loss(embeddings: Tensor, labels: Tensor) -> Tensor:
        points, (ids, weights) = normalize(embeddings, dim=1), _weights(labels)
        zeros = points.new_zeros(int(ids.max()) + 1, points.shape[1])
        means = zeros.index_add(0, ids, weights[:, None] * points)
        total = (1 / len(means) - means.square().sum()) / 2
        parts = list(zip(points.split(BLOCK), ids.split(BLOCK), weights.split(BLOCK), strict=True))
        for k, first in enumerate(parts):
            for second in parts[k:]:
                value = checkpoint(push, *first, *second, use_reentrant=False)
                total = total + (1 if first is second else 2) * value
        return total

    return loss


def _push(x: Tensor, ids: Tensor, w: Tensor, y: Tensor, other_ids: Tensor, v: Tensor) -> Tensor:
    hinge = ((1 + x @ y.T) / 2 - MARGIN).relu()
    return w @ hinge.masked_fill(ids[:, None] == other_ids, 0.0) @ v


def forward(loss: Loss, points: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return loss(points, labels)

    return call


def forward_backward(loss: Loss, points: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    leaf = points.clone().requires_grad_()
    return lambda: torch.autograd.grad(loss(leaf, labels), leaf)[0]


def run(workload: str, settings: Settings) -> list[Row]:
    points, labels = settings.place(batch_of(workload))
    losses: dict[str, Loss] = {OURS: ours, "blocks": blocks(_push)}
    if settings.compile:
        losses["blocks, compiled"] = blocks(torch.compile(_push))
    if settings.slow:
        losses["matrix"] = matrix
        if settings.compile:
            losses["matrix, compiled"] = torch.compile(matrix)
    check(losses, points, labels)
    rows = []
    # The product of all points with all points; for the gradient one more, as for whoever skips no pair.
    for what, make, products in (("forward", forward, 1), ("forward + backward", forward_backward, 2)):
        work = Work(products * points.nbytes + labels.nbytes, 2 * products * len(points) * points.numel())
        row = ("cosine_margin_loss", workload, what)
        rows += compare(row, each(make, losses), (points, labels), settings, work)
    return rows


def check(losses: dict[str, Loss], points: Tensor, labels: Tensor) -> None:
    """All contestants compute the same loss and gradient, but for pairs that rounding puts at the margin."""
    expected = forward(ours, points, labels)(), forward_backward(ours, points, labels)()
    for name, loss in losses.items():
        found = forward(loss, points, labels)(), forward_backward(loss, points, labels)()
        for what, value, other in zip(("loss", "gradient"), found, expected, strict=True):
            assert (value - other).norm() <= 1e-3 * other.norm(), f"{name}: {what}"


def profile(workload: str, settings: Settings) -> Call:
    return forward_backward(ours, *settings.place(batch_of(workload)))


ENTRIES = [Entry("cosine_margin_loss", ("cosine_margin_loss",), tuple(WORKLOADS), run, profile)]
