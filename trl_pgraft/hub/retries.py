# SPDX-License-Identifier: Apache-2.0

"""
Requests to the Hub are repeated one by one while it is out of order, so that nothing is sent twice.

The client has a back-off of its own for uploads of large files; here are the others. A commit that seems to have
failed may have been made: it is repeated from the start of its call, which finds out.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session


# Seconds before a request is sent again.
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
Result = TypeVar("Result")


def retried(action: Callable[[], Result]) -> Result:
    """
    The result of `action`, which calls the Hub's client: each of its requests is repeated, and `action` itself where
    a commit failed.
    """
    with _each_request_repeated():
        for wait in WAITS:
            try:
                return action()
            except Exception as error:
                if _is_final(error):
                    raise
            time.sleep(wait)
        return action()


@contextmanager
def _each_request_repeated() -> Iterator[None]:
    """The client's session repeats what it sends inside the block, whatever its library."""
    session = get_session()
    is_first = "send" not in vars(session)
    if is_first:
        session.send = _repeating(session.send)
    try:
        yield
    finally:
        if is_first:
            vars(session).pop("send", None)


def _repeating(send: Callable[..., Any]) -> Callable[..., Any]:
    def send_and_repeat(request: Any, **options: Any) -> Any:
        for wait in WAITS if _may_be_repeated(request) else ():
            try:
                response = send(request, **options)
                if not _is_busy(response.status_code):
                    return response
                response.close()
            except (ValueError, TypeError, OfflineModeIsEnabled):
                raise
            except Exception:  # of a connection; the classes are those of the client's own library
                pass
            time.sleep(wait)
        return send(request, **options)

    return send_and_repeat


def _is_busy(status: int) -> bool:
    return status in (408, 429) or status >= 500


def _is_commit(request: Any) -> bool:
    return request is not None and request.method == "POST" and "/commit/" in str(request.url)


def _may_be_repeated(request: Any) -> bool:
    """Whether a request makes no commit, and its body is no file or stream, of which a part may be read already."""
    with suppress(RuntimeError):  # httpx has no content of a stream
        body = request.content if hasattr(type(request), "content") else request.body
        return not _is_commit(request) and isinstance(body, bytes | str | None)
    return False


def _is_final(error: Exception) -> bool:
    """Whether the error is of anything but a commit which the Hub may take another time."""
    request = None
    with suppress(RuntimeError):  # httpx: of no request
        request = getattr(getattr(error, "response", None) or error, "request", None)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return not (_is_commit(request) and (_is_busy(status) or status in (409, 412)))
    return not _is_commit(request)
