"""What the cases of all ops share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

OpCases = dict[str, list[Callable[[], tuple[Any, ...]]]]


class BadInput(NamedTuple):
    id: str
    error: type[Exception]
    names: str  # the argument that the message must name
    arguments: tuple[Any, ...]
    options: dict[str, Any] = {}  # noqa: RUF012
    shows: str = ""  # what else the message must show: the value that came


def random_embeddings(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def random_labels(*shape: int) -> Tensor:
    return torch.randint(0, 4, shape)


def ragged() -> Tensor:
    """Offsets of 20 points in three images."""
    return torch.tensor([0, 3, 3, 20])


GOOD = (torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.int64))
GOOD_POINTS = (torch.zeros(10, 3), torch.zeros(10, dtype=torch.int64))
