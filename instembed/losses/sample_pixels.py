"""Random pixels of each instance, for losses that look at pairs of pixels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from instembed import _arguments as arguments
from instembed import _native, _ops
from instembed._native import core, threads
from instembed._pixels import cuda_capacity, fake_capacity


class SampledPixels(NamedTuple):
    """Some pixels of each instance."""

    indices: Tensor
    """(B, C, K) int64: pixels over the flattened spatial dimensions in ascending order, of points over all N;
    -1 beyond an instance's pixels and an image's instances."""
    valid: Tensor
    """(B, C, K) bool: where there is a pixel."""


def sample_pixels(
    labels: Tensor,
    samples: int,
    *,
    background: int | None = 0,
    ignore_index: int | None = None,
    offsets: Tensor | None = None,
    generator: torch.Generator | None = None,
    max_instances: int | None = None,
) -> SampledPixels:
    r"""Draws pixels of each instance, uniformly and without replacement.

    An instance of at least ``samples`` pixels gives exactly ``samples`` of them, each set of as many with the
    same probability. A smaller one gives all its pixels, each once. Every pixel has a random key, a
    hash of its place and of a random word of its image, and those with the smallest keys are taken: labels
    are read once, whatever the number of instances.

    Args:
        labels: (B, *spatial) with 1 to 3 spatial dimensions, or (N,) points, of any integer dtype and any
            value. Ids are per image.
        samples: K, at least 1 (Fathi et al. 2017: 16).
        background: the id that is no instance; None makes 0 an instance like any other.
        ignore_index: another id that is no instance, for example 255.
        offsets: (B + 1,) for points: image b is points ``offsets[b]:offsets[b + 1]``. None is one image.
        generator: of the labels' device, where the random words come from; None is torch's default. The same
            state gives the same pixels, on any number of threads.
        max_instances: capacity C of the outputs. None: the largest number found in an image; on a GPU, where
            that would make the host wait, a 16th of the pixels, 64 to 4096.

    Returns:
        :class:`SampledPixels` ``(indices, valid)``: instances in ascending order of id, as in
        :func:`instance_pool`, and the pixels of each in ascending order. ``indices.flatten(1)`` are seeds for
        :func:`seediness_loss`.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value, or an image has
            more instances than ``max_instances``. On a GPU such an image's indices are all -2, and its loss
            is NaN; see :func:`set_overflow_checks`.
    """
    arguments.check_integer_tensor("labels", labels)
    if not 1 <= labels.dim() <= 4:
        raise ValueError(
            "labels must be (B, *spatial) with 1 to 3 spatial dimensions, or (N,), "
            f"got shape {tuple(labels.shape)}"
        )
    if offsets is not None and labels.dim() != 1:
        raise ValueError(f"offsets go with labels (N,), got labels of shape {tuple(labels.shape)}")
    offsets = arguments.check_offsets(offsets, labels[:, None] if offsets is not None else labels)
    arguments.check_capacity("samples", samples)
    if max_instances is not None:
        arguments.check_capacity("max_instances", max_instances)
    indices, valid = torch.ops.instembed.sample_pixels(
        labels,
        random_words(labels, offsets, generator),
        offsets,
        samples,
        max_instances,
        arguments.check_label_id("background", background),
        arguments.check_label_id("ignore_index", ignore_index),
    )
    return SampledPixels(indices, valid)


def random_words(labels: Tensor, offsets: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """(B,) int64, one for each image."""
    arguments.check_generator(generator, labels.device)
    words: Tensor = torch.randint(
        -(2**63), 2**63 - 1, (_images(labels, offsets),), generator=generator, device=labels.device
    )
    return words


def _images(labels: Tensor, offsets: Tensor | None) -> int:
    if labels.dim() != 1:
        return labels.shape[0]
    return 1 if offsets is None else offsets.shape[0] - 1


_ops.define(
    "sample_pixels(Tensor labels, Tensor words, Tensor? offsets, SymInt samples, SymInt? max_instances, "
    "int? background, int? ignore_index) -> (Tensor indices, Tensor valid)"
)


def _new_outputs(words: Tensor, samples: int, capacity: Any) -> tuple[Tensor, Tensor]:
    indices = words.new_empty((words.shape[0], capacity, samples))
    return indices, torch.empty_like(indices, dtype=torch.bool)


@_ops.cpu("sample_pixels")
def _sample_cpu(
    labels: Tensor,
    words: Tensor,
    offsets: Tensor | None,
    samples: int,
    max_instances: int | None,
    background: int | None,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor]:
    instances = core.SampleInstances(
        labels[None] if labels.dim() == 1 else labels.flatten(1),
        offsets,
        background=background,
        ignore_index=ignore_index,
        threads=threads(),
    )
    if max_instances is not None and instances.largest > max_instances:
        raise ValueError(
            f"max_instances={max_instances} is too small: an image has {instances.largest} instances"
        )
    outputs = _new_outputs(words, samples, instances.largest if max_instances is None else max_instances)
    instances.sample(words.contiguous(), *outputs, threads=threads())
    return outputs


@_ops.cuda("sample_pixels")
def _sample_cuda(
    labels: Tensor,
    words: Tensor,
    offsets: Tensor | None,
    samples: int,
    max_instances: int | None,
    background: int | None,
    ignore_index: int | None,
) -> tuple[Tensor, Tensor]:
    cuda_core = _native.cuda_core()
    capacity = cuda_capacity(labels[:, None], offsets, max_instances)
    indices, valid = _new_outputs(words, samples, capacity)
    flat = labels[None] if labels.dim() == 1 else labels.flatten(1)
    bytes_needed = cuda_core.sample_pixels_cuda_workspace(flat, offsets, capacity, samples)
    cuda_core.sample_pixels_cuda(
        flat,
        offsets,
        words.contiguous(),
        indices,
        valid,
        words.new_empty(bytes_needed, dtype=torch.uint8),
        background=background,
        ignore_index=ignore_index,
        stream=_native.stream_of(labels),
    )
    if _native.overflow_checks() and bool((indices < -1).any()):
        raise ValueError(
            f"max_instances={capacity} is too small: an image has more instances; or offsets do not rise "
            "from 0 to the number of points"
        )
    return indices, valid


@_ops.fake("sample_pixels")
def _sample_fake(
    labels: Tensor, words: Tensor, offsets: Tensor | None, samples: int, max_instances: int | None, *_: Any
) -> tuple[Tensor, Tensor]:
    return _new_outputs(words, samples, fake_capacity(labels[:, None], offsets, max_instances))


_ops.not_differentiable("sample_pixels")
