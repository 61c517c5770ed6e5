"""Helm charts, rendered with values by Helm's library in a process of its own.

The library is written in Go, whose runtime would stay in the process of the tests.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TESTS = Path(__file__).parent.parent


@dataclass(frozen=True)
class Rendered:
    """A chart with some values: its manifests and notes, or why Helm refuses them."""

    manifests: list[Any]
    notes: str
    error: str
    complaints: list[str]  # of `helm lint --strict`

    def one(self, kind: str) -> Any:
        """Return the only manifest of a kind."""
        (found,) = (each for each in self.manifests if each["kind"] == kind)
        return found

    @property
    def kinds(self) -> list[str]:
        return sorted(each["kind"] for each in self.manifests)


def render(chart: Path, values: list[dict[str, Any]]) -> list[Rendered]:
    """Render a chart once for each of these values, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "support.helm", str(chart)],
        input=json.dumps(values),
        cwd=TESTS,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return [_read(each) for each in json.loads(done.stdout)]


def _read(found: dict[str, Any]) -> Rendered:
    files = found["files"]
    notes = "".join(text for name, text in files.items() if name.endswith("NOTES.txt"))
    texts = [text for name, text in files.items() if name.endswith(".yaml")]
    manifests = [each for text in texts for each in yaml.safe_load_all(text) if each]
    return Rendered(manifests, notes, found["error"], found["complaints"])


def _main(chart: str) -> None:
    """Read values as a JSON list from stdin, and print what the chart is with each of them."""
    import helm_python

    found = []
    with helm_python.Chart.load(chart) as opened:
        for values in json.load(sys.stdin):
            files, error = {}, ""
            try:
                opened.validate_schema(values)
                files = opened.render(values, name="llm", namespace="models")
            except helm_python.HelmError as problem:
                error = str(problem)
            report = helm_python.lint(chart, values, strict=True)
            complaints = [each["error"] for each in report["messages"] if each["severity"] > 1]
            found.append({"files": files, "error": error, "complaints": complaints + report["errors"]})
    print(json.dumps(found))


if __name__ == "__main__":
    _main(sys.argv[1])
