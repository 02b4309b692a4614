"""Comparisons that several tests make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-11, torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Of gradients, relative to the largest."""


def assert_close(value: Tensor, expected: Tensor, tolerance: float, least: float = 0.0) -> None:
    """Relative to the largest value expected, or to `least` where all are smaller: zero but for rounding."""
    value, expected = value.cpu(), expected.cpu()
    assert value.isfinite().all()
    scale = max(expected.abs().max().item() if expected.numel() else 0.0, least)
    torch.testing.assert_close(value.double(), expected, rtol=0, atol=tolerance * scale + 1e-300)


def assert_compiles(step: Callable[[Tensor], Tensor], argument: Tensor) -> None:
    """A step of a training compiles without a graph break, to the same value and gradient, if it draws random
    numbers, the same ones."""
    torch._dynamo.reset()
    eager, compiled = (argument.detach().clone().requires_grad_() for _ in range(2))
    torch.manual_seed(0)
    expected = step(eager)
    expected.backward()
    torch.manual_seed(0)
    result = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled)
    result.backward()
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(compiled.grad, eager.grad)


def on_cpu(value: Any) -> Any:
    """A tensor, or those in a tuple or in options, on the CPU, where results are compared."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {name: on_cpu(option) for name, option in value.items()}
    if isinstance(value, tuple):
        values = map(on_cpu, value)
        return type(value)._make(values) if hasattr(value, "_make") else tuple(values)
    return value


def there(value: Any, device: str) -> Any:
    """Arguments with their tensors moved from the CPU to a device, where they lie in memory as they did."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or device == "cpu":
            return value
        if value.layout != torch.strided:
            return value.to(device)
        whole = value.untyped_storage().nbytes() // value.element_size()
        memory = value.detach().as_strided((whole,), (1,), 0).to(device)
        moved = memory.as_strided(value.shape, value.stride(), value.storage_offset())
        return moved.requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {name: there(item, device) for name, item in value.items()}
    return type(value)(there(item, device) for item in value) if type(value) in (tuple, list) else value


def as_on_cpu(found: Any, expected: Any) -> Any:
    """A result as the CPU gives it: a GPU's tables have room for more instances, which must hold zeros."""
    fields = []
    for table, right in zip(found, expected, strict=True):
        if table.device.type != "cpu" and table.dim() > 1 and table.shape != right.shape:
            rows = right.shape[1]
            assert not table[:, rows:].any()
            table = table[:, :rows]
        fields.append(table.cpu())
    return type(found)._make(fields)
