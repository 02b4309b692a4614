from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.cases.common import GOOD, GOOD_POINTS, BadInput, OpCases, ragged, random_embeddings, random_labels


def _pool(
    features: Tensor,
    labels: Tensor,
    offsets: Tensor | None = None,
    reduce: str = "mean",
    most: int | None = 8,
) -> tuple[Any, ...]:
    return (features, labels, offsets, reduce, most, 0, None)


def _pool_backward(
    features: Tensor, labels: Tensor, offsets: Tensor | None = None, reduce: str = "mean", last: bool = False
) -> tuple[Any, ...]:
    pooled, _, _, _, argmax = torch.ops.instembed.instance_pool(*_pool(features, labels, offsets, reduce))
    grad = torch.randn_like(pooled).requires_grad_()
    return (grad, argmax, labels, offsets, reduce, 0, None, features.shape, features.dtype, last)


OPCHECK: OpCases = {
    "instembed::instance_pool": [
        lambda: _pool(random_embeddings(2, 3, 5, 6).requires_grad_(), random_labels(2, 5, 6)),
        lambda: _pool(random_embeddings(2, 3, 5, 6).requires_grad_(), random_labels(2, 5, 6), reduce="max"),
        lambda: _pool(random_embeddings(2, 3, 5, 6), random_labels(2, 5, 6), reduce="sum", most=None),
        lambda: _pool(
            random_embeddings(2, 8, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_(),
            random_labels(2, 5, 6),
        ),
        lambda: _pool(random_embeddings(2, 3, 6, 5).transpose(2, 3).requires_grad_(), random_labels(2, 5, 6)),
        lambda: _pool(
            random_embeddings(1, 2, 3, 4, 5, dtype=torch.float64).requires_grad_(), random_labels(1, 3, 4, 5)
        ),
        lambda: _pool(random_embeddings(20, 3).requires_grad_(), random_labels(20), ragged(), reduce="max"),
        lambda: _pool(random_embeddings(2, 3, 7, dtype=torch.bfloat16).requires_grad_(), random_labels(2, 7)),
        lambda: _pool(random_embeddings(0, 3, 5, 6).requires_grad_(), random_labels(0, 5, 6)),
    ],
    "instembed::instance_pool_backward": [
        lambda: _pool_backward(random_embeddings(2, 3, 5, 6), random_labels(2, 5, 6)),
        lambda: _pool_backward(random_embeddings(2, 3, 5, 6), random_labels(2, 5, 6), reduce="max"),
        lambda: _pool_backward(random_embeddings(2, 3, 5, 6), random_labels(2, 5, 6), last=True),
        lambda: _pool_backward(random_embeddings(20, 3), random_labels(20), ragged(), reduce="sum"),
        lambda: _pool_backward(random_embeddings(20, 3), random_labels(20), ragged(), reduce="max"),
    ],
}


def _instance_pool_cases() -> list[BadInput]:
    features, labels = GOOD
    full = (torch.zeros(1, 2, 2, 3), torch.arange(6).reshape(1, 2, 3))
    return [
        BadInput("no tensor", TypeError, "features", ([1.0], labels), shows="list"),
        BadInput("integer features", TypeError, "features", (features.int(), labels), shows="torch.int32"),
        BadInput("features rank", ValueError, "features", (torch.zeros(4), labels), shows="(4,)"),
        BadInput("no channel", ValueError, "features", (torch.zeros(2, 0, 4, 5), labels), shows="(2, 0, 4"),
        BadInput("no label tensor", TypeError, "labels", (features, labels.numpy()), shows="ndarray"),
        BadInput("float labels", TypeError, "labels", (features, labels.float()), shows="torch.float32"),
        BadInput("bool labels", TypeError, "labels", (features, labels.bool()), shows="torch.bool"),
        BadInput(
            "labels at another stride", ValueError, "labels", (features, labels.new_zeros(2, 16, 20)), {},
            "features of shape (2, 3, 4, 5)",
        ),
        BadInput("labels device", ValueError, "labels", (features, labels.to("meta")), {}, "meta"),
        BadInput("reduce", ValueError, "reduce", GOOD, {"reduce": "amax"}, "amax"),
        BadInput("reduce as None", ValueError, "reduce", GOOD, {"reduce": None}, "None"),
        BadInput("no capacity", ValueError, "max_instances", GOOD, {"max_instances": 0}, "0"),
        BadInput("float capacity", TypeError, "max_instances", GOOD, {"max_instances": 5.0}, "float"),
        BadInput("capacity", ValueError, "max_instances=4", full, {"max_instances": 4}, "5 instances"),
        BadInput("large background", ValueError, "background", GOOD, {"background": 2**63}, str(2**63)),
        BadInput("ignore_index as text", TypeError, "ignore_index", GOOD, {"ignore_index": "255"}, "str"),
        BadInput("offsets with images", ValueError, "offsets", GOOD, {"offsets": torch.tensor([0, 2])}),
        BadInput("float offsets", TypeError, "offsets", GOOD_POINTS, {"offsets": torch.tensor([0.0, 10.0])}),
        BadInput("offsets end", ValueError, "offsets", GOOD_POINTS, {"offsets": torch.tensor([0, 9])}, "10"),
        BadInput(
            "offsets fall", ValueError, "offsets", GOOD_POINTS, {"offsets": torch.tensor([0, 8, 4, 10])}
        ),
    ]  # fmt: skip


BAD_INPUT = {
    "instance_pool": _instance_pool_cases(),
}
