from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.cases.common import GOOD, BadInput, OpCases, random_embeddings, random_labels

_THRESHOLDS = [0.25, 0.5, 0.75, 0.9]


def _seeds(images: int, seeds: int, pixels: int) -> Tensor:
    return torch.randint(-1, pixels, (images, seeds))


def _seediness(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(*shape, dtype=dtype)


def _grown(embeddings: Tensor, seeds: int, mask: Tensor | None = None) -> tuple[Any, ...]:
    images, pixels = len(embeddings), embeddings.shape[2:].numel()
    scores = torch.rand(images, seeds)
    classes, radii = torch.ones(images, seeds, dtype=torch.int64), torch.rand(images, seeds).double()
    return (embeddings, mask, _seeds(images, seeds, pixels), scores, classes, radii, 2, 0.5)


OPCHECK: OpCases = {
    "instembed::seed_mask_iou": [
        lambda: (
            random_embeddings(2, 3, 5, 6).requires_grad_(),
            random_labels(2, 5, 6),
            _seeds(2, 7, 30),
            _THRESHOLDS,
            0,
            2,
        ),
        lambda: (
            random_embeddings(2, 3, 5, 6).contiguous(memory_format=torch.channels_last),
            random_labels(2, 5, 6).to(torch.uint8),
            _seeds(2, 7, 30),
            [0.5],
            None,
            None,
        ),
        lambda: (
            random_embeddings(1, 2, 3, 4, 5, dtype=torch.float64),
            random_labels(1, 3, 4, 5),
            _seeds(1, 4, 60),
            _THRESHOLDS,
            0,
            None,
        ),
        lambda: (
            random_embeddings(0, 3, 5, 6).half(),
            random_labels(0, 5, 6),
            _seeds(0, 7, 30),
            _THRESHOLDS,
            0,
            None,
        ),
    ],
    "instembed::select_seeds": [
        lambda: (random_embeddings(2, 3, 5, 6).requires_grad_(), _seediness(2, 5, 6), None, 8, 0.3, 0.0),
        lambda: (
            random_embeddings(2, 3, 5, 6).contiguous(memory_format=torch.channels_last),
            _seediness(2, 5, 6, dtype=torch.float64),
            random_labels(2, 5, 6) > 0,
            40,
            0.0,
            0.5,
        ),
        lambda: (random_embeddings(0, 3, 7).half(), _seediness(0, 7), None, 2, 0.3, 0.0),
    ],
    "instembed::grow_seeds": [
        lambda: _grown(random_embeddings(2, 3, 5, 6).requires_grad_(), 7),
        lambda: _grown(random_embeddings(2, 3, 5, 6).half(), 4, random_labels(2, 5, 6) > 0),
        lambda: _grown(random_embeddings(1, 2, 3, 4, 5, dtype=torch.float64), 3),
        lambda: _grown(random_embeddings(0, 3, 5, 6), 3),
    ],
}

_EMBEDDINGS, _LABELS = GOOD  # (2, 3, 4, 5), (2, 4, 5)
_SEEDS = torch.zeros(2, 3, dtype=torch.int64)
_SCORES = torch.ones(2, 4, 2, 4, 5)  # T = 4, C = 1


def _embedding_cases(*rest: Any) -> list[BadInput]:
    return [
        BadInput("no tensor", TypeError, "embeddings", ([1.0], *rest), shows="list"),
        BadInput("integer embeddings", TypeError, "embeddings", (_EMBEDDINGS.int(), *rest), shows="int32"),
        BadInput("points", ValueError, "embeddings", (torch.zeros(10, 3), *rest), shows="(10, 3)"),
        BadInput("no channel", ValueError, "embeddings", (_EMBEDDINGS[:, :0], *rest), shows="(2, 0, 4, 5)"),
    ]


def _threshold_cases(arguments: tuple[Any, ...], options: dict[str, Any]) -> list[BadInput]:
    wrong: list[tuple[Any, type[Exception], str]] = [
        ((), ValueError, "none"),
        ((0.0,), ValueError, "0.0"),
        ((0.5, 1.5), ValueError, "1.5"),
        ((-0.1,), ValueError, "-0.1"),
        ((float("nan"),), ValueError, "nan"),
        (("0.5",), TypeError, "str"),
        (0.5, TypeError, "float"),
    ]
    return [
        BadInput(f"thresholds {v!r}", error, "thresholds", arguments, options | {"thresholds": v}, shows)
        for v, error, shows in wrong
    ]


def _seed_cases(arguments: tuple[Any, ...]) -> list[BadInput]:
    wrong: list[tuple[str, Any, type[Exception], str]] = [
        ("list", [[0]], TypeError, "list"),
        ("float", _SEEDS.float(), TypeError, "float32"),
        ("int32", _SEEDS.int(), TypeError, "int32"),
        ("rank", _SEEDS[0], ValueError, "(3,)"),
        ("batch", _SEEDS[:1], ValueError, "(1, 3)"),
        ("device", _SEEDS.to("meta"), ValueError, "meta"),
        ("beyond", _SEEDS + 20, ValueError, "20"),
        ("below", _SEEDS - 2, ValueError, "-2"),
    ]
    return [
        BadInput(f"seeds {name}", error, "seeds", arguments, {"seeds": value}, shows)
        for name, value, error, shows in wrong
    ]


def _iou_cases() -> list[BadInput]:
    good = (_EMBEDDINGS, _LABELS, _SEEDS)
    return [
        *_embedding_cases(_LABELS, _SEEDS),
        *_seed_cases(good[:2]),
        *_threshold_cases(good, {}),
        BadInput("float labels", TypeError, "labels", (_EMBEDDINGS, _LABELS.float(), _SEEDS), shows="float"),
        BadInput("labels", ValueError, "labels", (_EMBEDDINGS, _LABELS[:1], _SEEDS), shows="(1, 4, 5)"),
        BadInput("background", TypeError, "background", good, {"background": 0.5}, "float"),
        BadInput("ignore_index", ValueError, "ignore_index", good, {"ignore_index": 2**63}, str(2**63)),
    ]


def _loss_cases() -> list[BadInput]:
    good, seeds = (_SCORES, _EMBEDDINGS, _LABELS), {"seeds": _SEEDS}
    ones = torch.ones_like(_LABELS)
    of_instances = (_SCORES, _EMBEDDINGS, ones)
    classes = [
        ("list", [1], TypeError, "list"),
        ("float", ones.float(), TypeError, "float32"),
        ("shape", ones[:, :2], ValueError, "(2, 2, 5)"),
        ("0", 0 * ones, ValueError, "0"),
        ("beyond", 2 * ones, ValueError, "2"),
    ]
    return [
        *_seed_cases(good),
        *_threshold_cases(good, seeds),
        BadInput("no logits", TypeError, "logits", (None, *good[1:]), seeds, "NoneType"),
        BadInput("integer logits", TypeError, "logits", (_SCORES.int(), *good[1:]), seeds, "int32"),
        BadInput("logits rank", ValueError, "logits", (_SCORES[:, 0], *good[1:]), seeds, "(2, 2, 4, 5)"),
        BadInput("one class", ValueError, "logits", (_SCORES[:, :, :1], *good[1:]), seeds, "(2, 4, 1,"),
        BadInput("logits size", ValueError, "logits", (_SCORES[..., 1:], *good[1:]), seeds, "4, 4)"),
        BadInput("logits thresholds", ValueError, "logits", (_SCORES[:, :3], *good[1:]), seeds, "(2, 3,"),
        BadInput("reduction", ValueError, "reduction", good, seeds | {"reduction": "max"}, "max"),
        BadInput("iou", ValueError, "iou", good, seeds | {"iou": -0.5}, "-0.5"),
        *(
            BadInput(f"classes {name}", error, "classes", of_instances, seeds | {"classes": value}, shows)
            for name, value, error, shows in classes
        ),
    ]


def _mask_and_choice_cases(arguments: tuple[Any, ...]) -> list[BadInput]:
    wrong: list[tuple[str, Any, type[Exception], str]] = [
        ("mask", [1], TypeError, "list"),
        ("mask", torch.ones(2, 4, 5), TypeError, "float32"),
        ("mask", torch.ones(2, 4, 4, dtype=torch.bool), ValueError, "(2, 4, 4)"),
        ("diversity", -0.3, ValueError, "-0.3"),
        ("diversity", float("nan"), ValueError, "nan"),
        ("diversity", "1", TypeError, "str"),
        ("min_seediness", float("inf"), ValueError, "inf"),
        ("min_seediness", None, TypeError, "NoneType"),
        ("num_seeds", 0, ValueError, "0"),
        ("num_seeds", 2.0, TypeError, "float"),
    ]
    return [
        BadInput(f"{name} {value!r}", error, name, arguments, {"num_seeds": 3} | {name: value}, shows)
        for name, value, error, shows in wrong
    ]


def _select_cases() -> list[BadInput]:
    values = torch.ones(2, 4, 5)
    return [
        *_embedding_cases(values, 3),
        *_mask_and_choice_cases((_EMBEDDINGS, values)),
        BadInput("integer seediness", TypeError, "seediness", (_EMBEDDINGS, _LABELS, 3), shows="int64"),
        BadInput("seediness", ValueError, "seediness", (_EMBEDDINGS, values[:, :3], 3), shows="(2, 3, 5)"),
        BadInput("seediness device", ValueError, "seediness", (_EMBEDDINGS, values.to("meta"), 3)),
    ]


def _grow_cases() -> list[BadInput]:
    good = (_EMBEDDINGS, _SCORES)
    return [
        *_embedding_cases(_SCORES),
        *_mask_and_choice_cases(good),
        *_threshold_cases(good, {}),
        BadInput("integer seediness", TypeError, "seediness", (_EMBEDDINGS, _SCORES.int()), shows="int32"),
        BadInput("one map", ValueError, "seediness", (_EMBEDDINGS, _SCORES[:, 0, 0]), shows="(2, 4, 5)"),
        BadInput("no class", ValueError, "seediness", (_EMBEDDINGS, _SCORES[:, :, :1]), shows="(2, 4, 1"),
        BadInput("min_size", ValueError, "min_size", good, {"min_size": 0}, "0"),
        BadInput("float min_size", TypeError, "min_size", good, {"min_size": 2.0}, "float"),
        BadInput("overlap", ValueError, "overlap", good, {"overlap": 1.5}, "1.5"),
        BadInput("overlap as text", TypeError, "overlap", good, {"overlap": "1"}, "str"),
    ]


BAD_INPUT = {
    "seed_mask_iou": _iou_cases(),
    "seediness_loss": _loss_cases(),
    "select_seeds": _select_cases(),
    "grow_seeds": _grow_cases(),
}
