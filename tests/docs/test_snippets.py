"""Every fenced block of README and docs is read by what it is for: shells, parsers of commands, JSON, TOML, YAML, Python."""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points

import pytest

from nnunet_fedharm.cli import COMMANDS, command_parser
from tests.docs.pages import BLOCKS, REPOSITORY, SHELL, Block

LANGUAGES = ("", "json", "toml", "yaml", "python", "text")


def commands(*programs: str) -> list[str]:
    """Lines of shell blocks that begin with a program; a backslash continues, a comment and what follows a pipe are left out."""
    found = []
    for block in BLOCKS:
        for line in re.sub(r"\\\n\s*", "", block.text).splitlines() if block.language == "" else []:
            words = re.split(r"\s+#|\s*[|;&]\s*|\s+[<>]\s", line.strip())[0]
            if words.split()[:1] and re.fullmatch("|".join(programs), words.split()[0]):
                found.append(words)
    return sorted(set(found))


def test_pages_have_snippets_in_known_languages_only() -> None:
    assert len(SHELL) > 60
    assert [str(block) for block in BLOCKS if block.language not in LANGUAGES] == []


@pytest.mark.parametrize(
    "block", [item for item in BLOCKS if item.language in ("json", "toml", "yaml", "python")], ids=str
)
def test_a_block_in_a_language_is_valid_in_it(block: Block) -> None:
    if block.language == "yaml":
        yaml = pytest.importorskip("yaml")
        assert yaml.safe_load(block.text)
    else:
        {"json": json.loads, "toml": tomllib.loads, "python": ast.parse}[block.language](block.text)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash on this machine")
def test_shell_blocks_are_sound_shell() -> None:
    programs = (
        "nnunet-fedharm",
        "nnUNetv2",
        "flwr",
        "flower-",
        "python",
        "export",
        "mkdir",
        "pip",
        "tensorboard",
        "for ",
        "cat",
    )
    for block in SHELL:
        if block.text.startswith(programs):
            shown = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True, check=False)
            assert shown.returncode == 0, f"{block}: {shown.stderr}"


@pytest.mark.parametrize("snippet", commands("nnunet-fedharm"))
def test_our_commands_are_understood_by_our_parsers(snippet: str) -> None:
    _, name, *words = shlex.split(snippet)
    if not name.startswith("-") and name in COMMANDS:
        command_parser(name).parse_args(words)
    else:
        assert name in ("--help", "--version", "COMMAND")


@pytest.mark.parametrize("snippet", commands(r"nnUNetv2_\w+"))
def test_nnunets_commands_are_understood_by_nnunets_parsers(snippet: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = shlex.split(snippet)
    (script,) = [item for item in entry_points(group="console_scripts") if item.name == program]
    parsed: list[argparse.Namespace] = []
    parse = argparse.ArgumentParser.parse_known_args  # parse_args calls it too

    class Understood(Exception):
        pass

    def only_parse(self: argparse.ArgumentParser, *args: object, **more: object) -> None:
        found, unknown = parse(self, words)
        assert not unknown
        parsed.append(found)
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", only_parse)
    monkeypatch.setattr(sys, "argv", [program, *words])
    with pytest.raises(Understood):
        script.load()()
    assert parsed


@pytest.mark.parametrize("snippet", commands("flwr"))
def test_flowers_commands_are_understood_by_flowers_parser(snippet: str) -> None:
    from typer.main import get_command

    _, name, *words = shlex.split(snippet)
    (script,) = [item for item in entry_points(group="console_scripts") if item.name == "flwr"]
    group = get_command(script.load())
    context = group.make_context("flwr", [name, *words], resilient_parsing=False)
    _, command, rest = group.resolve_command(context, [name, *words])
    assert command is not None
    command.make_context(name, rest, parent=context, resilient_parsing=False)


@pytest.mark.parametrize("snippet", commands("python3?"))
def test_python_lines_name_scripts_that_are_here(snippet: str) -> None:
    words = shlex.split(snippet)
    if words[1].endswith(".py"):
        assert (REPOSITORY / words[1]).is_file() or (REPOSITORY / "docs" / words[1]).is_file(), snippet
    elif words[1] == "-m":
        assert re.fullmatch(r"[\w.]+", words[2])
