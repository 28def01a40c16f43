"""`nnunet-fedharm site …`: one hospital in a consortium."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "One hospital in a consortium: join it, start the site, and say by a policy what may be asked of it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare `join`, `start`, `check` and `policy`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="join|start|check|policy")
    join = actions.add_parser(
        "join", help="join a consortium, or take its coordinator's new file; makes the site's key"
    )
    join.add_argument("file", type=Path, metavar="CONSORTIUM_FILE", help="consortium.toml from the coordinator")
    join.add_argument("--site", required=True, help="this site's name in the consortium")
    join.add_argument("--site-root", type=Path, required=True, metavar="FOLDER", help="nnU-Net root of this site")
    join.add_argument(
        "--fingerprint", default="", help="that the coordinator read out by telephone; refused if it differs"
    )
    join.add_argument(
        "--address", default="", help="one of the consortium's addresses (default: the first; joining again keeps it)"
    )
    join.add_argument("--device", default="", help="cuda, cuda:N, mps or cpu (default: cuda; joining again keeps it)")
    join.add_argument(
        "--num-processes", type=int, help="for fingerprints and preprocessing (default: 2; joining again keeps it)"
    )
    join.add_argument("--new-key", action="store_true", help="make a new key; the coordinator has to register it")
    for name, text in (
        ("start", "take part until Ctrl-C or SIGTERM; outgoing connections only"),
        ("check", "whether the site is ready and reaches the server"),
    ):
        parser_of = actions.add_parser(name, help=text)
        parser_of.add_argument("root", type=Path, metavar="FOLDER", help="nnU-Net root of this site")
    policy = actions.add_parser("policy", help="print an annotated policy to start from, or check this site's own")
    policy.add_argument(
        "root", type=Path, nargs="?", metavar="FOLDER", help="nnU-Net root: check its fedharm/policy.toml"
    )


def run(args: argparse.Namespace) -> int:
    """Run the chosen action."""
    if args.action == "policy":
        return _policy(args)
    if args.action == "join":
        return _join(args)
    from nnunet_fedharm.federation.deploy.site_folder import SiteFolder
    from nnunet_fedharm.federation.deploy.site_node import check_site, start_site

    folder = SiteFolder(args.root.expanduser().resolve())
    if args.action == "start":
        start_site(folder, show=lambda line: print(line, flush=True))
        return 0
    trouble = check_site(folder)
    print(trouble or "The site is ready, and the consortium's server answers.")
    return 1 if trouble else 0


def _join(args: argparse.Namespace) -> int:
    from nnunet_fedharm.federation.deploy.device import device_trouble
    from nnunet_fedharm.federation.deploy.site_join import JoinOptions, join
    from nnunet_fedharm.federation.deploy.units import write_site_units

    options = JoinOptions(
        site=args.site,
        fingerprint=args.fingerprint,
        address=args.address,
        device=args.device,
        num_processes=args.num_processes,
        new_key=args.new_key,
    )
    folder, consortium, line = join(args.file, args.site_root, options)
    written = write_site_units(folder)
    print(f"{args.site} has joined {consortium.name}. Compare this fingerprint with the coordinator by telephone:")
    print(f"\n    {consortium.fingerprint}\n")
    print(f"Send this line (it is {folder.node_key.with_suffix('.pub')}) to the coordinator:")
    print(f"\n    {line}\n")
    trouble = device_trouble(folder.settings()["device"], file=folder.settings_file)
    if trouble:
        print(f"Before the site can start: {trouble}")
    print(f"Your rules: {folder.policy_file}")
    print(f"Examples for running it: {', '.join(str(path) for path in written)}")
    print(f"Next: nnunet-fedharm site start {folder.root}")
    return 0


def _policy(args: argparse.Namespace) -> int:
    from nnunet_fedharm.federation.policy import TEMPLATE

    if args.root is None:
        print(TEMPLATE, end="")
        return 0
    from nnunet_fedharm.federation.deploy.site_folder import SiteFolder
    from nnunet_fedharm.federation.policy import checked_policy

    folder = SiteFolder(args.root.expanduser().resolve())
    for name, value in vars(checked_policy(folder.policy_file, site="here")).items():
        print(f"{name:<26} {', '.join(value) or 'any' if isinstance(value, tuple) else value}")
    return 0
