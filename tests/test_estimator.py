"""The scikit-learn estimator."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import sklearn.cluster
from sklearn.datasets import make_blobs
from sklearn.utils.estimator_checks import parametrize_with_checks

import instembed


@parametrize_with_checks([instembed.MeanShift(), instembed.MeanShift(bandwidth=2.0, seeding="all")])
def test_estimator_contract(estimator, check) -> None:
    check(estimator)


def blobs(dtype: type = np.float64) -> np.ndarray:
    points, _ = make_blobs(600, centers=5, n_features=3, cluster_std=0.5, random_state=0)
    return points.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_scikit_learn(dtype: type) -> None:
    points = blobs(dtype)
    theirs = sklearn.cluster.MeanShift(bandwidth=1.5, cluster_all=False).fit(points.astype(np.float64))
    ours = instembed.MeanShift(1.5, seeding="all").fit(points)
    np.testing.assert_array_equal(ours.labels_, theirs.labels_)
    np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, rtol=1e-5)
    assert ours.n_iter_ == theirs.n_iter_
    assert ours.cluster_centers_.dtype == dtype


def test_peel_predict_and_estimated_bandwidth() -> None:
    points = blobs()
    fitted = instembed.MeanShift(leftovers="nearest").fit(points)
    assert fitted.bandwidth_ == pytest.approx(sklearn.cluster.estimate_bandwidth(points))
    assert (fitted.labels_ >= 0).all()
    centers = fitted.cluster_centers_
    np.testing.assert_array_equal(fitted.predict(centers), range(len(centers)))
    labels = instembed.MeanShift(1.5).fit_predict(points)
    np.testing.assert_array_equal(labels, instembed.MeanShift(1.5).fit(points).labels_)


def test_nothing_found() -> None:
    fitted = instembed.MeanShift(1.0, min_size=1000).fit(blobs())
    assert (fitted.labels_ == -1).all()
    assert (fitted.predict(blobs()) == -1).all()


@pytest.mark.parametrize(
    ("parameters", "error", "names"),
    [
        ({"bandwidth": 0.0}, ValueError, "bandwidth"),
        ({"bandwidth": float("nan")}, ValueError, "bandwidth"),
        ({"bandwidth": "1"}, TypeError, "bandwidth"),
        ({"seeding": "bins"}, ValueError, "seeding"),
        ({"leftovers": "drop"}, ValueError, "leftovers"),
        ({"min_size": -1}, ValueError, "min_size"),
        ({"max_iter": 0}, ValueError, "max_iter"),
        ({"tol": -1.0}, ValueError, "tol"),
    ],
)
def test_bad_parameters(parameters: dict, error: type[Exception], names: str) -> None:
    with pytest.raises(error, match=names):
        instembed.MeanShift(**{"bandwidth": 1.0, **parameters}).fit(blobs())


def test_without_scikit_learn() -> None:
    """The package imports without it, and does not import it before it is needed."""
    program = """
import sys
import instembed
assert "sklearn" not in sys.modules
sys.modules["sklearn"] = sys.modules["sklearn.base"] = None
try:
    instembed.MeanShift(1.0)
except ImportError as error:
    assert "instembed[sklearn]" in str(error), error
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
