"""The package as installed: what is in it, and what happens without its core."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import instembed
from instembed import _native

ROOT = Path(__file__).parent.parent


def run_python(code: str, folder: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def installed() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("instembed")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("instembed is imported from a source tree and not installed")


def test_version_is_in_one_place(installed: importlib.metadata.Distribution) -> None:
    assert installed.version == instembed.__version__ == _native.core.version


def test_installed_files(installed: importlib.metadata.Distribution) -> None:
    names = {str(file) for file in installed.files or []}
    if not any(name.endswith("__init__.py") for name in names):
        pytest.skip("an editable install lists no sources")
    for name in ("instembed/py.typed", "instembed/_core.pyi", "instembed/reference/__init__.py"):
        assert name in names
    assert not any(name.startswith(("tests", "benchmarks", "csrc")) for name in names)


def test_runtime_dependencies_are_torch_and_numpy(installed: importlib.metadata.Distribution) -> None:
    needed = [line for line in installed.requires or [] if "extra ==" not in line]
    assert sorted(line.split(">")[0].strip() for line in needed) == ["numpy", "torch"]


def test_works_outside_the_source_tree(installed: importlib.metadata.Distribution, tmp_path: Path) -> None:
    code = """
        import torch, instembed
        e = torch.randn(1, 2, 8, 8, requires_grad=True)
        instembed.discriminative_loss(e, torch.ones(1, 8, 8, dtype=torch.int64)).backward()
        print(instembed.__file__)
    """
    assert run_python(code, tmp_path).strip()


def test_imports_only_torch_and_numpy(tmp_path: Path) -> None:
    code = """
        import sys, instembed
        loaded = {name.split(".")[0] for name in sys.modules}
        print(sorted(loaded & {"sklearn", "scipy", "matplotlib", "skimage", "pycocotools", "torchmetrics"}))
    """
    assert run_python(code, ROOT).strip() == "[]"


def test_an_unbuilt_tree_explains_itself(tmp_path: Path) -> None:
    code = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        import importlib.machinery, importlib.metadata
        sys.meta_path[:] = [f for f in sys.meta_path if "Editable" not in type(f).__name__]
        importlib.machinery.EXTENSION_SUFFIXES[:] = []  # no core is found
        sys.modules["instembed._core"] = None
        import torch, instembed
        e, n = torch.zeros(1, 2, 4, 4), torch.ones(1, 4, 4, dtype=torch.int64)
        instembed.reference.discriminative_loss(e, n)
        try:
            instembed.discriminative_loss(e, n)
        except ImportError as error:
            print(error)
    """
    assert "pip install ." in run_python(code, tmp_path)


def test_core_takes_numpy_arrays() -> None:
    """The core knows no torch: any producer of DLPack will do."""
    core = _native.core
    embeddings = np.random.default_rng(0).normal(size=(1, 3, 50)).astype(np.float32)
    labels = np.repeat(np.arange(5), 10)[None]
    options = core.DiscriminativeOptions(
        delta_var=0.5, delta_dist=1.5, norm=2, pooled_variance=False, background_push=False,
        background=0, ignore_index=None, threads=1,
    )  # fmt: skip
    terms = np.empty((1, 4), np.float32)
    core.discriminative_forward(embeddings, labels, None, options, terms)
    expected = instembed.discriminative_terms(torch.from_numpy(embeddings), torch.from_numpy(labels))
    np.testing.assert_array_equal(terms[0, :3], torch.stack(expected)[:, 0].numpy())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": np.zeros((1, 3, 50), np.int32)}, "embeddings"),
        ({"embeddings": np.zeros((3, 50), np.float32)}, "embeddings"),
        ({"labels": np.zeros((1, 49), np.int64)}, "labels"),
        ({"labels": np.zeros((1, 50), np.float32)}, "labels"),
        ({"terms": np.zeros((1, 3), np.float32)}, "terms"),
        ({"terms": np.zeros((1, 4), np.float64)}, "terms"),
        ({"offsets": np.array([0, 70])}, "offsets"),
    ],
)
def test_core_guards_its_own_boundary(change: dict, message: str) -> None:
    core = _native.core
    options = core.DiscriminativeOptions(
        delta_var=0.5, delta_dist=1.5, norm=2, pooled_variance=False, background_push=False,
        background=0, ignore_index=None, threads=1,
    )  # fmt: skip
    arguments = {
        "embeddings": np.zeros((1, 3, 50), np.float32),
        "labels": np.zeros((1, 50), np.int64),
        "offsets": None,
        "options": options,
        "terms": np.zeros((1, 4), np.float32),
    }
    with pytest.raises(ValueError, match=message):
        core.discriminative_forward(**(arguments | change))


def test_core_refuses_other_types() -> None:
    with pytest.raises(TypeError):
        _native.core.discriminative_forward([[1.0]], None, None, None, None)


def test_stub_names_what_the_core_has() -> None:
    stub = (ROOT / "instembed" / "_core.pyi").read_text()
    for name in dir(_native.core):
        if not name.startswith("_"):
            assert f"def {name}(" in stub or f"class {name}:" in stub or f"{name}: " in stub, name
