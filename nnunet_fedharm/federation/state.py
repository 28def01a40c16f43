"""The server's state: what a restarted run needs to go on after the last completed round.

`<server root>/fedharm/<run id>/state.json` names the files with the weights and with the strategy's memory, and their SHA-256, so
all of it changes in one rename.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from nnunet_fedharm.errors import CheckpointError
from nnunet_fedharm.federation.codec import Weights
from nnunet_fedharm.federation.durable import read_json, read_weights, write_json, write_weights

STATE_VERSION = 1
STATE_FILE = "state.json"


@dataclass(frozen=True)
class Memory:
    """What a strategy keeps on the server between rounds.

    Attributes:
        tensors: "part:name of tensor" -> array; parts are velocity, first, second, control, average.
        numbers: JSON-able values: SCAFFOLD's `amounts` (site -> weight) and `counted` (site -> last round that was counted).
    """

    tensors: Weights = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> Weights:
        """One part by the names of the model's tensors."""
        start = f"{name}:"
        return {key[len(start) :]: value for key, value in self.tensors.items() if key.startswith(start)}

    def with_part(self, name: str, values: Weights) -> Memory:
        """The memory with a part replaced."""
        kept = self.without(name).tensors
        return replace(self, tensors=kept | {f"{name}:{key}": value for key, value in values.items()})

    def without(self, *names: str) -> Memory:
        """The memory without some parts."""
        starts = tuple(f"{name}:" for name in names)
        return replace(self, tensors={key: value for key, value in self.tensors.items() if not key.startswith(starts)})


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """Everything that is known after the last completed step.

    Attributes:
        run_id: fingerprint of the configuration and a random part; names the folders of this run everywhere.
        config: the configuration's identity, to refuse another one.
        facts: site -> facts from preflight; empty before it.
        dataset_name: nnU-Net name of the dataset; empty before preflight.
        dataset_json, fingerprint, planned: from federated planning; empty before it. `planned` has no fedharm section.
        plans: final plans with the fedharm section; empty before the style bank is made.
        rounds_done: completed rounds per phase.
        history: one entry per completed round: phase, round, seconds, metrics, bytes.
        best_dice: best mean pseudo Dice so far; None before the first segmenter round.
        finished_sites: sites that hold the final model.
        memory: of the strategy.
    """

    run_id: str
    config: dict[str, Any]
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    dataset_name: str = ""
    dataset_json: dict[str, Any] = field(default_factory=dict)
    fingerprint: dict[str, Any] = field(default_factory=dict)
    planned: dict[str, Any] = field(default_factory=dict)
    plans: dict[str, Any] = field(default_factory=dict)
    rounds_done: dict[str, int] = field(default_factory=lambda: {"harmonizer": 0, "segmenter": 0})
    history: list[dict[str, Any]] = field(default_factory=list)
    best_dice: float | None = None
    finished_sites: list[str] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)

    @property
    def last_is_best(self) -> bool:
        """Whether no segmenter round was as good as the last one, or better, before it."""
        dice = [entry["dice"] for entry in self.history if entry["phase"] == "segmenter"]
        return bool(dice) and dice[-1] is not None and dice[-1] == self.best_dice and dice[-1] not in dice[:-1]

    def with_round(self, phase: str, entry: Mapping[str, Any], best_dice: float | None) -> ServerState:
        """The state after one more round of a phase."""
        done = {**self.rounds_done, phase: self.rounds_done[phase] + 1}
        return replace(self, rounds_done=done, history=[*self.history, dict(entry)], best_dice=best_dice)


def new_state(fingerprint: str, config: Mapping[str, Any]) -> ServerState:
    """State of a run that has done nothing yet; its id has a random part, so a restarted run shares no folder."""
    return ServerState(run_id=f"{fingerprint}-{secrets.token_hex(3)}", config=dict(config))


def save_state(folder: Path, state: ServerState, weights: Weights | None) -> None:
    """Write state, weights and the strategy's memory so that a crash at any moment leaves the former set or this one.

    Raises:
        CheckpointError: the disk is full or not writable; the former set stays whole.
    """
    content: dict[str, Any] = {item.name: getattr(state, item.name) for item in fields(state)}
    content |= {"version": STATE_VERSION, "memory": state.memory.numbers}
    for kind, tensors in (("weights", weights), ("memory", state.memory.tensors or None)):
        name, digest = "", ""
        if tensors is not None:
            # Never the name that the former state has: the same round may be saved twice, the gate shut and then open.
            numbers = "{kind}-{harmonizer:05d}-{segmenter:05d}".format(kind=kind, **state.rounds_done)
            name = f"{numbers}-{secrets.token_hex(3)}.safetensors"
            digest = write_weights(folder / name, tensors)
        content |= {f"{kind}_file": name, f"{kind}_sha256": digest}
    write_json(folder / STATE_FILE, content)
    for old in (
        *folder.glob("*.safetensors"),
        *folder.glob(".*.safetensors.*.tmp"),
    ):  # those that a kill left half written too
        if old.name not in (content["weights_file"], content["memory_file"]):
            old.unlink(missing_ok=True)


def load_state(folder: Path) -> tuple[ServerState, Weights | None]:
    """Read what `save_state` wrote.

    Raises:
        CheckpointError: missing, damaged, or written by another version.
    """
    content = read_json(folder / STATE_FILE)
    version, name, digest = (content.pop(key, None) for key in ("version", "weights_file", "weights_sha256"))
    kept, kept_digest = content.pop("memory_file", ""), content.pop("memory_sha256", "")
    if version != STATE_VERSION:
        raise CheckpointError(f"{folder / STATE_FILE} has version {version}, this release reads {STATE_VERSION}.")
    unknown = sorted(set(content) - {item.name for item in fields(ServerState)})
    if unknown:
        raise CheckpointError(f"{folder / STATE_FILE} has the unknown key {unknown[0]!r}.")
    tensors = read_weights(folder / str(kept), str(kept_digest)) if kept else {}
    content["memory"] = Memory(tensors, dict(content.get("memory", {})))
    return ServerState(**content), read_weights(folder / str(name), str(digest)) if name else None


def find_run(fedharm_folder: Path, fingerprint: str) -> Path | None:
    """Folder of the newest run of this configuration; None where there is none."""
    found = [path.parent for path in fedharm_folder.glob(f"{fingerprint}-*/{STATE_FILE}")]
    return max(found, key=lambda folder: (folder / STATE_FILE).stat().st_mtime_ns, default=None)


def unfinished_runs(fedharm_folder: Path, config: Mapping[str, Any], segmenter_rounds: int) -> list[str]:
    """A sentence for every stopped run of another configuration: one changed option starts anew, which may not be meant."""
    sentences = []
    for path in sorted(fedharm_folder.glob(f"*/{STATE_FILE}")):
        try:
            former = read_json(path)
        except CheckpointError:
            continue  # damaged: it cannot be resumed, whatever the configuration
        changed = sorted(key for key in {*config, *former["config"]} if config.get(key) != former["config"].get(key))
        wanted = former["config"].get("segmenter_rounds", segmenter_rounds)
        if changed and not former["finished_sites"] and former["rounds_done"]["segmenter"] < wanted:
            sentences.append(
                f"The unfinished run {former['run_id']} differs in {', '.join(changed)} and is left alone."
            )
    return sentences
