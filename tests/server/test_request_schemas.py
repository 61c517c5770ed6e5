"""The schemas of requests have all sampling parameters of the table, with the table's ranges and descriptions."""

from typing import Any

import pytest

from shoal.parameter_forms import Number, UnsupportedParameter
from shoal.params import SAMPLING_TABLE
from shoal.sampling_table import Endpoint
from shoal.server.api.request_schemas import Body, ChatBody, CompletionBody, ResponsesBody

BODIES: dict[Endpoint, type[Body]] = {"completions": CompletionBody, "chat": ChatBody, "responses": ResponsesBody}
FIELDS = [
    (endpoint, row.http[endpoint], name)
    for name, row in SAMPLING_TABLE.items()
    for endpoint in BODIES
    if endpoint in row.http and not isinstance(row.form, UnsupportedParameter)
]


def schema_of(endpoint: Endpoint, field: str) -> dict[str, Any]:
    found: dict[str, Any] = BODIES[endpoint].model_json_schema()["properties"][field]
    return found


@pytest.mark.parametrize(("endpoint", "field", "name"), FIELDS)
def test_every_parameter_is_described(endpoint: Endpoint, field: str, name: str) -> None:
    assert SAMPLING_TABLE[name].help in schema_of(endpoint, field)["description"]


@pytest.mark.parametrize(("endpoint", "field", "name"), FIELDS)
def test_numbers_have_the_ranges_of_the_table(endpoint: Endpoint, field: str, name: str) -> None:
    form = SAMPLING_TABLE[name].form
    if not isinstance(form, Number):
        return
    number, null = schema_of(endpoint, field)["anyOf"]
    assert (number["type"], null["type"]) == ("integer" if form.integer else "number", "null")
    low = number.get("exclusiveMinimum" if form.above_low else "minimum", form.low)
    # A completion with echo may have no new tokens; a response can't ask for the whole vocabulary.
    others = {("completions", "max_tokens"): 0, ("responses", "logprobs"): 0}
    assert low == others.get((endpoint, name), form.least)
    assert number.get("maximum", form.high) == (2048 if name == "n" else form.high)


def test_a_schema_has_only_standard_names_of_ranges() -> None:
    """pydantic writes `ge` instead of `minimum` where it cannot tell the type to which a range belongs."""
    for body in BODIES.values():
        assert '"ge"' not in str(body.model_json_schema()).replace("'", '"')
