from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.cases.common import GOOD, GOOD_POINTS, BadInput, OpCases, ragged, random_embeddings, random_labels


def _loss(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True, **options: Any) -> tuple:
    points = normalize(random_embeddings(*shape, dtype=dtype), dim=1)
    if options.get("channels_last"):
        points = points.contiguous(memory_format=torch.channels_last)
    labels = random_labels(*(shape[:1] if len(shape) == 2 else (shape[0], *shape[2:])))
    keys = torch.rand(labels.shape) if options.get("keys") else None
    squared = options.get("squared", False)
    rules = (0.5, 100, 0.4, squared, options.get("background", 0), 3)
    return points.requires_grad_(grad), labels, options.get("offsets"), keys, *rules, grad


def _loss_backward(offsets: Tensor | None, *shape: int) -> tuple[Any, ...]:
    images = len(offsets) - 1 if offsets is not None else (1 if len(shape) == 2 else shape[0])
    return torch.randn(images), torch.randn(*shape), torch.randn(*shape), offsets


OPCHECK: OpCases = {
    "instembed::cosine_margin_loss": [
        lambda: _loss(2, 3, 5, 6),
        lambda: _loss(2, 3, 5, 6, grad=False, keys=True),
        lambda: _loss(2, 8, 5, 6, keys=True, channels_last=True, squared=True),
        lambda: _loss(1, 2, 3, 4, 5, dtype=torch.float64, background=None),
        lambda: _loss(20, 3, offsets=ragged(), keys=True),
        lambda: _loss(20, 3),
        lambda: _loss(0, 3, 5, 6),
    ],
    "instembed::cosine_margin_loss_backward": [
        lambda: _loss_backward(None, 2, 3, 5, 6),
        lambda: _loss_backward(None, 20, 3),
        lambda: _loss_backward(ragged(), 20, 3),
    ],
}


def _cosine_margin_cases() -> list[BadInput]:
    embeddings, labels = GOOD
    _, ids = GOOD_POINTS
    cases = [
        BadInput("no tensor", TypeError, "embeddings", ([1.0], labels), shows="list"),
        BadInput("integer embeddings", TypeError, "embeddings", (embeddings.int(), labels), shows="int32"),
        BadInput("embeddings rank 1", ValueError, "embeddings", (torch.zeros(4), ids), shows="(4,)"),
        BadInput("no channel", ValueError, "embeddings", (torch.zeros(2, 0, 4, 5), labels), shows="(2, 0, 4"),
        BadInput("float labels", TypeError, "labels", (embeddings, labels.float()), shows="float32"),
        BadInput("bool labels", TypeError, "labels", (embeddings, labels.bool()), shows="bool"),
        BadInput("labels shape", ValueError, "labels", (embeddings, labels[:1]), shows="(1, 4, 5)"),
        BadInput("labels device", ValueError, "labels", (embeddings, labels.to("meta")), shows="meta"),
        BadInput("offsets with images", ValueError, "offsets", GOOD, {"offsets": torch.tensor([0, 2])}),
        BadInput("offsets end", ValueError, "offsets", GOOD_POINTS, {"offsets": torch.tensor([0, 9])}, "10"),
        BadInput("margin as text", TypeError, "margin", GOOD, {"margin": "0.5"}, "str"),
        BadInput("negative margin", ValueError, "margin", GOOD, {"margin": -0.1}, "-0.1"),
        BadInput("margin of 2", ValueError, "margin", GOOD, {"margin": 2}, "2"),
        BadInput("NaN margin", ValueError, "margin", GOOD, {"margin": float("nan")}, "nan"),
        BadInput("squared as number", TypeError, "squared", GOOD, {"squared": 1}, "int"),
        BadInput("normalize as None", TypeError, "normalize", GOOD, {"normalize": None}, "NoneType"),
        BadInput("background as float", TypeError, "background", GOOD, {"background": 0.0}, "float"),
        BadInput("huge ignore_index", ValueError, "ignore_index", GOOD, {"ignore_index": 2**63}),
        BadInput("seed for generator", TypeError, "generator", GOOD, {"generator": 0}, "int"),
        BadInput("unknown reduction", ValueError, "reduction", GOOD, {"reduction": "max"}, "max"),
    ]
    for value in (0, -1, 0.0, 1.5, float("nan"), (0.5, 0), (0.0, 10), 2**63):
        cases.append(BadInput(f"samples {value}", ValueError, "samples", GOOD, {"samples": value}))
    for value in (True, "all", (0.5,), (0.5, 10.0), [0.5, 10], torch.tensor(3)):
        cases.append(BadInput(f"samples {value}", TypeError, "samples", GOOD, {"samples": value}))
    return cases


BAD_INPUT = {
    "cosine_margin_loss": _cosine_margin_cases(),
}
