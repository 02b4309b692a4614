"""The associative embedding loss against the best vectorised PyTorch. The floor zeroes the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import instembed
from benchmarks.harness import FLOOR, OURS, Entry, Row, Settings, compare, each
from benchmarks.machine import Work
from benchmarks.timing import Call
from instembed import reference

IMAGES, SIZE, JOINTS, PEOPLE = 8, 128, 17, 30
TAG_DIMENSIONS = {"tags-1": 1, "tags-4": 4}


class Crowd(NamedTuple):
    tags: Tensor  # (B, K L, H, W)
    keypoints: Tensor  # (B, P, K, 2)
    visible: Tensor  # (B, P, K)


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def crowd(workload: str) -> Crowd:
    """Images of 1 to 30 people, padded to 30, with two joints in three visible."""
    generator = torch.Generator().manual_seed(0)
    tags = torch.randn(IMAGES, JOINTS * TAG_DIMENSIONS[workload], SIZE, SIZE, generator=generator)
    keypoints = SIZE * torch.rand(IMAGES, PEOPLE, JOINTS, 2, generator=generator) - 0.5
    visible = torch.rand(IMAGES, PEOPLE, JOINTS, generator=generator) < 0.67
    people = torch.linspace(1, PEOPLE, IMAGES).long()
    return Crowd(tags, keypoints, visible & (torch.arange(PEOPLE) < people[:, None])[..., None])


def vectorised(tags: Tensor, keypoints: Tensor, visible: Tensor) -> Tensor:
    """One gather for all joints, one tensor of pairs for all images."""
    height, width = tags.shape[2:]
    images, people, joints = visible.shape
    x, y = (keypoints + 0.5).floor().long().unbind(-1)  # (B, P, K)
    counts = visible & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    pixel = torch.where(counts, y * width + x, 0).transpose(1, 2)[:, :, None]  # (B, K, 1, P)
    maps = tags.view(images, joints, -1, height * width)
    found = maps.gather(3, pixel.expand(-1, -1, maps.shape[2], -1))  # (B, K, L, P)
    weight = counts.transpose(1, 2)[:, :, None].to(tags.dtype)
    number = weight.sum(1, keepdim=True)  # (B, 1, 1, P)
    means = (found * weight).sum(1, keepdim=True) / number.clamp(min=1)
    spread = ((found - means).square() * weight).sum((1, 2)) / number[:, 0, 0].clamp(min=1)  # (B, P)
    present = number[:, 0, 0] > 0
    count = present.sum(1)
    pull = spread.sum(1) / count.clamp(min=1)
    tag = means[:, 0]  # (B, L, P)
    square = (tag[..., None] - tag[..., None, :]).square().sum(1)
    pairs = present[:, :, None] & present[:, None] & ~torch.eye(people, dtype=torch.bool, device=tags.device)
    push = 0.5 * (torch.exp(-square) * pairs).sum((1, 2)) / (count * (count - 1)).clamp(min=1)
    return (pull + push).mean()


def forward_and_backward(
    loss: Loss, tags: Tensor, keypoints: Tensor, visible: Tensor
) -> Callable[[], Tensor]:
    leaf = tags.clone().requires_grad_()

    def call() -> Tensor:
        leaf.grad = None
        loss(leaf, keypoints, visible).backward()
        assert leaf.grad is not None
        return leaf.grad

    return call


def forward_only(loss: Loss, *task: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return loss(*task)

    return call


def run(workload: str, settings: Settings) -> list[Row]:
    task = settings.place(crowd(workload))
    losses: dict[str, Loss] = {OURS: instembed.associative_embedding_loss, "eager gather": vectorised}
    if settings.compile:
        torch._dynamo.reset()
        losses["torch.compile gather"] = torch.compile(vectorised)
    if settings.slow:
        losses["loop over joints"] = reference.associative_embedding_loss
    check(losses, task)
    forward, backward = each(forward_only, losses), each(forward_and_backward, losses)
    # A sector of memory for each tag of a visible joint; backward, as much and the gradient's zeros.
    sectors = 32 * TAG_DIMENSIONS[workload] * int(task.visible.sum())
    read = Work(sectors + task.keypoints.nbytes + task.visible.nbytes)
    all_of_it = Work(read.bytes + sectors + task.tags.nbytes)

    def both(task: Crowd) -> dict[str, Call]:
        return {**backward(task), FLOOR: lambda: torch.zeros_like(task.tags)}

    op = "associative_embedding_loss"
    return [
        *compare((op, workload, "forward"), forward, task, settings, read, peaks=()),
        *compare((op, workload, "forward + backward"), both, task, settings, all_of_it),
    ]


def check(losses: dict[str, Loss], task: Crowd) -> None:
    """All contestants compute the same loss and gradient."""
    expected: tuple[Tensor, Tensor] | None = None
    for name, loss in losses.items():
        gradient = forward_and_backward(loss, *task)()
        value = forward_only(loss, *task)()
        expected = expected or (value, gradient)
        torch.testing.assert_close(value, expected[0], rtol=1e-5, atol=1e-6, msg=f"{name}: loss")
        torch.testing.assert_close(gradient, expected[1], rtol=1e-4, atol=1e-7, msg=f"{name}: gradient")


def profile(workload: str, settings: Settings) -> Call:
    return forward_and_backward(instembed.associative_embedding_loss, *settings.place(crowd(workload)))


ENTRIES = [
    Entry(
        "associative_embedding",
        ("associative_embedding_loss", "associative_embedding_terms"),
        tuple(TAG_DIMENSIONS),
        run,
        profile,
    )
]
