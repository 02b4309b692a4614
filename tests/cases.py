"""What tests/test_ops.py runs for each op: arguments for opcheck, and bad input with its error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class BadInput(NamedTuple):
    id: str
    error: type[Exception]
    names: str  # the argument that the message must name
    arguments: tuple[Any, ...]
    options: dict[str, Any] = {}  # noqa: RUF012
    shows: str = ""  # what else the message must show: the value that came


def _embeddings(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def _labels(*shape: int) -> Tensor:
    return torch.randint(0, 4, shape)


# Discriminative loss ---------------------------------------------------------------------------------------

_DISCRIMINATIVE = (0.5, 1.5, 2, 0, None, False, False)


def _terms(
    embeddings: Tensor, labels: Tensor, offsets: Tensor | None = None, **changes: Any
) -> tuple[Any, ...]:
    values = changes.get("options", _DISCRIMINATIVE)
    return (embeddings, labels, offsets, *values, embeddings.requires_grad)


def _terms_backward(embeddings: Tensor, labels: Tensor, offsets: Tensor | None = None) -> tuple[Any, ...]:
    leaf = embeddings.requires_grad_()
    terms, *state = torch.ops.instembed.discriminative_terms(*_terms(leaf, labels, offsets))
    return (torch.rand_like(terms), embeddings.detach(), labels, offsets, *_DISCRIMINATIVE, *state)


_POINTS = (torch.tensor([0, 3, 3, 20]),)

OPCHECK: dict[str, list[Callable[[], tuple[Any, ...]]]] = {
    "instembed::discriminative_terms": [
        lambda: _terms(_embeddings(2, 3, 5, 6).requires_grad_(), _labels(2, 5, 6)),
        lambda: _terms(_embeddings(2, 3, 5, 6), _labels(2, 5, 6)),
        lambda: _terms(
            _embeddings(2, 8, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_(),
            _labels(2, 5, 6),
        ),
        lambda: _terms(_embeddings(2, 3, 6, 5).transpose(2, 3).requires_grad_(), _labels(2, 5, 6)),
        lambda: _terms(_embeddings(1, 2, 3, 4, 5, dtype=torch.float64).requires_grad_(), _labels(1, 3, 4, 5)),
        lambda: _terms(_embeddings(20, 3).requires_grad_(), _labels(20), *_POINTS),
        lambda: _terms(_embeddings(2, 3, 7, dtype=torch.float16).requires_grad_(), _labels(2, 7)),
        lambda: _terms(
            _embeddings(2, 3, 5, 6).requires_grad_(),
            _labels(2, 5, 6),
            options=(0.1, 3.0, 1, None, 2, True, True),
        ),
        lambda: _terms(_embeddings(0, 3, 5, 6).requires_grad_(), _labels(0, 5, 6)),
    ],
    "instembed::discriminative_terms_backward": [
        lambda: _terms_backward(_embeddings(2, 3, 5, 6), _labels(2, 5, 6)),
        lambda: _terms_backward(_embeddings(20, 3), _labels(20), *_POINTS),
    ],
}

_GOOD = (torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.int64))
_GOOD_POINTS = (torch.zeros(10, 3), torch.zeros(10, dtype=torch.int64))


def _discriminative_cases() -> list[BadInput]:
    embeddings, labels = _GOOD
    cases = [
        BadInput("no tensor", TypeError, "embeddings", ([1.0], labels), shows="list"),
        BadInput(
            "integer embeddings", TypeError, "embeddings", (embeddings.int(), labels), shows="torch.int32"
        ),
        BadInput("complex embeddings", TypeError, "embeddings", (embeddings.to(torch.complex64), labels)),
        BadInput("sparse embeddings", TypeError, "embeddings", (embeddings.to_sparse(), labels)),
        BadInput("embeddings rank 1", ValueError, "embeddings", (torch.zeros(4), labels), shows="(4,)"),
        BadInput("embeddings rank 6", ValueError, "embeddings", (torch.zeros(1, 1, 1, 1, 1, 1), labels)),
        BadInput(
            "no channel", ValueError, "embeddings", (torch.zeros(2, 0, 4, 5), labels), shows="(2, 0, 4, 5)"
        ),
        BadInput("no label tensor", TypeError, "labels", (embeddings, labels.numpy()), shows="ndarray"),
        BadInput("float labels", TypeError, "labels", (embeddings, labels.float()), shows="torch.float32"),
        BadInput("bool labels", TypeError, "labels", (embeddings, labels.bool()), shows="torch.bool"),
        BadInput("labels shape", ValueError, "labels", (embeddings, labels[:, :3]), shows="(2, 3, 5)"),
        BadInput(
            "labels with a channel", ValueError, "labels", (embeddings, labels[:, None]), shows="(2, 1, 4, 5)"
        ),
        BadInput("labels batch", ValueError, "labels", (embeddings, labels[:1]), shows="(1, 4, 5)"),
        BadInput("labels device", ValueError, "labels", (embeddings, labels.to("meta")), shows="meta"),
        BadInput("offsets with images", ValueError, "offsets", _GOOD, {"offsets": torch.tensor([0, 2])}),
        BadInput("float offsets", TypeError, "offsets", _GOOD_POINTS, {"offsets": torch.tensor([0.0, 10.0])}),
        BadInput("offsets rank", ValueError, "offsets", _GOOD_POINTS, {"offsets": torch.tensor([[0, 10]])}),
        BadInput("offsets end", ValueError, "offsets", _GOOD_POINTS, {"offsets": torch.tensor([0, 9])}, "10"),
        BadInput(
            "offsets past the end",
            ValueError,
            "offsets",
            _GOOD_POINTS,
            {"offsets": torch.tensor([0, 99])},
            "99",
        ),
        BadInput("offsets start", ValueError, "offsets", _GOOD_POINTS, {"offsets": torch.tensor([1, 10])}),
        BadInput(
            "offsets fall", ValueError, "offsets", _GOOD_POINTS, {"offsets": torch.tensor([0, 8, 4, 10])}
        ),
        BadInput(
            "no offsets", ValueError, "offsets", _GOOD_POINTS, {"offsets": torch.zeros(0, dtype=torch.int64)}
        ),
        BadInput("norm", ValueError, "norm", _GOOD, {"norm": 3}, "3"),
        BadInput("norm as text", ValueError, "norm", _GOOD, {"norm": "2"}),
        BadInput("variance", ValueError, "variance", _GOOD, {"variance": "image"}, "image"),
        BadInput("large background", ValueError, "background", _GOOD, {"background": 2**63}, str(2**63)),
        BadInput("float background", TypeError, "background", _GOOD, {"background": 0.5}),
        BadInput("float ignore_index", TypeError, "ignore_index", _GOOD, {"ignore_index": 255.0}),
    ]
    for name in ("delta_var", "delta_dist"):
        cases += [
            BadInput(f"negative {name}", ValueError, name, _GOOD, {name: -0.1}, "-0.1"),
            BadInput(f"zero {name}", ValueError, name, _GOOD, {name: 0.0}, "0"),
            BadInput(f"NaN {name}", ValueError, name, _GOOD, {name: float("nan")}, "nan"),
            BadInput(f"infinite {name}", ValueError, name, _GOOD, {name: float("inf")}, "inf"),
            BadInput(f"{name} as text", TypeError, name, _GOOD, {name: "0.5"}, "str"),
        ]
    return cases


def _loss_cases() -> list[BadInput]:
    return [
        BadInput("reduction", ValueError, "reduction", _GOOD, {"reduction": "max"}, "max"),
        BadInput("negative push", ValueError, "background_push", _GOOD, {"background_push": -1.0}),
        BadInput("infinite alpha", ValueError, "alpha", _GOOD, {"alpha": float("inf")}),
        BadInput("beta as text", TypeError, "beta", _GOOD, {"beta": "1"}),
        BadInput("NaN gamma", ValueError, "gamma", _GOOD, {"gamma": float("nan")}),
    ]


# Label statistics ------------------------------------------------------------------------------------------

OPCHECK["instembed::label_statistics"] = [
    lambda: (_labels(2, 5, 6), 0, None, 8),
    lambda: (_labels(2, 5, 6), None, 3, None),
    lambda: (_labels(2, 6, 5).to(torch.uint8).transpose(1, 2), 0, 255, None),
    lambda: (_labels(1, 3, 4, 5).int(), 0, None, 8),
    lambda: (_labels(2, 7), 0, None, None),
    lambda: (_labels(0, 5, 6), 0, None, None),
]


def _label_statistics_cases() -> list[BadInput]:
    labels = _GOOD[1]
    full = torch.arange(6).reshape(1, 2, 3)
    return [
        BadInput("no tensor", TypeError, "labels", ([[[1]]],), shows="list"),
        BadInput("float labels", TypeError, "labels", (labels.float(),), shows="torch.float32"),
        BadInput("bool labels", TypeError, "labels", (labels.bool(),), shows="torch.bool"),
        BadInput("sparse labels", TypeError, "labels", (labels.to_sparse(),)),
        BadInput("labels rank 0", ValueError, "labels", (labels[0, 0, 0],), shows="()"),
        BadInput("labels rank 1", ValueError, "labels", (labels[0, 0],), shows="(5,)"),
        BadInput("labels rank 5", ValueError, "labels", (labels[None, None],), shows="(1, 1, 2, 4, 5)"),
        BadInput("large background", ValueError, "background", (labels,), {"background": 2**63}, str(2**63)),
        BadInput("float background", TypeError, "background", (labels,), {"background": 0.5}, "float"),
        BadInput(
            "ignore_index as text", TypeError, "ignore_index", (labels,), {"ignore_index": "255"}, "str"
        ),
        BadInput("no capacity", ValueError, "max_instances", (labels,), {"max_instances": 0}, "0"),
        BadInput("float capacity", TypeError, "max_instances", (labels,), {"max_instances": 5.0}, "float"),
        BadInput("capacity", ValueError, "max_instances=4", (full,), {"max_instances": 4}, "5 instances"),
    ]


# Instance pooling ------------------------------------------------------------------------------------------


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


OPCHECK["instembed::instance_pool"] = [
    lambda: _pool(_embeddings(2, 3, 5, 6).requires_grad_(), _labels(2, 5, 6)),
    lambda: _pool(_embeddings(2, 3, 5, 6).requires_grad_(), _labels(2, 5, 6), reduce="max"),
    lambda: _pool(_embeddings(2, 3, 5, 6), _labels(2, 5, 6), reduce="sum", most=None),
    lambda: _pool(
        _embeddings(2, 8, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_(),
        _labels(2, 5, 6),
    ),
    lambda: _pool(_embeddings(2, 3, 6, 5).transpose(2, 3).requires_grad_(), _labels(2, 5, 6)),
    lambda: _pool(_embeddings(1, 2, 3, 4, 5, dtype=torch.float64).requires_grad_(), _labels(1, 3, 4, 5)),
    lambda: _pool(_embeddings(20, 3).requires_grad_(), _labels(20), *_POINTS, reduce="max"),
    lambda: _pool(_embeddings(2, 3, 7, dtype=torch.bfloat16).requires_grad_(), _labels(2, 7)),
    lambda: _pool(_embeddings(0, 3, 5, 6).requires_grad_(), _labels(0, 5, 6)),
]
OPCHECK["instembed::instance_pool_backward"] = [
    lambda: _pool_backward(_embeddings(2, 3, 5, 6), _labels(2, 5, 6)),
    lambda: _pool_backward(_embeddings(2, 3, 5, 6), _labels(2, 5, 6), reduce="max"),
    lambda: _pool_backward(_embeddings(2, 3, 5, 6), _labels(2, 5, 6), last=True),
    lambda: _pool_backward(_embeddings(20, 3), _labels(20), *_POINTS, reduce="sum"),
    lambda: _pool_backward(_embeddings(20, 3), _labels(20), *_POINTS, reduce="max"),
]


def _instance_pool_cases() -> list[BadInput]:
    features, labels = _GOOD
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
        BadInput("reduce", ValueError, "reduce", _GOOD, {"reduce": "amax"}, "amax"),
        BadInput("reduce as None", ValueError, "reduce", _GOOD, {"reduce": None}, "None"),
        BadInput("no capacity", ValueError, "max_instances", _GOOD, {"max_instances": 0}, "0"),
        BadInput("float capacity", TypeError, "max_instances", _GOOD, {"max_instances": 5.0}, "float"),
        BadInput("capacity", ValueError, "max_instances=4", full, {"max_instances": 4}, "5 instances"),
        BadInput("large background", ValueError, "background", _GOOD, {"background": 2**63}, str(2**63)),
        BadInput("ignore_index as text", TypeError, "ignore_index", _GOOD, {"ignore_index": "255"}, "str"),
        BadInput("offsets with images", ValueError, "offsets", _GOOD, {"offsets": torch.tensor([0, 2])}),
        BadInput("float offsets", TypeError, "offsets", _GOOD_POINTS, {"offsets": torch.tensor([0.0, 10.0])}),
        BadInput("offsets end", ValueError, "offsets", _GOOD_POINTS, {"offsets": torch.tensor([0, 9])}, "10"),
        BadInput(
            "offsets fall", ValueError, "offsets", _GOOD_POINTS, {"offsets": torch.tensor([0, 8, 4, 10])}
        ),
    ]  # fmt: skip


# Mean shift ------------------------------------------------------------------------------------------------


def _grouping(
    embeddings: Tensor,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    seeding: str = "peel",
    max_instances: int | None = None,
) -> tuple[Any, ...]:
    return (embeddings, mask, offsets, 1.0, seeding, 1, max_instances, "noise", 300, 1e-3)


OPCHECK["instembed::mean_shift"] = [
    lambda: _grouping(_embeddings(2, 3, 5, 6)),
    lambda: _grouping(_embeddings(2, 3, 5, 6).requires_grad_(), max_instances=64),
    lambda: _grouping(
        _embeddings(2, 3, 5, 6).contiguous(memory_format=torch.channels_last), _labels(2, 5, 6)
    ),
    lambda: _grouping(_embeddings(1, 2, 3, 4, 5, dtype=torch.float64), seeding="all"),
    lambda: _grouping(_embeddings(20, 3, dtype=torch.bfloat16), _labels(20) > 0, *_POINTS),
    lambda: _grouping(_embeddings(0, 3, 5, 6), max_instances=2),
]


def _mean_shift_cases() -> list[BadInput]:
    embeddings, classes = _GOOD
    good = (embeddings, 1.5)
    points = (_GOOD_POINTS[0], 1.5)
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


BAD_INPUT: dict[str, list[BadInput]] = {
    "discriminative_terms": _discriminative_cases(),
    "discriminative_loss": _discriminative_cases() + _loss_cases(),
    "mean_shift": _mean_shift_cases(),
    "label_statistics": _label_statistics_cases(),
    "instance_pool": _instance_pool_cases(),
}
