from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.cases.common import GOOD, GOOD_POINTS, BadInput, OpCases, ragged, random_embeddings, random_labels


def _unit(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normalize(random_embeddings(*shape, dtype=dtype), dim=1)


def _shift(points: Tensor, mask: Tensor | None = None, offsets: Tensor | None = None) -> tuple[Any, ...]:
    return (points, mask, offsets, 0.5, 0.8, 1e-6)


def _shift_backward(
    points: Tensor, mask: Tensor | None = None, offsets: Tensor | None = None
) -> tuple[Any, ...]:
    arguments = _shift(points, mask, offsets)
    state = torch.ops.instembed.recurrent_mean_shift(*arguments)
    return (torch.randn_like(points), *arguments, *state)


OPCHECK: OpCases = {
    "instembed::recurrent_mean_shift": [
        lambda: _shift(_unit(2, 3, 5, 6).requires_grad_()),
        lambda: _shift(_unit(2, 3, 5, 6), random_labels(2, 5, 6)),
        lambda: _shift(
            _unit(2, 8, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_(),
            random_labels(2, 5, 6) > 0,
        ),
        lambda: _shift(_unit(2, 3, 6, 5).transpose(2, 3).requires_grad_()),
        lambda: _shift(_unit(1, 2, 3, 4, 5, dtype=torch.float64).requires_grad_()),
        lambda: _shift(_unit(20, 3).requires_grad_(), random_labels(20) > 0, ragged()),
        lambda: _shift(_unit(0, 3, 5, 6).requires_grad_()),
    ],
    "instembed::recurrent_mean_shift_backward": [
        lambda: _shift_backward(_unit(2, 3, 5, 6)),
        lambda: _shift_backward(_unit(2, 3, 5, 6, dtype=torch.float64), random_labels(2, 5, 6)),
        lambda: _shift_backward(_unit(2, 8, 5, 6).contiguous(memory_format=torch.channels_last)),
        lambda: _shift_backward(_unit(20, 3), None, ragged()),
    ],
}


def _recurrent_mean_shift_cases() -> list[BadInput]:
    embeddings, flags = GOOD
    good = (embeddings, 0.1)
    points = (GOOD_POINTS[0], 0.1)
    cases = [
        BadInput("no tensor", TypeError, "embeddings", ([1.0], 0.1), shows="list"),
        BadInput("integer embeddings", TypeError, "embeddings", (embeddings.int(), 0.1), shows="int32"),
        BadInput("embeddings rank 1", ValueError, "embeddings", (torch.zeros(4), 0.1), shows="(4,)"),
        BadInput("no channel", ValueError, "embeddings", (torch.zeros(2, 0, 4, 5), 0.1), shows="(2, 0, 4"),
        BadInput("no mask tensor", TypeError, "mask", good, {"mask": flags.numpy()}, "ndarray"),
        BadInput("float mask", TypeError, "mask", good, {"mask": flags.float()}, "torch.float32"),
        BadInput("mask shape", ValueError, "mask", good, {"mask": flags[:, :3]}, "(2, 3, 5)"),
        BadInput("mask device", ValueError, "mask", good, {"mask": flags.to("meta")}, "meta"),
        BadInput("offsets with images", ValueError, "offsets", good, {"offsets": torch.tensor([0, 2])}),
        BadInput("float offsets", TypeError, "offsets", points, {"offsets": torch.tensor([0.0, 10.0])}),
        BadInput("offsets end", ValueError, "offsets", points, {"offsets": torch.tensor([0, 9])}, "10"),
        BadInput("offsets fall", ValueError, "offsets", points, {"offsets": torch.tensor([0, 8, 4, 10])}),
        BadInput("negative iterations", ValueError, "iterations", good, {"iterations": -1}, "-1"),
        BadInput("float iterations", TypeError, "iterations", good, {"iterations": 1.0}, "float"),
        BadInput("step as text", TypeError, "step", good, {"step": "1"}, "str"),
        BadInput("NaN step", ValueError, "step", good, {"step": float("nan")}, "nan"),
        BadInput("negative tolerance", ValueError, "tolerance", good, {"tolerance": -1e-6}, "-1e-06"),
        BadInput("tolerance of 1", ValueError, "tolerance", good, {"tolerance": 1}, "1"),
        BadInput("return_all as number", TypeError, "return_all", good, {"return_all": 1}, "int"),
        BadInput("recompute as None", TypeError, "recompute", good, {"recompute": None}, "NoneType"),
        BadInput(
            "negative backprop", ValueError, "backprop_iterations", good, {"backprop_iterations": -1}, "-1"
        ),
        BadInput("bool backprop", TypeError, "backprop_iterations", good, {"backprop_iterations": True}),
    ]
    for value in (0.0, -1.0, float("nan"), float("inf")):
        cases.append(
            BadInput(f"bandwidth {value}", ValueError, "bandwidth", (embeddings, value), {}, str(value))
        )
    cases.append(BadInput("bandwidth as text", TypeError, "bandwidth", (embeddings, "0.1"), shows="str"))
    return cases


BAD_INPUT = {
    "recurrent_mean_shift": _recurrent_mean_shift_cases(),
}
