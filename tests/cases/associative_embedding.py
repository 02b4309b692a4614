from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.cases.common import BadInput, OpCases, random_embeddings


def _people(*shape: int) -> tuple[Tensor, Tensor]:
    """Keypoints and visible for (B, P, K), some of them outside a map of 5 x 6."""
    return 8 * torch.rand(*shape, 2) - 1, torch.randint(0, 3, shape)


def _tags_backward(tags: Tensor, keypoints: Tensor | None, visible: Tensor) -> tuple[Any, ...]:
    terms, *state = torch.ops.instembed.associative_embedding_terms(tags, keypoints, visible, False, 0.7, 1.0)
    return (torch.rand_like(terms), tags, *state, keypoints is None)


OPCHECK: OpCases = {
    "instembed::associative_embedding_terms": [
        lambda: (random_embeddings(2, 6, 5, 6).requires_grad_(), *_people(2, 4, 3), False, 0.7, 1.0),
        lambda: (random_embeddings(2, 6, 5, 6), *_people(2, 4, 3), True, 0.7, 1.0),
        lambda: (
            random_embeddings(2, 6, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_(),
            *_people(2, 4, 3),
            True,
            0.7,
            1.0,
        ),
        lambda: (
            random_embeddings(2, 3, 6, 5).transpose(2, 3).requires_grad_(),
            *_people(2, 4, 3),
            False,
            0.7,
            1.0,
        ),
        lambda: (
            random_embeddings(2, 4, 3, 2, dtype=torch.float64).requires_grad_(),
            None,
            _people(2, 4, 3)[1] > 0,
            False,
            0.7,
            1.0,
        ),
        lambda: (random_embeddings(2, 3, 5, 6).half().requires_grad_(), *_people(2, 0, 3), False, 0.7, 1.0),
    ],
    "instembed::associative_embedding_terms_backward": [
        lambda: _tags_backward(random_embeddings(2, 6, 5, 6), *_people(2, 4, 3)),
        lambda: _tags_backward(random_embeddings(2, 4, 3, 2), None, _people(2, 4, 3)[1]),
    ],
}

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


BAD_INPUT = {
    "associative_embedding_terms": _associative_embedding_cases(),
    "associative_embedding_loss": _associative_embedding_cases() + _associative_loss_cases(),
}
