"""A hospital's HTTP proxy: used only where the site's settings name one, then by the check and by Flower alike."""

from __future__ import annotations

import base64
import http.client
import os
import socket
from urllib.parse import SplitResult, unquote, urlsplit

from nnunet_fedharm.errors import SetupError

_VARIABLES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


def connect(host: str, port: int, *, proxy: str = "", seconds: float = 10.0) -> socket.socket:
    """A connection to a host, directly or through the tunnel of a proxy.

    Args:
        proxy: as in a site's settings; empty for none.

    Raises:
        OSError: nobody answers, or the proxy lets nobody through.
        SetupError: the proxy is not written as one.
    """
    if not proxy:
        return socket.create_connection((host, port), timeout=seconds)
    way = check_proxy(proxy)
    connection = http.client.HTTPConnection(str(way.hostname), way.port or 80, timeout=seconds)
    headers = {}
    if way.username is not None:
        user = f"{unquote(way.username)}:{unquote(way.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
    connection.set_tunnel(host, port, headers)
    try:
        connection.connect()
    except http.client.HTTPException as error:
        connection.close()
        raise OSError(f"{way.hostname} is no HTTP proxy: {error!r}") from error
    return connection.sock


def check_proxy(proxy: str) -> SplitResult:
    """The parts of a proxy's address.

    Raises:
        SetupError: it is none that Flower and the check both speak with.
    """
    try:
        way = urlsplit(proxy)
        fits = way.scheme == "http" and bool(way.hostname) and (way.port or 80) > 0
    except ValueError:  # a port that is no number
        fits = False
    if not fits:
        raise SetupError('The proxy in the site\'s settings is no HTTP proxy; write proxy = "http://HOST:PORT" there.')
    return way


def exported_proxy() -> str:
    """Name of the environment's variable that would send HTTPS to a proxy; empty where there is none."""
    return next((name for name in _VARIABLES if os.environ.get(name)), "")
