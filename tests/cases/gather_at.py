from __future__ import annotations

import torch
from torch import Tensor

from tests.cases.common import GOOD, BadInput, OpCases, random_embeddings, random_labels


def _points(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return 8 * torch.rand(*shape, dtype=dtype) - 1


OPCHECK: OpCases = {
    "instembed::gather_at": [
        lambda: (random_embeddings(2, 3, 5, 6).requires_grad_(), _points(2, 7, 2), None, False, 1),
        lambda: (
            random_embeddings(2, 3, 5, 6).requires_grad_(),
            _points(2, 7, 4, 2).requires_grad_(),
            random_labels(2, 7, 4),
            True,
            1,
        ),
        lambda: (
            random_embeddings(2, 8, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_(),
            _points(2, 7, 4, 2),
            random_labels(2, 7, 4) > 0,
            False,
            4,
        ),
        lambda: (random_embeddings(2, 3, 6).half(), _points(2, 7, 1).requires_grad_(), None, True, 1),
        lambda: (
            random_embeddings(1, 2, 3, 4, 5, dtype=torch.float64).requires_grad_(),
            _points(1, 3),
            None,
            True,
            1,
        ),
        lambda: (random_embeddings(2, 3, 5, 6).requires_grad_(), _points(2, 0, 2), None, False, 1),
    ],
    "instembed::gather_at_backward": [
        lambda: (
            random_embeddings(2, 7, 3),
            random_embeddings(2, 3, 5, 6),
            _points(2, 7, 2),
            None,
            True,
            1,
            True,
            True,
        ),
        lambda: (
            random_embeddings(2, 7, 4, 2),
            random_embeddings(2, 8, 5, 6),
            _points(2, 7, 4, 2),
            None,
            False,
            4,
            True,
            False,
        ),
    ],
}


def _gather_at_cases() -> list[BadInput]:
    features, points = GOOD[0], torch.zeros(2, 7, 2)
    good = (features, points)
    return [
        BadInput("no tensor", TypeError, "features", ([1.0], points), shows="list"),
        BadInput("integer features", TypeError, "features", (features.int(), points), shows="torch.int32"),
        BadInput("features rank 2", ValueError, "features", (features[0, 0], points), shows="(4, 5)"),
        BadInput("no channel", ValueError, "features", (features[:, :0], points), shows="(2, 0, 4, 5)"),
        BadInput("no points tensor", TypeError, "points", (features, [[0, 0]]), shows="list"),
        BadInput("bool points", TypeError, "points", (features, points.bool()), shows="torch.bool"),
        BadInput("complex points", TypeError, "points", (features, points.to(torch.complex64))),
        BadInput("points rank 1", ValueError, "points", (features, points[0, 0]), shows="(2,)"),
        BadInput("points batch", ValueError, "points", (features, points[:1]), shows="(1, 7, 2)"),
        BadInput("points axes", ValueError, "points", (features, torch.zeros(2, 7, 3)), shows="(2, 7, 3)"),
        BadInput("points device", ValueError, "points", (features, points.to("meta")), shows="meta"),
        BadInput("no valid tensor", TypeError, "valid", good, {"valid": True}, "bool"),
        BadInput("float valid", TypeError, "valid", good, {"valid": torch.ones(2, 7)}, "torch.float32"),
        BadInput("valid shape", ValueError, "valid", good, {"valid": random_labels(2, 6)}, "(2, 6)"),
        BadInput("valid rank", ValueError, "valid", good, {"valid": random_labels(2, 7, 1)}, "(2, 7, 1)"),
        BadInput(
            "valid device", ValueError, "valid", good, {"valid": random_labels(2, 7).to("meta")}, "meta"
        ),
        BadInput("mode", ValueError, "mode", good, {"mode": "bicubic"}, "bicubic"),
    ]


BAD_INPUT = {
    "gather_at": _gather_at_cases(),
}
