"""The Python examples of the README and of every docs page run, in order, one page at a time."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page: Path) -> None:
    names: dict[str, object] = {"__name__": page.stem}
    for block in re.finditer(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        line = page.read_text()[: block.start(1)].count("\n")  # so that a traceback shows the page's line
        exec(compile("\n" * line + block[1], str(page), "exec"), names)
