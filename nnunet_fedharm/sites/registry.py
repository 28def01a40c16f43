"""`sites.json`: which site each case comes from, and what is known about each site's scanner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from nnunet_fedharm.errors import DataError
from nnunet_fedharm.sites.files import read_json, write_json

SITES_FILE = "sites.json"


@dataclass(frozen=True)
class SiteInfo:
    """Scanner of a site; everything is optional.

    Attributes:
        vendor: manufacturer's name.
        field: field strength in tesla.
        sequence: free text, such as "T1w MPRAGE".
        simulation: how a simulated site was made (seed, parameters); JSON values only.
    """

    vendor: str | None = None
    field: float | None = None
    sequence: str | None = None
    simulation: dict[str, Any] | None = None


@dataclass(frozen=True)
class SitesFile:
    """Parsed `sites.json`.

    Attributes:
        sites: site -> scanner, in the file's order.
        cases: case identifier -> site.
        patients: case identifier -> patient, for patients with several cases; a case that is not here is its own patient.
    """

    sites: dict[str, SiteInfo] = field(default_factory=dict)
    cases: dict[str, str] = field(default_factory=dict)
    patients: dict[str, str] = field(default_factory=dict)

    def patient_of(self, case: str) -> str:
        """Patient of a case.

        A travelling subject `<SITE>_<SUBJECT>` that neither `patients` nor `cases` names is the patient of the case that shows
        the subject at another site's home, `<OTHER SITE>_<SUBJECT>` or `<SUBJECT>`, else SUBJECT.

        Raises:
            DataError: several patients could be the travelling subject.
        """
        site = self.site_of(case)
        if case in self.patients or case in self.cases or site is None:
            return self.patients.get(case, case)
        subject = case.removeprefix(f"{site}_")
        home = {subject, *(f"{other}_{subject}" for other in self.sites if other != site)}
        found = {self.patients.get(name, name) for name in home if name in self.cases}
        if len(found) > 1:
            raise DataError(
                f"Site {site}, travelling subject {case}: several cases could be the same person ({', '.join(sorted(found))}). "
                f"Say which with `patients` in {SITES_FILE}."
            )
        return found.pop() if found else subject

    def site_of(self, case: str) -> str | None:
        """Site of a case; of a travelling subject `<SITE>_<SUBJECT>`, which is not under `cases`, the site in its name."""
        if case in self.cases:
            return self.cases[case]
        named = [site for site in self.sites if case.startswith(f"{site}_") and len(case) > len(site) + 1]
        return max(named, key=len, default=None)

    def cases_of(self, site: str) -> list[str]:
        """Sorted case identifiers of one site."""
        return sorted(case for case, owner in self.cases.items() if owner == site)

    def only(self, site: str) -> SitesFile:
        """What one site may know: itself and its own cases."""
        own = {case: patient for case, patient in self.patients.items() if self.site_of(case) == site}
        return SitesFile({site: self.sites[site]}, dict.fromkeys(self.cases_of(site), site), own)

    def to_dict(self) -> dict[str, Any]:
        sites = {
            name: {key: value for key, value in asdict(info).items() if value is not None}
            for name, info in self.sites.items()
        }
        return {"sites": sites, "cases": dict(self.cases)} | (
            {"patients": dict(self.patients)} if self.patients else {}
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = SITES_FILE) -> SitesFile:
        """Inverse of `to_dict`.

        Raises:
            DataError: a key is missing or unknown, or a case belongs to a site that is not listed, or a patient is given
                for a case that is not listed.
        """
        unknown = sorted(set(data) - {item.name for item in fields(cls)})
        if unknown:
            raise DataError(f"{source} has the unknown key {unknown[0]!r}. Known keys: sites, cases, patients.")
        for key in ("sites", "cases"):
            if not isinstance(data.get(key), Mapping):
                raise DataError(
                    f"{source} has no object {key!r}. It needs `sites` (site -> scanner) and `cases` (case -> site)."
                )
        sites = {str(name): _site(str(name), info, source) for name, info in data["sites"].items()}
        cases = {str(case): str(site) for case, site in data["cases"].items()}
        for case, site in cases.items():
            if site not in sites:
                raise DataError(
                    f"{source}: case {case} belongs to site {site}, which is not listed under `sites` "
                    f"({', '.join(sites) or 'none'}). Add the site or correct the case."
                )
        found = cls(sites, cases, _patients(data.get("patients", {}), source))
        for case in found.patients:
            if found.site_of(case) is None:
                raise DataError(
                    f"{source}: `patients` names the case {case}, which is neither under `cases` nor a travelling subject "
                    "<SITE>_<SUBJECT> of a listed site. Correct the case."
                )
        return found

    @classmethod
    def load(cls, path: Path) -> SitesFile:
        """Read a file.

        Raises:
            DataError: the file is missing, is no JSON, or is not in this form; the message names it.
        """
        return cls.from_dict(read_json(path, what="The sites file"), source=str(path))

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        write_json(self.to_dict(), path)


def _site(name: str, info: Mapping[str, Any], source: str) -> SiteInfo:
    known = {item.name for item in fields(SiteInfo)}
    unknown = sorted(set(info) - known)
    if unknown:
        raise DataError(
            f"{source}: site {name} has the unknown key {unknown[0]!r}. Known keys: {', '.join(sorted(known))}."
        )
    return SiteInfo(**info)


def _patients(data: object, source: str) -> dict[str, str]:
    if not isinstance(data, Mapping):
        raise DataError(f"{source}: `patients` holds a {type(data).__name__}; it has to be an object, case -> patient.")
    return {str(case): str(patient) for case, patient in data.items()}
