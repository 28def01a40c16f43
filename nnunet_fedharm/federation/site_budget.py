"""Both limits of a noisy release: what the run was given, which is the server's word, and the site's own `max_epsilon`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nnunet_fedharm.federation.site import Site
from nnunet_fedharm.privacy.ledger import Ledger
from nnunet_fedharm.privacy.releases import Budget, Release


def ledger_within(site: Site, planned: Sequence[Release], asked: Mapping[str, Any] | None = None) -> Ledger:
    """The site's ledger, once both limits hold what is planned with all that was released before.

    Args:
        planned: entries to come.
        asked: values of the request, with `epsilon` and `delta` of the run; None where only the site's own limit counts.

    Raises:
        PrivacyError: one does not, or the ledger is damaged.
    """
    ledger = Ledger(site.folder)
    if asked is not None:
        ledger.refuse_beyond(Budget(asked["epsilon"], asked["delta"], allow_unbounded=True), planned)
    if site.budget is not None:
        ledger.refuse_beyond(site.budget, planned)
    return ledger
