"""The page over HTTP, to this machine only: loopback address, one path, GET and HEAD, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from nnunet_fedharm.errors import FedHarmError, SetupError

HOST = "127.0.0.1"
_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page_server(render: Callable[[], str], port: int) -> ThreadingHTTPServer:
    """A server of one page, not yet serving.

    Args:
        render: makes the page anew for each look.
        port: 0 takes any free one.

    Raises:
        SetupError: the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "nnunet-fedharm", ""

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def _answer(self) -> None:
            # A name that resolves to 127.0.0.1 must not let a web page of somebody else read this one.
            if (self.headers.get("Host") or "").rsplit(":", 1)[0] not in (HOST, "localhost"):
                self._send(HTTPStatus.MISDIRECTED_REQUEST, "Ask for this page as localhost.")
            elif self.path.split("?", 1)[0] != "/":
                self._send(HTTPStatus.NOT_FOUND, "There is one page: /")
            else:
                try:
                    self._send(HTTPStatus.OK, render())
                except FedHarmError as error:
                    self._send(HTTPStatus.SERVICE_UNAVAILABLE, str(error))

        def _send(self, status: HTTPStatus, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            for name, value in _HEADERS.items():
                self.send_header(name, value if status is HTTPStatus.OK else value.replace("text/html", "text/plain"))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nobody needs a line for each refresh."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise SetupError(
            f"Cannot listen on {HOST}:{port} ({error}). Choose another --port; 0 takes a free one."
        ) from error
