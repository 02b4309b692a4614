"""Deep metric learning: sampling pixels, and the loss over all pairs of them, against the best PyTorch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import instembed
from benchmarks.harness import OURS, Entry, Row, Settings, compare, each
from benchmarks.machine import Work
from benchmarks.timing import Call
from benchmarks.workloads import instances_of, labels_of, trained_embeddings

SAMPLES, CHANNELS = 16, 64
SAMPLED = ("cells", "city", "noise")  # workloads of sampling

# The 100 instances of 8 images of "cells". Trained embeddings of two instances are far apart, where nothing
# is left to push; of untrained ones every pair counts.
KINDS = ("trained", "untrained")


# Sampling ---------------------------------------------------------------------------------------------------


def sorted_samples(labels: Tensor, samples: int) -> Tensor:
    """(B, C, K) for ids 0..C, 0 the background: random keys, sorted within ids in one sort of an image."""
    rows = []
    for ids in labels.flatten(1):
        order = (ids.double() + torch.rand(len(ids), dtype=torch.float64, device=ids.device)).argsort()
        counts = torch.bincount(ids)
        starts = counts.cumsum(0) - counts
        steps = torch.arange(samples, device=ids.device)
        valid = steps < counts[1:, None]
        at = order[(starts[1:, None] + steps).clamp(max=len(ids) - 1)]
        rows.append(torch.where(valid, at, -1))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def scattered_samples(labels: Tensor, samples: int) -> Tensor:
    """The same without the sort by id: shuffled pixels, of which the first of each id are kept."""
    rows = []
    for ids in labels.flatten(1):
        pixels = ids.nonzero()[:, 0]
        pixels = pixels[torch.randperm(len(pixels), device=ids.device)]
        own = ids[pixels]
        order = own.argsort(stable=True)
        counts = torch.bincount(own)
        starts = counts.cumsum(0) - counts
        steps = torch.arange(samples, device=ids.device)
        at = (starts[1:, None] + steps).clamp(max=len(pixels) - 1)
        rows.append(torch.where(steps < counts[1:, None], pixels[order[at]], -1))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def run_sampling(workload: str, settings: Settings) -> list[Row]:
    labels = labels_of(workload)
    room = settings.room(instances_of(labels))
    labels = settings.place(labels)
    samplers: dict[str, Callable[[Tensor], Tensor]] = {
        OURS: lambda labels: instembed.sample_pixels(labels, SAMPLES, max_instances=room).indices,
        "eager, sort of ids": functools.partial(sorted_samples, samples=SAMPLES),
        "eager, shuffle": functools.partial(scattered_samples, samples=SAMPLES),
    }
    counts = [torch.bincount(ids) for ids in labels.flatten(1)]
    for name, sampler in samplers.items():
        for b, ids in enumerate(labels.flatten(1)):
            pixels = sampler(labels)[b]
            found = torch.bincount(ids[pixels[pixels >= 0]], minlength=len(counts[b]))[1:]
            assert torch.equal(found, counts[b][1:].clamp(max=SAMPLES)), name
    row = ("sample_pixels", workload, "forward")
    return compare(row, each(functools.partial, samplers), (labels,), settings, Work(labels.nbytes))


# The loss ---------------------------------------------------------------------------------------------------


def scene(kind: str) -> tuple[Tensor, Tensor]:
    """Embeddings (8, 64, 256, 256) and labels."""
    labels = labels_of("cells")
    if kind == "trained":
        return trained_embeddings(labels, CHANNELS), labels
    shape = (len(labels), CHANNELS, *labels.shape[1:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) / math.sqrt(CHANNELS), labels


def gathered(embeddings: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points (B, M, D), whether each is one, their instances, and their weights (B, M)."""
    images, instances, samples = indices.shape
    valid = indices >= 0
    flat = indices.clamp(min=0).view(images, 1, -1).expand(-1, embeddings.shape[1], -1)
    points = embeddings.flatten(2).gather(2, flat).mT
    shares = (valid / valid.sum(2, keepdim=True).clamp(min=1)).flatten(1)
    owners = torch.arange(instances, device=indices.device).repeat_interleave(samples).expand(images, -1)
    return points, valid.flatten(1), owners, shares


def terms_of(squares: Tensor, same: Tensor) -> Tensor:
    """softplus for both: -log(1 - sigma) = softplus(d) - d - log(1 - exp(-d))."""
    soft = F.softplus(squares)
    d = squares.clamp(min=1e-6)
    return torch.where(same, soft - math.log(2), soft - d - torch.log(-torch.expm1(-d)))


def tanh_terms(squares: Tensor, same: Tensor) -> Tensor:
    return torch.where(
        same, F.softplus(squares) - math.log(2), -torch.log(torch.tanh(squares.clamp(min=1e-6) / 2))
    )


