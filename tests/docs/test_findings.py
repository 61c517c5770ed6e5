"""The page on troubleshooting has every finding of the doctor, and the messages that people search for."""

import ast
import re
from pathlib import Path

import pytest

from shoal.doctor import kinds

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "guides" / "troubleshooting.md").read_text("utf-8")


def rows() -> list[list[str]]:
    section = PAGE.partition("### Findings")[2].partition("\n## ")[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in section.splitlines() if "|" in line][2:]


def test_the_page_has_the_table_of_the_code() -> None:
    assert rows() == [[kind.title, kind.meaning, kind.mend] for kind in kinds.KINDS.values()]


def test_every_kind_is_found_by_some_check() -> None:
    used = set()
    for file in (ROOT / "src" / "shoal" / "doctor").glob("*.py"):
        if file.name != "kinds.py":
            tree = ast.walk(ast.parse(file.read_text("utf-8")))
            used |= {node.value for node in tree if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert set(kinds.KINDS) - used == set()


@pytest.mark.parametrize(
    "message",
    [
        "No available node types can fulfill resource request",
        "NCCL error ... unhandled system error",
        "EngineCore failed to start",
    ],
)
def test_messages_that_people_search_for(message: str) -> None:
    section = PAGE.partition("## Messages that you may search for")[2].partition("\n## ")[0]
    assert re.search(rf"^\| [^|]*`{re.escape(message)}`[^|]* \| [^|]{{40,}} \|$", section, re.MULTILINE)
