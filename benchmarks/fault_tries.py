"""Faults played in one process or in a forked one: SIGKILL at any moment, deaths at messages, bad replies, a full disk.

`benchmarks/faults.py` calls these; each returns `Try`s.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message

from nnunet_fedharm.federation.codec import decode
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.events import EVENTS_FILE, read_events
from nnunet_fedharm.federation.server_app import run_server
from tests.conftest import write_raw_dataset
from tests.federation.local_grid import Client, LocalGrid
from tests.federation.power_cuts import (
    Chance,
    differences,
    fingerprint_of_results,
    rounds_lost,
    run_through_failures,
)
from tests.federation.test_in_process import real_sites, tiny

SITES = ("A", "B", "C")
OPTIONS: dict[str, Any] = {
    "sites": ",".join(SITES),
    "harmonizer": "curve",
    "harmonizer_rounds": 2,
    "segmenter_rounds": 6,
    "phases": "finetune",
    "strategy": "fedadam",  # its memory and the average have to survive too
    "server_ema": 0.5,
    "quorum": 3,  # all of a phase's sites, so that the same ones reply in each round
    "max_retries": 5,
}
Results = dict[str, dict[str, Any]]
SAME = "same weights, bit for bit"


@dataclass
class Try:
    """One run with faults.

    Attributes:
        fault: what happened to it.
        times: how often.
        outcome: `SAME`, or what was else.
        rounds_lost: complete rounds that were trained once more.
        recover_s: seconds from each new start, or death where all starts at once, to the end of the next round.
        notes: moments, sentences.
    """

    fault: str
    times: int
    outcome: str
    rounds_lost: int
    recover_s: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def make_sites(root: Path) -> Path:
    """A and B with two labelled cases each, C with two unlabelled ones."""
    for index, (site, labelled, unlabelled) in enumerate((("A", 2, 0), ("B", 2, 0), ("C", 0, 2))):
        folder = root / "sites" / site / "nnUNet_raw"
        counts = {"n_labelled": labelled, "n_unlabelled": unlabelled}
        write_raw_dataset(folder, site=site, gain=1.0 + index, seed=index, shape=(12, 24, 24), **counts)
    return root


def configuration(root: Path, **options: Any) -> FederateConfig:
    return tiny(root, **{**OPTIONS, **options})


def uninterrupted(root: Path) -> Results:
    """The weights that every run has to end with."""
    config = configuration(make_sites(root))
    run_server(LocalGrid(real_sites(config, 3)), config)
    return fingerprint_of_results(config)


def verdict(expected: Results, config: FederateConfig) -> str:
    wrong = differences(expected, fingerprint_of_results(config))
    return f"{len(wrong)} differences, first {wrong[0]}" if wrong else SAME


def recovery_seconds(root: Path, starts: list[datetime]) -> list[float]:
    """From each start to the end of the next round; starts that did not come so far are left out."""
    events, _ = read_events(root / "server" / "fedharm" / EVENTS_FILE)
    ends = [datetime.fromisoformat(event["time"]) for event in events if event["event"] in ("round_end", "finished")]
    seconds = []
    for index, start in enumerate(starts):
        until = starts[index + 1] if index + 1 < len(starts) else datetime.max.replace(tzinfo=UTC)
        found = [end for end in ends if start < end < until]
        seconds += [round((found[0] - start).total_seconds(), 2)] if found else []
    return seconds


class Forked:
    """A run in a child process of its own group, with the server and all sites in it."""

    def __init__(self, config: FederateConfig) -> None:
        self.errors = Path(config.root) / "child.log"
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            code = 1
            try:
                run_server(LocalGrid(real_sites(config, 3)), config)
                code = 0
            except BaseException:  # noqa: BLE001 - the child ends here, whatever it was
                with self.errors.open("a") as stream:
                    traceback.print_exc(file=stream)
            finally:
                os._exit(code)

    def ends_within(self, seconds: float) -> int | None:
        """Exit status, or None where it still runs."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        return None

    def kill(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def last_event(root: Path) -> str:
    events, _ = read_events(root / "server" / "fedharm" / EVENTS_FILE)
    if not events:
        return "before the first event"
    where = f" {events[-1]['phase']} {events[-1]['round']}" if "round" in events[-1] else ""
    return f"after {events[-1]['event']}{where}"


def sigkills(root: Path, expected: Results, seed: int, *, longest_s: float) -> Try:
    """SIGKILL to the server and all sites together, at uniformly random moments, until the run ends."""
    generator = np.random.default_rng(seed)
    config = configuration(make_sites(root))
    moments, starts, status = [], [], None
    while status is None and len(starts) < 60:
        if moments:
            starts.append(datetime.now(UTC))
        child = Forked(config)
        status = child.ends_within(float(generator.uniform(0, longest_s)))
        if status is None:
            child.kill()
            moments.append(last_event(root))
    outcome = verdict(expected, config) if status == 0 else f"stopped: {child.errors.read_text()[-400:]}"
    what = "SIGKILL to server and all sites at once, any moment"
    return Try(what, len(moments), outcome, rounds_lost(config), recovery_seconds(root, starts), moments)


def message_deaths(root: Path, expected: Results, seed: int, *, most: int) -> Try:
    """The server, a node, or both die at random messages."""
    config = configuration(make_sites(root), deadline_s=0.5, prepare_deadline_s=0.5)
    chance = Chance(seed, rate=0.15, most=most)
    story = run_through_failures(config, 3, chance)
    lost, seconds = rounds_lost(config), recovery_seconds(root, chance.moments)
    what = "server, node or both die at a message"
    return Try(what, len(story.kills), verdict(expected, config), lost, seconds, story.kills)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of its own, small enough to be filled; needs the right to mount."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(root: Path, expected: Results, seed: int, *, times: int, longest_s: float) -> Try:
    """The server's disk fills up at random moments; the run stops with a sentence and goes on once there is space."""
    generator = np.random.default_rng(seed)
    config = configuration(make_sites(root))
    ballast, stops, starts, status = root / "server" / "ballast", [], [], None
    with small_disk(root / "server", "16m"):
        while status != 0 and len(starts) < 40:
            starts.append(datetime.now(UTC))
            child = Forked(config)
            status = None
            if len(stops) < times:
                status = child.ends_within(float(generator.uniform(0, longest_s)))
                if status is None:
                    fill(ballast)
            status = child.ends_within(120.0) if status is None else status
            if status is None:
                child.kill()
            ballast.unlink(missing_ok=True)
            if status != 0:
                stops.append(stop_reason(root))
        outcome = verdict(expected, config) if status == 0 else f"stopped: {child.errors.read_text()[-400:]}"
        lost, seconds = rounds_lost(config), recovery_seconds(root, starts[1:])
    return Try("disk full at the server", len(stops), outcome, lost, seconds, stops)


def fill(path: Path) -> None:
    """Take all space that is left."""
    with path.open("wb", buffering=0) as stream:
        try:
            while stream.write(bytes(1 << 16)):
                pass
        except OSError:
            return


def stop_reason(root: Path) -> str:
    """Last line of what the child said."""
    log = root / "child.log"
    lines = log.read_text().strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "it hung"


def spoilt(client: Client, when: tuple[str, int], spoil: Callable[[Message], Message | None]) -> Client:
    """The client, but its reply to one round is spoilt."""

    def answer(message: Message) -> Message | None:
        values = message.content.config_records.get("config", {})
        given = client(message)
        hit = message.metadata.message_type == "train" and (values.get("phase"), values.get("round")) == when
        return spoil(given) if hit and given is not None else given

    return answer


def _with_array(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Callable[[Message], Message]:
    """A reply whose tensors are changed."""

    def spoil(message: Message) -> Message:
        arrays = change(decode(message.content.array_records["weights"], source="C"))
        # Not by `encode`, which refuses what a broken or hostile site may send.
        message.content["weights"] = ArrayRecord({name: Array(value) for name, value in sorted(arrays.items())})
        return message

    return spoil


def _with_values(**values: Any) -> Callable[[Message], Message]:
    def spoil(message: Message) -> Message:
        record = message.content.config_records["config"]
        for key, value in values.items():
            record[key] = value
        return message

    return spoil


def _first(arrays: dict[str, np.ndarray], change: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    name = next(name for name, value in sorted(arrays.items()) if value.dtype.kind == "f" and value.size > 1)
    return {**arrays, name: change(arrays[name])}


def _nan(value: np.ndarray) -> np.ndarray:
    out = value.copy()
    out.flat[0] = np.nan
    return out


BAD_REPLIES: dict[str, Callable[[Message], Message | None]] = {
    "no reply until the deadline": lambda message: None,
    "reply with NaN": _with_array(lambda arrays: _first(arrays, _nan)),
    "reply with a wrong shape": _with_array(lambda arrays: _first(arrays, lambda value: value.reshape(-1)[:-1])),
    "reply without a tensor": _with_array(lambda arrays: dict(sorted(arrays.items())[1:])),
    "reply of other plans": _with_values(plans_hash="0" * 64),
    "reply of an earlier round": _with_values(round=0),
    "update 100 times too large": _with_array(
        lambda arrays: {k: v + np.float32(100) if v.dtype.kind == "f" else v for k, v in arrays.items()}
    ),
}
"""What site C does once, in harmonizer round 2; all sites have a part in it."""


def bad_replies(root: Path) -> list[Try]:
    """Each bad reply has to end like a run in which that site was silent in that round."""
    expected, tries = None, []
    for index, (name, spoil) in enumerate(BAD_REPLIES.items()):
        where = make_sites(root / str(index))
        config = configuration(where, quorum=2, segmenter_rounds=1, norm_bound=3.0, deadline_s=60.0)
        if index == 0:
            config = replace(config, deadline_s=2.0)
        sites = real_sites(config, 3)
        run_server(LocalGrid({**sites, 102: spoilt(sites[102], ("harmonizer", 1), spoil)}), config)
        events, _ = read_events(where / "server" / "fedharm" / EVENTS_FILE)
        aside = [event["reason"] for event in events if event["event"] == "site_set_aside" and event["site"] == "C"]
        expected = expected or fingerprint_of_results(config)
        found = verdict(expected, config)
        outcome = "set aside by name; weights of a run in which it was silent" if found == SAME and aside else found
        tries.append(Try(name, 1, outcome, rounds_lost(config), [], aside))
    return tries


def late_site(root: Path) -> Try:
    """A site is away from the first round on, loses its disk, and comes back in the segmenter phase: it gets plans and model."""
    config = configuration(make_sites(root), quorum=1, deadline_s=60.0)
    sites, back_at = real_sites(config, 3), []
    grid = LocalGrid(sites)

    def leaving(message: Message) -> Message | None:
        if message.metadata.message_type == "train":
            grid.clients.pop(101, None)
            return None
        return sites[101](message)

    def calling(message: Message) -> Message | None:
        values = message.content.config_records.get("config", {})
        if (values.get("phase"), values.get("round")) == ("segmenter", 2) and 201 not in grid.clients:
            for folder in ("fedharm", "nnUNet_preprocessed"):
                shutil.rmtree(root / "sites" / "B" / folder, ignore_errors=True)
            grid.clients[201] = sites[101]
            back_at.append(datetime.now(UTC))
        return sites[100](message)

    grid.clients = {**sites, 100: calling, 101: leaving}
    run_server(grid, replace(config, deadline_s=1.0))
    events, _ = read_events(root / "server" / "fedharm" / EVENTS_FILE)
    rounds = [
        f"{event['phase']} {event['round']}: {','.join(event['sites'])}"
        for event in events
        if event["event"] == "round_end"
    ]
    with_it = [
        datetime.fromisoformat(event["time"])
        for event in events
        if event["event"] == "round_end"
        and "B" in event["sites"]
        and datetime.fromisoformat(event["time"]) > back_at[0]
    ]
    outcome = "got plans and the current model; took part from the next round on" if with_it else "never came back"
    seconds = [round((end - back_at[0]).total_seconds(), 2) for end in with_it[:1]]
    what = "site joins late, with nothing of the run on its disk"
    return Try(what, 1, outcome, rounds_lost(config), seconds, rounds)
