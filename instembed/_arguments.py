"""Checks of public arguments, the same for every op: the message names the argument and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGER = tuple(
    getattr(torch, name)
    for name in ("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64")
    if hasattr(torch, name)
)
_INT64 = (-(2**63), 2**63 - 1)


def check_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    return value


def check_floating_tensor(name: str, value: object) -> Tensor:
    tensor = check_tensor(name, value)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float32, float64, float16 or bfloat16, got {tensor.dtype}")
    return tensor


def check_number_tensor(name: str, value: object) -> Tensor:
    """Of a floating or an integer dtype."""
    tensor = check_tensor(name, value)
    if tensor.dtype not in FLOATING + INTEGER:
        raise TypeError(f"{name} must have a floating or integer dtype, got {tensor.dtype}")
    return tensor


def check_flags(name: str, value: object) -> Tensor:
    """Bool, or of an integer dtype where greater than 0 means true."""
    tensor = check_tensor(name, value)
    if tensor.dtype != torch.bool and tensor.dtype not in INTEGER:
        raise TypeError(f"{name} must be bool or have an integer dtype, got {tensor.dtype}")
    return tensor


def check_embeddings(name: str, value: object, *, points: bool) -> Tensor:
    """(B, D, *spatial) with 1 to 3 spatial dimensions, or (N, D) where points are allowed."""
    tensor = check_floating_tensor(name, value)
    if tensor.dim() == 2 and points:
        if tensor.shape[1] < 1:
            raise ValueError(f"{name} must have at least one channel, got shape {tuple(tensor.shape)}")
        return tensor
    if not 3 <= tensor.dim() <= 5:
        expected = "(B, D, *spatial) with 1 to 3 spatial dimensions" + (", or (N, D)" if points else "")
        raise ValueError(f"{name} must be {expected}, got shape {tuple(tensor.shape)}")
    if tensor.shape[1] < 1:
        raise ValueError(f"{name} must have at least one channel, got shape {tuple(tensor.shape)}")
    return tensor


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name} and {other_name} must be on one device, got {value.device} and {other.device}"
        )


def check_pixels(name: str, value: Tensor, embeddings: Tensor, of: str = "embeddings") -> None:
    """One value for each pixel of embeddings: (B, *spatial), or (N,). `of` is what the user calls them."""
    points = embeddings.dim() == 2
    expected = embeddings.shape[:1] if points else embeddings.shape[:1] + embeddings.shape[2:]
    if value.shape != expected:
        raise ValueError(
            f"{name} must have shape {tuple(expected)} for {of} of shape {tuple(embeddings.shape)}, "
            f"got {tuple(value.shape)}"
        )
    check_same_device(name, value, of, embeddings)


def check_integer_tensor(name: str, value: object) -> Tensor:
    tensor = check_tensor(name, value)
    if tensor.dtype not in INTEGER:
        raise TypeError(f"{name} must have an integer dtype, got {tensor.dtype}")
    return tensor


def check_valid(valid: object, name: str, points: Tensor) -> Tensor:
    """One flag for each of points (B, *P, S), which the user calls `name`."""
    tensor = check_flags("valid", valid)
    if tensor.shape != points.shape[:-1]:
        raise ValueError(
            f"valid must have shape {tuple(points.shape[:-1])} for {name} of shape {tuple(points.shape)}, "
            f"got {tuple(tensor.shape)}"
        )
    check_same_device("valid", tensor, name, points)
    return tensor


def check_offsets(offsets: object, points: Tensor, of: str = "embeddings") -> Tensor | None:
    """(B + 1,) offsets into (N, D) points. Values are checked by the kernel, once it may read them."""
    if offsets is None:
        return None
    tensor = check_integer_tensor("offsets", offsets)
    if points.dim() != 2:
        raise ValueError(f"offsets go with points (N, D), got {of} of shape {tuple(points.shape)}")
    if tensor.dim() != 1 or tensor.shape[0] < 1:
        raise ValueError(f"offsets must have shape (B + 1,), got {tuple(tensor.shape)}")
    check_same_device("offsets", tensor, of, points)
    return tensor.to(torch.int64).contiguous()


def check_number(
    name: str, value: object, *, above: float | None = None, at_least: float | None = None
) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    number = float(value)
    if not abs(number) < math.inf:  # not isfinite: torch.compile makes floats symbolic
        raise ValueError(f"{name} must be finite, got {value}")
    if above is not None and not number > above:
        raise ValueError(f"{name} must be greater than {above:g}, got {value}")
    if at_least is not None and not number >= at_least:
        raise ValueError(f"{name} must be at least {at_least:g}, got {value}")
    return number


def check_integer(name: str, value: object, *, at_least: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    if not _INT64[0] <= value <= _INT64[1]:
        raise ValueError(f"{name} must fit 64 bits, got {value}")
    return value


def check_capacity(name: str, value: object) -> int:
    """Rows of a table. The core counts instances in 32 bits."""
    capacity = check_integer(name, value, at_least=1)
    if capacity >= 2**31:
        raise ValueError(f"{name} must be below 2^31, got {capacity}")
    return capacity


def check_label_id(name: str, value: object) -> int | None:
    return None if value is None else check_integer(name, value)


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def check_generator(generator: object, device: torch.device) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if generator.device.type != device.type:
        raise ValueError(f"generator must be of the labels' device, {device}, got one of {generator.device}")


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if isinstance(value, (bool, Tensor)) or value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {expected}, got {value!r}")


def check_indices(name: str, value: object, count: int) -> tuple[int, ...]:
    """Integers from 0 to count - 1, in a list or tuple."""
    indices = check_sequence(name, value)
    for index in indices:
        if not 0 <= check_integer(name, index) < count:
            raise ValueError(f"{name} must be from 0 to {count - 1}, got {index}")
    return indices


def check_sequence(name: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list or tuple, got {type(value).__name__}")
    return tuple(value)
