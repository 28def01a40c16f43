"""What a client process knows about its own site, and what of its errors may leave it."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_fedharm.errors import DataError, FederationError, FedHarmError
from nnunet_fedharm.federation.policy import POLICY_FILE, Policy, load_policy
from nnunet_fedharm.nnunet_root import NnunetRoot, environment

if TYPE_CHECKING:
    from nnunet_fedharm.privacy.releases import Budget

SITE_LOG = "site.log"
_IMAGE_FOLDERS = ("imagesTr", "labelsTr", "imagesUnlabelled", "imagesTs", "labelsTs")


@dataclass(frozen=True)
class Site:
    """One site as its client process sees it.

    Attributes:
        name: as in the federation.
        root: its own nnU-Net root.
        device: where it trains.
        num_processes: for fingerprints, preprocessing and features.
        min_patients: the site report sends nothing about fewer patients.
        max_epsilon: the site report sends nothing without noise, and nothing with noise leaves beyond this together with all
            noised releases in the ledger; 0 for no such limit.
        secure_only: updates leave this site inside secure sums or not at all.
        policy: rules of the site's own file. Where the node config has the same rule, the stricter one counts, and stands in the
            three attributes above.
    """

    name: str
    root: NnunetRoot
    device: str
    num_processes: int
    min_patients: int = 5
    max_epsilon: float = 0.0
    secure_only: bool = False
    policy: Policy = field(default_factory=Policy)

    @property
    def folder(self) -> Path:
        """Durable state and log of this site."""
        return self.root.path / "fedharm"

    @property
    def budget(self) -> Budget | None:
        """What each patient here may lose to all releases with noise together; None without such a limit."""
        from nnunet_fedharm.privacy.releases import (
            Budget,  # its accountant brings scipy, which Flower's process does without
        )

        return Budget(self.max_epsilon, self.policy.delta, allow_unbounded=True) if self.max_epsilon else None

    def raw_dataset(self, dataset: str) -> Path:
        """Folder of a raw dataset by number or name.

        Raises:
            DataError: there is none, or more than one.
        """
        pattern = f"Dataset{int(dataset):03d}_*" if dataset.isdigit() else dataset
        found = sorted(path for path in self.root.raw.glob(pattern) if path.is_dir())
        if len(found) != 1:
            what = "no dataset" if not found else f"{len(found)} datasets"
            raise DataError(
                f"Site {self.name} has {what} {pattern} in {self.root.raw}. Put exactly one such folder there."
            )
        return found[0]

    def patients_of(self, dataset: str, *, labelled_only: bool = False) -> int:
        """How many patients a raw dataset has.

        Raises:
            DataError: there is no such dataset, or its dataset.json or sites.json is damaged.
        """
        from nnunet_fedharm.sites.files import labelled_cases, read_dataset_json, unlabelled_cases
        from nnunet_fedharm.sites.registry import SITES_FILE, SitesFile

        raw = self.raw_dataset(dataset)
        description = read_dataset_json(raw, site=self.name)
        files = [*labelled_cases(raw, description), *([] if labelled_only else unlabelled_cases(raw, description))]
        registry = SitesFile.load(raw / SITES_FILE) if (raw / SITES_FILE).is_file() else SitesFile()
        return len({registry.patient_of(item.case) for item in files})


def site_folders(root: Path) -> list[str]:
    """Names of the sites in a consortium folder, sorted.

    Raises:
        FederationError: there is none.
    """
    names = sorted(path.name for path in (root / "sites").glob("*") if path.is_dir())
    if not names:
        raise FederationError(
            f"{root / 'sites'} holds no site. Make one folder per site with `nnunet-fedharm sites split`."
        )
    return names


def locate_site(node_config: Mapping[str, Any], run_config: Mapping[str, Any]) -> Site:
    """The site of this client: `site` and `site-root` of the node config, or in simulation the site of its partition id.

    Raises:
        FederationError: neither is given, or the folder is missing.
    """
    device = str(node_config.get("device", run_config.get("device", "cpu")))
    processes = int(node_config.get("num-processes", run_config.get("num-processes", 1)))
    if "site" in node_config and "site-root" in node_config:
        name, path = str(node_config["site"]), Path(str(node_config["site-root"])).expanduser()
    elif "partition-id" in node_config and run_config.get("root"):
        root = Path(str(run_config["root"])).expanduser()
        listed = sorted(part.strip() for part in str(run_config.get("sites", "")).split(",") if part.strip())
        names = listed or site_folders(root)
        position = int(node_config["partition-id"])
        if position >= len(names):
            raise FederationError(
                f"Simulated node {position} has no site: there are {len(names)} ({', '.join(names)})."
            )
        name, path = names[position], root / "sites" / names[position]
    else:
        raise FederationError(
            'This SuperNode does not know its site. Start it with --node-config \'site="A" site-root="/data/A"\'.'
        )
    if not path.is_dir():
        raise FederationError(f"Site {name}: the folder {path} does not exist. Correct site-root or make the folder.")
    policy = load_policy(path.resolve() / "fedharm" / POLICY_FILE, site=name)
    least = int(node_config.get("min-patients", run_config.get("report-min-patients", Site.min_patients)))
    limits = [limit for limit in (float(node_config.get("max-epsilon", 0.0)), policy.max_epsilon) if limit]
    return Site(
        name=name,
        root=NnunetRoot(path.resolve()),
        device=device,
        num_processes=processes,
        min_patients=max(least, policy.min_patients),
        max_epsilon=min(limits, default=0.0),
        secure_only=bool(node_config.get("secure-only", False)) or policy.secure_only,
        policy=policy,
    )


@contextmanager
def training_environment(device: str) -> Iterator[None]:
    """On a CPU: no compile and no worker processes, unless the site's own environment says otherwise."""
    wanted = {"nnUNet_compile": "f", "nnUNet_n_proc_DA": "0"} if device == "cpu" else {}
    with environment({name: value for name, value in wanted.items() if name not in os.environ}):
        yield


