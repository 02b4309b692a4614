"""Each method of the training example, from images to a picture of instances. Not how well it does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_instances.py"
SIZE = 40, 50


def draw(folder: Path) -> None:
    """Two images of bright squares."""
    folder.mkdir()
    for name in ("a", "b"):
        labels = np.zeros(SIZE, np.uint16)
        labels[3:18, 5:20], labels[20:38, 25:45] = 7, 300
        image = np.random.default_rng(0).integers(0, 40, SIZE, np.uint8)
        image[labels > 0] += 150
        Image.fromarray(labels).save(folder / f"{name}_labels.png")
        Image.fromarray(image).save(folder / f"{name}_image.png")


def run(*arguments: object) -> None:
    subprocess.run([sys.executable, EXAMPLE, "--threads=1", *map(str, arguments)], check=True, timeout=300)


@pytest.mark.parametrize(("method", "panels"), [("deep-metric", 2), ("discriminative", 1), ("recurrent", 1)])
def test_trains_reports_and_predicts(method: str, panels: int, tmp_path: Path) -> None:
    images, report, model, found = (tmp_path / name for name in ("images", "out.json", "net.pt", "found"))
    draw(images)
    run("--train", images, "--val", images, "--report", report, "--checkpoint", model, "--method", method,
        "--minutes", 0.03)  # fmt: skip
    result = json.loads(report.read_text())
    assert result["method"]["name"] == method and result["training_steps"] >= 1
    assert result["tp"] + result["fn"] == 4 and 0 <= result["coco"]["AP"] <= result["coco"]["AP50"] <= 1
    run("--predict", images / "a_image.png", "--checkpoint", model, "--output", found)
    assert np.asarray(Image.open(found / "a_labels.png")).shape == SIZE
    assert np.asarray(Image.open(found / "a_overlay.png")).shape == (SIZE[0], panels * SIZE[1], 3)
