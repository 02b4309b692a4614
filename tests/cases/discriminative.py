from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.cases.common import GOOD, GOOD_POINTS, BadInput, OpCases, ragged, random_embeddings, random_labels

_DISCRIMINATIVE = (0.5, 1.5, 2, 0, None, False, False, None)


def _terms(
    embeddings: Tensor, labels: Tensor, offsets: Tensor | None = None, **changes: Any
) -> tuple[Any, ...]:
    values = changes.get("options", _DISCRIMINATIVE)
    return (embeddings, labels, offsets, *values, embeddings.requires_grad)


def _terms_backward(embeddings: Tensor, labels: Tensor, offsets: Tensor | None = None) -> tuple[Any, ...]:
    leaf = embeddings.requires_grad_()
    terms, *state = torch.ops.instembed.discriminative_terms(*_terms(leaf, labels, offsets))
    return (torch.rand_like(terms), embeddings.detach(), labels, offsets, *_DISCRIMINATIVE, *state)


OPCHECK: OpCases = {
    "instembed::discriminative_terms": [
        lambda: _terms(random_embeddings(2, 3, 5, 6).requires_grad_(), random_labels(2, 5, 6)),
        lambda: _terms(random_embeddings(2, 3, 5, 6), random_labels(2, 5, 6)),
        lambda: _terms(
            random_embeddings(2, 8, 5, 6).contiguous(memory_format=torch.channels_last).requires_grad_(),
            random_labels(2, 5, 6),
        ),
        lambda: _terms(
            random_embeddings(2, 3, 6, 5).transpose(2, 3).requires_grad_(), random_labels(2, 5, 6)
        ),
        lambda: _terms(
            random_embeddings(1, 2, 3, 4, 5, dtype=torch.float64).requires_grad_(), random_labels(1, 3, 4, 5)
        ),
        lambda: _terms(random_embeddings(20, 3).requires_grad_(), random_labels(20), ragged()),
        lambda: _terms(random_embeddings(2, 3, 7, dtype=torch.float16).requires_grad_(), random_labels(2, 7)),
        lambda: _terms(
            random_embeddings(2, 3, 5, 6).requires_grad_(),
            random_labels(2, 5, 6),
            options=(0.1, 3.0, 1, None, 2, True, True, 9),
        ),
        lambda: _terms(random_embeddings(0, 3, 5, 6).requires_grad_(), random_labels(0, 5, 6)),
    ],
    "instembed::discriminative_terms_backward": [
        lambda: _terms_backward(random_embeddings(2, 3, 5, 6), random_labels(2, 5, 6)),
        lambda: _terms_backward(random_embeddings(20, 3), random_labels(20), ragged()),
    ],
}


def _discriminative_cases() -> list[BadInput]:
    embeddings, labels = GOOD
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
        BadInput("offsets with images", ValueError, "offsets", GOOD, {"offsets": torch.tensor([0, 2])}),
        BadInput("float offsets", TypeError, "offsets", GOOD_POINTS, {"offsets": torch.tensor([0.0, 10.0])}),
        BadInput("offsets rank", ValueError, "offsets", GOOD_POINTS, {"offsets": torch.tensor([[0, 10]])}),
        BadInput("offsets end", ValueError, "offsets", GOOD_POINTS, {"offsets": torch.tensor([0, 9])}, "10"),
        BadInput(
            "offsets past the end",
            ValueError,
            "offsets",
            GOOD_POINTS,
            {"offsets": torch.tensor([0, 99])},
            "99",
        ),
        BadInput("offsets start", ValueError, "offsets", GOOD_POINTS, {"offsets": torch.tensor([1, 10])}),
        BadInput(
            "offsets fall", ValueError, "offsets", GOOD_POINTS, {"offsets": torch.tensor([0, 8, 4, 10])}
        ),
        BadInput(
            "no offsets", ValueError, "offsets", GOOD_POINTS, {"offsets": torch.zeros(0, dtype=torch.int64)}
        ),
        BadInput("norm", ValueError, "norm", GOOD, {"norm": 3}, "3"),
        BadInput("norm as text", ValueError, "norm", GOOD, {"norm": "2"}),
        BadInput("variance", ValueError, "variance", GOOD, {"variance": "image"}, "image"),
        BadInput("large background", ValueError, "background", GOOD, {"background": 2**63}, str(2**63)),
        BadInput("float background", TypeError, "background", GOOD, {"background": 0.5}),
        BadInput("float ignore_index", TypeError, "ignore_index", GOOD, {"ignore_index": 255.0}),
        BadInput("no capacity", ValueError, "max_instances", GOOD, {"max_instances": 0}, "0"),
        BadInput("float capacity", TypeError, "max_instances", GOOD, {"max_instances": 5.0}, "float"),
    ]
    for name in ("delta_var", "delta_dist"):
        cases += [
            BadInput(f"negative {name}", ValueError, name, GOOD, {name: -0.1}, "-0.1"),
            BadInput(f"zero {name}", ValueError, name, GOOD, {name: 0.0}, "0"),
            BadInput(f"NaN {name}", ValueError, name, GOOD, {name: float("nan")}, "nan"),
            BadInput(f"infinite {name}", ValueError, name, GOOD, {name: float("inf")}, "inf"),
            BadInput(f"{name} as text", TypeError, name, GOOD, {name: "0.5"}, "str"),
        ]
    return cases


def _loss_cases() -> list[BadInput]:
    return [
        BadInput("reduction", ValueError, "reduction", GOOD, {"reduction": "max"}, "max"),
        BadInput("negative push", ValueError, "background_push", GOOD, {"background_push": -1.0}),
        BadInput("infinite alpha", ValueError, "alpha", GOOD, {"alpha": float("inf")}),
        BadInput("beta as text", TypeError, "beta", GOOD, {"beta": "1"}),
        BadInput("NaN gamma", ValueError, "gamma", GOOD, {"gamma": float("nan")}),
    ]


BAD_INPUT = {
    "discriminative_terms": _discriminative_cases(),
    "discriminative_loss": _discriminative_cases() + _loss_cases(),
}
