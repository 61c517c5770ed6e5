"""A `RequestError` as a part of messages."""

from shoal.errors import RequestError
from shoal.wire.base import Wire


class RequestRefusal(Wire, frozen=True):
    """The fields of a `RequestError`, which explains them."""

    message: str
    param: str | None = None
    code: str | None = None
    subject: str = ""

    @classmethod
    def of(cls, error: RequestError) -> "RequestRefusal":
        return cls(error.message, error.param, error.code, error.subject)

    def error(self) -> RequestError:
        return RequestError(self.message, self.param, self.code, subject=self.subject)
