"""docs/sampling.md is made from the table of sampling parameters, and made again whenever that changes."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import make_sampling_page  # noqa: E402
from shoal.params import SAMPLING_TABLE  # noqa: E402


def test_the_page_is_fresh() -> None:
    page = make_sampling_page.page()
    assert make_sampling_page.PAGE.read_text("utf-8") == page, "run `python tools/make_sampling_page.py`"


def test_every_parameter_has_a_row_with_its_help() -> None:
    page = make_sampling_page.page()
    for row in SAMPLING_TABLE.values():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{row.name}` |")]
        assert row.help in line
        assert line.replace("\\|", "").count("|") in (4, 9)


def test_it_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_sampling_page, "PAGE", tmp_path / "sampling.md")
    make_sampling_page.main([])
    assert (tmp_path / "sampling.md").read_text("utf-8") == make_sampling_page.page()
