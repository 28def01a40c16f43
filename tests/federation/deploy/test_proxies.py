"""Exported proxies do not get between a consortium's processes; a proxy that a site's settings name is used by all of them."""

from __future__ import annotations

import base64
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from nnunet_fedharm.errors import SetupError
from nnunet_fedharm.federation import daemon
from nnunet_fedharm.federation.daemon import flower_environment, wait_until_ready, with_proxies
from nnunet_fedharm.federation.deploy import control
from nnunet_fedharm.federation.deploy.certificates import check_server
from nnunet_fedharm.federation.deploy.control import operator
from nnunet_fedharm.federation.deploy.proxies import check_proxy
from nnunet_fedharm.federation.deploy.server_folder import ServerFolder
from nnunet_fedharm.federation.deploy.site_folder import SiteFolder
from nnunet_fedharm.federation.deploy.site_node import check_site
from tests.federation.deploy.real import RealConsortium
from tests.federation.deploy.test_consortium import answering

NOWHERE = "http://127.0.0.1:1"
VARIABLES = [name for lower in ("http_proxy", "https_proxy", "all_proxy") for name in (lower, lower.upper())]
DIRECT = ("NO_PROXY", "no_proxy")


class Tunnel:
    """An HTTP proxy that knows CONNECT only.

    Attributes:
        asked: first line of each request.
        heads: the whole requests.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.heads: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            head = b""
            while b"\r\n\r\n" not in head and (data := client.recv(4096)):
                head += data
            self.heads.append(head.decode())
            self.asked.append(self.heads[-1].splitlines()[0])
            host, _, port = self.asked[-1].split()[1].rpartition(":")
            try:
                with socket.create_connection((host, int(port))) as server:
                    client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    self._pass_on(client, server)
            except OSError:
                return  # either side may leave at any time

    @staticmethod
    def _pass_on(client: socket.socket, server: socket.socket) -> None:
        while True:
            for end in select.select([client, server], [], [])[0]:
                data = end.recv(65536)
                if not data:
                    return
                (server if end is client else client).sendall(data)


@pytest.fixture
def tunnel() -> Iterator[Tunnel]:
    made = Tunnel()
    yield made
    made.close()


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No proxy is exported."""
    for name in (*VARIABLES, *DIRECT):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def way(url: str, environment: dict[str, str], patch: pytest.MonkeyPatch) -> str:
    """How Flower's HTTP client goes to a URL: "direct", or host and port of the proxy."""
    with patch.context() as inside:
        for name in (*VARIABLES, *DIRECT):
            inside.delenv(name, raising=False)
        for name in {*VARIABLES, *DIRECT} & set(environment):
            inside.setenv(name, environment[name])
        with httpx.Client(
            verify=False
        ) as client:  # the authorities take longer to read than all else; nobody is called
            proxy = getattr(client._transport_for_url(httpx.URL(url))._pool, "_proxy_url", None)  # type: ignore[attr-defined]
    return "direct" if proxy is None else f"{proxy.host.decode()}:{proxy.port}"


