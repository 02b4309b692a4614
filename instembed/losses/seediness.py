"""Seediness: which pixels make good seeds (Fathi et al. 2017, arXiv 1703.10277)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from instembed import _arguments as arguments
from instembed import _native, _ops
from instembed._native import core, threads
from instembed._pixels import accumulation_dtype, at_pixels, flat_embeddings, flat_pixels
from instembed._similarity import THRESHOLDS, check_logits, check_thresholds, squared_radii
from instembed.losses._weighting import Reduction, reduced
from instembed.losses.sample_pixels import sample_pixels


def seed_mask_iou(
    embeddings: Tensor,
    labels: Tensor,
    seeds: Tensor,
    thresholds: Sequence[float] = THRESHOLDS,
    *,
    background: int | None = 0,
    ignore_index: int | None = None,
) -> Tensor:
    r"""How well the masks that grow from seeds match the instances that the seeds lie in.

    The mask of a seed p at a threshold tau is every pixel q with ``sigma(p, q) >= tau``, where
    ``sigma(p, q) = 2 / (1 + exp(|e_p - e_q|^2))``, that is ``|e_p - e_q|^2 <= log(2 - tau) - log(tau)``.
    Its intersection over union with the pixels that carry p's label is what seediness is trained on.

    Pixels are read once, whatever the number of seeds; memory beyond the inputs grows with S T.

    Args:
        embeddings: (B, D, *spatial) with 1 to 3 spatial dimensions, contiguous or channels-last (neither is
            copied). float32, float64, float16 or bfloat16.
        labels: (B, *spatial) instance ids of any integer dtype and any value. Ids are per image.
        seeds: (B, S) int64 pixels, counted over the flattened spatial dimensions; -1 is no seed.
        thresholds: T similarities in (0, 1], in any order (paper: 0.25, 0.5, 0.75, 0.9).
        background: the id that is no instance, whose pixels count where a mask covers them; None makes 0
            an instance like any other.
        ignore_index: the id of pixels that count nowhere, for example 255. None: there is none.

    Returns:
        (B, S, T) float32 (float64 for float64 embeddings), no gradient. 0 for a seed that is -1, on the
        background or on an ignored pixel. A pixel with a NaN or an infinity is in no mask, and a seed with
        one has none. Squared distances are in float64 with the channels added in order: a pixel is in a
        mask or not, on any machine and any number of threads.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value. On a GPU seeds
            outside of the image give NaN.
    """
    arguments.check_embeddings("embeddings", embeddings, points=False)
    arguments.check_integer_tensor("labels", labels)
    arguments.check_pixels("labels", labels, embeddings)
    _check_seeds(seeds, embeddings)
    iou: Tensor = torch.ops.instembed.seed_mask_iou(
        embeddings,
        labels,
        seeds,
        check_thresholds(thresholds),
        arguments.check_label_id("background", background),
        arguments.check_label_id("ignore_index", ignore_index),
    )
    return iou


def seediness_loss(
    logits: Tensor,
    embeddings: Tensor,
    labels: Tensor,
    *,
    classes: Tensor | None = None,
    seeds: Tensor | None = None,
    samples: int = 16,
    background_samples: int = 256,
    generator: torch.Generator | None = None,
    max_instances: int | None = None,
    thresholds: Sequence[float] = THRESHOLDS,
    iou: float = 0.5,
    background: int | None = 0,
    ignore_index: int | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Teaches a head which pixels make good seeds, at which threshold, and of which class.

    For each seed p and threshold tau a softmax cross-entropy over C + 1 classes. The target is the class of
    p's instance where the mask that grows from p at tau has an IoU of at least ``iou`` with the instance
    (:func:`seed_mask_iou`), and 0, background, elsewhere and for seeds on the background. An image's loss is
    the mean over its seeds and thresholds.

    Args:
        logits: (B, T, C + 1, *spatial), as :class:`SeedinessHead` gives them: class 0 is background. float32,
            float64, float16 or bfloat16.
        embeddings: (B, D, *spatial). They get no gradient from here: their masks make the targets.
        labels: (B, *spatial) instance ids of any integer dtype and any value.
        classes: (B, *spatial) of an integer dtype, 1 to C at the pixels of instances; only those of seeds are
            read. None: every instance is of class 1.
        seeds: (B, S) int64 pixels to train on, -1 for none. They should lie on the background too. None draws
            them with :func:`sample_pixels`: the next two numbers of pixels, with ``generator`` and
            ``max_instances`` as there.
        samples: of each instance (paper: 16).
        background_samples: of the background, in all. What is never trained to be background is
            seedy at inference.
        thresholds: T similarities in (0, 1] (paper: 0.25, 0.5, 0.75, 0.9).
        iou: the least IoU of a good mask (paper: 0.5).
        background: the id that is no instance; None makes 0 an instance like any other.
        ignore_index: the id of pixels that count in no mask; seeds on them are left out.
        reduction: "mean" or "sum" over the images, "none" for (B,). Images without seeds are 0.

    Returns:
        A float32 (float64 for float64 logits) scalar, or (B,) with ``reduction="none"``; differentiable any
        number of times with respect to ``logits``. The paper adds it to the loss of the embeddings with a
        weight that rises from 0 to 0.2 during training: :func:`seediness_weight`.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value. On a GPU seeds
            and classes that there are not give NaN.
    """
    arguments.check_embeddings("embeddings", embeddings, points=False)
    radii = len(check_thresholds(thresholds))
    check_logits("logits", logits, embeddings, radii)
    if seeds is None:
        arguments.check_integer_tensor("labels", labels)
        arguments.check_pixels("labels", labels, embeddings)
        drawn = sample_pixels(
            labels,
            samples,
            background=background,
            ignore_index=ignore_index,
            generator=generator,
            max_instances=max_instances,
        )
        seeds = drawn.indices.flatten(1)
        if arguments.check_integer("background_samples", background_samples, at_least=0):
            flags = torch.zeros_like(labels, dtype=torch.uint8)
            if background is not None and background != ignore_index:
                flags = (labels.to(torch.int64) == background).to(torch.uint8)
            outside = sample_pixels(flags, background_samples, generator=generator, max_instances=1)
            seeds = torch.cat([seeds, outside.indices.flatten(1)], dim=1)
    found = seed_mask_iou(
        embeddings, labels, seeds, thresholds, background=background, ignore_index=ignore_index
    )
    # Seeds and classes out of range are errors on the CPU. On a GPU, which cannot wait to find them, the loss
    # of their image is NaN, as where it has too many instances, whose pixels are -2.
    pixels = math.prod(labels.shape[1:])
    inside = (seeds >= 0) & (seeds < pixels)
    wrong = ((seeds < -1) | (seeds >= pixels)).any(1)
    places = torch.where(inside, seeds, -1)
    counted = inside
    if ignore_index is not None:
        counted = inside & (at_pixels(labels.flatten(1), places) != ignore_index)
    good = found >= arguments.check_number("iou", iou, at_least=0)  # (B, S, T)
    targets = good.to(torch.int64)
    if classes is not None:
        arguments.check_integer_tensor("classes", classes)
        arguments.check_pixels("classes", classes, embeddings)
        targets = targets * at_pixels(classes.flatten(1), places).to(torch.int64)[..., None]
        most = logits.shape[2] - 1
        none = good & counted[..., None] & ((targets < 1) | (targets > most))
        _check_classes(targets, none, most)
        wrong = wrong | none.flatten(1).any(1)
        targets = targets.clamp(0, most)
    at_seeds = at_pixels(logits.flatten(3), places)  # (B, T, C + 1, S)
    terms = F.cross_entropy(
        at_seeds.to(accumulation_dtype(logits)).transpose(1, 2), targets.transpose(1, 2), reduction="none"
    )  # (B, T, S)
    weights = counted[:, None].to(terms.dtype)
    losses = (terms * weights).sum((1, 2)) / (radii * weights.sum((1, 2))).clamp(min=1)
    losses = torch.where(wrong, torch.nan, losses)
    return reduced(losses, reduction)


