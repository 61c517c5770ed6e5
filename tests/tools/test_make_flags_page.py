"""docs/flags.md is made from the code, and must be made again when the code changes."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import make_flags_page  # noqa: E402
from shoal import env  # noqa: E402
from shoal.config import engine_options  # noqa: E402
from shoal.params import SAMPLING_TABLE  # noqa: E402


def test_the_page_is_up_to_date() -> None:
    assert make_flags_page.PAGE.read_text("utf-8") == make_flags_page.page(), "run `python tools/make_flags_page.py`"


def test_the_page_has_all_flags_and_variables() -> None:
    page = make_flags_page.page()
    for option in engine_options.options():
        assert option.flag in page
        assert f"`{env.option_variable(option.name)}`" in page
    for row in SAMPLING_TABLE.values():
        assert row.flag is None or f"--{row.flag}" in page
    for variable in env.SETTINGS:
        assert variable.name in page
    for name in make_flags_page.commands():
        assert f"## `{name[0]}" in page


def test_every_row_has_all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    for line in make_flags_page.page().splitlines():
        if line.startswith("| `"):
            assert line.replace("\\|", "").count("|") in (3, 4), line


@pytest.mark.parametrize("argument", ["--help", "--check", "page.md"])
def test_wrong_arguments_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argument: str) -> None:
    monkeypatch.setattr(make_flags_page, "PAGE", tmp_path / "flags.md")
    with pytest.raises(SystemExit):
        make_flags_page.main([argument])
    assert not (tmp_path / "flags.md").exists()
    make_flags_page.main([])
    assert (tmp_path / "flags.md").read_text("utf-8") == make_flags_page.page()
