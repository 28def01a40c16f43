"""`nnunet-fedharm server …`: the server of a consortium of real hospitals."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from nnunet_fedharm.commands.card import write_federated_card
from nnunet_fedharm.commands.federate import add_config_arguments
from nnunet_fedharm.federation.config import FederateConfig

HELP = "The server of a consortium of real hospitals: make its folder, start it, let sites in, run trainings and site reports."
_NOT_HERE = ("root", "server_root")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command for each step."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    init = _action(actions, "init", "make a consortium: authority, certificate, keys, signed app, consortium.toml")
    init.add_argument(
        "--host",
        dest="hosts",
        nargs="+",
        required=True,
        metavar="HOST",
        help="names or IP addresses by which sites reach this machine, the best one first",
    )
    init.add_argument("--name", required=True, help="of the study")
    init.add_argument("--sites", nargs="*", default=[], metavar="SITE", help="names of the expected sites")
    init.add_argument("--port", type=int, default=9092, help="TCP port that sites connect to (default: 9092)")
    init.add_argument("--bind", default="0.0.0.0", help="address to listen on (default: all)")
    _action(actions, "start", "run the server until Ctrl-C or SIGTERM")
    add = _action(actions, "add", "expect hospitals that come later: enter their names into consortium.toml")
    add.add_argument("sites", nargs="+", metavar="SITE")
    register = _action(actions, "register", "let a site in by its public key")
    register.add_argument("site", metavar="SITE")
    register.add_argument("key", type=Path, metavar="KEYFILE", help="the site's node.pub")
    register.add_argument("--replace", action="store_true", help="the site made a new key; the former one is shut out")
    remove = _action(actions, "remove", "shut a site out")
    remove.add_argument("site", metavar="SITE")
    _action(actions, "sites", "who is registered, and who is connected now")
    run = _action(actions, "run", "train across the registered sites; the same command resumes a stopped run")
    add_config_arguments(run, skip=(*_NOT_HERE, "parallel_sites"))
    run.add_argument(
        "--keep",
        action="store_true",
        help="`server start` resumes it after a crash, a reboot or a failure, until every site has its model",
    )
    report = _action(actions, "report", "how different the registered sites are, from counts and sums")
    _add_report_arguments(report)
    for parser_of in (run, report):
        parser_of.add_argument("--detach", action="store_true", help="do not wait for the end")
    _action(actions, "watch", "show the run that is going on")
    _action(actions, "stop", "stop the run that is going on; the server stays")
    sign = _action(actions, "sign", "sign the app of the installed release, after an upgrade")
    sign.add_argument("--signing-key", type=Path, metavar="FILE", help="where the key is, if not in the folder")
    renew = _action(actions, "renew", "a new server certificate of the same authority")
    renew.add_argument(
        "--host", dest="hosts", nargs="+", default=[], metavar="HOST", help="other addresses than before"
    )
    _action(actions, "units", "write the systemd unit and the container file again")


def run(args: argparse.Namespace) -> int:
    """Run the chosen action."""
    from nnunet_fedharm.federation.deploy import server
    from nnunet_fedharm.federation.deploy.keeper import Keeper
    from nnunet_fedharm.federation.deploy.server_folder import ServerFolder

    folder = ServerFolder(args.folder.expanduser().resolve())
    if args.action == "init":
        return _init(args)
    if args.action == "start":
        keeper = Keeper(folder, show=_print, finished=write_federated_card)
        server.start_server(folder, each=keeper.look, show=_print)
    elif args.action in ("run", "report"):
        kept = args.action == "run" and args.keep
        event = server.run(folder, _config(args), detach=args.detach, kept=kept, show=_print)
        if event.get("event") == "finished":
            write_federated_card(Path(event["results"]))
        if event.get("event") == "reported":
            print(f"Make the page: nnunet-fedharm sites report --findings {event['results']}")
    elif args.action == "watch":
        server.watch_run(folder, show=_print)
    elif args.action == "stop":
        print(f"{server.stop_runs(folder)} run(s) stopped.")
    elif args.action == "add":
        return _add(args, folder)
    elif args.action in ("register", "remove"):
        return _membership(args, folder)
    elif args.action == "sites":
        return _sites(folder)
    else:
        return _upkeep(args, folder)
    return 0


def _action(actions: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the consortium")
    return parser


def _init(args: argparse.Namespace) -> int:
    from nnunet_fedharm.federation.deploy.server_folder import ServerOptions, init_server
    from nnunet_fedharm.federation.deploy.units import write_server_units

    options = ServerOptions(name=args.name, hosts=args.hosts, sites=args.sites, port=args.port, bind=args.bind)
    folder = init_server(args.folder, options)
    written = write_server_units(folder)
    consortium = folder.consortium()
    print(f"{folder.consortium_file}: send it to every site. Fingerprint, to be read out by telephone:")
    print(f"\n    {consortium.fingerprint}\n")
    print(f"{folder.private}: never leaves this machine, but for ca.key and signing.key, which are better kept")
    print("offline; they are needed to renew the certificate and after an upgrade only.")
    print(f"Examples for running it: {', '.join(str(path) for path in written)}")
    print(f"Next: nnunet-fedharm server register {folder.path} SITE node.pub   (the file that a site sends back)")
    print(f"      nnunet-fedharm server start {folder.path}")
    return 0


def _add(args: argparse.Namespace, folder: Any) -> int:
    from nnunet_fedharm.federation.deploy.server_folder import expect_sites

    new = expect_sites(folder, args.sites)
    if new:
        print(f"{', '.join(new)}: expected. Send them {folder.consortium_file}; other sites need no new file.")
    else:
        print(f"{folder.consortium_file} has these names already; send it to them.")
    print(f"Fingerprint, to be read out by telephone: {folder.consortium().fingerprint}")
    return 0


def _membership(args: argparse.Namespace, folder: Any) -> int:
    from nnunet_fedharm.federation.deploy import server

    if args.action == "register":
        told = server.register_site(folder, args.site, args.key, replace_key=args.replace)
        text = f"{args.site} is registered"
    else:
        told = server.remove_site(folder, args.site)
        text = f"{args.site} is shut out"
    print(f"{text}." if told else f"{text} when the server starts.")
    return 0


def _sites(folder: Any) -> int:
    from nnunet_fedharm.federation.deploy.control import operator

    with operator(folder) as connection:
        status = {node.site: node.status for node in connection.nodes()}
    for site in sorted({*folder.consortium().sites, *status}):
        print(f"{site:<24} {status.get(site, 'not registered')}")
    return 0


def _upkeep(args: argparse.Namespace, folder: Any) -> int:
    from nnunet_fedharm.federation.deploy.server_folder import renew_certificate, sign_again
    from nnunet_fedharm.federation.deploy.units import write_server_units

    if args.action == "sign":
        sign_again(folder, args.signing_key)
        print(f"Signed. Restart the server, and send {folder.consortium_file} to every site: `site join` takes it.")
    elif args.action == "renew":
        renew_certificate(folder, args.hosts)
        print(
            "Renewed. Restart the server. Sites need nothing, unless an address changed: then send the consortium file."
        )
    else:
        print("\n".join(str(path) for path in write_server_units(folder)))
    return 0


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    from nnunet_fedharm.federation.report.config import SiteReportConfig

    add_config_arguments(parser, skip=(*_NOT_HERE, "device", "parallel_sites"), config=SiteReportConfig)


def _config(args: argparse.Namespace) -> Any:
    from nnunet_fedharm.federation.report.config import SiteReportConfig
    from nnunet_fedharm.federation.server_root import with_start

    kind: Any = FederateConfig if args.action == "run" else SiteReportConfig
    config = kind(**{item.name: getattr(args, item.name) for item in fields(kind) if hasattr(args, item.name)})
    return with_start(config)


def _print(line: str) -> None:
    print(line, flush=True)
