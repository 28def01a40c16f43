"""A site says by name that its plans are lost, so that the server sends them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnunet_fedharm.federation import messages
from nnunet_fedharm.federation.answers import answer
from nnunet_fedharm.federation.codec import encode
from nnunet_fedharm.federation.config import FederateConfig
from nnunet_fedharm.federation.durable import write_json
from nnunet_fedharm.federation.messages import SiteFailure, json_hash, unpack_reply
from nnunet_fedharm.federation.requests import train_request
from nnunet_fedharm.federation.site import locate_site
from nnunet_fedharm.federation.state import ServerState
from nnunet_fedharm.federation.stored_plans import PLANS_FILE, OtherPlansError, held_hash, stored_plans

RUN = "0123456789ab-012345"
PLANS: dict[str, Any] = {"plans_name": "ours", "configurations": {}}


def test_missing_damaged_and_other_plans_are_named_as_such(tmp_path: Path) -> None:
    site = locate_site({"site": "A", "site-root": str(tmp_path)}, {})
    path = site.folder / RUN / PLANS_FILE
    wanted = json_hash(PLANS)
    for content, why in ((None, "no plans of this run"), (b"half a fi", "damaged ones")):
        if content is not None:
            path.parent.mkdir(parents=True)
            path.write_bytes(content)
        assert held_hash(site, RUN) == ""
        with pytest.raises(OtherPlansError, match=f"Site A holds .*{why}"):
            stored_plans(site, RUN, wanted)
    write_json(path, {"plans": {"plans_name": "theirs"}})
    with pytest.raises(OtherPlansError, match="Site A holds other plans than the server"):
        stored_plans(site, RUN, wanted)
    write_json(path, {"plans": PLANS})
    assert stored_plans(site, RUN, wanted) == {"plans": PLANS}


def test_the_reply_to_a_round_has_the_name_that_the_server_reads(tmp_path: Path) -> None:
    state = ServerState(run_id=RUN, config={}, dataset_name="Dataset001_Blobs", plans=PLANS)
    config = FederateConfig(sites="A", dataset="1")
    weights = encode({"segmenter.w": np.zeros(2, np.float32)})
    request = train_request(config, state, "nnUNetTrainerFedHarmNone", "segmenter", 0, weights)
    given = answer("train", request, {"site": "A", "site-root": str(tmp_path)}, {})
    with pytest.raises(SiteFailure, match="Site A holds no plans of this run") as said:
        unpack_reply(messages.TRAIN_REPLY, given, source="A")
    assert said.value.kind == OtherPlansError.__name__
