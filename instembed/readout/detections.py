"""Label maps as lists of detections, in the form that evaluators and torchvision's users take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from instembed import _arguments as arguments
from instembed._native import core, threads
from instembed.grouping import Grouping, SeededGrouping
from instembed.readout.label_statistics import label_statistics

PerInstance = Tensor | Sequence[Tensor] | None


def detections(
    grouping_or_labels: Grouping | SeededGrouping | Tensor,
    scores: PerInstance = None,
    classes: PerInstance = None,
    masks: bool = True,
    rle: bool = False,
    *,
    background: int | None = 0,
    ignore_index: int | None = None,
) -> list[dict[str, Any]]:
    """One dict an image, as torchvision's detection models return them.

    Args:
        grouping_or_labels: a ``Grouping`` or ``SeededGrouping`` with labels (B, H, W), or labels (B, H, W) or
            (H, W) of any integer dtype, any ids and any strides.
        scores, classes: of each instance: (B, C) with at least as many columns as an image has instances, or
            a list of B tensors (K_b,), or None. For (H, W) labels (C,) will do. Row k - 1 belongs to instance
            k of a Grouping, and for labels the rows are their ids in ascending order, as in
            :func:`instembed.label_statistics`. Scores are floating point, classes integer.
        masks: give masks, one byte a pixel and instance.
        rle: give COCO run lengths, encoded from the label map in one pass without building masks. The CPU
            does it: labels on a GPU are copied.
        background, ignore_index: ids that are no instance; None for background makes 0 one.

    Returns:
        A list of B dicts, on the labels' device, of the K instances with pixels, in ascending order of id:

        - ``boxes`` (K, 4) float32: (x1, y1, x2, y2) in pixels, x2 and y2 one past the last pixel;
        - ``labels`` (K,) int64: the classes, those of a SeededGrouping or 1 where none are given;
        - ``scores`` (K,) float32: likewise;
        - ``masks`` (K, H, W) bool, with ``masks=True``;
        - ``rle``, with ``rle=True``: K dicts ``{"size": [H, W], "counts": bytes}``, as pycocotools encodes.

        An instance of a Grouping that has no pixel is left out together with its score and class. Nothing
        has a gradient. On a GPU the host waits for the result.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value.
    """
    labels, expected = _labels_of(grouping_or_labels)
    if isinstance(grouping_or_labels, SeededGrouping):
        scores = grouping_or_labels.scores if scores is None else scores
        classes = grouping_or_labels.classes if classes is None else classes
    arguments.check_bool("masks", masks)
    arguments.check_bool("rle", rle)
    if labels.dim() == 2:
        labels = labels[None]
        scores = scores[None] if isinstance(scores, Tensor) and scores.dim() == 1 else scores
        classes = classes[None] if isinstance(classes, Tensor) and classes.dim() == 1 else classes
    found = label_statistics(
        labels, background=background, ignore_index=ignore_index, max_instances=_room_for(labels)
    )
    ids = [row[:n] for row, n in zip(found.ids, found.num_instances.tolist(), strict=True)]
    numbers = [len(row) for row in ids] if expected is None else expected
    rows = [torch.arange(len(row), device=labels.device) for row in ids]
    if expected is not None:
        rows = [_grouping_rows(row, n) for row, n in zip(ids, numbers, strict=True)]
    all_scores = _per_instance("scores", scores, numbers, labels)
    all_classes = _per_instance("classes", classes, numbers, labels)

    result = []
    for b, image in enumerate(labels):
        count = len(ids[b])
        entry: dict[str, Any] = {
            "boxes": found.boxes[b, :count],
            "labels": torch.ones_like(ids[b]) if all_classes is None else all_classes[b][rows[b]],
            "scores": found.boxes.new_ones(count) if all_scores is None else all_scores[b][rows[b]],
        }
        if masks:
            entry["masks"] = _masks(image, ids[b])
        if rle:
            entry["rle"] = _run_lengths(image, ids[b])
        result.append(entry)
    return result


def coco_results(detections: Sequence[dict[str, Any]], image_ids: Sequence[int]) -> list[dict[str, Any]]:
    """The rows that ``pycocotools.coco.COCO.loadRes`` takes, one a detection.

    Args:
        detections: one dict an image, as :func:`detections` returns.
        image_ids: the dataset's id of each of these images.

    Returns:
        Dicts of ``image_id``, ``category_id``, ``score`` and, where the detections have ``rle``,
        ``segmentation`` (from which COCO derives the box too), otherwise ``bbox`` as (x, y, width, height).
        The counts of a segmentation are bytes, as pycocotools has them: decode them before writing JSON.

    Raises:
        ValueError: ``image_ids`` has another length than ``detections``.
    """
    if len(image_ids) != len(detections):
        raise ValueError(f"image_ids must name {len(detections)} images, got {len(image_ids)}")
    rows = []
    for image_id, found in zip(image_ids, detections, strict=True):
        sizes = found["boxes"][:, 2:] - found["boxes"][:, :2]
        places = torch.cat([found["boxes"][:, :2], sizes], dim=1).tolist()
        for k, (category, score) in enumerate(
            zip(found["labels"].tolist(), found["scores"].tolist(), strict=True)
        ):
            row = {"image_id": image_id, "category_id": category, "score": score}
            rows.append(row | ({"segmentation": found["rle"][k]} if "rle" in found else {"bbox": places[k]}))
    return rows


def _labels_of(value: Grouping | SeededGrouping | Tensor) -> tuple[Tensor, list[int] | None]:
    """The label maps, and for a Grouping the number of its instances in each image."""
    if isinstance(value, (Grouping, SeededGrouping)):
        if value.labels.dim() != 3:
            raise ValueError(
                f"grouping_or_labels must have labels (B, H, W), got shape {tuple(value.labels.shape)}"
            )
        numbers = value.num_instances.tolist()
        if isinstance(value, Grouping) and not all(0 <= n <= value.counts.shape[1] for n in numbers):
            raise ValueError(
                f"grouping_or_labels did not fit: it has num_instances {numbers} and "
                f"{value.counts.shape[1]} rows. Group with a larger max_instances"
            )
        return value.labels, numbers
    labels = arguments.check_integer_tensor("grouping_or_labels", value)
    if labels.dim() not in (2, 3):
        raise ValueError(f"grouping_or_labels must be (B, H, W) or (H, W), got shape {tuple(labels.shape)}")
    return labels, None


def _room_for(labels: Tensor) -> int | None:
    """The capacity to tell label_statistics on a GPU: ids are counted, as the host waits anyway."""
    if labels.device.type == "cpu":
        return None
    return max([1, *(len(image.to(torch.int64).unique()) for image in labels)])


def _grouping_rows(ids: Tensor, number: int) -> Tensor:
    if len(ids) and not 1 <= int(ids[0]) <= int(ids[-1]) <= number:
        raise ValueError(
            f"grouping_or_labels has num_instances {number} for an image with labels from {int(ids[0])} to "
            f"{int(ids[-1])}"
        )
    return ids - 1


def _per_instance(name: str, values: PerInstance, numbers: list[int], labels: Tensor) -> list[Tensor] | None:
    """Values of the instances of each image, in the dtype of a detection."""
    if values is None:
        return None
    if isinstance(values, Tensor):
        if values.dim() != 2 or values.shape[0] != len(numbers) or values.shape[1] < max(numbers, default=0):
            raise ValueError(
                f"{name} must have shape ({len(numbers)}, {max(numbers, default=0)} or more), "
                f"got {tuple(values.shape)}"
            )
    elif not isinstance(values, (list, tuple)):
        raise TypeError(f"{name} must be a tensor, a list of tensors or None, got {type(values).__name__}")
    elif len(values) != len(numbers):
        raise ValueError(f"{name} must have one tensor for each of {len(numbers)} images, got {len(values)}")
    for image, (row, number) in enumerate(zip(values, numbers, strict=True)):
        arguments.check_tensor(f"{name}[{image}]", row)
        if not isinstance(values, Tensor) and row.shape != (number,):
            raise ValueError(f"{name}[{image}] must have shape ({number},), got {tuple(row.shape)}")
    return [_converted(f"{name}[{b}]", row, labels, name == "scores") for b, row in enumerate(values)]


def _converted(name: str, row: Tensor, labels: Tensor, floating: bool) -> Tensor:
    allowed = arguments.FLOATING if floating else arguments.INTEGER
    if row.dtype not in allowed:
        raise TypeError(
            f"{name} must have {'a floating' if floating else 'an integer'} dtype, got {row.dtype}"
        )
    arguments.check_same_device(name, row, "labels", labels)
    return row.detach().to(torch.float32 if floating else torch.int64)


def _masks(labels: Tensor, ids: Tensor) -> Tensor:
    """(H, W), (K,) -> (K, H, W)."""
    if labels.device.type != "cpu":
        return labels.to(torch.int64) == ids[:, None, None]
    masks = torch.empty((len(ids), *labels.shape), dtype=torch.bool)
    core.fill_masks(labels, ids, masks, threads=threads())
    return masks


def _run_lengths(labels: Tensor, ids: Tensor) -> list[dict[str, Any]]:
    counts = core.encode_masks(labels.cpu(), ids.cpu(), threads=threads())
    return [{"size": list(labels.shape), "counts": text} for text in counts]