def describe_error(site: Site, error: Exception) -> tuple[str, str]:
    """Kind and sentence that may leave the site: no case identifier, no path; the whole goes to the site's own log."""
    stamp = datetime.now(UTC).isoformat(timespec="seconds")
    whole = str(error) if isinstance(error, FedHarmError) else "".join(traceback.format_exception(error))
    with suppress(OSError):  # on a full disk the sentence has to reach the server all the more
        site.folder.mkdir(parents=True, exist_ok=True)
        with (site.folder / SITE_LOG).open("a", encoding="utf-8") as stream:
            stream.write(f"{stamp} {type(error).__name__}: {whole}\n")
    kind = type(error).__name__
    if not isinstance(error, FedHarmError):
        return kind, f"Site {site.name} failed with {kind}; the reason is in its own log fedharm/{SITE_LOG}."
    text = redact(str(error), case_identifiers(site.root.raw))
    return kind, text if site.name in text else f"Site {site.name}: {text}"


def case_identifiers(raw: Path) -> list[str]:
    """Names of all image and label files below nnUNet_raw, without ending and channel number; longest first."""
    names: set[str] = set()
    for folder in _IMAGE_FOLDERS:
        for path in raw.glob(f"*/{folder}/*"):
            stem = re.sub(r"(\.nii)?\.[A-Za-z0-9]+$", "", path.name)
            names |= {stem, re.sub(r"_\d{4}$", "", stem)}
    return sorted(names - {""}, key=len, reverse=True)


def redact(text: str, identifiers: list[str]) -> str:
    """The text without paths and case identifiers."""
    text = re.sub(r"(?<![\w<])(?:~|[A-Za-z]:)?[/\\][^\s,;:'\")]+", "<path>", text)
    for name in identifiers:
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "<case>", text)
    return text
