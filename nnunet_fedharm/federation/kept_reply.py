"""A site's reply to a round, kept until it has made the next: asked the same once more, it sends that one again.

A server that died within a round asks anew, and so does one whose round had too few replies, or whose deadline this site
passed by a minute. Training again would cost the hours a second time and, under differential privacy, the epsilon; the same
bytes cost neither. A round inside a secure sum keeps its part in the same way (`secure.home`).
"""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from nnunet_fedharm.errors import CheckpointError, FedHarmError
from nnunet_fedharm.federation.durable import write_bytes
from nnunet_fedharm.federation.entries import digest_of
from nnunet_fedharm.federation.messages import Unpacked, json_hash
from nnunet_fedharm.federation.site import Site, describe_error
from nnunet_fedharm.federation.warm.wire import receive, receive_head, send

KEPT_FILE = "last-reply.bin"
"""In the run's folder at the site; as large as what it sends."""


@dataclass(frozen=True)
class KeptReply:
    """The place of a run's last reply, and the request that is to be answered.

    Attributes:
        site: this one.
        path: of the file.
        question: SHA-256 of the request and of the rules under which this site answers.
    """

    site: Site
    path: Path
    question: str

    @classmethod
    def to(cls, site: Site, request: Unpacked) -> KeptReply:
        """For a request to train.

        Args:
            site: this one.
            request: with its weights.
        """
        # A reply was made under the site's own rules: under others it is not sent.
        rules = {"policy": asdict(site.policy), "secure_only": site.secure_only}
        config = ConfigRecord({"values": json_hash(request.values), "rules": json_hash(rules)})
        question = digest_of(RecordDict({"config": config, "weights": request.weights}))
        return cls(site, site.folder / request.values["run_id"] / KEPT_FILE, question)

    def read(self) -> RecordDict | None:
        """The reply to the very same request; None where it was another one, or the file is damaged."""
        if not self.path.is_file():
            return None
        try:
            with _File(self.path) as stream:
                if receive_head(stream).get("question") != self.question:
                    return None  # nearly always, and as large as a model: the rest is not read
                stream.seek(0)
                head, content = receive(stream)
            if head.get("sha256") != digest_of(content):
                raise CheckpointError(f"{self.path} is damaged; the round is trained again.")
        except (FedHarmError, ValueError, OSError) as error:
            describe_error(self.site, error)  # into the site's log
            return None
        return content

    def write(self, content: RecordDict) -> None:
        """Keep a reply in place of the former one; it is in the ledger by now. Without room for it the round goes on without."""
        whole = _Bytes()
        send(whole, {"question": self.question, "sha256": digest_of(content)}, content)
        try:
            write_bytes(self.path, whole.getvalue())
        except CheckpointError as error:
            describe_error(self.site, error)


class _Bytes(io.BytesIO):
    """Memory that a parcel of the warm workers is written to, as if it were a socket."""

    def sendall(self, data: Any, /) -> None:
        self.write(data)


class _File(io.FileIO):
    """A file that a parcel is read from, likewise."""

    def recv_into(self, buffer: Any, /) -> int:
        return self.readinto(buffer)
