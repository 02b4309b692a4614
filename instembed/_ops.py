"""Registration of the ops: one library, and what their registrations share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library

_library = library.Library("instembed", "FRAGMENT")
define = _library.define


def cpu(name: str) -> Callable[..., Any]:
    """Decorates the CPU implementation of an op."""
    return library.impl(_library, name, "CPU")


cuda_kernels: dict[str, Callable[..., Any]] = {}
"""The CUDA implementations by op."""


def cuda(name: str) -> Callable[..., Any]:
    """Decorates the CUDA implementation of an op, for which its tensors' device is the current one."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def on_device(*args: Any) -> Any:
            tensors = [value for value in args if isinstance(value, Tensor)]
            devices = {tensor.device for tensor in tensors}
            if len(devices) > 1:
                found = " and ".join(sorted(map(str, devices)))
                raise ValueError(f"instembed::{name} takes tensors on one device, got {found}")
            # torch's guard: going back makes no context on a device that has none yet.
            with torch.cuda.device_of(tensors[0]):
                return function(*args)

        cuda_kernels[name] = function
        _library.impl(name, on_device, "CUDA")
        return function

    return register


def fake(name: str) -> Callable[..., Any]:
    """Decorates what gives an op's outputs their shapes, without data."""
    return library.register_fake(f"instembed::{name}", lib=_library)


def default_capacity(pixels: int) -> int:
    """Instances an image for which an op on a GPU has room if not told: a 16th of the pixels, 64 to 4096.

    A CUDA op cannot ask how many there are without making the host wait.
    """
    return min(4096, max(64, pixels // 16))


def capacity(max_instances: int | None) -> Any:
    """In a fake: the number of rows of a table of instances, which without a limit depends on the data."""
    return library.get_ctx().new_dynamic_size() if max_instances is None else max_instances


def differentiable(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None
) -> None:
    library.register_autograd(f"instembed::{name}", backward, setup_context=setup_context, lib=_library)


def not_differentiable(name: str) -> None:
    """Outputs require no gradient, whatever the inputs do."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output if isinstance(output, tuple) else (output,))
        ctx.inputs = len(inputs)

    def backward(ctx: Any, *_: Tensor | None) -> tuple[None, ...]:
        return (None,) * ctx.inputs

    differentiable(name, backward, setup_context)


def differentiable_once(backward_op: str, function: str) -> None:
    """Makes a backward op explain that it has no derivative itself."""

    def refuse(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError(
            f"instembed.{function} is differentiable once: its gradient has no derivative. "
            f"instembed.reference.{function} can be differentiated again."
        )

    differentiable(backward_op, refuse)
