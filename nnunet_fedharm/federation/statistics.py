"""Statistics that leave a site with noise, before any training: made once a run, entered in the ledger, told again word for word.

Noise that is drawn anew for every asking could be averaged away by asking often; so a question that comes again, after a crash
of the server for instance, gets the bytes of the first answer. Another question, or another run, is another release.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from nnunet_fedharm.federation.durable import read_json, write_json
from nnunet_fedharm.federation.messages import Unpacked, json_hash
from nnunet_fedharm.federation.site import Site
from nnunet_fedharm.federation.site_budget import ledger_within
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.releases import Release


def answer_once(
    site: Site, request: Unpacked, release: Release, make: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """A noisy answer, entered in the site's ledger.

    Args:
        request: with `run_id`, `epsilon` and `delta`.
        release: its entry.
        make: computes the answer, a JSON object, and draws its noise.

    Raises:
        PrivacyError: the run's budget or the site's own does not hold it, or the ledger cannot be written.
    """
    values = request.values
    path = site.folder / values["run_id"] / f"{release.what.replace(' ', '-')}.json"
    question = json_hash({key: value for key, value in values.items() if key != "run_id"})
    kept = read_json(path) if path.is_file() else {}
    ledger = Ledger(site.folder)
    if kept.get("question") != question:
        ledger = ledger_within(site, [release], values)
        kept = {"question": question, "answer": dict(make())}
        write_json(path, kept)
    answer = dict(kept["answer"])
    ledger.record(replace(release, run_id=values["run_id"], digest=json_hash(answer)), within=site.budget)
    return answer
