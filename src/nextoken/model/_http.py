"""JSON over HTTP with time limits, retries and errors that a person can act on."""

from __future__ import annotations

import http.client
import json
import random
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

from nextoken.errors import ModelError

_RETRIED = frozenset({429, 500, 502, 503, 504})
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 60.0
_SHOWN = 300
"""Characters of a server's own words that an error repeats."""


class Refused(ModelError):
    """The server answered with an error status that trying again will not change."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Connection:
    """A server at `url`.

    Args:
        url: with or without a trailing `/v1`.
        timeout: seconds a request may take between two signs of life.
        retries: how often a request is repeated after status 429, 500, 502, 503, 504 or a connection that broke off.
            Pauses are 0.5, 1, 2, ... seconds, each times a random factor of 0.5 to 1.5, or what the server asks for.
        api_key: sent as a bearer token, to this server only, and never shown.

    Raises:
        ModelError: the address is not one of http or https, or has a password in it.
    """

    def __init__(self, url: str, *, timeout: float = 60.0, retries: int = 3, api_key: str | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ModelError(f"{url!r} is not the address of a server: expected http://host:port or https://...")
        if parts.username or parts.password:
            raise ModelError(f"the address of {parts.hostname} has a name or password in it: pass api_key= instead")
        if timeout <= 0 or retries < 0:
            raise ValueError(f"timeout must be above 0 and retries at least 0, got {timeout} and {retries}")
        root = parts.path.rstrip("/").removesuffix("/v1")
        self.root = f"{parts.scheme}://{parts.netloc}{root}"
        self.timeout, self.retries = timeout, retries
        self._api_key = api_key
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if parts.hostname in ("localhost", "127.0.0.1", "::1"):
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)
        # A generator of its own, so that pauses never move the seeds of a program.
        self._random = random.Random()

    def get(self, path: str) -> Any:
        """The JSON at `path`. Errors as for `post`."""
        return self._request(path, None, self.retries)

    def post(self, path: str, body: Mapping[str, Any], *, retries: int | None = None) -> Any:
        """The JSON that answers `body`.

        Raises:
            Refused: a status of 4xx or 5xx, after the retries that it deserves.
            ModelError: the server cannot be reached, does not answer in time, breaks off, or answers with no JSON.
        """
        data = json.dumps(body, allow_nan=False).encode()
        return self._request(path, data, self.retries if retries is None else retries)

    def _request(self, path: str, data: bytes | None, retries: int) -> Any:
        for attempt in range(retries + 1):
            try:
                return self._once(path, data)
            except _Passing as trouble:
                if attempt == retries:
                    raise trouble.error from None
                pause = _FIRST_PAUSE * 2**attempt * self._random.uniform(0.5, 1.5)
                time.sleep(min(_LONGEST_PAUSE, pause if trouble.pause is None else trouble.pause))
        raise AssertionError("unreachable")

    def _once(self, path: str, data: bytes | None) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        request = urllib.request.Request(self.root + path, data=data, headers=headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            with error:
                raise self._status(error, path) from None
        except (TimeoutError, urllib.error.URLError, http.client.HTTPException, ConnectionError) as error:
            raise self._trouble(error) from None
        try:
            return json.loads(content)
        except ValueError:
            start = self._discreet(content[:80].decode("utf-8", errors="replace"))
            raise ModelError(f"{self.root}{path} answered with something that is no JSON: {start!r}") from None

    def _status(self, error: urllib.error.HTTPError, path: str) -> Exception:
        status = error.code
        try:
            said = _message(error.read())
        except (OSError, http.client.HTTPException):
            said = ""
        said = self._discreet(said)[:_SHOWN]
        if status in (401, 403):
            hint = "the API key was not accepted" if self._api_key else "it wants an API key: pass api_key="
            return Refused(f"{self.root} refused access ({status}): {hint}", status)
        if 300 <= status < 400:
            where = error.headers.get("Location", "elsewhere")
            return Refused(f"{self.root}{path} redirects to {where}: give that address", status)
        refused = Refused(f"{self.root}{path} answered {status}{': ' + said if said else ''}", status)
        if status not in _RETRIED:
            return refused
        after = error.headers.get("Retry-After", "")
        return _Passing(refused, float(after) if after.isdecimal() else None)

    def _trouble(self, error: Exception) -> Exception:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            return ModelError(f"{self.root} did not answer within {self.timeout:g} seconds: raise timeout=")
        broke_off = ConnectionResetError | ConnectionAbortedError | BrokenPipeError | http.client.HTTPException
        if isinstance(reason, broke_off):
            return _Passing(ModelError(f"{self.root} broke off the connection ({type(reason).__name__})"), None)
        if isinstance(reason, socket.gaierror):
            return ModelError(f"cannot reach {self.root}: no such host")
        return ModelError(f"cannot reach {self.root}: {self._discreet(str(reason))}. Is the server running?")

    def _discreet(self, text: str) -> str:
        return text.replace(self._api_key, "***") if self._api_key else text


class _Passing(Exception):
    """Trouble that may pass; `error` is what it is called when it does not."""

    def __init__(self, error: ModelError, pause: float | None) -> None:
        super().__init__(str(error))
        self.error, self.pause = error, pause


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Following would carry the API key to another server."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _message(content: bytes) -> str:
    """The message within an error's body, whatever its form, on one line."""
    text = content.decode("utf-8", errors="replace")
    try:
        found = json.loads(text)
    except ValueError:
        return " ".join(text.split())
    for key in ("error", "message", "detail"):
        while isinstance(found, dict) and key in found:
            found = found[key]
    return " ".join((found if isinstance(found, str) else json.dumps(found)).split())
