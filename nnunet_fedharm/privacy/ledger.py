"""One ledger per site: every release that touches its patients, for good.

An entry is written, and flushed to the disk, *before* what it describes leaves the site, so a crash in between counts a release
that may not have happened and never misses one. Entries are lines of JSON, each with the SHA-256 of the line before it; a small
file beside, the head, names their number and the last hash. The head is there before the first entry, so entries without one
were cut. A ledger that was edited, cut or deleted is refused: a budget does not start anew because a file is gone. Who deletes
the whole folder, puts an older copy of both files back or computes the hashes anew is not noticed: nothing here has a key.

What was read and checked once is not read again while neither file has changed (size, times, inode), so a long training pays the
same for its last entry as for its first; an entry by another process is a change.

A release without noise has no finite epsilon. It is entered as `none`, makes the site's total unbounded, and is listed by name.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.privacy.releases import Budget, Release, Spent, spent

LEDGER_FILE = "privacy-ledger.jsonl"
HEAD_FILE = "privacy-ledger.head.json"
LOCK_FILE = "privacy-ledger.lock"
"""Empty until the first entry, and never again."""
TRACES = (LOCK_FILE, "policy-use.json", "*/federation.json")
"""What lies beside a ledger only after an entry: its lock's mark, and of federated runs, whose facts are entered first, the
rounds that were trained and the plans."""
_START = "0" * 64
_Stamp = tuple[int, int, int, int]


@dataclass
class _Known:
    """What stood in the ledger when its files had these stamps.

    Attributes:
        stamps: of ledger and head.
        end: bytes of the whole lines.
        last: SHA-256 of the last line.
        releases: all entries.
        steps: (run, what) -> steps of its entries.
        digests: (what, digest) -> first entry of the same bytes.
    """

    stamps: tuple[_Stamp | None, _Stamp | None]
    end: int = 0
    last: str = _START
    releases: list[Release] = field(default_factory=list)
    steps: Counter[tuple[str, str]] = field(default_factory=Counter)
    digests: dict[tuple[str, str], Release] = field(default_factory=dict)

    def add(self, release: Release, line: bytes) -> None:
        self.end += len(line) + 1
        self.last = _digest(line)
        self.releases.append(release)
        self.steps[(release.run_id, release.what)] += release.steps
        if release.digest:
            self.digests.setdefault((release.what, release.digest), release)


class Ledger:
    """The ledger of one site.

    Args:
        folder: the site's own folder (`<site root>/fedharm`); made with the first entry.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER_FILE
        self._head = folder / HEAD_FILE
        self._lock = folder / LOCK_FILE
        self._cache: _Known | None = None
        self._own = 0
        """Entries that this object made."""
        self._others = -1
        """Those of others when `refuse_beyond` held a plan against all; once there are more, the plan holds no longer."""

    def releases(self) -> list[Release]:
        """All entries in order of time.

        Raises:
            PrivacyError: the ledger was damaged, edited, cut or deleted.
        """
        return list(self._known().releases)

    def steps_of(self, run_id: str, what: str) -> int:
        """Steps of a run's entries of that name.

        Raises:
            PrivacyError: the ledger was damaged, edited, cut or deleted.
        """
        return self._known().steps[(run_id, what)]

    def record(self, release: Release, *, within: Budget | None = None) -> Release:
        """Append an entry and bring it to the disk; call it before the release leaves the site.

        Args:
            within: budget that `refuse_beyond` of this object held; it is held again for each entry, in the same step, once
                others have made entries since, such as a training of another fold that was started at the same time.

        Returns:
            The entry as written; the former one where the very same bytes (`digest`) were released before.

        Raises:
            PrivacyError: the ledger is damaged or cannot be written, or the budget does not hold the entry; nothing may be
                released then.
        """
        stamped = release if release.time else Release(**{**asdict(release), "time": _now()})
        with self._locked():
            known = self._known()
            former = known.digests.get((release.what, release.digest))
            if release.digest and former is not None:
                return former
            if within is not None and len(known.releases) - self._own != self._others:
                self._hold(within, [stamped])
            self._append(known, stamped)
            self._own += 1
        return stamped

    def spent(self, delta: float) -> Spent:
        """Epsilon of all entries together at delta.

        Raises:
            PrivacyError: the ledger is damaged, or delta is out of range.
        """
        return spent(self.releases(), delta)

    def would_exceed(self, budget: Budget, planned: Sequence[Release]) -> bool:
        """Whether the entries and the planned releases together are above the budget.

        Raises:
            PrivacyError: the ledger is damaged.
        """
        after = spent([*self.releases(), *planned], budget.delta)
        return (after.epsilon if budget.allow_unbounded else after.total) > budget.epsilon

    def refuse_beyond(self, budget: Budget, planned: Sequence[Release]) -> None:
        """Refuse a run that cannot end within the budget, before it starts.

        Raises:
            PrivacyError: it cannot; the sentence has what is spent, what the run needs and what both are together.
        """
        self._hold(budget, planned)
        self._others = len(self._known().releases) - self._own

    def _hold(self, budget: Budget, planned: Sequence[Release]) -> None:
        if not self.would_exceed(budget, planned):
            return
        before = self.spent(budget.delta)
        alone = spent(planned, budget.delta)
        after = spent([*self.releases(), *planned], budget.delta)
        if math.isinf(after.total) and after.epsilon <= budget.epsilon:
            names = ", ".join(after.unbounded[:5]) + (", …" if len(after.unbounded) > 5 else "")
            raise PrivacyError(
                f"No finite epsilon covers this site: released without noise are {names}. The others together come to "
                f"{after.epsilon:.3g} of {budget.epsilon:g} at delta {budget.delta:g}; allow the named ones, or leave them out."
            )
        raise PrivacyError(
            f"The budget is epsilon {budget.epsilon:g} at delta {budget.delta:g}: {before.epsilon:.3g} is spent, this run alone "
            f"needs {alone.epsilon:.3g}, both together {after.epsilon:.3g}. Take more noise, fewer steps or a larger budget."
        )

    def _append(self, known: _Known, release: Release) -> None:
        line = json.dumps({**asdict(release), "previous": known.last}, allow_nan=False).encode()
        try:
            self._begin()
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                # What a crash left behind the last whole line was never released: `record` did not return.
                os.ftruncate(handle, known.end)
                os.lseek(handle, known.end, os.SEEK_SET)
                os.write(handle, line + b"\n")
                os.fsync(handle)
            finally:
                os.close(handle)
            self._write_head(len(known.releases) + 1, _digest(line))
            known.add(release, line)
            known.stamps = self._stamps()
        except OSError as error:
            raise PrivacyError(
                f"Cannot write {self.path}: {error.strerror}. Nothing may leave the site before its entry is stored."
            ) from error

    def _begin(self) -> None:
        """Before an entry: what tells a ledger that is gone from one that never was; an earlier release's gets its mark now."""
        if not self._head.exists():
            self._write_head(0, "")
        if not self._lock.exists() or not self._lock.stat().st_size:
            self._lock.write_text("Entries were made here.\n", encoding="utf-8")

    def _known(self) -> _Known:
        """The entries, read again where a file has changed since."""
        stamps = self._stamps()
        if self._cache is None or self._cache.stamps != stamps:
            self._cache = None  # what follows may raise
            known = _Known(stamps)
            for line in self._lines():
                known.add(_to_release(line, self.path), line)
            self._cache = known
        return self._cache

    def _stamps(self) -> tuple[_Stamp | None, _Stamp | None]:
        return _stamp(self.path), _stamp(self._head)

    def _write_head(self, count: int, digest: str) -> None:
        temporary = self._head.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as stream:
            json.dump({"entries": count, "sha256": digest}, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self._head)
        if not count and os.name == "posix":  # else a power cut could leave the first entry and take the head
            folder = os.open(self._head.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)

    def _lines(self) -> list[bytes]:
        """Whole lines whose chain of hashes holds and that are as many as the head says."""
        # The head first: a writer who comes in between adds lines, and never takes one away.
        begun = self._head.exists()
        count, digest = self._read_head() if begun else (0, "")
        data = self.path.read_bytes() if self.path.exists() else b""
        lines = data[: data.rfind(b"\n") + 1].splitlines()
        if not begun:
            missing = self._missing(len(lines))
            if self._head.exists():
                return self._lines()  # somebody's first entry came in between
            if missing:
                raise PrivacyError(missing)
        previous = _START
        for number, line in enumerate(lines, start=1):
            if _parse(line, self.path).get("previous") != previous:
                raise PrivacyError(
                    f"{self.path}: line {number} does not follow the one before it. Restore the ledger from a backup."
                )
            previous = _digest(line)
        if len(lines) < count or (count and _digest(lines[count - 1]) != digest):
            raise PrivacyError(
                f"{self.path} holds {len(lines)} entries that can be trusted, {count} were written. Restore it from a backup: "
                "what this site has released cannot be known without it."
            )
        return lines

    def _missing(self, entries: int) -> str:
        """Without a head there is no entry, and nothing that follows one: the sentence where there is, else nothing."""
        folder = self.path.parent
        if entries:
            return (
                f"{self._head} is missing, and {self.path} has {entries} entries that cannot be trusted without it. Restore both "
                "files from a backup."
            )
        traces = (path for name in TRACES for path in sorted(folder.glob(name)) if path.stat().st_size)
        found = next(traces, None)
        if found is None:
            return ""
        return (
            f"{self.path} is missing, but {found} is left of earlier releases. Restore {LEDGER_FILE} and {HEAD_FILE} from a "
            f"backup, or, if this site's patients are others now, move the whole folder {folder} away."
        )

    def _read_head(self) -> tuple[int, str]:
        try:
            head = json.loads(self._head.read_bytes())
            return int(head["entries"]), str(head["sha256"])
        except (ValueError, KeyError, TypeError) as error:
            raise PrivacyError(f"{self._head} is damaged. Restore it from a backup.") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time (POSIX; elsewhere one process a site is assumed)."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if os.name != "posix":
            yield
            return
        import fcntl  # not on every system

        with self._lock.open("a") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


def _stamp(path: Path) -> _Stamp | None:
    """None where there is no such file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _parse(line: bytes, path: Path) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise PrivacyError(f"{path} has a line that is no entry. Restore the ledger from a backup.")
    return values


def _to_release(line: bytes, path: Path) -> Release:
    values = {key: value for key, value in _parse(line, path).items() if key != "previous"}
    unknown = sorted(set(values) - {item.name for item in fields(Release)})
    if unknown:
        raise PrivacyError(f"{path} has the unknown key {unknown[0]!r}; it was written by a later release.")
    return Release(**values)
