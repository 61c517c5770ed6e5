"""Writing the report of a benchmark."""

import json
from pathlib import Path
from typing import Any

from shoal.errors import UserError


def write_report(report: dict[str, Any], output: Path | None) -> None:
    """Write a report as JSON to a file; None: to stdout.

    Raises:
        UserError: the file cannot be written.
    """
    text = json.dumps(report, indent=2)
    if output is None:
        print(text)
        return
    try:
        output.write_text(text + "\n", "utf-8")
    except OSError as error:
        raise UserError(f"--output {output} can't be written: {error.strerror}") from None
