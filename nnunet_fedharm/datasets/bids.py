"""BIDS data sets (Brain Imaging Data Structure) -> cases and sites.

    SOURCE/sub-01/[ses-1/]anat/sub-01[_ses-1][_entities]_T1w.nii.gz and .json
    SOURCE/participants.tsv
    SOURCE/derivatives/PIPELINE/sub-01/[ses-1/]anat/sub-01[…]_dseg.nii.gz, …dseg.tsv with `index` and `name`

A case is a subject, or a session of a subject. A channel is a suffix (`T1w`), with entities in front where several files have
it (`ce-gad_T1w`). A sidecar is found by the inheritance principle: files at any level from the root down to the image whose
entities are among the image's and whose suffix is the same, nearer ones overriding.

Sources: names, `participants.tsv`, sidecar fields and the inheritance principle as in the BIDS specification 1.10, `dseg` files
as in BIDS Derivatives. Not handled: NIfTI inside `.zip`, `scans.tsv`, split parts, labels in other spaces than the image's.

References:
    Gorgolewski et al., "The brain imaging data structure", Scientific Data 2016.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_fedharm.datasets.bids_files import find_file, label_names, participants, sessions, sidecar
from nnunet_fedharm.datasets.convert_cases import Chooser, Conversion, SourceCase, describe_sites
from nnunet_fedharm.datasets.convert_tables import Row, number, site_name
from nnunet_fedharm.datasets.mamamia import vendor
from nnunet_fedharm.errors import DataError
from nnunet_fedharm.sites.files import read_json
from nnunet_fedharm.sites.registry import SiteInfo


@dataclass(frozen=True, kw_only=True)
class BidsOptions:
    """What to take from a BIDS data set."""

    channels: tuple[str, ...]
    """Suffixes, with entities where needed, in channel order."""
    pipeline: str | None = None
    """Folder below `derivatives` with the labels; None: all cases are unlabelled."""
    label_entity: str | None = None
    """Entity such as `desc-manual` or `label-lesion` where a case has several dseg files."""
    label_names: Mapping[str, int] | None = None
    """Name -> value in the files; None reads the pipeline's dseg.tsv."""
    site_column: str | None = None
    """Column of participants.tsv; None: institution, else manufacturer and field strength, of the sidecars."""
    skip_missing: bool = False
    """Leave out cases that lack a channel or a site."""
    exclude: tuple[str, ...] = ()
    """Cases to leave out, such as `sub-01_ses-1`."""

    def __post_init__(self) -> None:
        if not self.channels or len(set(self.channels)) != len(self.channels):
            raise DataError("--channels needs one or more different suffixes, such as T1w FLAIR.")


def dataset_name(source: Path) -> str:
    """`Name` of dataset_description.json, else the folder's, as letters and digits."""
    description = source / "dataset_description.json"
    name = str(read_json(description, what="The BIDS description").get("Name", "")) if description.is_file() else ""
    return "".join(part for part in site_name(name or source.resolve().name).split("-")) or "BIDS"


def find_bids(source: Path, options: BidsOptions) -> Conversion:
    """Find the subjects and sessions.

    Raises:
        DataError: no subject, no such pipeline, label names unknown, several files for a channel, a case without a channel
            or site.
    """
    units = sessions(source)
    labels_root = None if options.pipeline is None else source / "derivatives" / options.pipeline
    if labels_root is not None and not labels_root.is_dir():
        known = sorted(path.name for path in (source / "derivatives").glob("*") if path.is_dir())
        raise DataError(f"There is no {labels_root}. Pipelines in derivatives: {', '.join(known) or 'none'}.")
    labels = {"background": 0} if labels_root is None else _labels(labels_root, options)
    people = participants(source) if options.site_column else {}
    chooser = Chooser(skip_missing=options.skip_missing, exclude=options.exclude)
    cases, scanners = [], defaultdict(list)
    for case, folder in units.items():
        found = _case(case, folder, source, labels_root, people, options, chooser) if chooser.wants(case) else None
        if found is not None:
            cases.append(found[0])
            scanners[found[0].site].append(found[1])
    chooser.check_used()
    values = list(labels.values())
    consecutive = values == list(range(len(values)))
    return Conversion(
        cases=tuple(cases),
        sites=describe_sites(scanners),
        channels=options.channels,
        labels={name: index for index, name in enumerate(labels)},
        remap=None if consecutive else {value: index for index, value in enumerate(values)},
        excluded=chooser.excluded,
        facts={"name": dataset_name(source)},
        options={
            "converter": "bids",
            "source": str(source.resolve()),
            "channels": list(options.channels),
            "pipeline": options.pipeline,
            "label_entity": options.label_entity,
            "labels": labels,
            "site_column": options.site_column,
        },
    )


def _labels(labels_root: Path, options: BidsOptions) -> dict[str, int]:
    """Name -> value in the source, background first, by value."""
    given = dict(options.label_names) if options.label_names is not None else label_names(labels_root)
    named = {name: value for name, value in sorted(given.items(), key=lambda item: item[1]) if value != 0}
    if not named or len(set(named.values())) != len(named) or min(named.values()) < 0:
        raise DataError(f"The labels {given} are not usable: every name needs a value of its own from 1 on.")
    return {"background": 0, **named}


def _case(
    case: str,
    folder: Path,
    source: Path,
    labels_root: Path | None,
    people: Mapping[str, Row],
    options: BidsOptions,
    chooser: Chooser,
) -> tuple[SourceCase, SiteInfo] | None:
    images = []
    for channel in options.channels:
        image = find_file(folder, case, channel, hint="--channels")
        if image is None:
            chooser.missing(case, f"it has no file {case}_…{channel}.nii.gz in {folder}", "Choose other --channels.")
            return None
        images.append(image)
    facts = sidecar(images[0], source)
    site = _site(case, facts, people, options)
    if not site:
        where = f"column {options.site_column} of participants.tsv" if options.site_column else "its sidecars"
        chooser.missing(
            case, f"{where} do not say which site it is from", "Fill it in, or choose another --site-column."
        )
        return None
    label = None
    if labels_root is not None:
        suffix = "_".join(filter(None, [options.label_entity, "dseg"]))
        label = find_file(labels_root / folder.relative_to(source), case, suffix, hint="--label-entity")
    subject, _, session = case.partition("_")
    patient = subject if session else None
    part: Any = "unlabelled" if label is None else "train"
    made = SourceCase(case=case, site=site, images=tuple(images), label=label, part=part, patient=patient)
    return made, _scanner(facts, options.channels)


def _site(case: str, facts: Mapping[str, Any], people: Mapping[str, Row], options: BidsOptions) -> str:
    if options.site_column:
        return site_name(people.get(case.split("_")[0], {}).get(options.site_column, ""))
    institution = str(facts.get("InstitutionName") or "").strip()
    if institution:
        return site_name(institution)
    field = number(str(facts.get("MagneticFieldStrength") or ""))
    return site_name(vendor(str(facts.get("Manufacturer") or "")) or "", "" if field is None else f"{field:g}T")


def _scanner(facts: Mapping[str, Any], channels: Sequence[str]) -> SiteInfo:
    sequence = str(facts.get("PulseSequenceType") or facts.get("SequenceName") or facts.get("ScanningSequence") or "")
    return SiteInfo(
        vendor=vendor(str(facts.get("Manufacturer") or "")),
        field=number(str(facts.get("MagneticFieldStrength") or "")),
        sequence=" ".join([", ".join(channels), sequence]).strip(),
    )
