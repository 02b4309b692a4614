from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.cases.common import GOOD, GOOD_POINTS, BadInput, OpCases, ragged, random_embeddings, random_labels


def _words(images: int) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (images,))


def _sample(labels: Tensor, offsets: Tensor | None = None, most: int | None = 8) -> tuple[Any, ...]:
    images = 1 if labels.dim() == 1 else len(labels)
    return (labels, _words(images if offsets is None else len(offsets) - 1), offsets, 3, most, 0, None)


def _loss(
    embeddings: Tensor, labels: Tensor, offsets: Tensor | None = None, differentiable: bool = True
) -> tuple[Any, ...]:
    indices, _ = torch.ops.instembed.sample_pixels(*_sample(labels, offsets))
    return (embeddings, indices, differentiable)


def _loss_backward(embeddings: Tensor, labels: Tensor, offsets: Tensor | None = None) -> tuple[Any, ...]:
    _, indices, _ = arguments = _loss(embeddings, labels, offsets)
    losses, slopes = torch.ops.instembed.pairwise_similarity_loss(*arguments)
    return (torch.rand_like(losses), embeddings, slopes, indices)


OPCHECK: OpCases = {
    "instembed::sample_pixels": [
        lambda: _sample(random_labels(2, 5, 6)),
        lambda: _sample(random_labels(2, 5, 6), most=None),
        lambda: _sample(random_labels(1, 3, 4, 5).int()),
        lambda: _sample(random_labels(20)),
        lambda: _sample(random_labels(20), ragged()),
        lambda: _sample(random_labels(0, 5, 6)),
    ],
    "instembed::pairwise_similarity_loss": [
        lambda: _loss(random_embeddings(2, 3, 5, 6).requires_grad_(), random_labels(2, 5, 6)),
        lambda: _loss(random_embeddings(2, 3, 5, 6), random_labels(2, 5, 6), differentiable=False),
        lambda: _loss(
            random_embeddings(2, 8, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_(),
            random_labels(2, 5, 6),
        ),
        lambda: _loss(random_embeddings(2, 3, 6, 5).transpose(2, 3).requires_grad_(), random_labels(2, 5, 6)),
        lambda: _loss(
            random_embeddings(1, 2, 3, 4, 5, dtype=torch.float64).requires_grad_(), random_labels(1, 3, 4, 5)
        ),
        lambda: _loss(random_embeddings(20, 3).requires_grad_(), random_labels(20), ragged()),
        lambda: _loss(random_embeddings(2, 3, 7, dtype=torch.float16).requires_grad_(), random_labels(2, 7)),
        lambda: _loss(random_embeddings(0, 3, 5, 6).requires_grad_(), random_labels(0, 5, 6)),
    ],
    "instembed::pairwise_similarity_loss_backward": [
        lambda: _loss_backward(random_embeddings(2, 3, 5, 6), random_labels(2, 5, 6)),
        lambda: _loss_backward(
            random_embeddings(2, 3, 5, 6).contiguous(memory_format=torch.channels_last),
            random_labels(2, 5, 6),
        ),
        lambda: _loss_backward(random_embeddings(20, 3), random_labels(20), ragged()),
    ],
}

_LABELS, _POINTS = GOOD[1], GOOD_POINTS[1]


def _shared_cases(good: tuple[Any, ...], points: tuple[Any, ...]) -> list[BadInput]:
    """Of both functions; `good` and `points` are their arguments without `samples`."""
    many = torch.arange(6).reshape(1, 2, 3)
    several = (many,) if len(good) == 1 else (torch.zeros(1, 2, 2, 3), many)
    return [
        BadInput("no samples", ValueError, "samples", good, {"samples": 0}, "0"),
        BadInput("too many samples", ValueError, "samples", good, {"samples": 2**31}, str(2**31)),
        BadInput("float samples", TypeError, "samples", good, {"samples": 16.0}, "float"),
        BadInput("large background", ValueError, "background", good, {"samples": 2, "background": 2**63}),
        BadInput("float ignore_index", TypeError, "ignore_index", good, {"samples": 2, "ignore_index": 0.5}),
        BadInput("generator", TypeError, "generator", good, {"samples": 2, "generator": 0}, "int"),
        BadInput(
            "no capacity", ValueError, "max_instances", good, {"samples": 2, "max_instances": 0}, "0"
        ),
        BadInput(
            "capacity", ValueError, "max_instances=4", several, {"samples": 2, "max_instances": 4},
            "5 instances",
        ),
        BadInput(
            "offsets with images", ValueError, "offsets", good, {"samples": 2, "offsets": ragged()}
        ),
        BadInput(
            "offsets end", ValueError, "offsets", points, {"samples": 2, "offsets": torch.tensor([0, 9])},
            "10",
        ),
        BadInput(
            "offsets past the end", ValueError, "offsets", points,
            {"samples": 2, "offsets": torch.tensor([0, 99])}, "99",
        ),
        BadInput(
            "float offsets", TypeError, "offsets", points, {"samples": 2, "offsets": torch.tensor([0.0, 9.0])}
        ),
    ]  # fmt: skip


BAD_INPUT = {
    "sample_pixels": [
        *_shared_cases((_LABELS,), (_POINTS,)),
        BadInput("no tensor", TypeError, "labels", ([1], 2), shows="list"),
        BadInput("float labels", TypeError, "labels", (_LABELS.float(), 2), shows="torch.float32"),
        BadInput("labels rank 0", ValueError, "labels", (torch.tensor(1), 2), shows="()"),
        BadInput("labels rank 5", ValueError, "labels", (_LABELS[None, None], 2), shows="(1, 1, 2, 4, 5)"),
    ],
    "pairwise_similarity_loss": [
        *_shared_cases(GOOD, GOOD_POINTS),
        BadInput("no tensor", TypeError, "embeddings", ([1.0], _LABELS), shows="list"),
        BadInput("integer embeddings", TypeError, "embeddings", (GOOD[0].int(), _LABELS), shows="int32"),
        BadInput("embeddings rank", ValueError, "embeddings", (torch.zeros(4), _LABELS), shows="(4,)"),
        BadInput("no channel", ValueError, "embeddings", (torch.zeros(2, 0, 4, 5), _LABELS)),
        BadInput("labels shape", ValueError, "labels", (GOOD[0], _LABELS[:, :3]), shows="(2, 3, 5)"),
        BadInput("float labels", TypeError, "labels", (GOOD[0], _LABELS.float()), shows="torch.float32"),
        BadInput("reduction", ValueError, "reduction", GOOD, {"reduction": "max"}, "max"),
    ],
}
