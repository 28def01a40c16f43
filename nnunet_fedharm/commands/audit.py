"""`nnunet-fedharm audit membership|canaries|statistics|inversion`: attacks on our own models and mechanisms, with a report."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_fedharm.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from nnunet_fedharm.evaluation.audit.site import AuditedSite
    from nnunet_fedharm.sites.files import CaseFiles

HELP = "Attack a model or the private training itself, and set what is found beside the epsilon that is claimed."

FOUND = 1
"""Exit status where an audit contradicts the claim, or finds the mechanism not as promised."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the four audits."""
    # Imported here: the options' docstrings are their help.
    from nnunet_fedharm.commands.options import add_dataclass_options
    from nnunet_fedharm.evaluation.audit.gradient_canaries import CanaryOptions
    from nnunet_fedharm.evaluation.audit.inversion import InversionOptions
    from nnunet_fedharm.evaluation.audit.membership import MembershipOptions
    from nnunet_fedharm.evaluation.audit.noisy_statistics import StatisticOptions
    from nnunet_fedharm.privacy.options import PrivacyOptions

    actions = parser.add_subparsers(dest="action", required=True, metavar="membership|canaries|statistics|inversion")
    member = actions.add_parser("membership", help="was a case in the training of a model?")
    _add_membership(member)
    add_dataclass_options(member, MembershipOptions)
    canaries = actions.add_parser("canaries", help="a lower bound on epsilon from one run of the private training")
    _add_training(canaries)
    canaries.add_argument(
        "--patients",
        type=int,
        default=0,
        metavar="STEPS",
        help="also take real patients as canaries, in that many steps",
    )
    canaries.add_argument(
        "--phase",
        choices=("segmenter", "harmonizer"),
        default="segmenter",
        help="whose private steps are audited (default: %(default)s)",
    )
    add_dataclass_options(canaries, CanaryOptions)
    statistics = actions.add_parser("statistics", help="the same of the noisy fingerprint, styles and votes")
    _add_training(statistics)
    statistics.add_argument(
        "-np", "--num-processes", type=int, default=1, help="to read the images (default: %(default)s)"
    )
    add_dataclass_options(statistics, StatisticOptions)
    inversion = actions.add_parser("inversion", help="can the receiver of an update draw the patch behind it?")
    _add_training(inversion)
    add_dataclass_options(inversion, InversionOptions)
    for action in (canaries, statistics, inversion):
        claim = action.add_argument_group("differential privacy", "what the plans say, unless given here")
        add_dataclass_options(claim, PrivacyOptions, show_defaults=False)


def run(args: argparse.Namespace) -> int:
    """Run the chosen audit, write its report, print its table and reading."""
    actions = {"membership": _membership, "canaries": _canaries, "statistics": _statistics, "inversion": _inversion}
    return actions[args.action](args)


def _add_membership(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m", "--model", type=Path, required=True, help="results folder TRAINER__PLANS__CONFIGURATION of our trainers"
    )
    parser.add_argument("-f", "--fold", default="all", help="0 to 4 or all (default)")
    parser.add_argument("--checkpoint", default="checkpoint_final.pth", help="default: %(default)s")
    parser.add_argument(
        "--members", type=Path, nargs=2, required=True, metavar=("IMAGES", "LABELS"), help="cases of the training"
    )
    parser.add_argument(
        "--non-members", type=Path, nargs=2, metavar=("IMAGES", "LABELS"), help="held-out cases of the same kind"
    )
    parser.add_argument(
        "--splits", type=Path, metavar="FILE", help="splits_final.json: members are the fold's training cases, and its "
        "validation cases are non-members",
    )  # fmt: skip
    parser.add_argument(
        "--reference-models", type=Path, nargs="+", default=[], metavar="MODEL",
        help="models, all their folds, that were trained on none of the cases: a stronger attack",
    )  # fmt: skip
    _add_common(parser)


