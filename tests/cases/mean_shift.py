from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.cases.common import GOOD, GOOD_POINTS, BadInput, OpCases, ragged, random_embeddings, random_labels


def _grouping(
    embeddings: Tensor,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    seeding: str = "peel",
    max_instances: int | None = None,
) -> tuple[Any, ...]:
    return (embeddings, mask, offsets, 1.0, seeding, 1, max_instances, "noise", 300, 1e-3)


OPCHECK: OpCases = {
    "instembed::mean_shift": [
        lambda: _grouping(random_embeddings(2, 3, 5, 6)),
        lambda: _grouping(random_embeddings(2, 3, 5, 6).requires_grad_(), max_instances=64),
        lambda: _grouping(
            random_embeddings(2, 3, 5, 6).contiguous(memory_format=torch.channels_last),
            random_labels(2, 5, 6),
        ),
        lambda: _grouping(random_embeddings(1, 2, 3, 4, 5, dtype=torch.float64), seeding="all"),
        lambda: _grouping(random_embeddings(20, 3, dtype=torch.bfloat16), random_labels(20) > 0, ragged()),
        lambda: _grouping(random_embeddings(0, 3, 5, 6), max_instances=2),
    ],
}


def _mean_shift_cases() -> list[BadInput]:
    embeddings, classes = GOOD
    good = (embeddings, 1.5)
    points = (GOOD_POINTS[0], 1.5)
    cases = [
        BadInput("no tensor", TypeError, "embeddings", ([1.0], 1.5), shows="list"),
        BadInput("integer embeddings", TypeError, "embeddings", (embeddings.int(), 1.5), shows="int32"),
        BadInput("embeddings rank 1", ValueError, "embeddings", (torch.zeros(4), 1.5), shows="(4,)"),
        BadInput("embeddings rank 6", ValueError, "embeddings", (torch.zeros(1, 1, 1, 1, 1, 1), 1.5)),
        BadInput("no channel", ValueError, "embeddings", (torch.zeros(2, 0, 4, 5), 1.5), shows="(2, 0, 4"),
        BadInput("no mask tensor", TypeError, "mask", good, {"mask": classes.numpy()}, "ndarray"),
        BadInput("float mask", TypeError, "mask", good, {"mask": classes.float()}, "torch.float32"),
        BadInput("mask shape", ValueError, "mask", good, {"mask": classes[:, :3]}, "(2, 3, 5)"),
        BadInput("mask device", ValueError, "mask", good, {"mask": classes.to("meta")}, "meta"),
        BadInput("offsets with images", ValueError, "offsets", good, {"offsets": torch.tensor([0, 2])}),
        BadInput("float offsets", TypeError, "offsets", points, {"offsets": torch.tensor([0.0, 10.0])}),
        BadInput("offsets end", ValueError, "offsets", points, {"offsets": torch.tensor([0, 9])}, "10"),
        BadInput(
            "offsets past the end", ValueError, "offsets", points, {"offsets": torch.tensor([0, 99])}, "99"
        ),
        BadInput("offsets fall", ValueError, "offsets", points, {"offsets": torch.tensor([0, 8, 4, 10])}),
        BadInput("seeding", ValueError, "seeding", good, {"seeding": "bins"}, "bins"),
        BadInput("leftovers", ValueError, "leftovers", good, {"leftovers": "drop"}, "drop"),
        BadInput("negative min_size", ValueError, "min_size", good, {"min_size": -1}, "-1"),
        BadInput("zero min_size", ValueError, "min_size", good, {"min_size": 0}, "0"),
        BadInput("float min_size", TypeError, "min_size", good, {"min_size": 1.0}, "float"),
        BadInput("no max_instances", ValueError, "max_instances", good, {"max_instances": 0}, "0"),
        BadInput("float max_instances", TypeError, "max_instances", good, {"max_instances": 2.0}, "float"),
        BadInput("no iteration", ValueError, "max_iter", good, {"max_iter": 0}, "0"),
        BadInput("negative tol", ValueError, "tol", good, {"tol": -1e-3}, "-0.001"),
        BadInput("NaN tol", ValueError, "tol", good, {"tol": float("nan")}, "nan"),
        BadInput(
            "too many instances",
            ValueError,
            "max_instances",
            (10 * torch.arange(5.0)[:, None], 1.5),
            {"max_instances": 3},
            "5 instances",
        ),
    ]
    for value in (0.0, -1.0, float("nan"), float("inf")):
        arguments = (embeddings, value)
        cases.append(BadInput(f"bandwidth {value}", ValueError, "bandwidth", arguments, shows=str(value)))
    cases.append(BadInput("bandwidth as text", TypeError, "bandwidth", (embeddings, "1.5"), shows="str"))
    return cases


BAD_INPUT = {
    "mean_shift": _mean_shift_cases(),
}
