"""Checks of Kubernetes manifests against the schemas of its API."""

import re
from collections.abc import Mapping
from typing import Any

import kubernetes_validate

VERSIONS = ("1.27", kubernetes_validate.latest_version())  # the oldest that the chart allows, and the newest known


def check(manifest: Any) -> None:
    """Check a manifest of a kind that is part of Kubernetes. Fields that it does not know are mistakes.

    Raises:
        kubernetes_validate.ValidationError: the manifest is not valid.
    """
    for version in VERSIONS:
        kubernetes_validate.validate(manifest, version, strict=True)


def check_pod(template: Any) -> None:
    """Check a pod template, as `check`."""
    labels = template.get("metadata", {}).get("labels", {"app": "any"})
    template = {**template, "metadata": {**template.get("metadata", {}), "labels": labels}}
    check(
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "any"},
            "spec": {"selector": {"matchLabels": labels}, "template": template},
        }
    )


def expand(text: str, variables: Mapping[str, str]) -> str:
    """Return an argument of a container as Kubernetes expands it: $(NAME) is replaced if NAME is set, $$ is $."""

    def value(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else variables.get(found[1], found[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", value, text)


def selects(selector: Mapping[str, str], manifest: Any) -> bool:
    """Return True if a selector finds a manifest by its labels."""
    labels: Mapping[str, str] = manifest["metadata"]["labels"]
    return selector.items() <= labels.items()