def seediness_weight(step: int, steps: int, final: float = 0.2) -> float:
    """The weight of :func:`seediness_loss` at a step of a training: from 0 to ``final`` in ``steps`` steps.

    Masks of embeddings that are not trained yet teach a head nothing, so its weight rises linearly (paper:
    to 0.2). Raises ValueError or TypeError for negative steps and weights.
    """
    arguments.check_integer("step", step, at_least=0)
    arguments.check_integer("steps", steps, at_least=0)
    arguments.check_number("final", final, at_least=0)
    return final * min(1.0, step / steps) if steps > 0 else final


class SeedinessHead(nn.Module):
    """A convolution of size 1 from features to the logits of :func:`seediness_loss`.

    Args:
        channels: of the features, the embeddings for example.
        num_classes: C, 1 by default: every instance is of one class.
        thresholds: T similarities in (0, 1] (paper: 0.25, 0.5, 0.75, 0.9).
        dims: spatial dimensions of the features, 1 to 3.

    ``forward(features)`` takes (B, channels, *spatial) to (B, T, C + 1, *spatial); a softmax over dimension 2
    makes it the seediness that :func:`grow_seeds` takes.
    """

    def __init__(
        self, channels: int, num_classes: int = 1, *, thresholds: Sequence[float] = THRESHOLDS, dims: int = 2
    ) -> None:
        super().__init__()
        arguments.check_integer("channels", channels, at_least=1)
        self.num_classes = arguments.check_integer("num_classes", num_classes, at_least=1)
        self.thresholds = tuple(check_thresholds(thresholds))
        arguments.check_choice("dims", dims, (1, 2, 3))
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.convolution = convolution(channels, len(self.thresholds) * (num_classes + 1), 1)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.convolution(features)
        return logits.unflatten(1, (len(self.thresholds), self.num_classes + 1))


