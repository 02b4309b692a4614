"""The discriminative loss against the loop that people use and the best vectorised PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import instembed
from benchmarks.harness import FLOOR, OURS, Entry, Row, Settings, compare, each
from benchmarks.machine import Work
from benchmarks.timing import Call
from benchmarks.workloads import instances_of, labels_of, random_embeddings
from instembed import reference

Loss = Callable[[Tensor, Tensor], Tensor]


def loop(embeddings: Tensor, labels: Tensor) -> Tensor:
    """The usual implementation: a mask and a few operations an instance."""
    return reference.discriminative_loss(embeddings, labels)


def vectorised(instances: int) -> Loss:
    """index_add over all images at once, for ids that are known to be 0..instances, 0 the background.

    That is more than instembed may assume of ids; it spares the baseline a `unique`, which is a sort.
    """
    slots = instances + 1

    def loss(embeddings: Tensor, labels: Tensor) -> Tensor:
        batch, channels = embeddings.shape[:2]
        points = embeddings.flatten(2).transpose(1, 2).reshape(-1, channels)  # (B N, D)
        shift = slots * torch.arange(batch, device=labels.device)[:, None]
        slot = (labels.flatten(1) + shift).flatten()  # (B N)
        counts = torch.bincount(slot, minlength=batch * slots).to(points.dtype)
        sums = points.new_zeros(batch * slots, channels).index_add(0, slot, points)
        means = sums / counts.clamp(min=1)[:, None]
        square = (points - means[slot]).square().sum(1)
        hinge = (square.clamp(min=1e-24).sqrt() - 0.5).clamp(min=0).square()
        per_instance = points.new_zeros(batch * slots).index_add(0, slot, hinge) / counts.clamp(min=1)

        present = counts.view(batch, slots)[:, 1:] > 0  # (B, C), without the background
        number = present.sum(1)
        variance = (per_instance.view(batch, slots)[:, 1:] * present).sum(1) / number.clamp(min=1)
        centers = means.view(batch, slots, channels)[:, 1:]
        gaps = (centers[:, :, None] - centers[:, None]).square().sum(-1).clamp(min=1e-24).sqrt()
        pairs = (
            present[:, :, None]
            & present[:, None]
            & ~torch.eye(instances, dtype=torch.bool, device=slot.device)
        )
        push = ((3.0 - gaps).clamp(min=0).square() * pairs).sum((1, 2)) / (number * (number - 1)).clamp(min=1)
        norms = (centers.square().sum(-1).clamp(min=1e-24).sqrt() * present).sum(1) / number.clamp(min=1)
        return (variance + push + 0.001 * norms).mean()

    return loss


def loss_with_room(labels: Tensor, settings: Settings) -> Loss:
    room = settings.room(instances_of(labels))
    return functools.partial(instembed.discriminative_loss, max_instances=room)


def forward_and_backward(loss: Loss, embeddings: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    leaf = embeddings.detach().clone(memory_format=torch.preserve_format).requires_grad_()

    def call() -> Tensor:
        leaf.grad = None
        loss(leaf, labels).backward()
        assert leaf.grad is not None
        return leaf.grad

    return call


def forward_only(loss: Loss, embeddings: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return loss(embeddings, labels)

    return call


def run(workload: str, settings: Settings) -> list[Row]:
    images = random_embeddings(workload), labels_of(workload)
    ours = loss_with_room(images[1], settings)
    embeddings, labels = images = settings.place(images)
    eager = vectorised(int(labels.max()))
    losses: dict[str, Loss] = {OURS: ours, "eager index_add": eager}
    if settings.compile:
        torch._dynamo.reset()
        losses["torch.compile index_add"] = torch.compile(eager)
    # The loop's backward pass makes a gradient of an image's size an instance.
    if (settings.slow or settings.gpu) and int(labels.max()) * embeddings[0].nbytes < 2**32:
        losses["loop over instances"] = loop
    check(losses, embeddings, labels)
    forward_calls, backward_calls = each(forward_only, losses), each(forward_and_backward, losses)

    def forward(images: tuple[Tensor, Tensor]) -> dict[str, Call]:
        embeddings, _ = images
        return {**forward_calls(images), FLOOR: lambda: embeddings.sum() + embeddings.sum()}

    def both(images: tuple[Tensor, Tensor]) -> dict[str, Call]:
        embeddings, _ = images

        def floor() -> Tensor:
            embeddings.sum()
            embeddings.sum()
            return embeddings.clone()

        return {**backward_calls(images), FLOOR: floor}

    # Forward each embedding is read, backward again, and the gradient written.
    read = Work(embeddings.nbytes + labels.nbytes, 4 * embeddings.numel())
    all_of_it = Work(3 * embeddings.nbytes + labels.nbytes, 12 * embeddings.numel())
    op = "discriminative_loss"
    return [
        *compare((op, workload, "forward"), forward, images, settings, read, peaks=()),
        *compare((op, workload, "forward + backward"), both, images, settings, all_of_it),
    ]


def check(losses: dict[str, Loss], embeddings: Tensor, labels: Tensor) -> None:
    """All contestants compute the same loss and gradient."""
    expected: tuple[Tensor, Tensor] | None = None
    for name, loss in losses.items():
        leaf = embeddings.clone().requires_grad_()
        value = loss(leaf, labels)
        (gradient,) = torch.autograd.grad(value, leaf)
        expected = expected or (value.detach(), gradient)
        scale = expected[1].abs().max()
        torch.testing.assert_close(value.detach(), expected[0], rtol=1e-4, atol=1e-5, msg=f"{name}: loss")
        torch.testing.assert_close(
            gradient / scale, expected[1] / scale, rtol=0, atol=1e-4, msg=f"{name}: gradient"
        )


def profile(workload: str, settings: Settings) -> Call:
    images = random_embeddings(workload), labels_of(workload)
    return forward_and_backward(loss_with_room(images[1], settings), *settings.place(images))


ENTRIES = [
    Entry(
        "discriminative",
        ("discriminative_loss", "discriminative_terms"),
        ("lane", "cells", "city", "volume", "noise"),
        run,
        profile,
        gpu_workloads=("train",),
    )
]
