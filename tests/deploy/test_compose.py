"""deploy/compose.yaml: its form, and the flags of its nodes."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema
from jsonschema import Draft7Validator

from support.serve_flags import unknown_flags

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
OF_ONE_NODE = {"--node-rank", "--headless", "--data-parallel-start-rank"}


def load(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def command(service: str) -> list[str]:
    """Return the arguments of a node, with the defaults of variables."""
    return shlex.split(re.sub(r"\$\{\w+:-(.*?)\}", r"\1", load("compose.yaml")["services"][service]["command"]))


def flags(words: list[str]) -> dict[str, str | None]:
    """Return the values of flags; None for a flag without one."""
    pairs = zip(words, [*words[1:], "--"], strict=True)
    return {word: None if value.startswith("--") else value for word, value in pairs if word.startswith("--")}


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_the_files_have_the_form_of_the_compose_specification(name: str) -> None:
    errors = Draft7Validator(get_builtin_schema("vendor.compose-spec")).iter_errors(load(name))
    assert [error.message for error in errors] == []


def test_gpus_are_added_to_every_node() -> None:
    assert load("compose.cuda.yaml")["services"].keys() == load("compose.yaml")["services"].keys()


@pytest.mark.parametrize("profile", ["replicas", "split"])
def test_the_nodes_of_a_profile_have_the_same_flags_but_for_their_numbers(profile: str) -> None:
    head, worker = flags(command(f"{profile}-head")), flags(command(f"{profile}-worker"))
    assert unknown_flags([*head, *worker]) == set()
    shared = {name: value for name, value in head.items() if name not in OF_ONE_NODE}
    assert shared == {name: value for name, value in worker.items() if name not in OF_ONE_NODE}
    assert "--headless" not in head
    assert "--headless" in worker
    address = head.get("--data-parallel-address") or head.get("--master-addr")
    assert address == load("compose.yaml")["services"][f"{profile}-head"]["hostname"]


def test_nodes_have_time_to_drain_and_headless_ones_no_health_check() -> None:
    for name, service in load("compose.yaml")["services"].items():
        assert service["stop_grace_period"] == "90s"
        assert ("healthcheck" in service) == name.endswith("-worker")
        assert "SHOAL_CLUSTER_KEY" in service["environment"]
