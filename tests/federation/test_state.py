"""The server's files: whole after a crash, a full disk or damage is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nnunet_fedharm.errors import CheckpointError
from nnunet_fedharm.federation.durable import file_lock, read_json, write_bytes, write_json
from nnunet_fedharm.federation.events import EventLog, read_events
from nnunet_fedharm.federation.state import find_run, load_state, new_state, save_state, unfinished_runs

WEIGHTS = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.array(3, dtype=np.int64),
    "e": np.zeros((0, 2), np.float32),
}


def test_state_and_weights_come_back_as_they_were(tmp_path: Path) -> None:
    state = new_state("0" * 12, {"seed": 1}).with_round("segmenter", {"phase": "segmenter", "round": 1}, 0.5)
    save_state(tmp_path / state.run_id, state, WEIGHTS)
    found = find_run(tmp_path, "0" * 12)
    assert found is not None
    back, weights = load_state(found)
    assert back == state
    assert weights is not None
    assert sorted(weights) == sorted(WEIGHTS)
    for name, value in WEIGHTS.items():
        np.testing.assert_array_equal(weights[name], value)
        assert weights[name].shape == value.shape


@pytest.mark.parametrize(
    ("dice", "best"), [([0.5], True), ([0.5, 0.6], True), ([0.6, 0.5], False), ([0.5, 0.5], False), ([None], False)]
)
def test_the_state_knows_whether_its_last_round_is_the_best(dice: list[float | None], best: bool) -> None:
    state = new_state("0" * 12, {}).with_round("harmonizer", {"phase": "harmonizer", "dice": None}, None)
    assert not state.last_is_best
    for value in dice:
        former = state.best_dice
        better = value is not None and (former is None or value > former)
        state = state.with_round("segmenter", {"phase": "segmenter", "dice": value}, value if better else former)
    assert state.last_is_best is best


def test_key_order_survives_because_it_means_something_to_nnunet(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"labels": {"z": 1, "a": 2}})
    assert list(read_json(tmp_path / "x.json")["labels"]) == ["z", "a"]


def test_only_the_weights_of_the_last_round_are_kept(tmp_path: Path) -> None:
    state = new_state("0" * 12, {})
    for _ in range(3):
        state = state.with_round("segmenter", {}, None)
        save_state(tmp_path, state, WEIGHTS)
    assert [path.name[:19] for path in tmp_path.glob("*.safetensors")] == ["weights-00000-00003"]


def test_a_crash_between_two_saves_of_one_round_leaves_the_former_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After harmonizer rounds alone the gate is opened and the same round saved once more."""
    state = new_state("0" * 12, {}).with_round("harmonizer", {}, None)
    save_state(tmp_path, state, WEIGHTS)
    half = tmp_path / ".weights-00001-00000-abcdef.safetensors.77.tmp"
    half.write_bytes(b"of an earlier crash")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nnunet_fedharm.federation.state.write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            save_state(tmp_path, state, {name: np.asarray(value + 1) for name, value in WEIGHTS.items()})
    _, weights = load_state(tmp_path)
    assert weights is not None
    for name, value in WEIGHTS.items():
        np.testing.assert_array_equal(weights[name], value)
    save_state(tmp_path, state, WEIGHTS)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert not half.exists()


@pytest.mark.parametrize("suffix", ["state.json", ".safetensors"])
def test_damage_is_told_and_never_loaded(tmp_path: Path, suffix: str) -> None:
    save_state(tmp_path, new_state("0" * 12, {"word": "aaaa"}), WEIGHTS)
    path = next(path for path in tmp_path.iterdir() if path.name.endswith(suffix))
    data = bytearray(path.read_bytes())
    position = data.find(b"aaaa") if suffix == "state.json" else len(data) - 1
    data[position] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="SHA-256"):
        load_state(tmp_path)


def test_a_torn_file_is_told(tmp_path: Path) -> None:
    save_state(tmp_path, new_state("0" * 12, {}), None)
    path = tmp_path / "state.json"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_state(tmp_path)


def test_a_full_disk_leaves_the_former_checkpoint_whole(tmp_path: Path) -> None:
    """A real limit of the operating system (file size) stands for the full disk; it stops a write in the middle."""
    state = new_state("0" * 12, {}).with_round("segmenter", {}, None)
    save_state(tmp_path, state, WEIGHTS)
    script = (
        "import resource, signal, sys, numpy\n"
        "from pathlib import Path\n"
        "from nnunet_fedharm.errors import CheckpointError\n"
        "from nnunet_fedharm.federation.state import load_state, save_state\n"
        "folder = Path(sys.argv[1])\n"
        "state, _ = load_state(folder)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))\n"
        "try:\n"
        "    save_state(folder, state.with_round('segmenter', {}, None), {'w': numpy.zeros(10000, numpy.float32)})\n"
        "except CheckpointError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "The former file is untouched" in done.stdout
    back, weights = load_state(tmp_path)
    assert back == state
    assert weights is not None
    np.testing.assert_array_equal(weights["b"], WEIGHTS["b"])
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="Cannot write"):
        write_bytes(tmp_path / "x", b"1")


def test_a_path_that_cannot_be_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="Cannot write"):
        write_bytes(tmp_path / "file" / "x", b"1")


def test_a_second_server_does_not_get_the_lock(tmp_path: Path) -> None:
    with file_lock(tmp_path / "lock") as first, file_lock(tmp_path / "lock", wait_s=0.1) as second:
        assert first
        assert not second
    with file_lock(tmp_path / "lock", wait_s=0.1) as third:
        assert third


def test_events_are_read_from_where_the_reader_stopped(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.write("one", loss=float("nan"))
    first, offset = read_events(path)
    log.write("two", sites=("A",))
    with path.open("a") as stream:
        stream.write('{"event": "half')
    second, offset = read_events(path, offset)
    assert [event["event"] for event in first + second] == ["one", "two"]
    assert first[0]["loss"] is None
    assert read_events(path, offset) == ([], offset)


def test_a_stopped_run_of_another_configuration_is_mentioned(tmp_path: Path) -> None:
    stopped = new_state("0" * 12, {"seed": 1, "segmenter_rounds": 3})
    save_state(tmp_path / stopped.run_id, stopped, None)
    assert unfinished_runs(tmp_path, {"seed": 1, "segmenter_rounds": 3}, 3) == []
    assert unfinished_runs(tmp_path, {"seed": 2, "segmenter_rounds": 3}, 3) == [
        f"The unfinished run {stopped.run_id} differs in seed and is left alone."
    ]
