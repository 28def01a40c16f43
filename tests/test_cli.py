from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from nnunet_fedharm import __version__, cli
from nnunet_fedharm.commands import doctor
from nnunet_fedharm.errors import DataError


def test_top_help_lists_every_command_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from nnunet_fedharm.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('heavy:', sorted({'torch', 'nnunetv2', 'flwr', 'numpy'} & set(sys.modules)))"
    )
    shown = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert all(f"  {name}" in shown for name in cli.COMMANDS)
    assert "heavy: []" in shown


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert __version__ in capsys.readouterr().out


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == cli.EXIT_ERROR
    assert "doctor" in capsys.readouterr().out


def test_unknown_command_is_refused_with_the_allowed_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["guess"])
    assert stop.value.code == 2
    assert "federate" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"nnunet_fedharm.commands.{name.replace('-', '_')}")
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    assert module.HELP.split()[0] in capsys.readouterr().out


def test_own_errors_become_one_sentence_and_exit_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: object) -> int:
        raise DataError("Site B: no images in imagesTr.")

    monkeypatch.setattr(doctor, "run", refuse)
    assert cli.main(["doctor"]) == 2
    shown = capsys.readouterr()
    assert shown.err == "nnunet-fedharm doctor: Site B: no images in imagesTr.\n"
    assert shown.out == ""


def test_the_installed_script_and_the_module_are_the_same_program() -> None:
    shown = subprocess.check_output([sys.executable, "-m", "nnunet_fedharm.cli", "--version"], text=True)
    assert shown.strip() == f"nnunet-fedharm {__version__}"
