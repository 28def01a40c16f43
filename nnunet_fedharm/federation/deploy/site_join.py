"""A site joins a consortium, or takes its coordinator's new file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nnunet_fedharm.errors import SetupError
from nnunet_fedharm.federation.deploy import app_bundle, keys
from nnunet_fedharm.federation.deploy.consortium import Consortium, version_differences
from nnunet_fedharm.federation.deploy.settings_file import change_setting, writing
from nnunet_fedharm.federation.deploy.site_folder import SiteFolder
from nnunet_fedharm.federation.policy import TEMPLATE
from nnunet_fedharm.federation.site_names import check_site_names

_DEVICE, _PROCESSES = "cuda", 2
Show = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class JoinOptions:
    """What `site join` is told.

    Attributes:
        fingerprint: that the coordinator read out; empty where it is compared by eye.
        address: one of the consortium's; empty for the present one, at first the consortium's first.
        device: empty for the present one, at first cuda.
        num_processes: None for the present number, at first 2.
        new_key: make a new node key though there is one.
    """

    site: str
    fingerprint: str = ""
    address: str = ""
    device: str = ""
    num_processes: int | None = None
    new_key: bool = False


def join(
    consortium_file: Path, root: Path, options: JoinOptions, *, show: Show = print
) -> tuple[SiteFolder, Consortium, str]:
    """Join a consortium, or take a new file of the same one.

    Key and policy that are there stay. Of the settings that are there only those change that the options name, and an address
    that the consortium has no more.

    Returns:
        The site's folder, the consortium, and the public key line for the coordinator.

    Raises:
        SetupError: the folder, the file, or the fingerprint is not as it has to be, or the folder cannot be written.
    """
    consortium = Consortium.load(consortium_file.expanduser())
    folder = SiteFolder(root.expanduser().resolve())
    with writing(folder.root):
        _check_join(consortium, folder, options)
        folder.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        for private in (folder.home.parent, folder.home):
            private.chmod(0o700)
        folder.consortium_file.write_text(consortium.to_toml(), encoding="utf-8")
        folder.ca_certificate.write_text(consortium.ca_certificate.strip() + "\n", encoding="utf-8")
        folder.trusted_entities.write_text(app_bundle.trusted_entities(consortium.signing_key), encoding="utf-8")
        if options.new_key or not folder.node_key.exists():
            keys.make_node_key(folder.node_key, comment=options.site)
        if not folder.superexec_secret.exists():
            keys.make_secret(folder.superexec_secret)
        if folder.settings_file.exists():
            _update_settings(folder, consortium, options, show)
        else:
            folder.settings_file.write_text(_settings_text(consortium, options), encoding="utf-8")
        if not folder.policy_file.exists():
            folder.policy_file.write_text(TEMPLATE, encoding="utf-8")
        line = folder.node_key.with_suffix(".pub").read_text(encoding="utf-8").strip()
    return folder, consortium, line


def check_release(consortium: Consortium) -> None:
    """Nothing, where the installed release and its app are the server's.

    Raises:
        SetupError: they are not.
    """
    differences = version_differences(consortium)
    if differences:
        raise SetupError(f"{' '.join(differences)} Install the same releases as the server.")
    if app_bundle.app_hash(app_bundle.build_app()) != consortium.app_sha256:
        raise SetupError(
            "The installed nnunet_fedharm is another build than the server's (its app differs). Install the same release, or "
            "ask the coordinator for the present consortium file."
        )


def _check_join(consortium: Consortium, folder: SiteFolder, options: JoinOptions) -> None:
    check_site_names([options.site], error=SetupError)
    if options.site not in consortium.sites:
        raise SetupError(
            f"{options.site} is not among the sites of {consortium.name}: {', '.join(consortium.sites) or 'none'}. Use the name "
            "that the coordinator gave you; one that was added later is in the coordinator's present consortium file."
        )
    given = options.fingerprint.replace(" ", "").lower()
    if given and given.replace("-", "") != consortium.fingerprint.replace("-", ""):
        raise SetupError(
            f"The file's fingerprint is {consortium.fingerprint}, not what the coordinator read out. Do not use this file."
        )
    if options.address and options.address not in consortium.addresses:
        raise SetupError(
            f"{options.address} is not among the consortium's addresses: {', '.join(consortium.addresses)}."
        )
    if not folder.root.is_dir():
        raise SetupError(
            f"The site's nnU-Net root {folder.root} does not exist. Make it, with nnUNet_raw/DatasetXXX_Name."
        )
    if folder.consortium_file.exists():
        former = Consortium.load(folder.consortium_file)
        if former.fingerprint != consortium.fingerprint:
            raise SetupError(
                f"This site belongs to {former.name} ({former.fingerprint}), and the file is of {consortium.name} "
                f"({consortium.fingerprint}). If it shall leave the former one, move {folder.home} away."
            )
        if folder.settings()["site"] != options.site:
            raise SetupError(
                f"This site is {folder.settings()['site']}, not {options.site}. Move {folder.home} away first."
            )
    check_release(consortium)


def _update_settings(folder: SiteFolder, consortium: Consortium, options: JoinOptions, show: Show) -> None:
    """Change what the options name, and an address that the consortium has no more; say what was changed."""
    former = folder.settings()
    wanted: dict[str, str | int] = {}
    if options.address or former["address"] not in consortium.addresses:
        wanted["address"] = options.address or consortium.addresses[0]
    if options.device:
        wanted["device"] = options.device
    if options.num_processes is not None:
        wanted["num_processes"] = options.num_processes
    for key, value in wanted.items():
        if value != former[key]:
            change_setting(folder.settings_file, key, value)
            why = "" if key != "address" or options.address else ", which the consortium file has no more"
            show(f"{folder.settings_file}: {key} is {value} now; it was {former[key]}{why}.")


def _settings_text(consortium: Consortium, options: JoinOptions) -> str:
    lines = [
        f"site = {json.dumps(options.site)}",
        f"address = {json.dumps(options.address or consortium.addresses[0])}",
        f"device = {json.dumps(options.device or _DEVICE)}  # cuda, cuda:1, mps or cpu",
        f"num_processes = {options.num_processes or _PROCESSES}  # for fingerprints and preprocessing",
        'proxy = ""  # http://HOST:PORT, only where the server is reached through this proxy alone',
        "",
        "[node_config]  # further keys of the node config, for example warm-minutes = 30.0",
    ]
    return "\n".join(lines) + "\n"
