"""Draw mean shift on the sphere at work: blobs of points before, and after 1 and 5 iterations.

    python sphere.py --output sphere.png

After the toy figure of Kong and Fowlkes (2018): points around a few directions, with noise, move to the modes
of their density. Colours are the instances that ``instembed.group_on_sphere`` finds at each stage, before any
iteration too; a map of the sphere shows all of it. Needs ``pip install instembed[demo]``.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

import instembed

BLOBS, POINTS, NOISE, BANDWIDTH = 10, 1500, 0.2, 0.25
STAGES = (0, 1, 5)


def blobs(seed: int) -> Tensor:
    """(POINTS, 3) unit vectors around evenly spread directions."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.arange(BLOBS) + 0.5
    height, angle = 1 - 2 * numbers / BLOBS, numbers * math.pi * (3 - math.sqrt(5))
    radius = (1 - height.square()).sqrt()
    centers = torch.stack([radius * angle.cos(), radius * angle.sin(), height], dim=1)
    which = torch.randint(0, BLOBS, (POINTS,), generator=generator)
    noise = torch.randn(POINTS, 3, generator=generator)
    return torch.nn.functional.normalize(centers[which] + NOISE * noise, dim=1)


def draw(stages: Sequence[tuple[int, Tensor]], path: Path) -> None:
    figure = plt.figure(figsize=(10, 2.1), layout="constrained")
    for place, (iteration, points) in enumerate(stages, start=1):
        grouping = instembed.group_on_sphere(points, threshold=math.cos(BANDWIDTH / 2), min_size=20)
        axes = figure.add_subplot(1, len(stages), place, projection="mollweide")
        longitude = torch.atan2(points[:, 1], points[:, 0])
        latitude = points[:, 2].clamp(-1, 1).asin()
        labels = grouping.labels.numpy()
        colours = plt.get_cmap("tab10")((labels - 1) % 10)
        colours[labels == 0] = (0.7, 0.7, 0.7, 1)
        axes.scatter(longitude, latitude, s=4 + 2 * iteration, c=colours, linewidths=0)
        axes.grid(alpha=0.3)
        axes.set_xticklabels([])
        axes.set_yticklabels([])
        name = {0: "before", 1: "1 iteration"}.get(iteration, f"{iteration} iterations")
        axes.set_title(f"{name}: {grouping.num_instances.item()} instances", fontsize=10)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("sphere.png"), help="picture to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    iterates = instembed.recurrent_mean_shift(
        blobs(args.seed), BANDWIDTH, iterations=max(STAGES), return_all=True
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw([(iteration, iterates[iteration]) for iteration in STAGES], args.output)
    print(f"drawn in {args.output}")


if __name__ == "__main__":
    main()
