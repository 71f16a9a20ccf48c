"""One server, asked over HTTP: JSON in, JSON out, with tries, a pace, and a decision when the server is down.

A request that fails is tried again after 0.5, 1, 2, … seconds, or after what the server asks for (Retry-After), at most
`timeout_s`. What the server then still refuses for this one request is a `Refused`; what no further request could
change (nobody listens, a token that is not accepted, no such address) ends the run, and so do several requests in a
row that failed, unless one that went well before goes well again.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

from stages.errors import StageError
from stages.score.wire.config import WireSettings, token_of

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_MOST_BYTES = 1 << 26  # of a reply; more is no list of rewards
_IN_A_ROW = 3  # requests that failed before the server is suspected to be down
_PASSING = frozenset((408, 425, 429, 500, 502, 503, 504))
_FINAL = {401: "token", 403: "token", 404: "address", 405: "address", 410: "address"}

Read = TypeVar("Read")


class Refused(Exception):
    """A request that was not answered as it should be, for whatever reason lies in it or in its reply.

    Args:
        reason: in words.
        lasting: whether the same request would be refused again, so that it says nothing about the server.
        wait_s: what the server asks to be given before the next try.
    """

    def __init__(self, reason: str, *, lasting: bool = False, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.lasting, self.wait_s = reason, lasting, wait_s


class _Unreachable(Exception):
    """No connection came about."""


class Client:
    """Asks one server; safe to use from several threads.

    Args:
        config: the reward's settings.
        url: the address to post to.
        where: names the reward, for errors.

    Raises:
        InputError: see `token_of`.
    """

    def __init__(self, config: WireSettings, *, url: str, where: str) -> None:
        self._config, self._url, self._where = config, url, where
        self._token = token_of(config, where=where)
        shown = f"Bearer {self._token}" if config.token_header.lower() == "authorization" else self._token
        self._http = httpx.Client(
            headers={config.token_header: shown} if self._token else {},
            timeout=config.timeout_s,
            limits=httpx.Limits(max_connections=config.concurrency),
        )
        self._lock, self._next_at = threading.Lock(), 0.0
        self._failed_in_a_row = 0
        self._went_well: Callable[[], object] | None = None
        self._down: StageError | None = None

    def ask(self, body: Mapping[str, Any], read: Callable[[Any], Read], *, tries: int | None = None) -> Read:
        """What `read` makes of the reply to a request.

        Args:
            body: the request.
            read: makes a result of the reply's JSON, or raises `Refused`.
            tries: in the place of the config's retries and one.

        Raises:
            Refused: if there is none, after all tries.
            StageError: if the server is down.
        """
        try:
            found = self._tried(body, read, tries or self._config.retries + 1)
        except Refused as refused:
            if not refused.lasting:
                self._suspect(refused)
            raise
        with self._lock:
            self._failed_in_a_row, self._went_well = 0, lambda: self._tried(body, read, 1)
        return found

    def _tried(self, body: Mapping[str, Any], read: Callable[[Any], Read], tries: int) -> Read:
        last: Exception = Refused("not asked")
        for attempt in range(tries):
            if self._down is not None:
                raise self._down
            asked_for_time = False
            try:
                return read(self._posted(body))
            except Refused as refused:
                if refused.lasting:
                    raise
                last, asked_for_time = refused, self._give_time(refused.wait_s)
            except _Unreachable as error:
                last = error
            if attempt + 1 < tries and not asked_for_time:
                time.sleep(_pause(attempt))
        if isinstance(last, _Unreachable):
            raise self._give_up(f"{last}, {tries} times") from None
        raise last

    def _posted(self, body: Mapping[str, Any]) -> Any:
        """The reply's JSON to one try."""
        self._keep_pace()
        ends = time.monotonic() + self._config.timeout_s
        content = bytearray()
        try:
            with self._http.stream("POST", self._url, json=body) as reply:
                for part in reply.iter_bytes():
                    content += part
                    if time.monotonic() > ends or len(content) > _MOST_BYTES:
                        raise Refused(f"no end of its reply within {self._config.timeout_s:g} s or 64 MiB")
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _Unreachable(f"no connection: {error or type(error).__name__}") from None
        except httpx.TimeoutException:
            raise Refused(f"no reply within {self._config.timeout_s:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Refused(f"{type(error).__name__}: {error}") from None
        if reply.status_code != 200:
            raise self._refusal(reply, bytes(content))
        try:
            return json.loads(content)
        except ValueError:
            raise Refused(f"a reply that is no JSON: {self._quoted(bytes(content))}") from None

    def _refusal(self, reply: httpx.Response, content: bytes) -> Exception:
        """What a status other than 200 means."""
        status = reply.status_code
        got = f"HTTP {status} {reply.reason_phrase}: {self._quoted(content)}"
        kind = "address" if reply.is_redirect else _FINAL.get(status)
        if kind is not None:
            fix = {
                "token": f"set token_env to the variable that holds the token: now {self._config.token_env or 'none'}",
                "address": f"check url, and model if there is one; asked by POST at {self._url}",
            }
            return self._give_up(got, fix[kind])
        lasting = status not in _PASSING and status < 500
        return Refused(got, lasting=lasting, wait_s=_asked_wait(reply.headers.get("retry-after")))

    def _suspect(self, refused: Refused) -> None:
        """Count a failure; after several in a row, ask what went well before, or give up."""
        with self._lock:
            self._failed_in_a_row += 1
            if self._failed_in_a_row < _IN_A_ROW:
                return
            again = self._went_well
        if again is not None:
            try:
                again()
            except Refused:
                again = None
        if again is None:
            raise self._give_up(f"{_IN_A_ROW} requests in a row without a result, the last: {refused.reason}")
        with self._lock:
            self._failed_in_a_row = 0

    def _give_up(self, got: str, fix: str = "start it, or mend it there") -> StageError:
        self._down = StageError(
            self._where,
            wanted=f"rewards from {self._url}",
            got=got,
            fix=f"{fix}; the same command carries on, and asks nothing again that was answered",
        )
        return self._down

    def _keep_pace(self) -> None:
        """Wait for this request's turn."""
        rate = self._config.requests_per_second
        with self._lock:
            at = max(self._next_at, time.monotonic())
            self._next_at = at + 1 / rate if rate is not None else self._next_at
        time.sleep(max(0.0, at - time.monotonic()))

    def _give_time(self, wait_s: float | None) -> bool:
        """Let no request begin before the time is over that the server asks for; whether it asks for any."""
        if wait_s is None:
            return False
        with self._lock:
            self._next_at = max(self._next_at, time.monotonic() + min(wait_s, self._config.timeout_s))
        return True

    def _quoted(self, content: bytes) -> str:
        """The beginning of a reply, without the token, which some servers repeat."""
        text = content[:2000].decode("utf-8", "replace")
        text = text.replace(self._token, "…") if self._token else text
        return repr(" ".join(text.split())[:200])


def _pause(attempt: int) -> float:
    """Seconds before the next try, spread so that many who wait do not come back at once."""
    return min(_FIRST_WAIT_S * 2**attempt, _LONGEST_WAIT_S) * random.uniform(0.8, 1.2)


def _asked_wait(told: str | None) -> float | None:
    """Seconds, from a Retry-After header: a number of them, or a date."""
    if told is None:
        return None
    try:
        return max(0.0, float(told))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(told) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
