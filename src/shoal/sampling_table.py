"""The rows of the table of sampling parameters.

A row is written once, as the field of `SamplingParams` that it describes. From it come the checks of `SamplingParams`,
the schema of HTTP requests, the flags of `shoal generate` and the page docs/sampling.md.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shoal.parameter_forms import Form

Endpoint = Literal["completions", "chat", "responses"]
_ROW = "sampling parameter"  # the key of a row in the metadata of its field


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParameter:
    """A row: one sampling parameter."""

    name: str
    form: Form
    default: Any
    help: str  # what the parameter does, without its range
    flag: str | None  # the flag of `shoal generate`, without dashes; None: there is none
    http: Mapping[Endpoint, str]  # the name of the parameter in the requests of each endpoint that has it

    @property
    def description(self) -> str:
        """What the parameter does, and its range."""
        return f"{self.help}; {self.form}"


@dataclass(frozen=True, slots=True)
class _Row:
    form: Form
    help: str
    flag: str | None
    http: Mapping[Endpoint, str] | tuple[Endpoint, ...]


ALL: tuple[Endpoint, ...] = ("completions", "chat", "responses")
NOT_RESPONSES: tuple[Endpoint, ...] = ("completions", "chat")


def parameter(
    default: Any,
    form: Form,
    help: str,
    *,
    flag: str | None = "",
    http: Mapping[Endpoint, str] | tuple[Endpoint, ...] = ALL,
) -> Any:
    """Return the field of a sampling parameter.

    Args:
        flag: as in the row; "": the name with dashes.
        http: as in the row; a tuple: the endpoints where the parameter has its own name.
    """
    return dataclasses.field(default=default, metadata={_ROW: _Row(form, help, flag, http)})


def table_of(params: type[Any]) -> dict[str, SamplingParameter]:
    """Return the rows of all fields of a class by their names."""
    found = {}
    for field in dataclasses.fields(params):
        row: _Row = field.metadata[_ROW]
        http = row.http if isinstance(row.http, Mapping) else dict.fromkeys(row.http, field.name)
        flag = field.name.replace("_", "-") if row.flag == "" else row.flag
        found[field.name] = SamplingParameter(
            name=field.name, form=row.form, default=field.default, help=row.help, flag=flag, http=http
        )
    return found
