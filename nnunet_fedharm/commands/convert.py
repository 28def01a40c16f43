"""`nnunet-fedharm convert brats2021|mamamia|bids`: a published data set -> an nnU-Net raw dataset with sites.json."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_fedharm.errors import DataError

if TYPE_CHECKING:
    from nnunet_fedharm.datasets.convert_cases import Conversion

HELP = "Convert a published data set to an nnU-Net raw dataset whose sites.json says which hospital each case is from."
LISTED = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare one action per data set."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="brats2021|mamamia|bids")
    brats = actions.add_parser("brats2021", help="BraTS 2021 Task 1: folders BraTS2021_00000/ and the mapping table")
    _common(brats)
    brats.add_argument("--table", type=Path, help="table of institutions (default: looked for in and below SOURCE)")
    brats.add_argument(
        "--site-by", choices=["institution", "collection"], default="institution", help="default: %(default)s"
    )
    brats.add_argument("--regions", action="store_true", help="nnU-Net's regions: whole tumor, core, enhancing tumor")
    brats.add_argument("--unlabelled", action="store_true", help="take cases without segmentation as unlabelled")
    mamamia = actions.add_parser("mamamia", help="MAMA-MIA: images/, segmentations/, clinical_and_imaging_info")
    _common(mamamia)
    mamamia.add_argument("--table", type=Path, help="clinical and imaging table, CSV or Excel (default: in SOURCE)")
    mamamia.add_argument(
        "--phases", type=int, nargs="+", default=[0, 1, 2], help="DCE phases, 0 is before contrast (default: 0 1 2)"
    )
    mamamia.add_argument(
        "--segmentations", choices=["expert", "automatic"], default="expert", help="default: %(default)s"
    )
    mamamia.add_argument(
        "--site-by", choices=["centre", "dataset", "manufacturer"], default="centre", help="default: %(default)s"
    )
    mamamia.add_argument("--official-split", action="store_true", help="patients of test_split go to imagesTs")
    bids = actions.add_parser("bids", help="any BIDS data set")
    _common(bids)
    bids.add_argument("--name", help="name of the dataset (default: of dataset_description.json)")
    bids.add_argument("--channels", nargs="+", required=True, metavar="SUFFIX", help="such as T1w FLAIR, ce-gad_T1w")
    bids.add_argument(
        "--labels", metavar="PIPELINE", help="folder below derivatives with dseg files (default: no labels)"
    )
    bids.add_argument(
        "--label-entity", metavar="ENTITY", help="such as desc-manual, where a case has several dseg files"
    )
    bids.add_argument("--label-names", nargs="+", metavar="NAME=VALUE", help="default: the pipeline's dseg.tsv")
    bids.add_argument("--site-column", help="of participants.tsv (default: institution or scanner of the sidecars)")


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of the data set as published")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="nnUNet_raw, or the dataset's folder Dataset<ID>_<Name>"
    )
    parser.add_argument("-d", "--dataset-id", type=int, required=True, metavar="ID", help="1 to 999")
    parser.add_argument("--copy", action="store_true", help="copy files instead of linking them")
    parser.add_argument("--skip-missing", action="store_true", help="leave out incomplete cases and list them")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="CASE", help="cases to leave out")


def run(args: argparse.Namespace) -> int:
    """Find the cases, write the dataset, print one line per site."""
    # Imported here: nibabel and numpy take a while that --help need not wait for.
    from nnunet_fedharm.datasets.convert_write import dataset_folder, write_conversion

    if not args.source.is_dir():
        raise DataError(f"There is no folder {args.source}. Give the data set's folder.")
    name, conversion = _find(args)
    folder = dataset_folder(args.output, args.dataset_id, name)
    written = write_conversion(conversion, folder, link=not args.copy)
    print(format_summary(conversion))
    print(f"\n{folder}: {len(conversion.cases)} cases, {written.n_new} files new in this run.")
    print(f"Check the voxels next:\n  nnunet-fedharm sites check -d {folder}")
    return 0


def _find(args: argparse.Namespace) -> tuple[str, Conversion]:
    from nnunet_fedharm.datasets import bids, brats, mamamia

    shared = {"skip_missing": args.skip_missing, "exclude": tuple(args.exclude)}
    if args.action == "brats2021":
        return brats.NAME, brats.find_brats(
            args.source,
            table=args.table,
            site_by=args.site_by,
            regions=args.regions,
            unlabelled=args.unlabelled,
            **shared,
        )
    if args.action == "mamamia":
        return mamamia.NAME, mamamia.find_mamamia(
            args.source,
            table=args.table,
            phases=args.phases,
            segmentations=args.segmentations,
            site_by=args.site_by,
            official_split=args.official_split,
            **shared,
        )
    options = bids.BidsOptions(
        channels=tuple(args.channels),
        pipeline=args.labels,
        label_entity=args.label_entity,
        label_names=None if args.label_names is None else parse_label_names(args.label_names),
        site_column=args.site_column,
        **shared,
    )
    return args.name or bids.dataset_name(args.source), bids.find_bids(args.source, options)


def parse_label_names(words: list[str]) -> dict[str, int]:
    """`["tumor=1", "oedema=2"]` as a map.

    Raises:
        DataError: a word is not NAME=VALUE.
    """
    found = {}
    for word in words:
        name, _, value = word.rpartition("=")
        if not name or not value.isdigit():
            raise DataError(f"--label-names takes NAME=VALUE with whole numbers, got {word!r}.")
        found[name] = int(value)
    return found


def format_summary(conversion: Conversion) -> str:
    """One line per site, sites with a single case and what was left out."""
    lines = [f"{'site':<20} {'train':>6} {'unlabelled':>11} {'held out':>9}  scanner"]
    singles = []
    for site, info in conversion.sites.items():
        parts = [case.part for case in conversion.cases if case.site == site]
        field = None if info.field is None else f"{info.field:g} T"
        scanner = ", ".join(filter(None, [info.vendor, field, info.sequence]))
        counts = [parts.count("train"), parts.count("unlabelled"), parts.count("test")]
        lines.append(f"{site:<20} {counts[0]:>6} {counts[1]:>11} {counts[2]:>9}  {scanner}".rstrip())
        singles += [site] if len(parts) == 1 else []
    if singles:
        lines.append(f"One case only, too few to train at: {', '.join(singles)}")
    if conversion.excluded:
        lines.append(f"Left out: {len(conversion.excluded)}")
        lines += [f"  {case}: {reason}" for case, reason in list(conversion.excluded.items())[:LISTED]]
        lines += ["  …"] if len(conversion.excluded) > LISTED else []
    return "\n".join(lines)
