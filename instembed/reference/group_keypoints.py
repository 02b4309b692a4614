"""Grouping of keypoints by their tags, by its definition: one joint and one person at a time, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from instembed._pixels import accumulation_dtype
from instembed.grouping.group_keypoints import PosesWithDetails, default_joint_order

_FAR = 2.0**30  # what is farther than this in tag space, or scores higher, is not told apart
_SCORE_UNIT = 2**32  # scores count in units of 2^-32 in the assignment, so that its sums are exact
_TIE_UNIT = 2**24
_NONE = -1


@dataclass
class Joint:
    score: float
    x: int
    y: int
    tag: list[float]


@dataclass
class Person:
    joints: dict[int, Joint] = field(default_factory=dict)
    """Peaks by joint."""
    tag_sum: list[float] = field(default_factory=list)

    def add(self, k: int, joint: Joint) -> None:
        sums = self.tag_sum or [0.0] * len(joint.tag)
        self.tag_sum = [a + b for a, b in zip(sums, joint.tag, strict=True)]
        self.joints[k] = joint

    @property
    def tag(self) -> list[float]:
        return [a / len(self.joints) for a in self.tag_sum]


def group_keypoints(
    heatmaps: Tensor,
    tags: Tensor,
    *,
    max_people: int = 30,
    peak_threshold: float = 0.1,
    tag_threshold: float = 1.0,
    nms: int = 5,
    joint_order: Sequence[int] | None = None,
    adjust: bool = True,
    refine: bool = True,
) -> PosesWithDetails:
    """The definition of :func:`instembed.group_keypoints`, with its details."""
    images, joints = heatmaps.shape[:2]
    order = default_joint_order(joints) if joint_order is None else joint_order
    heat = heatmaps.detach().double()
    tags_of = tags.detach().double().unflatten(1, (joints, -1))  # (B, K, L, H, W)
    heat = torch.where(heat.isfinite(), heat, -math.inf)

    new = heatmaps.detach().new_zeros
    dtype = accumulation_dtype(heatmaps)
    poses = PosesWithDetails(
        keypoints=new(images, max_people, joints, 2, dtype=dtype),
        scores=new(images, max_people, dtype=dtype),
        tags=new(images, max_people, tags_of.shape[2], dtype=dtype),
        num_people=new(images, dtype=torch.int64),
        keypoint_scores=new(images, max_people, joints, dtype=dtype),
        visibility=new(images, max_people, joints, dtype=torch.uint8),
    )
    for b in range(images):
        peaks = [
            find_peaks(heat[b, k], tags_of[b, k], peak_threshold, nms)[:max_people] for k in range(joints)
        ]
        people = group_peaks(peaks, order, tag_threshold)
        people.sort(
            key=lambda person: -score_of(person, joints)
        )  # stable: equals stay in order of their start
        poses.num_people[b] = min(len(people), max_people)
        for p, person in enumerate(people[:max_people]):
            poses.scores[b, p] = score_of(person, joints)
            poses.tags[b, p] = torch.tensor(person.tag, dtype=torch.float64)
            for k in range(joints):
                joint = person.joints.get(k)
                if joint is None and refine:
                    joint = search(heat[b, k], tags_of[b, k], person.tag)
                if joint is not None:
                    x, y = adjusted(heat[b, k], joint.x, joint.y) if adjust else (joint.x, joint.y)
                    poses.keypoints[b, p, k] = torch.tensor([x, y], dtype=torch.float64)
                    poses.keypoint_scores[b, p, k] = joint.score
                    poses.visibility[b, p, k] = 2 if k in person.joints else 1
    return poses


def find_peaks(heatmap: Tensor, tags: Tensor, threshold: float, window: int) -> list[Joint]:
    """Pixels above the threshold than which none in the window around them is higher, highest first.

    Of equal pixels only the first in row-major order counts: a pixel with an equal one before it in its
    window is no peak. So a plateau, if it is convex, is one peak, whatever its size. A pixel with a tag that
    is not finite is no peak, though it hides others.
    """
    height, width = heatmap.shape
    reach = window // 2
    rows, columns = min(reach, max(height - 1, 0)), min(reach, max(width - 1, 0))
    around = F.pad(heatmap, (columns, columns, rows, rows), value=-math.inf)
    is_peak = heatmap > threshold
    for dy in range(-rows, rows + 1):
        for dx in range(-columns, columns + 1):
            other = around[rows + dy : rows + dy + height, columns + dx : columns + dx + width]
            is_peak &= heatmap > other if (dy, dx) < (0, 0) else heatmap >= other
    is_peak &= tags.isfinite().all(dim=0)
    peaks = [
        Joint(heatmap[y, x].item(), x, y, tags[:, y, x].tolist())
        for y, x in is_peak.nonzero().tolist()  # in row-major order
    ]
    return sorted(peaks, key=lambda peak: -peak.score)  # stable


def group_peaks(peaks: list[list[Joint]], order: Sequence[int], tag_threshold: float) -> list[Person]:
    """People in order of their start: joint after joint, candidates go to people or start new ones."""
    people: list[Person] = []
    for k in order:
        tags = [person.tag for person in people]
        distances = [[distance(candidate.tag, tag) for tag in tags] for candidate in peaks[k]]
        matches = match(distances, [candidate.score for candidate in peaks[k]], tag_threshold)
        for candidate, row, p in zip(peaks[k], distances, matches, strict=True):
            if p is not None and row[p] < tag_threshold:
                people[p].add(k, candidate)
            else:
                people.append(Person())
                people[-1].add(k, candidate)
    return people


def distance(a: list[float], b: list[float]) -> float:
    total = 0.0
    for x, y in zip(a, b, strict=True):
        total += (x - y) * (x - y)
    return min(math.sqrt(total), _FAR)


def match(distances: list[list[float]], scores: list[float], tag_threshold: float) -> list[int | None]:
    """The person of each candidate, or None: as many pairs as there can be, at the least total cost.

    The cost of a pair is ``round(distance) * 100 - score``, half to even. Rounding makes ties frequent; the
    assignment with the least sum of ``min(distance, tag_threshold) ** 2`` is taken among those of equal cost.
    """

    def cost(d: float, score: float) -> int:
        first = round(d) * 100 * _SCORE_UNIT - round(min(score, _FAR) * _SCORE_UNIT)
        share = min(d / tag_threshold, 1.0) if tag_threshold > 0 else 0.0
        return (first << 40) + round(share * share * _TIE_UNIT)

    costs = [[cost(d, score) for d in row] for row, score in zip(distances, scores, strict=True)]
    candidates, people = len(costs), len(costs[0]) if costs else 0
    if candidates <= people:
        return list(least_cost_assignment(costs))
    matches: list[int | None] = [None] * candidates
    for p, candidate in enumerate(
        least_cost_assignment([list(column) for column in zip(*costs, strict=True)])
    ):
        matches[candidate] = p
    return matches


def least_cost_assignment(costs: list[list[int]]) -> list[int]:
    """A column for each row, none twice, at the least total cost; at most as many rows as columns.

    Shortest augmenting paths (Jonker and Volgenant, 1987). All ties go to the lower index.
    """
    columns = len(costs[0]) if costs else 0
    column_of, row_of = [_NONE] * len(costs), [_NONE] * columns
    row_price, column_price = [min(row) for row in costs], [0] * columns
    for i, row in enumerate(costs):  # each row takes its cheapest column, if that is free
        j = row.index(row_price[i])
        if row_of[j] == _NONE:
            column_of[i], row_of[j] = j, i
    for start in [i for i, j in enumerate(column_of) if j == _NONE]:
        # Dijkstra's algorithm from the row to the nearest free column, over reduced costs.
        length: dict[int, int] = {}
        via: dict[int, int] = {}
        waiting, done = list(range(columns)), []
        i, reached = start, 0
        while True:
            for j in waiting:
                through = reached + costs[i][j] - row_price[i] - column_price[j]
                if j not in length or through < length[j]:
                    length[j], via[j] = through, i
            end = min(waiting, key=length.__getitem__)
            reached = length[end]
            if row_of[end] == _NONE:
                break
            waiting.remove(end)
            done.append(end)
            i = row_of[end]
        row_price[start] += reached
        for j in done:
            column_price[j] -= reached - length[j]
            row_price[row_of[j]] += reached - length[j]
        j = end
        while j != _NONE:  # each row on the path moves on by one column
            i = via[j]
            row_of[j], column_of[i], j = i, j, column_of[i]
    return column_of


def score_of(person: Person, joints: int) -> float:
    """The mean over all joints, in order, of the peaks' scores; a joint without a peak counts as 0."""
    total = 0.0
    for k in range(joints):
        if k in person.joints:
            total += person.joints[k].score
    return total / joints


