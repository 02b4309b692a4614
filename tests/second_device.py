"""A device that is not there: tensors that say they are elsewhere, and refuse to meet those of the CPU.

Their device is "meta", which every build of torch has, and they hold CPU tensors that do the work. So code
that is told a device runs without one, and fails where it forgets it: two devices in one operation, or
NumPy's view of a tensor that is not the CPU's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}


class Elsewhere(Tensor):
    """Wraps a tensor of the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        tensor = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"Elsewhere({self.inner})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("a tensor of another device has no NumPy array")


@contextmanager
def second_device() -> Iterator[torch.device]:
    """Within it, tensors can be made on DEVICE and moved there and back."""
    with _Numbers(), _Operations():
        yield DEVICE


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Numbers(TorchFunctionMode):
    """Tensors of numbers, which are lost on "meta" before an operation is seen."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.new_tensor:
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(args[0].device)
        if func is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    if there and func not in COPIES:
        for tensor in tensors:  # torch takes scalars from the CPU
            assert isinstance(tensor, Elsewhere) or tensor.dim() == 0, f"{func}: a tensor of the CPU"
    inner_args, inner_kwargs = tree_map(
        lambda leaf: leaf.inner if isinstance(leaf, Elsewhere) else leaf, (args, kwargs)
    )
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]) == DEVICE
        inner_kwargs["device"] = torch.device("cpu")
    result = func(*inner_args, **inner_kwargs)
    if torch.Tag.inplace_view in func.tags:  # which has changed the shape of what is held
        with no_dispatch():
            func(*args, **kwargs)
    changed = [*zip(tree_leaves((inner_args, inner_kwargs)), tree_leaves((args, kwargs)), strict=True)]

    def outer(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        same = [before for inner, before in changed if inner is value]  # an operation in place
        return same[0] if same else Elsewhere(value) if there else value

    return tree_map(outer, result)