def product_squares(points: Tensor) -> Tensor:
    norms = points.square().sum(2)
    return torch.baddbmm(norms[:, :, None] + norms[:, None, :], points, points.mT, alpha=-2).clamp(min=0)


def cdist_squares(points: Tensor) -> Tensor:
    return torch.cdist(points, points, compute_mode="use_mm_for_euclid_dist").square()


def pair_loss(
    points: Tensor,
    owners: Tensor,
    shares: Tensor,
    squares_of: Callable[[Tensor], Tensor],
    terms: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """All ordered pairs; a point and itself cost log(sigma(0)) = 0, and their weights are left out."""
    squares = squares_of(points)
    values = terms(squares, owners[:, :, None] == owners[:, None, :])
    total = shares.sum(1).square() - shares.square().sum(1)
    sums = torch.einsum("bi,bij,bj->b", shares, values, shares)
    return (sums / total).mean()


def torch_loss(
    embeddings: Tensor, indices: Tensor, loss: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    points, _, owners, shares = gathered(embeddings, indices)
    return loss(points, owners, shares)


def differentiated(loss: Callable[[Tensor], Tensor], embeddings: Tensor) -> Callable[[], Tensor]:
    leaf = embeddings.clone().requires_grad_()

    def call() -> Tensor:
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        return gradient

    return call


def ours(labels: Tensor, room: int | None) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator(labels.device)
    return lambda embeddings: instembed.pairwise_similarity_loss(
        embeddings, labels, samples=SAMPLES, generator=generator.manual_seed(0), max_instances=room
    )


def run_loss(workload: str, settings: Settings) -> list[Row]:
    """The others are given the sampled pixels for nothing."""
    embeddings, labels = settings.place(scene(workload))
    room, generator = settings.room(instances_of(labels)), torch.Generator(labels.device)
    indices = instembed.sample_pixels(
        labels, SAMPLES, generator=generator.manual_seed(0), max_instances=room
    ).indices
    losses: dict[str, Callable[[Tensor], Tensor]] = {OURS: ours(labels, room)}
    for how, squares in (("product", product_squares), ("cdist", cdist_squares)):
        for what, terms in (("softplus", terms_of), ("tanh", tanh_terms)):
            plain = functools.partial(pair_loss, squares_of=squares, terms=terms)
            losses[f"eager, {how}, {what}"] = functools.partial(torch_loss, indices=indices, loss=plain)
            if settings.compile and how == "product":
                step = torch.compile(plain)
                whole = torch.compile(functools.partial(torch_loss, indices=indices, loss=plain))
                losses[f"compiled pairs, {what}"] = functools.partial(torch_loss, indices=indices, loss=step)
                losses[f"torch.compile, {what}"] = whole
    expected = losses[OURS](embeddings)
    gradient = differentiated(losses[OURS], embeddings)()
    for name, loss in losses.items():
        torch.testing.assert_close(loss(embeddings), expected, rtol=1e-3, atol=1e-6, msg=name)
        if "cdist" in name:
            continue  # whose gradient is NaN, or wrong, where the square root's is
        difference = (differentiated(loss, embeddings)() - gradient).abs().max() / gradient.abs().max()
        assert difference < 1e-2, f"{name}: gradient off by {difference:.1e}"
    # A subtraction, a square and a sum for each channel of a pair, and as many for gradients, which are
    # written for all pixels.
    points = (indices >= 0).sum((1, 2))
    pairs, channel = int(points.square().sum()), embeddings.element_size()
    read = Work(labels.nbytes + int(points.sum()) * CHANNELS * channel, 3 * pairs * CHANNELS)
    all_of_it = Work(read.bytes + embeddings.nbytes, 2 * read.flops)
    rows = []
    for what, make, work in (
        ("forward", functools.partial, read),
        ("forward + backward", differentiated, all_of_it),
    ):
        row = ("pairwise_similarity_loss", workload, what)
        rows += compare(row, each(make, losses), (embeddings,), settings, work)
    return rows


def profile_sampling(workload: str, settings: Settings) -> Call:
    labels = labels_of(workload)
    room = settings.room(instances_of(labels))
    return functools.partial(instembed.sample_pixels, settings.place(labels), SAMPLES, max_instances=room)


def profile_loss(workload: str, settings: Settings) -> Call:
    embeddings, labels = settings.place(scene(workload))
    return differentiated(ours(labels, settings.room(instances_of(labels))), embeddings)


ENTRIES = [
    Entry(
        "sample_pixels",
        ("sample_pixels",),
        SAMPLED,
        run_sampling,
        profile_sampling,
    ),
    Entry(
        "pairwise_similarity_loss",
        ("pairwise_similarity_loss",),
        KINDS,
        run_loss,
        profile_loss,
    ),
]