def search(heatmap: Tensor, tags: Tensor, person: list[float]) -> Joint | None:
    """The pixel, the first of equals, with the largest ``heatmap - round(|tag - person's mean tag|)``.

    None where the heatmap is not positive there. Pixels that are not finite, or have a tag that is not, take
    no part.
    """
    squares = torch.zeros_like(heatmap)
    for channel, mean in zip(tags, person, strict=True):
        squares += (channel - mean) * (channel - mean)
    value = heatmap - squares.sqrt().clamp(max=_FAR).round()
    value = torch.where(tags.isfinite().all(dim=0), value, -math.inf)
    y, x = (value == value.max()).nonzero()[0].tolist()
    score = heatmap[y, x].item()
    return Joint(score, x, y, tags[:, y, x].tolist()) if score > 0 and value[y, x] > -math.inf else None


def adjusted(heatmap: Tensor, x: int, y: int) -> tuple[float, float]:
    """(x, y), each moved by a quarter of a pixel towards the higher of the two neighbours on its axis.

    Equal neighbours, and one that is missing or not finite, move nothing.
    """

    def quarter(line: Tensor, i: int) -> float:
        if not 0 < i < len(line) - 1 or math.inf in (-line[i - 1], -line[i + 1]):
            return 0.0
        return 0.25 * float((line[i + 1] - line[i - 1]).sign())

    return x + quarter(heatmap[y], x), y + quarter(heatmap[:, x], y)
