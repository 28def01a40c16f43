"""What a converter hands over: the cases of a published data set, where their files lie and which site they are from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.sites.files import UNLABELLED
from nnunet_fedharm.sites.registry import SiteInfo

ENDING = ".nii.gz"
Part = Literal["train", "test", "unlabelled"]
FOLDERS: dict[Part, tuple[str, str | None]] = {
    "train": ("imagesTr", "labelsTr"),
    "test": ("imagesTs", "labelsTs"),
    "unlabelled": (UNLABELLED, None),
}


@dataclass(frozen=True, kw_only=True)
class SourceCase:
    """One case where the data set's publisher put it.

    Attributes:
        case: nnU-Net case identifier that it gets.
        site: name of its site.
        images: one file per channel.
        label: its segmentation; None for an unlabelled case.
        part: training, held out, or unlabelled.
        patient: of several cases that are one person; None: the case is its own patient.
    """

    case: str
    site: str
    images: tuple[Path, ...]
    label: Path | None
    part: Part
    patient: str | None = None


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """Everything that is needed to write an nnU-Net raw dataset.

    Attributes:
        cases: in the order of their identifiers.
        sites: site -> scanner.
        channels: names in channel order.
        labels: as dataset.json holds them.
        remap: value in the source -> value in nnU-Net; None: labels are taken as they are.
        excluded: case -> why it was left out.
        facts: further keys of dataset.json (name, reference, licence, regions_class_order).
        options: everything that changes what is written; a folder of other options is not continued.
    """

    cases: tuple[SourceCase, ...]
    sites: dict[str, SiteInfo]
    channels: tuple[str, ...]
    labels: dict[str, Any]
    remap: dict[int, int] | None = None
    excluded: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


class Chooser:
    """Leaves cases out where the user allowed it, and refuses where not.

    Args:
        skip_missing: leave out cases that lack a file or a row of the table.
        exclude: cases that the user leaves out.
    """

    def __init__(self, *, skip_missing: bool, exclude: Sequence[str] = ()) -> None:
        self.skip_missing = skip_missing
        self.unused = set(exclude)
        self.exclude = frozenset(exclude)
        self.excluded: dict[str, str] = {}

    def wants(self, case: str) -> bool:
        """Whether the user did not leave the case out."""
        if case not in self.exclude:
            return True
        self.unused.discard(case)
        self.excluded[case] = "left out by --exclude"
        return False

    def missing(self, case: str, reason: str, remedy: str) -> None:
        """Leave the case out, or refuse it.

        Raises:
            DataError: without skip_missing.
        """
        if not self.skip_missing:
            raise DataError(f"Case {case}: {reason}. {remedy} --skip-missing leaves out such cases and lists them.")
        self.excluded[case] = reason

    def check_used(self) -> None:
        """Refuse names in --exclude that no case has.

        Raises:
            DataError: such a name.
        """
        if self.unused:
            raise DataError(
                f"--exclude names {sorted(self.unused)[0]}, which is no case of the source. Check the name."
            )


def describe_sites(scanners: Mapping[str, Sequence[SiteInfo]]) -> dict[str, SiteInfo]:
    """One scanner per site: what all its cases have in common; several vendors or sequences are listed, and a field
    strength is given only where all its cases have the same.
    """
    sites = {}
    for site in sorted(scanners):
        found = scanners[site]
        fields = {info.field for info in found if info.field is not None}
        sites[site] = SiteInfo(
            vendor=_joined([info.vendor for info in found]),
            field=fields.pop() if len(fields) == 1 else None,
            sequence=_joined([info.sequence for info in found]),
        )
    return sites


def _joined(values: Sequence[str | None]) -> str | None:
    return " / ".join(sorted({value for value in values if value})) or None
