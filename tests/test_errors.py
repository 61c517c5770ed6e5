"""What an error carries beside its message, and that it is kept on the way to whoever reads it."""

import pickle

import pytest

from shoal.errors import UNPROCESSABLE, RequestError, context_length_exceeded, structured_outputs_error
from shoal.wire.base import encode
from shoal.wire.engine import Finish, RefusalKind, SeqUpdate, Updates, error_fields, from_engine
from shoal.wire.request_refusal import RequestRefusal

ERRORS = [
    RequestError("there is no replica 7", "data_parallel_rank"),
    RequestError("the body is not JSON", code="invalid_json"),
    RequestError.about("top_k", "must be at least 1, got 0"),
    RequestError.about("logit_bias", "must be in [-100, 100]", subject="logit_bias of token 5"),
    context_length_exceeded(10, "the prompt has 20 tokens: shorten it"),
    structured_outputs_error(": $ref at / leads nowhere", "json"),
]


def fields(error: RequestError) -> tuple[object, ...]:
    return error.message, error.param, error.code, error.subject, str(error)


def test_a_message_begins_with_the_name_of_the_parameter() -> None:
    assert str(ERRORS[2]) == "top_k must be at least 1, got 0"
    assert str(ERRORS[3]) == "logit_bias of token 5 must be in [-100, 100]"
    assert str(ERRORS[5]) == "structured_outputs.json: $ref at / leads nowhere"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ERRORS[0], "there is no replica 7"),
        (ERRORS[2], "mine must be at least 1, got 0"),
        (ERRORS[5], "mine: $ref at / leads nowhere"),
    ],
)
def test_an_error_for_a_sender_with_another_name(error: RequestError, message: str) -> None:
    renamed = error.renamed("mine")
    assert (renamed.message, renamed.param, renamed.code) == (message, "mine", error.code)
    assert renamed.renamed("yours").message == message.replace("mine", "yours")


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_a_place_before_the_message_changes_nothing_else(error: RequestError) -> None:
    placed = error.within("prompt 3")
    assert (placed.message, placed.param, placed.code) == (f"prompt 3: {error.message}", error.param, error.code)
    assert placed.renamed("mine").message == placed.message


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_all_fields_go_through_messages_and_pickles(error: RequestError) -> None:
    assert fields(RequestRefusal.of(error).error()) == fields(error)
    update = SeqUpdate.invalid(5, error)
    (found,) = from_engine.decode(encode(Updates((update,)))).updates  # type: ignore[union-attr]
    assert (found.seq, found.finish, found.refusal) == (5, Finish.ABORT, RefusalKind.INVALID)
    assert fields(found.request_error()) == fields(error)
    assert fields(pickle.loads(pickle.dumps(error))) == fields(error)


def test_the_kind_of_an_error_that_is_only_a_message() -> None:
    assert error_fields("the queue is full", RefusalKind.FULL) == {
        "error": "the queue is full",
        "refusal": RefusalKind.FULL,
    }
    assert error_fields(ERRORS[5])["code"] == UNPROCESSABLE
