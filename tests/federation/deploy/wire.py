"""What left the sites, message by message: held against the schemas, the model's tensors and the sites' own images.

A shape says little: an image may travel under a tensor's name, in a tensor's shape. So the bytes are searched too, for rows of
the images as they lie on the sites' disks and as nnU-Net has preprocessed them.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import blosc2
import nibabel
import numpy as np
import numpy.typing as npt
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from nnunet_fedharm.federation import messages
from nnunet_fedharm.federation.codec import decode
from nnunet_fedharm.federation.messages import Schema, SiteFailure, Unpacked, unpack_reply
from nnunet_fedharm.federation.report import messages as report_messages
from nnunet_fedharm.federation.secure import messages as secure_messages
from nnunet_fedharm.federation.state import STATE_FILE, load_state
from nnunet_fedharm.harmonizers import SITE_ROWS

REPLIES = {
    "query.preflight": messages.PREFLIGHT_REPLY,
    "query.summarize": messages.SUMMARIZE_REPLY,
    "query.prepare": messages.PREPARE_REPLY,
    "query.plans": messages.STORE_PLANS_REPLY,
    "train": messages.TRAIN_REPLY,
    "query.finish": messages.FINISH_REPLY,
}
REPORT_REPLIES = {
    "query.report_hello": report_messages.HELLO_REPLY,
    "query.report_measure": report_messages.MEASURE_REPLY,
    "query.report_counts": report_messages.COUNTS_REPLY,
    "query.report_moments": report_messages.MOMENTS_REPLY,
    "query.report_classify": report_messages.CLASSIFY_REPLY,
    "query.report_keep": report_messages.KEEP_REPLY,
}
SUM_REPLIES = {
    "query.secure_setup": secure_messages.SETUP_REPLY,
    "query.secure_share": secure_messages.SHARE_REPLY,
    "query.secure_mask": secure_messages.MASK_REPLY,
    "query.secure_unmask": secure_messages.UNMASK_REPLY,
}
SECURE_REPLIES = {"train.secure": secure_messages.TRAIN_REPLY, **SUM_REPLIES}
SCHEMAS: dict[str, Schema] = {**REPLIES, **REPORT_REPLIES}
SUMS = r"\d\d\.(counts|n|sum|products)"
"""Arrays of a report: counts and sums over patients of each part."""
ROWS = {f"harmonizer.{name}" for name in SITE_ROWS}
FLEET = {"activate-node", "deactivate-node", "register-node", "send-node-heartbeat", "pull-messages", "push-messages"}
FLEET |= {"get-run", "get-fab", "push-object", "pull-object", "confirm-message-received", "unregister-node"}
_TELLING, _DISTINCT = 8, 6
"""Voxels of a searched piece, and how many of them differ at least: a run of zeros is in every message."""
_COMPRESSES = 0.98


@dataclass(frozen=True)
class Allowed:
    """What may leave the sites of some runs.

    Attributes:
        shapes: tensor of a model -> its shapes in these runs.
        pixels: of the smallest patch; a list of numbers as long could be an image.
        pieces: bytes of the sites' images, each of which is too telling to come about by chance.
    """

    shapes: dict[str, set[tuple[int, ...]]]
    pixels: int
    pieces: frozenset[bytes]

    @cached_property
    def beginnings(self) -> npt.NDArray[np.uint64]:
        """The first eight bytes of every piece, sorted."""
        return np.unique(np.frombuffer(b"".join(piece[:8] for piece in self.pieces), np.uint64))

    @cached_property
    def lengths(self) -> set[int]:
        """Of the pieces, in bytes."""
        return {len(piece) for piece in self.pieces}

    def shape(self, name: str, found: tuple[int, ...]) -> bool:
        """Whether a tensor may have this shape: a tensor of a model, or the site's own row of one."""
        return any(found == known or (name in ROWS and found == (1, *known[1:])) for known in self.shapes.get(name, ()))


def allowed(fedharm: Path, roots: Iterable[Path]) -> Allowed:
    """What the runs at a server allow.

    Args:
        fedharm: the server's folder with the runs' states; without a run (of a report alone) no tensor is allowed.
        roots: nnU-Net roots of the sites.
    """
    shapes: dict[str, set[tuple[int, ...]]] = {}
    pixels = []
    for path in fedharm.glob(f"*/{STATE_FILE}"):
        state, weights = load_state(path.parent)
        if weights is None:
            continue  # stopped before it had a model
        pixels.append(int(np.prod(state.plans["configurations"]["2d"]["patch_size"])))
        for name, value in weights.items():
            shapes.setdefault(name, set()).add(value.shape)
    pieces = frozenset(piece for root in roots for image in volumes(root) for piece in pieces_of(image))
    return Allowed(shapes, min(pixels, default=24 * 24), pieces)


def volumes(root: Path) -> Iterator[npt.NDArray[Any]]:
    """A site's volumes, raw and preprocessed."""
    found = [*root.glob("nnUNet_raw/*/images*/*.nii.gz")]
    assert found, f"no image in {root}, nothing to look for"
    for path in (*found, *root.glob("nnUNet_preprocessed/*/*/*.b2nd")):
        if not path.stem.endswith("_seg"):
            yield volume(path)