def _add_training(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", "--dataset", required=True, help="number or name of the preprocessed dataset")
    parser.add_argument("-p", "--plans-name", default="nnUNetFedHarmPlans", help="default: %(default)s")
    parser.add_argument("-c", "--configuration", default="3d_fullres", help="2d or 3d_fullres (default)")
    parser.add_argument("-f", "--fold", default="all", help="0 to 4 or all (default)")
    parser.add_argument(
        "--site-root",
        type=Path,
        metavar="FOLDER",
        help="the site's nnU-Net root; default: nnU-Net's environment variables",
    )
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of report.html and report.json")
    parser.add_argument("-device", "--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: %(default)s)")


def _membership(args: argparse.Namespace) -> int:
    # torch and nnU-Net take seconds that --help need not wait for.
    from nnunet_fedharm.commands.device import torch_device
    from nnunet_fedharm.commands.options import read_dataclass_options
    from nnunet_fedharm.evaluation.audit import words
    from nnunet_fedharm.evaluation.audit.membership import MembershipOptions, attack_membership
    from nnunet_fedharm.evaluation.audit.model import (
        check_alike,
        labelled_cases,
        load_model,
        members_by_split,
        read_claim,
    )
    from nnunet_fedharm.evaluation.audit.pages import membership_page

    device = str(torch_device(args.device))
    model = load_model(args.model, fold=args.fold, checkpoint=args.checkpoint, device=device)
    references = [
        load_model(folder, fold=path.parent.name.removeprefix("fold_"), checkpoint=args.checkpoint, device=device)
        for folder in args.reference_models
        for path in sorted(folder.glob(f"fold_*/{args.checkpoint}"))
    ]
    if args.reference_models and not references:
        raise CheckpointError(f"{args.reference_models[0]} has no fold_*/{args.checkpoint}. Give finished models.")
    for reference in references:
        check_alike(model, reference)
    members = labelled_cases(args.members, model.dataset_json, what="members")
    others: list[CaseFiles] = []
    if args.splits is not None:
        if not str(args.fold).isdigit():
            raise DataError("--splits needs a fold of 0 to 4; with fold all every case of the folder is a member.")
        members, others = members_by_split(members, args.splits, int(args.fold))
    if args.non_members is not None:
        others = [*others, *labelled_cases(args.non_members, model.dataset_json, what="non-members")]
    if not others:
        raise DataError(
            "There are no held-out cases to compare with. Give some with --non-members, or a fold with --splits."
        )
    card = read_claim(args.model / f"fold_{args.fold}")
    audit = attack_membership(
        model, members, others, references=references,
        claimed=None if card is None else (float(card["epsilon"]), float(card["delta"])),
        options=read_dataclass_options(args, MembershipOptions), progress=True,
    )  # fmt: skip
    print(words.plain_table(words.MEMBERSHIP_HEAD, words.membership_rows(audit)))
    _finish(args.output, words.membership_sentence(audit), audit.to_dict(), membership_page(audit))
    return FOUND if audit.refuted else 0


def _canaries(args: argparse.Namespace) -> int:
    from nnunet_fedharm.commands.options import given_options, read_dataclass_options
    from nnunet_fedharm.evaluation.audit import words
    from nnunet_fedharm.evaluation.audit.gradient_canaries import CanaryOptions, audit_gradients
    from nnunet_fedharm.evaluation.audit.pages import canary_page
    from nnunet_fedharm.evaluation.audit.patient_canaries import audit_patients
    from nnunet_fedharm.evaluation.audit.site import audit_trainer
    from nnunet_fedharm.privacy.options import PrivacyOptions

    site, options = _site(args), read_dataclass_options(args, CanaryOptions)
    privacy = site.privacy(given_options(args, PrivacyOptions))
    with audit_trainer(site, privacy) as trainer:
        if args.phase == "harmonizer":
            from nnunet_fedharm.evaluation.audit.harmonizer_canaries import audit_harmonizer

            audit = audit_harmonizer(trainer, options, delta=privacy.delta)
        else:
            audit = audit_gradients(trainer, options, delta=privacy.delta, progress=True)
    patients = None
    if args.patients > 0:
        with audit_trainer(site, privacy) as trainer:
            patients = audit_patients(
                trainer, steps=args.patients, delta=privacy.delta, confidence=options.confidence, seed=options.seed,
                progress=True,
            )  # fmt: skip
    print(words.plain_table(words.MEASURED_HEAD, words.measured_rows(audit)) + "\n")
    print(words.plain_table(words.CANARY_HEAD, words.canary_rows(audit.found)))
    sentence = words.canary_sentence(audit) + ("" if patients is None else " " + words.patient_sentence(patients))
    found = {"gradient_canaries": audit.to_dict(), "patients": None if patients is None else patients.to_dict()}
    content = {"phase": args.phase, **found}
    _finish(args.output, sentence, content, canary_page(audit, patients, dataset=site.dataset_name))
    return FOUND if audit.refuted or audit.suspicions or (patients is not None and patients.refuted) else 0


def _statistics(args: argparse.Namespace) -> int:
    from nnunet_fedharm.commands.options import given_options, read_dataclass_options
    from nnunet_fedharm.evaluation.audit import words
    from nnunet_fedharm.evaluation.audit.noisy_statistics import StatisticOptions
    from nnunet_fedharm.evaluation.audit.pages import statistics_page
    from nnunet_fedharm.evaluation.audit.site_statistics import audit_statistics
    from nnunet_fedharm.privacy.options import PrivacyOptions

    site, options = _site(args), read_dataclass_options(args, StatisticOptions)
    privacy = site.privacy(given_options(args, PrivacyOptions))
    found = audit_statistics(site, privacy, options, num_processes=args.num_processes, progress=True)
    print(words.plain_table(words.STATISTICS_HEAD, words.statistics_rows(found.audits)))
    for what, why in found.left_out.items():
        print(f"Not audited: {what}; {why}.")
    page = statistics_page(found, dataset=site.dataset_name)
    _finish(args.output, words.statistics_sentence(found), found.to_dict(), page)
    return FOUND if found.refuted else 0


def _inversion(args: argparse.Namespace) -> int:
    from nnunet_fedharm.commands.options import given_options, read_dataclass_options
    from nnunet_fedharm.evaluation.audit import words
    from nnunet_fedharm.evaluation.audit.inversion import InversionOptions, invert_updates
    from nnunet_fedharm.evaluation.audit.pages import inversion_page
    from nnunet_fedharm.evaluation.audit.site import audit_trainer
    from nnunet_fedharm.privacy.options import PrivacyOptions

    site, given = _site(args), given_options(args, PrivacyOptions)
    claims = given or "privacy" in site.plans["configurations"][site.configuration]["fedharm"]
    with audit_trainer(site, site.privacy(given) if claims else None) as trainer:
        audit = invert_updates(trainer, read_dataclass_options(args, InversionOptions), progress=True)
    print(words.plain_table(words.INVERSION_HEAD, words.inversion_rows(audit)))
    _finish(
        args.output, words.inversion_sentence(audit), audit.to_dict(), inversion_page(audit, dataset=site.dataset_name)
    )
    return 0


def _site(args: argparse.Namespace) -> AuditedSite:
    from nnunet_fedharm.commands.device import torch_device
    from nnunet_fedharm.evaluation.audit.site import AuditedSite, find_plans
    from nnunet_fedharm.nnunet_root import NnunetRoot, find_dataset
    from nnunet_fedharm.planning.central import EnvironmentRoot

    root = EnvironmentRoot.from_environment() if args.site_root is None else NnunetRoot(args.site_root)
    name = find_dataset(root.preprocessed, args.dataset, advice="Plan and preprocess it first.")
    return AuditedSite(
        root=root,
        dataset_name=name,
        plans=find_plans(root, name, args.plans_name, args.configuration),
        configuration=args.configuration,
        fold=int(args.fold) if str(args.fold).isdigit() else args.fold,
        device=str(torch_device(args.device)),
    )


def _finish(output: Path, sentence: str, content: Mapping[str, Any], page: str) -> None:
    from nnunet_fedharm import __version__
    from nnunet_fedharm.sites.files import write_text

    facts = {"reading": sentence, "nnunet_fedharm": __version__, "date": time.strftime("%Y-%m-%d"), **content}
    write_text(json.dumps(facts, indent=2) + "\n", output / "report.json")
    write_text(page, output / "report.html")
    print(
        f"\n{sentence}\n\nWritten: {output / 'report.html'} and report.json, about this site's patients: keep them here."
    )
