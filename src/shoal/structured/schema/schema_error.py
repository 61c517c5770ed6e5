"""The error of a JSON schema that can't be used."""

from shoal.errors import RequestError, structured_outputs_error


def schema_error(problem: str) -> RequestError:
    """Return an error that names the schema, followed by what is wrong with it."""
    return structured_outputs_error(problem, "json")
