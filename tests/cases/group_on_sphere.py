from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.cases.common import GOOD, GOOD_POINTS, BadInput, OpCases, ragged, random_embeddings, random_labels


def _group(
    points: Tensor,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    max_instances: int | None = None,
    leftovers: str = "noise",
) -> tuple[Any, ...]:
    return normalize(points, dim=1), mask, offsets, 0.7, 2, max_instances, leftovers


OPCHECK: OpCases = {
    "instembed::group_on_sphere": [
        lambda: _group(random_embeddings(2, 3, 5, 6), max_instances=30),
        lambda: _group(random_embeddings(2, 3, 5, 6), random_labels(2, 5, 6), None, 30, "nearest"),
        lambda: _group(random_embeddings(2, 3, 5, 6).requires_grad_()),
        lambda: _group(random_embeddings(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)),
        lambda: _group(random_embeddings(20, 3, dtype=torch.float64), random_labels(20) > 0, ragged()),
        lambda: _group(random_embeddings(0, 3, 5, 6), max_instances=1),
    ],
}


def _group_on_sphere_cases() -> list[BadInput]:
    embeddings, flags = GOOD
    ok = {"threshold": 0.9}
    cases = [
        BadInput("no tensor", TypeError, "embeddings", ([1.0],), ok, "list"),
        BadInput("integer embeddings", TypeError, "embeddings", (embeddings.int(),), ok, "int32"),
        BadInput("embeddings rank 1", ValueError, "embeddings", (torch.zeros(4),), ok, "(4,)"),
        BadInput("no channel", ValueError, "embeddings", (torch.zeros(2, 0, 4, 5),), ok, "(2, 0, 4"),
        BadInput("float mask", TypeError, "mask", (embeddings,), ok | {"mask": flags.float()}, "float32"),
        BadInput("mask shape", ValueError, "mask", (embeddings,), ok | {"mask": flags[:, :3]}, "(2, 3, 5)"),
        BadInput("mask device", ValueError, "mask", (embeddings,), ok | {"mask": flags.to("meta")}, "meta"),
        BadInput(
            "offsets with images",
            ValueError,
            "offsets",
            (embeddings,),
            ok | {"offsets": torch.tensor([0, 2])},
        ),
        BadInput(
            "offsets end",
            ValueError,
            "offsets",
            GOOD_POINTS[:1],
            ok | {"offsets": torch.tensor([0, 9])},
            "10",
        ),
        BadInput("threshold as text", TypeError, "threshold", (embeddings,), {"threshold": "0.9"}, "str"),
        BadInput("min_size 0", ValueError, "min_size", (embeddings,), ok | {"min_size": 0}, "0"),
        BadInput("float min_size", TypeError, "min_size", (embeddings,), ok | {"min_size": 2.0}, "float"),
        BadInput("leftovers", ValueError, "leftovers", (embeddings,), ok | {"leftovers": "drop"}, "drop"),
        BadInput("no room", ValueError, "max_instances", (embeddings,), ok | {"max_instances": 0}, "0"),
        BadInput(
            "too little room",
            ValueError,
            "max_instances",
            (torch.eye(4),),
            ok | {"max_instances": 3},
            "an image has 4",
        ),
    ]
    for value in (1.1, -1.1, float("nan"), float("inf")):
        cases.append(
            BadInput(
                f"threshold {value}", ValueError, "threshold", (embeddings,), {"threshold": value}, str(value)
            )
        )
    return cases


BAD_INPUT = {
    "group_on_sphere": _group_on_sphere_cases(),
}
