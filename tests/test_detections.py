"""Detections against plain comparisons, and through the evaluators that people use."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

import instembed
from instembed import Grouping
from instembed._arguments import INTEGER
from tests.comparing import there
from tests.test_label_statistics import HUGE, blobs

pytestmark = pytest.mark.usefixtures("each_device")


def grouping_of(labels: Tensor, instances: list[int]) -> Grouping:
    capacity = max(instances, default=0)
    counts = torch.stack([torch.bincount(row, minlength=capacity + 1)[1:] for row in labels.flatten(1)])
    centers = torch.zeros(len(labels), capacity, 2)
    return Grouping(labels, centers, counts, torch.tensor(instances))


def encoded(masks: Tensor) -> list[dict[str, Any]]:
    """What pycocotools makes of (K, H, W) masks."""
    return [coco_mask.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8))) for mask in masks]


def assert_same_run_lengths(labels: Tensor, **options: Any) -> None:
    for found in instembed.detections(labels, rle=True, **options):
        assert found["rle"] == encoded(found["masks"])
        if found["rle"]:
            decoded = torch.from_numpy(coco_mask.decode(found["rle"])).permute(2, 0, 1)
            assert torch.equal(decoded.bool(), found["masks"].cpu())
            places = found["boxes"].clone()
            places[:, 2:] -= places[:, :2]
            assert coco_mask.toBbox(found["rle"]).tolist() == places.tolist()
            assert coco_mask.area(found["rle"]).tolist() == found["masks"].sum((1, 2)).tolist()


# The dicts --------------------------------------------------------------------------------------------------


def test_a_case_by_hand() -> None:
    labels = torch.tensor([[0, 9, 9, 0], [0, 9, 0, 0], [0, 0, 0, -4]])
    (found,) = instembed.detections(labels, scores=torch.tensor([0.25, 0.5]), rle=True)
    assert list(found) == ["boxes", "labels", "scores", "masks", "rle"]
    assert found["boxes"].tolist() == [[3, 2, 4, 3], [1, 0, 3, 2]]
    assert found["labels"].tolist() == [1, 1]
    assert found["scores"].tolist() == [0.25, 0.5]
    assert torch.equal(found["masks"], torch.stack([labels == -4, labels == 9]))
    # 11 zeros, 1 one; and 3 zeros, 2 ones, 1 zero, 1 one (written as 1 - 2), 5 zeros (written as 5 - 1).
    assert found["rle"] == [
        {"size": [3, 4], "counts": b";1"},
        {"size": [3, 4], "counts": b"321O4"},
    ]


@pytest.mark.parametrize("dtype", INTEGER, ids=str)
def test_dtypes_and_masks(dtype: torch.dtype) -> None:
    labels = blobs(2, 31, 45).to(dtype)
    for image, found in zip(labels, instembed.detections(labels), strict=True):
        ids = [i for i in image.to(torch.int64).unique().tolist() if i != 0]
        assert torch.equal(found["masks"], torch.stack([image.to(torch.int64) == i for i in ids]))
        assert {name: tensor.dtype for name, tensor in found.items()} == {
            "boxes": torch.float32,
            "labels": torch.int64,
            "scores": torch.float32,
            "masks": torch.bool,
        }


def test_background_and_ignored() -> None:
    labels = torch.tensor([[0, 1, 255, 2]], dtype=torch.uint8)
    (found,) = instembed.detections(labels, background=None, ignore_index=255, rle=True)
    assert found["boxes"][:, 0].tolist() == [0, 1, 3]
    assert found["rle"] == encoded(found["masks"])


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5), (2, 4, 0), (1, 3, 3)])
def test_nothing_there(shape: tuple[int, ...]) -> None:
    found = instembed.detections(torch.zeros(shape, dtype=torch.int32), rle=True)
    assert len(found) == shape[0]
    for entry in found:
        assert entry["boxes"].shape == (0, 4) and entry["masks"].shape == (0, *shape[1:])
        assert entry["labels"].shape == entry["scores"].shape == (0,) and entry["rle"] == []


def test_more_instances_than_a_gpu_has_room_for(overflow_checks: None) -> None:
    labels = torch.stack([torch.arange(200), torch.arange(200) % 3]).view(2, 10, 20)
    many, few = instembed.detections(labels, masks=False)
    assert many["boxes"][:, :2].tolist() == [[k % 20, k // 20] for k in range(1, 200)]
    assert len(few["boxes"]) == 2
    (found,) = instembed.detections(grouping_of(labels[:1], [199]), torch.arange(199.0)[None], masks=False)
    assert found["scores"].tolist() == list(range(199))


def test_only_what_was_asked_for() -> None:
    labels = torch.ones(1, 2, 2, dtype=torch.int64)
    assert set(instembed.detections(labels, masks=False)[0]) == {"boxes", "labels", "scores"}
    assert set(instembed.detections(labels, masks=False, rle=True)[0]) == {"boxes", "labels", "scores", "rle"}


def test_scores_and_classes_follow_their_instances() -> None:
    labels = torch.tensor([[[1, 1, 3]], [[0, 2, 0]]])
    scores = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], dtype=torch.float64, requires_grad=True)
    classes = [torch.tensor([11, 12, 13]), torch.tensor([21, 22], dtype=torch.int16)]
    first, second = instembed.detections(grouping_of(labels, [3, 2]), scores, classes)
    # Label 2 of the first image and label 1 of the second have no pixel.
    assert first["labels"].tolist() == [11, 13] and second["labels"].tolist() == [22]
    torch.testing.assert_close(first["scores"], torch.tensor([0.1, 0.3]))
    torch.testing.assert_close(second["scores"], torch.tensor([0.5]))
    # Of plain labels it is the order of the ids that counts.
    first, second = instembed.detections(labels, scores, [classes[0][:2], classes[1][:1]])
    assert first["labels"].tolist() == [11, 12] and second["labels"].tolist() == [21]
    torch.testing.assert_close(first["scores"], torch.tensor([0.1, 0.2]))


def test_from_a_grouping() -> None:
    embeddings = torch.zeros(1, 2, 6, 8)
    embeddings[:, 0, :, 4:] = 10
    grouping = instembed.mean_shift(embeddings, 1.0, max_instances=5)
    (found,) = instembed.detections(grouping, scores=torch.rand(1, 5))
    assert found["boxes"].tolist() == [[0, 0, 4, 6], [4, 0, 8, 6]]


def test_bad_grouping() -> None:
    labels = torch.tensor([[[1, 5]]])
    with pytest.raises(ValueError, match=r"num_instances 2 .* from 1 to 5"):
        instembed.detections(grouping_of(labels, [2]))
    with pytest.raises(ValueError, match=r"grouping_or_labels must have labels \(B, H, W\)"):
        instembed.detections(grouping_of(labels[0], [5]))


# Run lengths ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", INTEGER, ids=str)
def test_run_lengths_of_every_dtype(dtype: torch.dtype) -> None:
    assert_same_run_lengths(blobs(2, 37, 50).to(dtype))


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 40), (40, 1), (5000, 3), (3, 5000), (64, 64), (301, 299), (2, 2)], ids=str
)
def test_run_lengths_of_every_shape(shape: tuple[int, int]) -> None:
    assert_same_run_lengths(blobs(1, *shape)[0])
    assert_same_run_lengths(blobs(1, *shape)[0], background=None)
    assert_same_run_lengths(torch.ones(shape, dtype=torch.int64))


def test_run_lengths_of_huge_ids_and_strides() -> None:
    ids = blobs(3, 66, 70, ids=len(HUGE))
    labels = HUGE.to(ids.device)[ids]
    assert_same_run_lengths(labels, background=-1)
    assert_same_run_lengths(labels.transpose(1, 2)[::2, 3:])
    assert_same_run_lengths(labels.flip(1)[:, ::3, ::2])


def test_run_lengths_of_many_digits() -> None:
    labels = torch.zeros(2000, 2100, dtype=torch.uint8)
    labels[5:7, 3], labels[1990:, 2050], labels[0, 2099] = 1, 1, 1
    labels[:, 100:2000] = 2
    found = instembed.detections(labels, masks=False, rle=True)[0]["rle"]
    assert found == encoded(torch.stack([labels == 1, labels == 2]))


@pytest.mark.cpu_only
def test_same_for_any_number_of_threads(two_threads) -> None:
    labels = blobs(1, 700, 600, ids=30)
    both = instembed.detections(labels, rle=True)[0]
    torch.set_num_threads(1)
    one = instembed.detections(labels, rle=True)[0]
    assert one["rle"] == both["rle"] == encoded(one["masks"])
    assert torch.equal(one["masks"], both["masks"])


@hypothesis_settings(deadline=None, max_examples=60)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    ids=st.integers(1, 6),
    dtype=st.sampled_from(INTEGER),
    seed=st.integers(0, 2**16),
)
def test_run_lengths_of_random_labels(
    height: int, width: int, ids: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    assert_same_run_lengths(blobs(1, height, width, ids=ids).to(dtype), background=None)


# Evaluators -------------------------------------------------------------------------------------------------


def coco_of(labels: Tensor) -> COCO:
    """Ground truth of (B, H, W) labels, by pycocotools alone. Image b has id 100 + b, the class is 1."""
    images, annotations = [], []
    for b, image in enumerate(labels):
        images.append({"id": 100 + b, "height": image.shape[0], "width": image.shape[1]})
        ids = [i for i in image.unique().tolist() if i != 0]
        for run_lengths in encoded(torch.stack([image == i for i in ids])):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 100 + b,
                    "category_id": 1,
                    "segmentation": run_lengths,
                    "bbox": coco_mask.toBbox(run_lengths).tolist(),
                    "area": float(coco_mask.area(run_lengths)),
                    "iscrowd": 0,
                }
            )
    coco = COCO()
    coco.dataset = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    coco.createIndex()
    return coco


def average_precision(truth: COCO, found: list[dict[str, Any]], kind: str) -> float:
    results = truth.loadRes(instembed.coco_results(found, [100 + b for b in range(len(found))]))
    evaluation = COCOeval(truth, results, kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return float(evaluation.stats[0])


@pytest.mark.parametrize(("kind", "rle"), [("bbox", False), ("bbox", True), ("segm", True)])
def test_coco_evaluation(kind: str, rle: bool) -> None:
    labels = torch.zeros(2, 60, 50, dtype=torch.int64)
    labels[0, 5:18, 5:15], labels[0, 30:43, 20:30] = 1, 2
    labels[1, 5:18, 5:15], labels[1, 30:43, 20:30] = 7, 300
    truth = coco_of(labels)
    assert average_precision(truth, instembed.detections(labels, rle=rle), kind) == pytest.approx(1.0)

    missed = labels.clone()
    missed[0][missed[0] == 2], missed[1][missed[1] == 7] = 0, 0
    # Recall ends at a half: 51 of COCO's 101 recall levels have precision 1, the others 0.
    assert average_precision(truth, instembed.detections(missed, rle=rle), kind) == pytest.approx(51 / 101)

    cut = labels.clone()
    cut[:, 15:18], cut[:, 40:43] = 0, 0  # IoU 10/13: right at the six thresholds from 0.5 to 0.75
    assert average_precision(truth, instembed.detections(cut, rle=rle), kind) == pytest.approx(0.6)

    # A false detection of a higher score halves the precision at the first true one of each image.
    extra = labels.clone()
    extra[:, 50:55, 40:45] = 1000
    scores = torch.tensor([[0.5, 0.5, 0.9], [0.5, 0.5, 0.9]])
    # Sorted: 2 false, then 4 true; the best precision from any recall on is that of the last, 4/6.
    ap = average_precision(truth, instembed.detections(extra, scores, rle=rle), kind)
    assert ap == pytest.approx(4 / 6)


def test_coco_results_bad_input() -> None:
    with pytest.raises(ValueError, match="image_ids must name 1 images, got 2"):
        instembed.coco_results(instembed.detections(torch.ones(1, 2, 2, dtype=torch.int64)), [1, 2])


def torchmetrics_detection(name: str) -> Any:
    """A member of torchmetrics.detection.

    An installed torchvision that does not fit torch fails with a RuntimeError, whatever is imported.
    """
    try:
        import torchmetrics.detection

        return getattr(torchmetrics.detection, name)
    except (ImportError, RuntimeError, AttributeError) as error:
        pytest.skip(f"torchmetrics.detection.{name} does not import: {error}")


def panoptic(labels: Tensor) -> Tensor:
    """(B, H, W) -> (B, H, W, 2) of category and instance: 0 is stuff, everything else one class of things."""
    return torch.stack([(labels != 0).long(), labels], dim=-1)


def test_panoptic_quality(each_device: str) -> None:
    quality = torchmetrics_detection("PanopticQuality")(things={1}, stuffs={0}, return_per_class=True)
    quality = quality.to(each_device)
    truth = torch.zeros(1, 20, 20, dtype=torch.int64)
    truth[0, 2:8, 2:8], truth[0, 12:18, 12:18] = 5, 9
    embeddings = torch.stack([20.0 * truth, torch.zeros_like(truth)], 1)
    grouping = instembed.mean_shift(embeddings, 1.0, mask=truth != 0)
    assert quality(panoptic(grouping.labels), panoptic(truth)).min() == 1.0
    missed = torch.where(grouping.labels == 2, 0, grouping.labels)
    # Things: 1 found of IoU 1 and 1 missed, 1 / (1 + 0.5). Stuff: one segment of IoU 328/364.
    expected = {1: 1 / 1.5, 0: 328 / 364}
    classes = sorted(expected, reverse=True)  # things come first
    values = quality(panoptic(missed), panoptic(truth)).flatten().tolist()
    assert values == pytest.approx([expected[c] for c in classes])


def map_inputs() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    labels = blobs(2, 40, 40)
    scores = [torch.rand(len(row.unique()) - 1) for row in labels]
    return instembed.detections(labels, scores), instembed.detections(labels)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_mean_average_precision(each_device: str, kind: str) -> None:
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        pytest.skip(f"torchvision, which MeanAveragePrecision needs, does not import: {error}")
    assert torchvision
    metric = torchmetrics_detection("MeanAveragePrecision")(iou_type=kind).to(each_device)
    metric.update(*map_inputs())
    assert metric.compute()["map"] == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_input_checks_of_mean_average_precision(kind: str) -> None:
    """What torchmetrics asks of predictions and targets, also where torchvision is missing."""
    found, truth = map_inputs()
    item = {"bbox": "boxes", "segm": "masks"}[kind]
    assert len(found) == len(truth)
    for entry in [*found, *truth]:
        assert all(isinstance(entry[name], Tensor) for name in (item, "labels", "scores"))
        assert len(entry[item]) == len(entry["labels"]) == len(entry["scores"]) > 0
        assert entry["boxes"].dtype == torch.float32 and entry["masks"].dtype == torch.bool
        assert (entry["boxes"][:, 2:] > entry["boxes"][:, :2]).all()
        # It encodes masks as they are, without a conversion.
        assert [coco_mask.encode(np.asfortranarray(m.cpu().numpy())) for m in entry["masks"]] == encoded(
            entry["masks"]
        )
    try:
        from torchmetrics.detection.helpers import _input_validator
    except (ImportError, RuntimeError):
        return
    _input_validator(found, truth, iou_type=kind)


# Bad input --------------------------------------------------------------------------------------------------

ONE = torch.tensor([[[1, 2]]])


@pytest.mark.parametrize(
    ("error", "message", "labels", "options"),
    [
        (TypeError, "grouping_or_labels must be a torch.Tensor, got list", [[1]], {}),
        (TypeError, "grouping_or_labels must have an integer dtype, got torch.float32", ONE.float(), {}),
        (TypeError, "grouping_or_labels .* got torch.bool", ONE.bool(), {}),
        (ValueError, r"grouping_or_labels must be \(B, H, W\) or \(H, W\), got shape \(2,\)", ONE[0, 0], {}),
        (ValueError, r"grouping_or_labels .* got shape \(1, 1, 1, 2\)", ONE[None], {}),
        (TypeError, "scores must be a tensor, a list of tensors or None, got float", ONE, {"scores": 0.5}),
        (TypeError, r"scores\[0\] must be a torch.Tensor, got float", ONE, {"scores": [0.5]}),
        (TypeError, r"scores\[0\] must have a floating dtype, got torch.int64", ONE, {"scores": ONE[0]}),
        (ValueError, r"scores .* \(1, 2 or more\), got \(1, 1\)", ONE, {"scores": torch.ones(1, 1)}),
        (ValueError, r"scores must have shape \(1, 2 or more\), got \(2,\)", ONE, {"scores": torch.rand(2)}),
        (ValueError, "scores must have one tensor for each of 1 images, got 0", ONE, {"scores": []}),
        (ValueError, r"scores\[0\] must have shape \(2,\), got \(3,\)", ONE, {"scores": [torch.rand(3)]}),
        (TypeError, r"classes\[0\] .* integer dtype, got torch.float32", ONE, {"classes": torch.rand(1, 2)}),
        (ValueError, r"classes\[0\] .* one device", ONE, {"classes": torch.ones(1, 2, device="meta").long()}),
        (TypeError, "background must be an integer, got str", ONE, {"background": "0"}),
        (ValueError, f"ignore_index must fit 64 bits, got {2**64}", ONE, {"ignore_index": 2**64}),
        (TypeError, "masks must be True or False, got Tensor", ONE, {"masks": torch.zeros(0)}),
        (TypeError, "rle must be True or False, got int", ONE, {"rle": 1}),
    ],
)  # fmt: skip
def test_bad_input(
    each_device: str, error: type[Exception], message: str, labels: Any, options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        instembed.detections(there(labels, each_device), **there(options, each_device))


@pytest.mark.parametrize("number", [3, -1])
def test_a_grouping_that_did_not_fit_its_capacity(number: int) -> None:
    """As a GPU tells too many instances and wrong offsets."""
    grouping = instembed.mean_shift(torch.randn(1, 2, 4, 5), 9.0, max_instances=2)
    overflowed = grouping._replace(
        labels=torch.zeros_like(grouping.labels),
        num_instances=torch.full_like(grouping.num_instances, number),
    )
    with pytest.raises(ValueError, match=rf"did not fit.*\[{number}\] and 2 rows"):
        instembed.detections(overflowed)
