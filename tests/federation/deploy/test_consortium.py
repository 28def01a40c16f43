"""What a consortium is made of: its file, its keys, its certificates, its signed app."""

from __future__ import annotations

import json
import socket
import ssl
import stat
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, tzinfo
from pathlib import Path

import pytest

from nnunet_fedharm.cli import command_parser, main
from nnunet_fedharm.errors import SetupError
from nnunet_fedharm.federation.deploy import app_bundle, certificates, keys
from nnunet_fedharm.federation.deploy.consortium import Consortium
from nnunet_fedharm.federation.deploy.server import register_site, remove_site, start_server
from nnunet_fedharm.federation.deploy.server_folder import (
    ServerFolder,
    ServerOptions,
    init_server,
    renew_certificate,
    sign_again,
)
from nnunet_fedharm.federation.deploy.site_folder import SiteFolder
from tests.federation.deploy.conftest import SITES


def test_a_consortium_file_survives_its_journey_and_shows_damage(server: ServerFolder) -> None:
    found = server.consortium()
    text = found.to_toml()
    assert Consortium.from_toml(text, source="mail") == found
    for private in server.private.iterdir():
        assert private.read_text().strip() not in text, "no secret is in the file that is sent"
    with pytest.raises(SetupError, match="changed on its way"):
        Consortium.from_toml(text.replace(found.fingerprint, found.fingerprint[::-1]), source="mail")
    other = keys.make_signing_key(server.path / "other.key")
    with pytest.raises(SetupError, match="changed on its way: its fingerprint is"):
        Consortium.from_toml(text.replace(found.signing_key, other), source="mail")
    with pytest.raises(SetupError, match="lacks 'sites'"):
        Consortium.from_toml(
            "\n".join(line for line in text.splitlines() if not line.startswith("sites")), source="mail"
        )
    with pytest.raises(SetupError, match="ca_certificate is damaged"):
        Consortium.from_toml(text.replace("MII", "MIJ", 1), source="mail")


def test_private_files_are_for_their_owner_only(server: ServerFolder, join_site: Callable[..., SiteFolder]) -> None:
    site = join_site()
    for path in [*server.private.iterdir(), site.node_key, site.superexec_secret]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(server.private.stat().st_mode) == stat.S_IMODE(site.home.stat().st_mode) == 0o700


