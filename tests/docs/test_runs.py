"""Every command of README and docs is run by a scenario (`test_run_*.py`), as it stands, or listed in `elsewhere.py`.

A new or changed command that is neither run nor listed fails, and so does an entry that no page has any more. A scenario's
module says in `RUN` what it runs; `reading.py` runs it, with sizes for two cores put behind where it would train for hours.
"""

from __future__ import annotations

from collections import Counter
from importlib import import_module
from pathlib import Path

from tests.docs.elsewhere import ELSEWHERE, listed
from tests.docs.pages import SHELL, commands_of


def commands_run() -> set[str]:
    modules = [import_module(f"tests.docs.{path.stem}") for path in Path(__file__).parent.glob("test_run_*.py")]
    return {command for module in modules for command in module.RUN}


def test_every_command_is_run_or_listed_with_a_reason_and_no_entry_is_old() -> None:
    found = {command: str(block) for block in SHELL for command in commands_of(block)}
    run = commands_run()
    rest = {command: where for command, where in found.items() if command not in run}
    missing = [f"{where}: {command}" for command, where in rest.items() if listed(command) is None]
    assert missing == [], "run these in a scenario, or say in elsewhere.py why they cannot be"
    assert [command for command in run if command not in found] == [], "no page has them any more"
    counted = Counter(listed(command) for command in rest)
    wrong = {item: counted[item] for item, count, _ in ELSEWHERE if counted[item] != count}
    assert wrong == {}, "commands came or went: see whether the reason is theirs too, and mend the number"