def _check_seeds(seeds: object, embeddings: Tensor) -> None:
    """(B, S) pixels. Values are checked by the kernel, once it may read them."""
    tensor = arguments.check_integer_tensor("seeds", seeds)
    if tensor.dtype != torch.int64:
        raise TypeError(f"seeds must be int64, got {tensor.dtype}")
    if tensor.dim() != 2 or tensor.shape[0] != embeddings.shape[0]:
        raise ValueError(
            f"seeds must be (B, S) with B = {embeddings.shape[0]} images, got shape {tuple(tensor.shape)}"
        )
    arguments.check_same_device("seeds", tensor, "embeddings", embeddings)


def _check_classes(targets: Tensor, none: Tensor, most: int) -> None:
    if torch.compiler.is_compiling() or targets.device.type != "cpu":
        return
    wrong = targets[none]
    if len(wrong):
        raise ValueError(
            f"classes must be from 1 to {most}, for logits of {most + 1} classes, got {int(wrong[0])}"
        )


_ops.define(
    "seed_mask_iou(Tensor embeddings, Tensor labels, Tensor seeds, float[] thresholds, int? background, "
    "int? ignore_index) -> Tensor"
)


def _new_iou(embeddings: Tensor, seeds: Tensor, thresholds: Sequence[float]) -> Tensor:
    return embeddings.new_empty((*seeds.shape, len(thresholds)), dtype=accumulation_dtype(embeddings))


@_ops.cpu("seed_mask_iou")
def _iou_cpu(
    embeddings: Tensor,
    labels: Tensor,
    seeds: Tensor,
    thresholds: Sequence[float],
    background: int | None,
    ignore_index: int | None,
) -> Tensor:
    iou = _new_iou(embeddings, seeds, thresholds)
    core.seed_mask_iou(
        flat_embeddings(embeddings),
        flat_pixels(labels, embeddings),
        seeds.contiguous(),
        squared_radii(thresholds),
        iou,
        background=background,
        ignore_index=ignore_index,
        threads=threads(),
    )
    return iou


@_ops.cuda("seed_mask_iou")
def _iou_cuda(
    embeddings: Tensor,
    labels: Tensor,
    seeds: Tensor,
    thresholds: Sequence[float],
    background: int | None,
    ignore_index: int | None,
) -> Tensor:
    cuda_core = _native.cuda_core()
    iou = _new_iou(embeddings, seeds, thresholds)
    flat, pixels = flat_embeddings(embeddings), seeds.contiguous()
    cuda_core.seed_mask_iou_cuda(
        flat,
        flat_pixels(labels, embeddings),
        pixels,
        squared_radii(thresholds),
        iou,
        embeddings.new_empty(cuda_core.seed_mask_iou_cuda_workspace(flat, pixels), dtype=torch.uint8),
        background=background,
        ignore_index=ignore_index,
        stream=_native.stream_of(embeddings),
    )
    return iou


@_ops.fake("seed_mask_iou")
def _iou_fake(
    embeddings: Tensor, labels: Tensor, seeds: Tensor, thresholds: Sequence[float], *_: int | None
) -> Tensor:
    return _new_iou(embeddings, seeds, thresholds)


_ops.not_differentiable("seed_mask_iou")
