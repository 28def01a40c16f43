from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nnunet_fedharm import cli
from nnunet_fedharm.commands import checks, doctor


@pytest.fixture
def nnunet_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in checks.PATH_VARIABLES:
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    return tmp_path


def test_a_ready_machine_passes(nnunet_paths: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["doctor"])
    shown = capsys.readouterr().out
    assert status == 0, shown
    assert f"nnU-Net finds {len(doctor.TRAINERS)} of {len(doctor.TRAINERS)}" in shown


def test_unset_paths_are_a_warning_with_the_line_to_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_raw", raising=False)
    check = checks.check_path("nnUNet_raw", fix=False)
    assert (check.status, check.mend) == ("warning", "export nnUNet_raw=$HOME/nnUNet_raw")


def test_a_missing_folder_is_a_problem_and_fix_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "new" / "raw"
    monkeypatch.setenv("nnUNet_raw", str(folder))
    assert checks.check_path("nnUNet_raw", fix=False).mend == f"mkdir -p {folder}"
    assert checks.check_path("nnUNet_raw", fix=True).status == "ok"
    assert folder.is_dir()


def test_a_path_below_a_file_cannot_be_made_and_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "file" / "raw"))
    check = checks.check_path("nnUNet_raw", fix=True)
    assert check.status == "problem"
    assert "cannot be made" in check.found


def test_a_problem_gives_exit_status_1(
    nnunet_paths: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("nnUNet_results", str(nnunet_paths / "gone"))
    monkeypatch.setattr(doctor, "check_trainers", lambda fix: checks.Check("trainers", "ok", "not looked at here"))
    assert cli.main(["doctor"]) == 1
    assert f"-> mkdir -p {nnunet_paths / 'gone'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tested", "status"), [(("1.0", "99"), "ok"), (("98", "99"), "warning"), (("0.1", "0.2"), "warning")]
)
def test_versions_outside_the_tested_range_are_named(tested: tuple[str, str], status: str) -> None:
    assert checks.check_version("nnU-Net", "nnunetv2", tested).status == status


def test_an_absent_package_is_a_problem_with_its_install_line() -> None:
    check = checks.check_version("Nothing", "no-such-package-of-ours", ("1", "2"))
    assert check.status == "problem"
    assert '"no-such-package-of-ours>=1,<2"' in check.mend


def test_trainers_that_nnunet_does_not_find_come_with_the_line_to_export() -> None:
    found, mend = doctor.explain_failure("RuntimeError: Could not find requested nnunet trainer nnUNetTrainerFedHarm")
    assert "does not find" in found
    assert f"export nnUNet_extTrainer={doctor.BRIDGE.parent}" in mend


def test_trainers_that_do_not_import_come_with_the_reason() -> None:
    found, mend = doctor.explain_failure("Traceback …\nImportError: cannot import name 'x'\n")
    assert "cannot import name 'x'" in found
    assert "pip install" in mend


def test_no_daemon_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(checks.FLOWER_PORT_VARIABLE, "1")
    assert checks.check_flower_daemon().status == "ok"


@pytest.fixture
def health_endpoint() -> Iterator[str]:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield str(server.server_port)
        server.shutdown()
        thread.join()


def test_a_daemon_that_cannot_be_looked_into_is_a_warning(
    health_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(checks.FLOWER_PORT_VARIABLE, health_endpoint)
    assert checks.check_flower_daemon().status == "warning"


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="only Linux shows another process's environment")
def test_a_daemon_with_another_environment_is_named_with_its_process(
    health_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(checks.FLOWER_PORT_VARIABLE, health_endpoint)
    program = tmp_path / "flower-superlink"
    program.write_text("import time; time.sleep(60)")
    environment = {**os.environ, "nnUNet_raw": "/elsewhere"}
    with subprocess.Popen([sys.executable, program, "--port", health_endpoint], env=environment) as process:
        try:
            check = checks.check_flower_daemon()
        finally:
            process.kill()
    assert check.status == "warning"
    assert check.found.startswith("stale")
    assert "nnUNet_raw" in check.found
    assert check.mend == f"kill {process.pid}"
