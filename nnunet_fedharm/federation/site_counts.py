"""How often a site has shown its updates with noise of its own in a run: never oftener than the run has paid for."""

from __future__ import annotations

from typing import Any

from nnunet_fedharm.errors import PrivacyError
from nnunet_fedharm.federation.durable import read_json, write_json
from nnunet_fedharm.federation.site import Site
from nnunet_fedharm.privacy.site_level import SitePrivacy

FILE = "site-privacy.json"
"""In the site's folder of the run."""


def count_release(site: Site, run_id: str, promised: SitePrivacy) -> int:
    """Count one more release; call it before it leaves the site.

    Args:
        promised: what the run promises each site; the first one of a run holds for all of it.

    Returns:
        Releases so far.

    Raises:
        PrivacyError: too many, or the promise has changed.
    """
    path = site.folder / run_id / FILE
    kept: dict[str, Any] = read_json(path) if path.is_file() else {"releases": 0, "promise": promised.to_dict()}
    # Sums of different phases may need different numbers of sites; neither the size of the noise nor its price may change.
    fixed = ("mode", "clip", "noise", "delta", "rounds", "colluding")
    if any(kept["promise"][name] != promised.to_dict()[name] for name in fixed):
        raise PrivacyError(
            f"Site {site.name} was promised another privacy of sites at the start of this run. Start a new run."
        )
    count = int(kept["releases"]) + 1
    if count > promised.releases:
        raise PrivacyError(
            f"Site {site.name} has shown its updates {count - 1} times in this run; the noise pays for {promised.releases} "
            "times. Start a new run."
        )
    write_json(path, kept | {"releases": count})
    return count
