"""A question to the service on this host, at its URL or at its Unix socket.  Python 3.7, standard library only."""

from __future__ import annotations

import functools
import http.client
import socket as sockets
import urllib.request
from typing import Any, Optional


class UnixConnection(http.client.HTTPConnection):
    """To a Unix socket at ``path``, whatever the URL's host is."""

    def __init__(self, host: str, path: str, **options: Any) -> None:
        super().__init__(host, **options)
        self._path = path

    def connect(self) -> None:
        self.sock = sockets.socket(sockets.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class UnixHandler(urllib.request.HTTPHandler):
    def __init__(self, path: str) -> None:
        super().__init__()
        self._connection: Any = functools.partial(UnixConnection, path=path)

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, request)


def ask(url: str, path: str, timeout: float, socket: str = "", body: Optional[bytes] = None) -> Any:
    """The reply to a GET, or to a POST of JSON where there is a ``body``; raises what ``urllib.request.urlopen`` does.

    With a socket the URL is a name alone, and the front's TLS is not the engine's.
    """
    headers = {} if body is None else {"Content-Type": "application/json"}
    request = urllib.request.Request(("http://engine" if socket else url) + path, body, headers)
    # The service is on this host: a proxy of the environment must not see the question.
    handlers = [urllib.request.ProxyHandler({}), *([UnixHandler(socket)] if socket else [])]
    return urllib.request.build_opener(*handlers).open(request, timeout=timeout)