def volume(path: Path) -> npt.NDArray[np.float32]:
    """One volume."""
    if path.suffix == ".b2nd":
        return np.asarray(blosc2.open(str(path), mode="r")[:], dtype=np.float32)
    return np.asarray(nibabel.load(path).dataobj, dtype=np.float32)


def pieces_of(image: npt.NDArray[np.float32]) -> Iterator[bytes]:
    """Neighbouring voxels of each row as they would lie in an array of float32, float16 or float64, and as JSON has them."""
    for axis in range(image.ndim - 3, image.ndim):  # whoever reads a file may have turned it
        middle = (image.shape[axis] - _TELLING) // 2
        rows = np.moveaxis(image, axis, -1)[..., middle : middle + _TELLING].reshape(-1, _TELLING)
        for row in _telling(rows):
            yield row.tobytes()
            yield row.astype(np.float64).tobytes()
            yield json.dumps(row.tolist(), separators=(",", ":"))[1:-1].encode()
        with np.errstate(over="ignore"):
            yield from (row.tobytes() for row in _telling(rows.astype(np.float16)))


def _telling(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Those of the rows that do not come about by chance."""
    changes = np.diff(np.sort(rows, axis=1), axis=1) != 0
    return np.ascontiguousarray(rows[changes.sum(axis=1) + 1 >= _DISTINCT])


def bytes_of(message: Message) -> bytes:
    """All bytes that Flower pushes for a message."""
    return b"".join(part.deflate() for part in get_all_nested_objects(message).values())


def check_message(message: Message, allows: Allowed) -> str:
    """Hold one message from a site against its schema; returns its kind."""
    kind = message.metadata.message_type
    content = message.content
    assert set(content.config_records) == {"config"}
    assert not content.metric_records
    assert set(content.array_records) <= {"weights"}
    data = bytes_of(message)
    assert b"case0" not in data, "no case identifier"
    check_no_piece(data, allows)
    try:
        read = unpack_reply((SCHEMAS | SECURE_REPLIES)[kind], content, source="a site")
    except SiteFailure:
        assert set(content.config_records["config"]) == {"status", "kind", "text"}
        assert not content.array_records
        return kind
    if kind in REPORT_REPLIES:
        check_sums(read)
        return kind
    if kind in SUM_REPLIES:
        check_masked(read)
        return kind
    for name, value in decode(read.weights, source="a site").items():
        assert allows.shape(name, value.shape), f"{name} {value.shape}: tensors of the model and own rows only"
        assert kind != "train.secure" or name in ROWS, f"{name}: beside a secure sum a site's own rows travel alone"
    assert longest_list(read.values) < allows.pixels, "no list of numbers as long as a patch"
    return kind


def check_no_piece(data: bytes, allows: Allowed) -> None:
    """No neighbouring voxels of any image are in these bytes."""
    first = allows.beginnings
    for offset in range(8):  # a piece may begin at any byte
        words = np.frombuffer(data, np.uint64, count=max(0, len(data) - offset) // 8, offset=offset)
        known = first[np.minimum(np.searchsorted(first, words), len(first) - 1)] == words
        for start in offset + 8 * np.flatnonzero(known):
            hits = [length for length in allows.lengths if data[start : start + length] in allows.pieces]
            assert not hits, f"a piece of an image, {hits[0]} bytes from byte {start} on"


def check_sums(read: Unpacked) -> None:
    """Hold the arrays of a report against what they may be: counts are numbers of patients, never values of one."""
    for name, value in report_messages.receive(read.weights, None, source="a site").items():
        assert re.fullmatch(SUMS, name), name
        if name.endswith((".counts", ".n")):
            assert (value == value.round()).all(), name
            assert (value >= 0).all(), name


def check_masked(read: Unpacked) -> None:
    """What goes into a secure sum looks like noise: bytes that a mask covers do not compress, an update does."""
    for name, value in decode(read.weights, source="a site").items():
        assert (name, value.dtype, value.ndim) == (secure_messages.MASKED, np.uint8, 1)
        assert len(zlib.compress(value.tobytes(), 9)) > _COMPRESSES * value.size, "not masked"


def check_private(message: Message) -> None:
    """A private run says neither how well nor how long a site has learnt: both would be releases without noise."""
    values = dict(message.content.config_records["config"])
    if message.metadata.message_type in ("train", "query.prepare"):
        assert values["seconds"] == 0.0
    if message.metadata.message_type == "train":
        assert set(json.loads(str(values["metrics"]))) <= {"epsilon"}
    if message.metadata.message_type == "query.summarize":
        assert json.loads(str(values["summary"]))["noise_multiplier"] > 0


def longest_list(value: Any) -> int:
    """Length of the longest list anywhere in a message."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = len(value) if isinstance(value, list | dict) else 0
    return max([own, *map(longest_list, inner)])
