"""Preflight: what a site says about its dataset before anything runs, and whether all sites agree.

Facts hold no image content and no case identifier. Reader, channels, labels and file ending have to be the same
everywhere, because one plans file and one network serve all sites.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nnunet_fedharm
from nnunet_fedharm.errors import DataError, FederationError, PlanError, SiteMismatchError
from nnunet_fedharm.sites.files import labelled_cases, read_dataset_json, reader_class, unlabelled_cases

_AGREED = ("dataset_name", "channels", "labels", "regions_class_order", "file_ending", "reader")
_REMEDY = {
    "dataset_name": "Give the dataset folder the same name at every site.",
    "channels": "Write the same channel_names, in the same order, in the dataset.json of every site.",
    "labels": "Write the same labels in the dataset.json of every site, and relabel the segmentations where they differ.",
    "regions_class_order": "Write the same regions_class_order in the dataset.json of every site.",
    "file_ending": "Convert the images so that every site uses the same file ending.",
    "reader": "Store the images so that the same nnU-Net reader opens them, or set overwrite_image_reader_writer everywhere.",
    "versions": "Install the same version at every site.",
}


@dataclass(frozen=True)
class SiteFacts:
    """One site's dataset in words and counts.

    Attributes:
        site: name of the site.
        dataset_name: folder name, `DatasetXXX_Name`.
        channels: channel index ("0", "1", …) -> name.
        labels: as in dataset.json; a region is a list of label values.
        regions_class_order: as in dataset.json; None without regions.
        file_ending: such as ".nii.gz".
        n_labelled: cases in imagesTr, the only ones that the segmenter trains on.
        n_unlabelled: cases in imagesUnlabelled, for the harmonizer phase.
        versions: package -> version (torch: major.minor).
        reader: class name of the nnU-Net reader that opens the images.
        own_privacy: epsilon and delta that the site's own policy promises its patients in this run; empty where it does not.
    """

    site: str
    dataset_name: str
    channels: dict[str, str]
    labels: dict[str, Any]
    regions_class_order: list[int] | None
    file_ending: str
    n_labelled: int
    n_unlabelled: int
    versions: dict[str, str]
    reader: str
    own_privacy: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SiteFacts:
        """Inverse of `to_dict`.

        Raises:
            PlanError: keys are missing or unknown (another version of this package sent them).
        """
        known = {item.name for item in fields(cls)}
        if wrong := sorted({"own_privacy", *data} ^ known):  # states of servers before own_privacy have none
            raise PlanError(
                f"Site facts do not have the expected keys ({', '.join(wrong)}). Install the same version everywhere."
            )
        own = data.get("own_privacy", {})
        if own and (set(own) != {"epsilon", "delta"} or not all(0 < float(value) < math.inf for value in own.values())):
            raise PlanError(f"Site facts have the privacy {own!r} of their own; epsilon and delta belong there.")
        return cls(**data)


def installed_versions() -> dict[str, str]:
    """Versions that decide whether two sites compute the same thing."""
    return {
        "nnunetv2": version("nnunetv2"),
        "nnunet_fedharm": nnunet_fedharm.__version__,
        "torch": ".".join(version("torch").split("+")[0].split(".")[:2]),
    }


def collect_facts(raw_dataset: Path, *, site: str) -> SiteFacts:
    """Look at dataset.json, file names and one file's header.

    Raises:
        DataError: no dataset, no case at all, no reader for the files.
    """
    dataset_json = read_dataset_json(raw_dataset, site=site)
    labelled, unlabelled = labelled_cases(raw_dataset, dataset_json), unlabelled_cases(raw_dataset, dataset_json)
    if not labelled and not unlabelled:
        raise DataError(
            f"Site {site} is empty: {raw_dataset} has no case in imagesTr or imagesUnlabelled that ends in "
            f"{dataset_json['file_ending']}. Add cases or leave the site out."
        )
    regions = dataset_json.get("regions_class_order")
    return SiteFacts(
        site=site,
        dataset_name=raw_dataset.name,
        channels={str(index): str(name) for index, name in sorted(dataset_json["channel_names"].items(), key=_as_int)},
        labels=dict(dataset_json["labels"]),
        regions_class_order=None if regions is None else [int(value) for value in regions],
        file_ending=str(dataset_json["file_ending"]),
        n_labelled=len(labelled),
        n_unlabelled=len(unlabelled),
        versions=installed_versions(),
        reader=reader_class(dataset_json, (labelled + unlabelled)[0].images[0], site=site).__name__,
    )


def check_agreement(facts: Sequence[SiteFacts]) -> None:
    """All sites describe the same task, and somebody has labels.

    Where sites differ, the value that most sites have counts (the first site's on a tie) and the first other site is named.

    Raises:
        FederationError: no site, or two sites of one name.
        SiteMismatchError: a site differs; the message names it, the field, both values and what to do.
    """
    if not facts:
        raise FederationError("No site reported its facts. Start the sites and run again.")
    names = Counter(fact.site for fact in facts)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise FederationError(f"Two sites call themselves {twice[0]}. Give every site its own name.")
    for name in _AGREED:
        _agree({fact.site: getattr(fact, name) for fact in facts}, what=name, remedy=_REMEDY[name])
    if facts[0].regions_class_order is not None:
        # With regions the order of `labels` is the order of the network's outputs.
        _agree({fact.site: list(fact.labels) for fact in facts}, what="order of labels", remedy=_REMEDY["labels"])
    for package in sorted({package for fact in facts for package in fact.versions}):
        values = {fact.site: fact.versions.get(package, "not installed") for fact in facts}
        _agree(values, what=f"version of {package}", remedy=_REMEDY["versions"])
    if not any(fact.n_labelled for fact in facts):
        raise SiteMismatchError(
            f"No site has labels ({', '.join(names)}): the segmenter cannot train. "
            "Put labelled cases into imagesTr and labelsTr of at least one site."
        )


def federation_dataset_json(facts: Sequence[SiteFacts]) -> dict[str, Any]:
    """The dataset.json of the whole federation, for the server, which has no image.

    `numTraining` counts labelled cases only: the planner derives the largest batch from it (5 % of the training voxels),
    and only labelled cases are segmenter training data.

    Raises:
        FederationError: no site.
        SiteMismatchError: the sites do not agree.
    """
    check_agreement(facts)
    first = facts[0]
    description: dict[str, Any] = {
        "channel_names": dict(first.channels),
        "labels": dict(first.labels),
        "numTraining": sum(fact.n_labelled for fact in facts),
        "file_ending": first.file_ending,
        "overwrite_image_reader_writer": first.reader,
    }
    if first.regions_class_order is not None:
        description["regions_class_order"] = list(first.regions_class_order)
    return description


def _as_int(item: tuple[str, Any]) -> int:
    return int(item[0])


def _agree(values: Mapping[str, Any], *, what: str, remedy: str) -> None:
    seen: list[Any] = []
    for value in values.values():
        if value not in seen:
            seen.append(value)
    usual = max(seen, key=lambda candidate: sum(value == candidate for value in values.values()))
    for site, value in values.items():
        if value != usual:
            raise SiteMismatchError(
                f"Site {site} disagrees on {what}: it has {value!r}, the others have {usual!r}. {remedy}"
            )
