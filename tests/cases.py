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


# Associative embedding -------------------------------------------------------------------------------------


def _people(*shape: int) -> tuple[Tensor, Tensor]:
    """Keypoints and visible for (B, P, K), some of them outside a map of 5 x 6."""
    return 8 * torch.rand(*shape, 2) - 1, torch.randint(0, 3, shape)


def _tags_backward(tags: Tensor, keypoints: Tensor | None, visible: Tensor) -> tuple[Any, ...]:
    terms, *state = torch.ops.instembed.associative_embedding_terms(tags, keypoints, visible, False, 0.7, 1.0)
    return (torch.rand_like(terms), tags, *state, keypoints is None)


OPCHECK["instembed::associative_embedding_terms"] = [
    lambda: (_embeddings(2, 6, 5, 6).requires_grad_(), *_people(2, 4, 3), False, 0.7, 1.0),
    lambda: (_embeddings(2, 6, 5, 6), *_people(2, 4, 3), True, 0.7, 1.0),
    lambda: (
        _embeddings(2, 6, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_(),
        *_people(2, 4, 3),
        True,
        0.7,
        1.0,
    ),
    lambda: (_embeddings(2, 3, 6, 5).transpose(2, 3).requires_grad_(), *_people(2, 4, 3), False, 0.7, 1.0),
    lambda: (
        _embeddings(2, 4, 3, 2, dtype=torch.float64).requires_grad_(),
        None,
        _people(2, 4, 3)[1] > 0,
        False,
        0.7,
        1.0,
    ),
    lambda: (_embeddings(2, 3, 5, 6).half().requires_grad_(), *_people(2, 0, 3), False, 0.7, 1.0),
]
OPCHECK["instembed::associative_embedding_terms_backward"] = [
    lambda: _tags_backward(_embeddings(2, 6, 5, 6), *_people(2, 4, 3)),
    lambda: _tags_backward(_embeddings(2, 4, 3, 2), None, _people(2, 4, 3)[1]),
]

_GOOD_TAGS = (
    torch.zeros(2, 6, 4, 5),
    torch.zeros(2, 7, 3, 2),
    torch.ones(2, 7, 3, dtype=torch.int64),
)
_GATHERED = (torch.zeros(2, 7, 3, 2), None, _GOOD_TAGS[2])


def _associative_embedding_cases() -> list[BadInput]:
    tags, keypoints, visible = _GOOD_TAGS
    gathered = _GATHERED[0]
    cases = [
        BadInput("no tensor", TypeError, "tags", ([1.0], keypoints, visible), shows="list"),
        BadInput("integer tags", TypeError, "tags", (tags.int(), keypoints, visible), shows="torch.int32"),
        BadInput("sparse tags", TypeError, "tags", (tags.to_sparse(), keypoints, visible)),
        BadInput("tags rank 3", ValueError, "tags", (tags[0], keypoints, visible), shows="(6, 4, 5)"),
        BadInput("no tag dimension", ValueError, "tags", (tags[:, :0], keypoints, visible), shows="(2, 0,"),
        BadInput(
            "part of a tag", ValueError, "tags", (tags[:, :5], keypoints, visible), shows="(2, 5, 4, 5)"
        ),
        BadInput("gathered rank", ValueError, "tags", (gathered[0], None, visible), shows="(7, 3, 2)"),
        BadInput(
            "gathered joints", ValueError, "tags", (gathered[:, :, :2], None, visible), shows="(2, 7, 2"
        ),
        BadInput("gathered people", ValueError, "tags", (gathered[:, :6], None, visible), shows="(2, 6, 3"),
        BadInput("gathered without dimension", ValueError, "tags", (gathered[..., :0], None, visible)),
        BadInput("maps without keypoints", ValueError, "tags", (tags, None, visible), shows="(2, 6, 4, 5)"),
        BadInput(
            "no keypoint tensor", TypeError, "keypoints", (tags, keypoints.numpy(), visible), shows="nd"
        ),
        BadInput("bool keypoints", TypeError, "keypoints", (tags, keypoints.bool(), visible), shows="bool"),
        BadInput(
            "keypoints shape", ValueError, "keypoints", (tags, keypoints[:, :6], visible), shows="(2, 6,"
        ),
        BadInput(
            "COCO keypoints", ValueError, "keypoints", (tags, torch.zeros(2, 7, 3, 3), visible), shows="3)"
        ),
        BadInput("keypoints device", ValueError, "keypoints", (tags, keypoints.to("meta"), visible)),
        BadInput("no visible tensor", TypeError, "visible", (tags, keypoints, None), shows="NoneType"),
        BadInput("float visible", TypeError, "visible", (tags, keypoints, visible.float()), shows="float32"),
        BadInput("visible rank", ValueError, "visible", (tags, keypoints, visible[0]), shows="(7, 3)"),
        BadInput("visible batch", ValueError, "visible", (tags, keypoints, visible[:1]), shows="(1, 7, 3)"),
        BadInput(
            "no joint", ValueError, "visible", (tags, keypoints[:, :, :0], visible[:, :, :0]), shows="0)"
        ),
        BadInput("visible device", ValueError, "visible", (tags, keypoints, visible.to("meta"))),
        BadInput("kind", ValueError, "kind", _GOOD_TAGS, {"kind": "l2"}, "l2"),
    ]
    for name in ("sigma", "margin"):
        for value in (0.0, -1.0, float("nan"), float("inf")):
            cases.append(BadInput(f"{name} {value}", ValueError, name, _GOOD_TAGS, {name: value}, str(value)))
        cases.append(BadInput(f"{name} as text", TypeError, name, _GOOD_TAGS, {name: "1"}, "str"))
    return cases


def _associative_loss_cases() -> list[BadInput]:
    return [
        BadInput("reduction", ValueError, "reduction", _GOOD_TAGS, {"reduction": "max"}, "max"),
        BadInput("infinite pull", ValueError, "pull_weight", _GOOD_TAGS, {"pull_weight": float("inf")}),
        BadInput("push as text", TypeError, "push_weight", _GATHERED, {"push_weight": "1"}, "str"),
    ]


# Features at points ----------------------------------------------------------------------------------------


def _points(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return 8 * torch.rand(*shape, dtype=dtype) - 1


OPCHECK["instembed::gather_at"] = [
    lambda: (_embeddings(2, 3, 5, 6).requires_grad_(), _points(2, 7, 2), None, False, 1),
    lambda: (
        _embeddings(2, 3, 5, 6).requires_grad_(),
        _points(2, 7, 4, 2).requires_grad_(),
        _labels(2, 7, 4),
        True,
        1,
    ),
    lambda: (
        _embeddings(2, 8, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_(),
        _points(2, 7, 4, 2),
        _labels(2, 7, 4) > 0,
        False,
        4,
    ),
    lambda: (_embeddings(2, 3, 6).half(), _points(2, 7, 1).requires_grad_(), None, True, 1),
    lambda: (_embeddings(1, 2, 3, 4, 5, dtype=torch.float64).requires_grad_(), _points(1, 3), None, True, 1),
    lambda: (_embeddings(2, 3, 5, 6).requires_grad_(), _points(2, 0, 2), None, False, 1),
]
OPCHECK["instembed::gather_at_backward"] = [
    lambda: (_embeddings(2, 7, 3), _embeddings(2, 3, 5, 6), _points(2, 7, 2), None, True, 1, True, True),
    lambda: (
        _embeddings(2, 7, 4, 2),
        _embeddings(2, 8, 5, 6),
        _points(2, 7, 4, 2),
        None,
        False,
        4,
        True,
        False,
    ),
]


def _gather_at_cases() -> list[BadInput]:
    features, points = _GOOD[0], torch.zeros(2, 7, 2)
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
        BadInput("valid shape", ValueError, "valid", good, {"valid": _labels(2, 6)}, "(2, 6)"),
        BadInput("valid rank", ValueError, "valid", good, {"valid": _labels(2, 7, 1)}, "(2, 7, 1)"),
        BadInput("valid device", ValueError, "valid", good, {"valid": _labels(2, 7).to("meta")}, "meta"),
        BadInput("mode", ValueError, "mode", good, {"mode": "bicubic"}, "bicubic"),
    ]


# Location maps ---------------------------------------------------------------------------------------------


def _location_maps_cases() -> list[BadInput]:
    maps, keypoints = torch.zeros(2, 45, 4, 5), torch.zeros(2, 7, 15, 2)
    valid = torch.ones(2, 7, 15, dtype=torch.int64)
    good, other = (maps, keypoints, valid), (maps[:, :12], keypoints[:, :, :4], valid[:, :, :4])
    return [
        BadInput("no tensor", TypeError, "maps", ([1.0], keypoints, valid), shows="list"),
        BadInput("integer maps", TypeError, "maps", (maps.int(), keypoints, valid), shows="torch.int32"),
        BadInput("maps rank", ValueError, "maps", (maps[0], keypoints, valid), shows="(45, 4, 5)"),
        BadInput("maps channels", ValueError, "maps", (maps[:, :44], keypoints, valid), shows="(2, 44,"),
        BadInput("maps batch", ValueError, "maps", (maps[:1], keypoints, valid), shows="(1, 45, 4, 5)"),
        BadInput("maps device", ValueError, "keypoints", (maps.to("meta"), keypoints, valid), shows="meta"),
        BadInput("no keypoint tensor", TypeError, "keypoints", (maps, None, valid)),
        BadInput("bool keypoints", TypeError, "keypoints", (maps, keypoints.bool(), valid)),
        BadInput("keypoints rank", ValueError, "keypoints", (maps, keypoints[0], valid)),
        BadInput("keypoints axes", ValueError, "keypoints", (maps, torch.zeros(2, 7, 15, 3), valid)),
        BadInput("no joint", ValueError, "keypoints", (maps, keypoints[:, :, :0], valid[:, :, :0])),
        BadInput("float valid", TypeError, "valid", (maps, keypoints, valid.float())),
        BadInput("valid shape", ValueError, "valid", (maps, keypoints, valid[:, :6]), shows="(2, 6"),
        BadInput("unknown limbs", ValueError, "limbs", other, {"root": [0]}, "4 joints"),
        BadInput("unknown root", ValueError, "root", other, {"limbs": [[0]]}, "4 joints"),
        BadInput("limbs as text", TypeError, "limbs", good, {"limbs": "arm"}, "str"),
        BadInput("a limb as number", TypeError, "limbs", good, {"limbs": [1, 2]}, "int"),
        BadInput("float in a limb", TypeError, "limbs", good, {"limbs": [[1.0]]}, "float"),
        BadInput("limb too high", ValueError, "limbs", good, {"limbs": [[3, 15]]}, "15"),
        BadInput("negative root", ValueError, "root", good, {"root": [-1]}, "-1"),
        BadInput("root as number", TypeError, "root", good, {"root": 1}, "int"),
        BadInput("no way to read", ValueError, "root", good, {"root": [], "limbs": [[0, 1]]}, "joint 2"),
    ]


def _read_points_cases() -> list[BadInput]:
    keypoints, valid = torch.zeros(2, 7, 15, 2), torch.ones(2, 7, 15, dtype=torch.int64)
    return [
        BadInput("size as number", TypeError, "size", (keypoints, valid, 5), shows="int"),
        BadInput("size of three", ValueError, "size", (keypoints, valid, (4, 5, 6)), shows="6"),
        BadInput("negative size", ValueError, "size", (keypoints, valid, (4, -5)), shows="-5"),
        BadInput("float size", TypeError, "size", (keypoints, valid, (4.0, 5)), shows="float"),
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


# Grouping of keypoints --------------------------------------------------------------------------------------


def _keypoints(
    shape: tuple[int, ...], dims: int = 1, dtype: torch.dtype = torch.float32, nms: int = 3
) -> tuple[Any, ...]:
    images, joints, *size = shape
    heatmaps = torch.rand(shape).to(dtype)
    tags = _embeddings(images, joints * dims, *size, dtype=dtype)
    return (heatmaps, tags, 4, 0.1, 1.0, nms, list(reversed(range(joints))), True, True)


OPCHECK["instembed::group_keypoints"] = [
    lambda: _keypoints((2, 3, 8, 9)),
    lambda: _keypoints((2, 3, 8, 9), dims=2, dtype=torch.float64, nms=1),
    lambda: _keypoints((1, 1, 5, 4), dtype=torch.float16),
    lambda: (
        torch.rand(2, 3, 8, 9).contiguous(memory_format=torch.channels_last).requires_grad_(),
        *_keypoints((2, 3, 8, 9))[1:],
    ),
    lambda: _keypoints((0, 3, 8, 9)),
]


def _group_keypoints_cases() -> list[BadInput]:
    maps = torch.zeros(2, 3, 4, 5)
    good = (maps, maps)
    cases = [
        BadInput("no tensor", TypeError, "heatmaps", ([1.0], maps), shows="list"),
        BadInput("no tag tensor", TypeError, "tags", (maps, None), shows="NoneType"),
        BadInput("integer heatmaps", TypeError, "heatmaps", (maps.int(), maps), shows="torch.int32"),
        BadInput("bool tags", TypeError, "tags", (maps, maps.bool()), shows="torch.bool"),
        BadInput("sparse heatmaps", TypeError, "heatmaps", (maps.to_sparse(), maps)),
        BadInput("heatmaps rank 3", ValueError, "heatmaps", (maps[0], maps), shows="(3, 4, 5)"),
        BadInput("tags rank 5", ValueError, "tags", (maps, maps[..., None]), shows="(2, 3, 4, 5, 1)"),
        BadInput("no joint", ValueError, "heatmaps", (maps[:, :0], maps), shows="(2, 0, 4, 5)"),
        BadInput("no tag dimension", ValueError, "tags", (maps, maps[:, :0]), shows="(2, 0, 4, 5)"),
        BadInput("tags of two joints", ValueError, "tags", (maps, maps[:, :2]), shows="(2, 2, 4, 5)"),
        BadInput("tags of another size", ValueError, "tags", (maps, maps[..., :4]), shows="(2, 3, 4, 4)"),
        BadInput("tags batch", ValueError, "tags", (maps, maps[:1]), shows="(1, 3, 4, 5)"),
        BadInput("tags device", ValueError, "tags", (maps, maps.to("meta")), shows="meta"),
        BadInput("no people", ValueError, "max_people", good, {"max_people": 0}, "0"),
        BadInput("too many people", ValueError, "max_people", good, {"max_people": 2**40}, str(2**40)),
        BadInput("float people", TypeError, "max_people", good, {"max_people": 3.0}, "float"),
        BadInput("even window", ValueError, "nms", good, {"nms": 4}, "4"),
        BadInput("no window", ValueError, "nms", good, {"nms": -1}, "-1"),
        BadInput("adjust as a number", TypeError, "adjust", good, {"adjust": 1}, "int"),
        BadInput("refine as text", TypeError, "refine", good, {"refine": "yes"}, "str"),
        BadInput("order beyond the joints", ValueError, "joint_order", good, {"joint_order": [0, 1, 3]}, "3"),
        BadInput("order as text", TypeError, "joint_order", good, {"joint_order": "012"}, "str"),
        BadInput("order of floats", TypeError, "joint_order", good, {"joint_order": [0.0, 1, 2]}, "float"),
        BadInput("short order", ValueError, "joint_order", good, {"joint_order": [0, 1]}, "[0, 1]"),
        BadInput("order repeats", ValueError, "joint_order", good, {"joint_order": [0, 1, 1]}, "[0, 1, 1]"),
    ]
    for name in ("peak_threshold", "tag_threshold"):
        cases += [
            BadInput(f"negative {name}", ValueError, name, good, {name: -0.1}, "-0.1"),
            BadInput(f"NaN {name}", ValueError, name, good, {name: float("nan")}, "nan"),
            BadInput(f"{name} as text", TypeError, name, good, {name: "1"}, "str"),
        ]
    return cases


BAD_INPUT: dict[str, list[BadInput]] = {
    "associative_embedding_terms": _associative_embedding_cases(),
    "associative_embedding_loss": _associative_embedding_cases() + _associative_loss_cases(),
    "discriminative_terms": _discriminative_cases(),
    "discriminative_loss": _discriminative_cases() + _loss_cases(),
    "gather_at": _gather_at_cases(),
    "read_location_maps": _location_maps_cases(),
    "location_read_points": _read_points_cases(),
    "mean_shift": _mean_shift_cases(),
    "label_statistics": _label_statistics_cases(),
    "group_keypoints": _group_keypoints_cases(),
    "instance_pool": _instance_pool_cases(),
}
