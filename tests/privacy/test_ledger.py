"""The ledger of a site: durable, never reset, honest about releases without noise."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.federation.policy_checks import USE_FILE
from nnunet_fedharm.federation.stored_plans import PLANS_FILE
from nnunet_fedharm.privacy.accounting import Noise, epsilon_of
from nnunet_fedharm.privacy.ledger import HEAD_FILE, LEDGER_FILE, LOCK_FILE, Ledger
from nnunet_fedharm.privacy.releases import GAUSSIAN, NONE, SUBSAMPLED, Budget, Release, spent

DELTA = 1e-5


def rounds(number: int) -> Release:
    return Release(
        what=f"segmenter round {number}",
        mechanism=SUBSAMPLED,
        noise_multiplier=1.1,
        sample_rate=0.1,
        steps=20,
        run_id="run",
    )


STYLE = Release(what="style bank", mechanism=GAUSSIAN, noise_multiplier=8.0)
FINGERPRINT = Release(what="fingerprint summary", mechanism=NONE)


def test_entries_come_back_as_they_were_and_add_up(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "fedharm")
    assert ledger.spent(DELTA).epsilon == 0.0
    written = [ledger.record(release) for release in (STYLE, rounds(1), rounds(2))]
    assert Ledger(tmp_path / "fedharm").releases() == written
    assert all(entry.time for entry in written)
    assert ledger.spent(DELTA).epsilon == pytest.approx(epsilon_of([Noise(8.0), Noise(1.1, 0.1, 40)], DELTA))
    assert not ledger.spent(DELTA).unbounded


def test_a_release_without_noise_makes_the_total_unbounded_and_is_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for release in (FINGERPRINT, rounds(1), FINGERPRINT, Release(what="validation Dice", mechanism=NONE)):
        ledger.record(release)
    result = ledger.spent(DELTA)
    assert result.total == math.inf
    assert result.unbounded == ("fingerprint summary", "validation Dice")
    assert result.epsilon == pytest.approx(spent([rounds(1)], DELTA).epsilon)


def test_a_run_that_cannot_end_within_the_budget_is_refused_with_the_numbers(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.record(STYLE)
    planned = [rounds(number) for number in range(1, 11)]
    whole = spent([STYLE, *planned], DELTA).epsilon
    enough, tight = Budget(whole + 0.1, DELTA), Budget(whole - 0.1, DELTA)
    assert not ledger.would_exceed(enough, planned)
    ledger.refuse_beyond(enough, planned)
    assert ledger.would_exceed(tight, planned)
    with pytest.raises(PrivacyError, match=rf"budget is epsilon .* is spent, .* both together {whole:.3g}"):
        ledger.refuse_beyond(tight, planned)
    assert len(ledger.releases()) == 1, "asking writes nothing"


def test_trainings_that_start_together_stop_at_the_budget_all_together(tmp_path: Path) -> None:
    budget = Budget(8.0, DELTA)
    folds = [Ledger(tmp_path) for _ in range(5)]
    for number, ledger in enumerate(folds):
        ledger.refuse_beyond(
            budget, [replace(rounds(0), run_id=f"fold_{number}", steps=160)]
        )  # before anybody's first entry
    refused = 0
    for _ in range(8):
        for number, ledger in enumerate(folds):
            try:
                ledger.record(replace(rounds(0), run_id=f"fold_{number}"), within=budget)
            except PrivacyError as error:
                assert "The budget is epsilon 8" in str(error)  # noqa: PT017 (many of them)
                refused += 1
    assert refused
    assert 7.0 < Ledger(tmp_path).spent(DELTA).epsilon <= 8.0


def test_an_unbounded_release_is_above_any_budget_unless_it_is_allowed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.record(FINGERPRINT)
    with pytest.raises(PrivacyError, match="released without noise are fingerprint summary"):
        ledger.refuse_beyond(Budget(100.0, DELTA), [rounds(1)])
    ledger.refuse_beyond(Budget(100.0, DELTA, allow_unbounded=True), [rounds(1)])


def test_the_same_bytes_once_more_cost_nothing_and_new_noise_costs_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    sent = Release(what="style bank", mechanism=GAUSSIAN, noise_multiplier=8.0, digest="a" * 64)
    assert ledger.record(sent) == ledger.record(sent)
    assert len(ledger.releases()) == 1
    ledger.record(Release(what="style bank", mechanism=GAUSSIAN, noise_multiplier=8.0, digest="b" * 64))
    assert ledger.spent(DELTA).epsilon == pytest.approx(epsilon_of([Noise(8.0), Noise(8.0)], DELTA))


def test_half_a_line_that_a_crash_left_is_no_entry_and_the_next_one_takes_its_place(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    first = ledger.record(STYLE)
    with ledger.path.open("a") as stream:
        stream.write('{"what": "segmenter rou')
    assert ledger.releases() == [first]
    second = ledger.record(rounds(1))
    assert Ledger(tmp_path).releases() == [first, second]


def test_an_entry_whose_head_a_crash_left_behind_counts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.record(STYLE)
    head = (tmp_path / HEAD_FILE).read_bytes()
    ledger.record(rounds(1))
    (tmp_path / HEAD_FILE).write_bytes(head)
    assert len(ledger.releases()) == 2


def test_a_ledger_that_was_edited_cut_or_deleted_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for release in (STYLE, rounds(1), rounds(2)):
        ledger.record(release)
    whole = ledger.path.read_text()
    lines = whole.splitlines(keepends=True)
    edited = json.loads(lines[1]) | {"noise_multiplier": 50.0}
    last = json.loads(lines[2]) | {"noise_multiplier": 50.0}
    for content in (
        lines[0] + json.dumps(edited) + "\n" + lines[2],
        lines[0] + lines[1] + json.dumps(last) + "\n",
        lines[0] + lines[1],
        lines[0] + lines[2],
        "",
        "nonsense\n",
    ):
        ledger.path.write_text(content)
        with pytest.raises(PrivacyError, match="backup"):
            ledger.releases()
        with pytest.raises(PrivacyError, match="backup"):
            ledger.record(rounds(3))
    ledger.path.unlink()
    with pytest.raises(PrivacyError, match="holds 0 entries"):
        ledger.spent(DELTA)
    ledger.path.write_text(whole)
    assert len(ledger.releases()) == 3


def test_a_ledger_whose_head_is_gone_is_refused_however_few_lines_are_left(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for release in (STYLE, rounds(1), rounds(2)):
        ledger.record(release)
    lines = ledger.path.read_text().splitlines(keepends=True)
    (tmp_path / HEAD_FILE).unlink()
    for content in ("".join(lines), lines[0]):
        ledger.path.write_text(content)
        with pytest.raises(PrivacyError, match=rf"{HEAD_FILE} is missing, .* Restore both files from a backup"):
            Ledger(tmp_path).spent(DELTA)
        with pytest.raises(PrivacyError, match="Restore both"):
            ledger.record(rounds(3))


def test_a_ledger_of_which_nothing_is_left_is_refused_where_it_has_been(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.record(STYLE)
    ledger.path.unlink(), (tmp_path / HEAD_FILE).unlink()
    for ask in (lambda: Ledger(tmp_path).spent(DELTA), lambda: ledger.record(rounds(1))):
        with pytest.raises(PrivacyError, match=rf"is missing, but .*{LOCK_FILE} is left of .* move the whole folder"):
            ask()
    tmp_path.rename(tmp_path.with_name("away"))
    assert Ledger(tmp_path).releases() == []


@pytest.mark.parametrize("name", [USE_FILE, f"0123456789ab-012345/{PLANS_FILE}"])
def test_what_a_run_leaves_behind_tells_of_a_ledger_that_is_gone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(PrivacyError, match=rf"but .*{name} is left of earlier releases"):
        Ledger(tmp_path).releases()


def test_a_crash_before_the_first_entry_leaves_a_ledger_that_can_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def power_cut(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    for place, where in ((Path, "replace"), (Path, "write_text"), (os, "write")):  # of the head, the lock, the line
        monkeypatch.setattr(place, where, power_cut)
        with pytest.raises(KeyboardInterrupt):
            Ledger(tmp_path).record(STYLE)
        monkeypatch.undo()
        assert Ledger(tmp_path).releases() == []
    Ledger(tmp_path).record(STYLE)
    assert len(Ledger(tmp_path).releases()) == 1


def test_a_ledger_of_an_earlier_release_goes_on_and_is_missed_from_its_next_entry_on(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.record(STYLE)
    (tmp_path / LOCK_FILE).write_bytes(b"")
    assert len(Ledger(tmp_path).releases()) == 1
    Ledger(tmp_path).record(rounds(1))
    assert (tmp_path / LOCK_FILE).stat().st_size


def test_somebodys_first_entry_during_a_reading_is_no_ledger_without_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, exists = Ledger(tmp_path), Path.exists

    def first_entry_in_between(path: Path) -> bool:
        found = exists(path)
        if path.name == HEAD_FILE:
            monkeypatch.undo()
            Ledger(tmp_path).record(STYLE)
        return found

    monkeypatch.setattr(Path, "exists", first_entry_in_between)
    assert len(reader.releases()) == 1


def test_an_entry_costs_the_same_however_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, readings = Ledger(tmp_path), []
    whole = Ledger._lines
    monkeypatch.setattr(Ledger, "_lines", lambda self: readings.append(self) or whole(self))
    for number in range(30):
        ledger.record(rounds(number % 3))
        assert ledger.steps_of("run", "segmenter round 0") == 20 * (1 + number // 3)
    assert len(readings) == 1, "what this process has checked and nobody has changed is not read again"
    assert Ledger(tmp_path).releases() == ledger.releases()


def test_two_open_ledgers_see_each_other_s_entries_and_what_somebody_edits(tmp_path: Path) -> None:
    first, second = Ledger(tmp_path), Ledger(tmp_path)
    for number in range(4):
        (first if number % 2 else second).record(rounds(0))
    assert first.steps_of("run", "segmenter round 0") == second.steps_of("run", "segmenter round 0") == 80
    first.path.write_text(first.path.read_text().replace("1.1", "9.9"))
    for ledger in (first, second):
        with pytest.raises(PrivacyError, match="backup"):
            ledger.record(rounds(1))


def _write_for_ever(folder: str) -> None:
    for number in range(1_000_000):
        Ledger(Path(folder)).record(rounds(number))


@pytest.mark.skipif(os.name != "posix", reason="signals and locks of POSIX")
def test_a_killed_writer_loses_no_entry_and_two_writers_share_one_chain(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    seen = 0
    for _ in range(3):
        writers = [context.Process(target=_write_for_ever, args=(str(tmp_path),)) for _ in range(2)]
        for writer in writers:
            writer.start()
        wanted, end = seen + 5, time.monotonic() + 20
        while time.monotonic() < end and _count(tmp_path) < wanted:
            time.sleep(0.02)
        for writer in writers:
            os.kill(writer.pid or 0, signal.SIGKILL)
            writer.join()
        entries = Ledger(tmp_path).releases()
        assert len(entries) >= wanted
        seen = len(entries)
    Ledger(tmp_path).record(STYLE)
    assert len(Ledger(tmp_path).releases()) == seen + 1


def _count(folder: Path) -> int:
    path = folder / LEDGER_FILE
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mechanism": "laplace"}, "mechanism"),
        ({"mechanism": GAUSSIAN}, "noise multiplier"),
        ({"mechanism": GAUSSIAN, "noise_multiplier": 1.0, "sample_rate": 0.5}, "subsampled"),
        ({"mechanism": NONE, "noise_multiplier": 1.0}, "neither noise"),
        ({"mechanism": GAUSSIAN, "noise_multiplier": 1.0, "unit": "patch"}, "counts by patient"),
    ],
)
def test_an_entry_that_says_nothing_valid_is_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(PrivacyError, match=words):
        Release(what="x", **values)  # type: ignore[arg-type]