@pytest.mark.parametrize("made", ["init", "units"])
def test_a_server_folder_that_cannot_be_written_is_named(
    made: str, server: ServerFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    if made == "init":
        words, path = ["init", "/dev/null/x", "--host", "localhost", "--name", "Other"], Path("/dev/null/x")
    else:
        words, path = ["units", str(server.path)], server.path / "deploy"
        path.write_text("a file in the way")
    assert main(["server", *words]) == 2
    error = capsys.readouterr().err
    assert f"Cannot write {path}" in error
    assert "Choose a folder that this user may write." in error


def test_a_consortium_is_never_made_over_another(server: ServerFolder) -> None:
    options = ServerOptions(name="Other", hosts=["localhost"], sites=[])
    with pytest.raises(SetupError, match="is a consortium already"):
        init_server(server.path, options)


@pytest.mark.parametrize("host", ["http://a.example", "a b"])
def test_a_host_that_is_none_is_refused(tmp_path: Path, host: str) -> None:
    with pytest.raises(SetupError):
        init_server(tmp_path / "new", ServerOptions(name="Other", hosts=[host], sites=[]))


def test_the_signed_app_is_the_installed_one_and_nothing_else_passes(server: ServerFolder) -> None:
    consortium = server.consortium()
    app, signature = server.app.read_bytes(), json.loads(server.signature.read_text())
    assert app_bundle.app_hash(app) == consortium.app_sha256 == app_bundle.app_hash(app_bundle.build_app())
    app_bundle.check_signature(app, signature, consortium.signing_key)
    with pytest.raises(SetupError, match="not signed"):
        app_bundle.check_signature(app + b" ", signature, consortium.signing_key)
    with pytest.raises(SetupError, match="not signed"):
        app_bundle.check_signature(app, {**signature, "signed_at": signature["signed_at"] + 1}, consortium.signing_key)
    with pytest.raises(SetupError, match="not signed"):
        app_bundle.check_signature(app, {}, consortium.signing_key)


def test_flowers_own_check_takes_our_signature_and_no_other(server: ServerFolder) -> None:
    import yaml
    from flwr.supercore.fab import Fab
    from flwr.supernode.start_client_internal import _verify_fab

    consortium = server.consortium()
    app, signature = server.app.read_bytes(), json.loads(server.signature.read_text())
    trusted = yaml.safe_load(app_bundle.trusted_entities(consortium.signing_key))
    carried = app_bundle.verifications(signature, consortium.signing_key)
    assert carried["valid_license"], "Flower looks for it before it reads signatures"
    assert _verify_fab(Fab(consortium.app_sha256, app, carried), trusted)
    other = b"an app that brings code of its own"
    assert not _verify_fab(Fab(app_bundle.app_hash(other), other, carried), trusted)
    stranger = keys.make_signing_key(server.path / "stranger.key")
    signed = app_bundle.sign_app(other, keys.load_signing_key(server.path / "stranger.key"))
    assert not _verify_fab(Fab("", other, app_bundle.verifications(signed, stranger)), trusted)


def test_an_upgrade_is_signed_by_the_key_that_sites_trust(server: ServerFolder) -> None:
    former = server.consortium()
    offline = server.path / "usb.key"
    server.signing_key.rename(offline)
    with pytest.raises(SetupError, match="--signing-key"):
        sign_again(server)
    signed = sign_again(server, offline)
    assert (signed.fingerprint, signed.app_sha256) == (former.fingerprint, former.app_sha256)
    keys.make_signing_key(server.path / "stranger.key")
    with pytest.raises(SetupError, match="not this consortium's signing key"):
        sign_again(server, server.path / "stranger.key")


def test_a_renewed_certificate_is_believed_and_the_fingerprint_stays(server: ServerFolder) -> None:
    former, certificate = server.consortium(), server.certificate.read_bytes()
    renewed = renew_certificate(server, ["localhost", "127.0.0.1", "::1"])
    assert renewed.fingerprint == former.fingerprint
    assert renewed.addresses == ("localhost:19092", "127.0.0.1:19092", "[::1]:19092")
    assert server.certificate.read_bytes() != certificate
    assert 390 < certificates.days_left(server.certificate) < 400
    with answering(server) as address:
        assert certificates.check_server(address, server.ca_certificate) == ""


def test_who_is_not_the_server_is_told_from_who_is_not_there(server: ServerFolder, tmp_path: Path) -> None:
    other = init_server(tmp_path / "other", ServerOptions(name="Other", hosts=["localhost"], sites=[]))
    with answering(other) as address, pytest.raises(SetupError, match="not this consortium's server"):
        certificates.check_server(address, server.ca_certificate)
    with answering(server) as address:
        by_other_name = address.replace("localhost", "127.0.0.2")
        with pytest.raises(SetupError, match="not this consortium's server"):
            certificates.check_server(by_other_name, server.ca_certificate)
    assert "does not answer" in certificates.check_server("localhost:1", server.ca_certificate)
    with pytest.raises(SetupError, match="host:port"):
        certificates.check_server("localhost", server.ca_certificate)


@pytest.mark.parametrize(
    ("shift", "why"),
    [
        (timedelta(days=-400), r"certificate has ended: the coordinator runs `nnunet-fedharm server renew FOLDER`"),
        (timedelta(days=2), r"not valid yet: this machine's clock says \d{4}-\d\d-\d\d \d\d:\d\d UTC; set it \(NTP\)"),
    ],
)
def test_a_certificate_out_of_its_time_is_not_taken_for_an_attack(
    server: ServerFolder, shift: timedelta, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhen(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.now(tz) + shift

    with monkeypatch.context() as patch:
        patch.setattr(certificates, "datetime", Elsewhen)
        renew_certificate(server)
    with answering(server) as address, pytest.raises(SetupError, match=why):
        certificates.check_server(address, server.ca_certificate)


def test_the_commands_that_sentences_name_are_there() -> None:
    assert command_parser("server").parse_args(["renew", "FOLDER"]).folder == Path("FOLDER")


def test_a_hospital_that_comes_later_is_added_joins_with_the_new_file_and_is_registered(
    server: ServerFolder,
    join_site: Callable[..., SiteFolder],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    key = str(join_site(SITES[0]).node_key.with_suffix(".pub"))
    words = ["server", "register", str(server.path), "hospital-west", key]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "hospital-west is not among the expected sites of Test study: hospital-north, hospital-south." in error
    assert server.registered() == {}
    assert main(["server", "register", str(server.path), SITES[0], key]) == 0, "the right name still can be used"
    (tmp_path / "west").mkdir()
    file = str(server.consortium_file)
    joining = ["site", "join", file, "--site", "hospital-west", "--site-root", str(tmp_path / "west")]
    assert main(joining) == 2
    assert "hospital-west is not among the sites of Test study" in capsys.readouterr().err
    before = server.consortium().fingerprint
    assert main(["server", "add", str(server.path), "hospital-west"]) == 0
    assert f"hospital-west: expected. Send them {file}; other sites need no new file." in capsys.readouterr().out
    assert server.consortium().sites == (*SITES, "hospital-west")
    assert server.consortium().fingerprint == before, "read out once, it holds"
    assert main(joining) == 0
    assert main([*words[:-1], str(tmp_path / "west" / "fedharm" / "consortium" / "node.pub")]) == 0
    assert list(server.registered()) == [SITES[0], "hospital-west"]
    assert main(["server", "add", str(server.path), "hospital-west"]) == 0
    assert "has these names already" in capsys.readouterr().out
    assert main(["server", "add", str(server.path), "../west"]) == 2
    assert server.consortium().sites == (*SITES, "hospital-west")


def test_only_public_keys_of_the_right_kind_are_registered(
    server: ServerFolder, join_site: Callable[..., SiteFolder]
) -> None:
    north, south = join_site(SITES[0]), join_site(SITES[1])
    assert not register_site(server, SITES[0], north.node_key.with_suffix(".pub")), "the server does not run"
    with pytest.raises(SetupError, match="private key"):
        register_site(server, SITES[1], south.node_key)
    with pytest.raises(SetupError, match="is that of hospital-north"):
        register_site(server, SITES[1], north.node_key.with_suffix(".pub"))
    (server.path / "ed.pub").write_text(keys.make_signing_key(server.path / "ed.key"))
    with pytest.raises(SetupError, match="another kind of key"):
        register_site(server, SITES[1], server.path / "ed.pub")
    with pytest.raises(SetupError, match="registered with another key"):
        register_site(server, SITES[0], south.node_key.with_suffix(".pub"))
    register_site(server, SITES[0], south.node_key.with_suffix(".pub"), replace_key=True)
    remove_site(server, SITES[0])
    assert server.registered() == {}
    with pytest.raises(SetupError, match="is not registered"):
        remove_site(server, SITES[0])
    for site in (north, south):  # replaced, and removed
        with pytest.raises(SetupError, match="was shut out before"):
            register_site(server, SITES[0], site.node_key.with_suffix(".pub"))
    register_site(server, SITES[0], join_site(SITES[0], new_key=True).node_key.with_suffix(".pub"))
    assert list(server.registered()) == [SITES[0]]


def test_a_server_of_another_release_does_not_start(server: ServerFolder) -> None:
    consortium = server.consortium()
    old = replace(consortium, versions={**consortium.versions, "nnunet_fedharm": "0.0.1"})
    server.consortium_file.write_text(old.to_toml())
    with pytest.raises(SetupError, match=r"and 0.0.1 at the server.*server sign"):
        start_server(server)
    server.consortium_file.write_text(replace(consortium, app_sha256="0" * 64).to_toml())
    with pytest.raises(SetupError, match="server sign"):
        start_server(server)


class answering:  # noqa: N801 - reads as a word in a with statement
    """A TLS listener with a consortium's certificate."""

    def __init__(self, server: ServerFolder) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(server.certificate, server.certificate_key)
        self._listener = socket.create_server(("", 0))

    def __enter__(self) -> str:
        threading.Thread(target=self._serve, daemon=True).start()
        return f"localhost:{self._listener.getsockname()[1]}"

    def __exit__(self, *error: object) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                self._context.wrap_socket(client, server_side=True).close()
            except OSError:
                client.close()
