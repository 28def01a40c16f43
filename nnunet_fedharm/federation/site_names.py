"""Names of sites. They become names of folders, files and logs at the server and at every site, so plain signs only."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nnunet_fedharm.errors import FederationError, FedHarmError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def check_site_names(names: Sequence[str], *, error: type[FedHarmError] = FederationError) -> None:
    """Refuse a name that cannot be used, and a name that stands twice.

    Raises:
        FedHarmError: of the kind `error`.
    """
    for name in names:
        if not _NAME.fullmatch(name):
            raise error(f"The site name {name!r} is not usable; use letters, digits, '.', '_' and '-'.")
    if len(set(names)) != len(names):
        raise error(f"A site is named twice in sites: {','.join(names)}.")