@pytest.mark.parametrize("name", VARIABLES)
@pytest.mark.parametrize("host", ["fed.example.org", "FED.example.org", "192.0.2.7", "2001:db8::7"])
def test_flowers_processes_call_loopback_and_the_server_directly(
    name: str, host: str, clean: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clean.setenv(name, "http://proxy.example:3128")
    clean.setenv("NO_PROXY", "intranet.example, .other.example")
    made = flower_environment(tmp_path, device="cpu", parallel_sites=1, hosts=[host])
    there = f"[{host}]" if ":" in host else host
    for url in (f"https://{there}:9092", "http://127.0.0.1:1", "http://localhost:1", "https://[::1]:1"):
        assert way(url, made, clean) == "direct", url
    if "http_" not in name.lower():
        assert way("https://elsewhere.example", made, clean) == "proxy.example:3128"
    assert way("https://intranet.example", made, clean) == "direct", "what the user has there stays"
    assert made["NO_PROXY"] == made["no_proxy"]


def test_both_lists_of_the_user_stay() -> None:
    made = with_proxies({"NO_PROXY": "a.example", "no_proxy": "b.example,a.example"}, hosts=["c.example"])
    assert made["no_proxy"] == "b.example,a.example,c.example,localhost,127.0.0.1,::1"


def test_a_socks_proxy_does_not_keep_flowers_client_from_starting(clean: pytest.MonkeyPatch) -> None:
    for scheme in ("socks", "socks5"):
        made = with_proxies({"ALL_PROXY": f"{scheme}://proxy.example:1080"}, hosts=["fed.example.org"])
        assert way("https://fed.example.org:9092", made, clean) == "direct"


def test_a_proxy_of_the_settings_counts_whatever_is_exported(clean: pytest.MonkeyPatch) -> None:
    exported = {"https_proxy": NOWHERE, "ALL_PROXY": NOWHERE, "NO_PROXY": "fed.example.org"}
    made = with_proxies(exported, hosts=["fed.example.org"], proxy="http://proxy.example:3128")
    assert way("https://fed.example.org:9092", made, clean) == "proxy.example:3128"
    assert way("http://127.0.0.1:9092", made, clean) == "direct"


def test_the_operator_asks_no_proxy_for_this_machine(server: ServerFolder, clean: pytest.MonkeyPatch) -> None:
    clean.setenv("HTTPS_PROXY", NOWHERE)
    clean.setenv("ALL_PROXY", "socks://127.0.0.1:1")
    with answering(server) as address:
        clean.setattr(control, "local_address", lambda folder: address)
        with operator(server) as connection:
            pool = connection.client._client._transport_for_url(httpx.URL(f"https://{address}"))._pool
    assert getattr(pool, "_proxy_url", None) is None


def test_a_local_superlink_is_found_though_a_dead_proxy_is_exported(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        clean.setenv(name, NOWHERE)
    with ThreadingHTTPServer(("127.0.0.1", 0), Healthy) as health:
        threading.Thread(target=health.serve_forever, daemon=True).start()
        with subprocess.Popen(["sleep", "60"]) as process:
            clean.setattr(daemon, "_START_S", 5.0)
            wait_until_ready(process, health.server_port, tmp_path / "log")
            process.kill()
        health.shutdown()


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *words: object) -> None:
        pass  # nothing on the test's output


def test_the_check_goes_through_the_proxy_of_the_settings(server: ServerFolder, tunnel: Tunnel) -> None:
    with answering(server) as address:
        assert check_server(address, server.ca_certificate, proxy=f"http://me:a%20b@{tunnel.address}") == ""
        assert [line.split()[:2] for line in tunnel.asked] == [["CONNECT", address]]
        assert f"Basic {base64.b64encode(b'me:a b').decode()}" in tunnel.heads[0]
        told = check_server(address, server.ca_certificate, proxy=f"http://{address}", seconds=2.0)
        assert "does not answer through the site's proxy" in told, "that is no proxy"
    assert "through the site's proxy" in check_server("localhost:1", server.ca_certificate, proxy=NOWHERE)


@pytest.mark.parametrize(
    "proxy", ["proxy.example:3128", "https://proxy.example", "socks5://p:1", "http://p:x", "http://"]
)
def test_what_is_no_http_proxy_is_refused(proxy: str) -> None:
    with pytest.raises(SetupError, match=r'write proxy = "http://HOST:PORT"'):
        check_proxy(proxy)


def test_a_site_that_reaches_nobody_is_told_of_an_exported_proxy(
    join_site: Callable[..., SiteFolder], clean: pytest.MonkeyPatch
) -> None:
    site = join_site()
    assert "exported" not in check_site(site)
    clean.setenv("HTTPS_PROXY", "http://user:secret@proxy.example:3128")
    told = check_site(site)
    assert "HTTPS_PROXY is exported here, and not used." in told
    assert f'write proxy = "http://HOST:PORT" in {site.settings_file}' in told
    assert "secret" not in told


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is everywhere on Linux only")
@pytest.mark.parametrize("named", [pytest.param(False, marks=pytest.mark.long), True])
def test_server_and_site_meet_though_a_dead_proxy_is_exported(
    named: bool, clean: pytest.MonkeyPatch, tmp_path: Path, tunnel: Tunnel
) -> None:
    """Directly, and through a proxy that the site's settings name."""
    for name in VARIABLES:
        clean.setenv(name, NOWHERE)
    (tmp_path / "north" / "nnUNet_raw" / "Dataset001_Blobs").mkdir(parents=True)
    real = RealConsortium(tmp_path, ("north",), recorded=False, host="127.0.0.2")
    try:
        site = real.join("north")
        if named:
            text = site.settings_file.read_text()
            site.settings_file.write_text(text.replace('proxy = ""', f'proxy = "http://{tunnel.address}"'))
        real.register(site)
        real.open(())
        assert real.command("site", "check", str(site.root))[0] == 0
        real.start("north", "site", "start", str(site.root))
        real.wait_for_log("north", "SuperNode ID")
        assert "north                    online" in real.command("server", "sites", str(real.server.path))[1]
    finally:
        real.close()
    port = real.server.settings()["port"]
    assert {line.split()[1] for line in tunnel.asked} == ({f"127.0.0.2:{port}"} if named else set())
