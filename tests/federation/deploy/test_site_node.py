"""A site that joins, its SuperNode's command line, and the units that are written for it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

from nnunet_fedharm.cli import main
from nnunet_fedharm.errors import FederationError, PrivacyError, SetupError
from nnunet_fedharm.federation.deploy import device as devices
from nnunet_fedharm.federation.deploy.processes import children, last_words
from nnunet_fedharm.federation.deploy.server_folder import ServerFolder, ServerOptions, init_server, renew_certificate
from nnunet_fedharm.federation.deploy.site_folder import SiteFolder
from nnunet_fedharm.federation.deploy.site_join import JoinOptions, join
from nnunet_fedharm.federation.deploy.site_node import check_site, start_site, supernode_command
from nnunet_fedharm.federation.deploy.units import write_server_units, write_site_units
from tests.federation.deploy.conftest import SITES


def test_joining_again_keeps_key_settings_and_policy(join_site: Callable[..., SiteFolder]) -> None:
    site = join_site(num_processes=3)
    site.policy_file.write_text("[work]\nmax_rounds = 3\n")
    files = (site.node_key, site.superexec_secret, site.settings_file, site.policy_file)
    before = [path.read_bytes() for path in files]
    assert [path.read_bytes() for path in files] == before == [path.read_bytes() for path in files]
    join_site(device="")
    assert [path.read_bytes() for path in files] == before
    join_site(new_key=True)
    assert site.node_key.read_bytes() != before[0]


def test_joining_again_takes_what_is_said_and_says_what_it_changed(
    join_site: Callable[..., SiteFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    site = join_site()
    own = '# Our own words.\n[node_config]\ndevice-note = "cuda"\n'
    head, _, _ = site.settings_file.read_text().partition("[node_config]")
    site.settings_file.write_text(head + own)
    files = (site.node_key, site.node_key.with_suffix(".pub"), site.superexec_secret, site.policy_file)
    before = [path.read_bytes() for path in files]
    capsys.readouterr()
    join_site(device="cuda:1", num_processes=5)
    text = site.settings_file.read_text()
    assert text == head.replace('"cpu"', '"cuda:1"').replace("num_processes = 2", "num_processes = 5") + own
    assert [path.read_bytes() for path in files] == before
    shown = capsys.readouterr().out
    assert f"{site.settings_file}: device is cuda:1 now; it was cpu." in shown
    assert "num_processes is 5 now; it was 2." in shown


def test_joining_again_follows_the_servers_addresses(
    server: ServerFolder, join_site: Callable[..., SiteFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    site = join_site()
    renew_certificate(server, ["127.0.0.1", "localhost"])
    join_site()
    assert site.settings()["address"] == "localhost:19092", "the consortium still has it"
    join_site(address="127.0.0.1:19092")
    assert site.settings()["address"] == "127.0.0.1:19092"
    renew_certificate(server, ["fed.example.org", "localhost"])
    capsys.readouterr()
    join_site()
    assert site.settings()["address"] == "fed.example.org:19092"
    shown = capsys.readouterr().out
    assert (
        "address is fed.example.org:19092 now; it was 127.0.0.1:19092, which the consortium file has no more." in shown
    )


def test_settings_that_cannot_be_changed_line_by_line_stay(join_site: Callable[..., SiteFolder]) -> None:
    site = join_site()
    text = site.settings_file.read_text().replace('"cpu"', '"""cpu"""')
    site.settings_file.write_text(text)
    with pytest.raises(SetupError, match=r'Cannot change device in .*Write device = "cuda" there yourself'):
        join_site(device="cuda")
    assert site.settings_file.read_text() == text


def test_a_site_without_its_gpu_joins_with_a_warning_and_is_not_ready(
    server: ServerFolder,
    join_site: Callable[..., SiteFolder],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    site = join_site()
    words = ["--site", SITES[0], "--site-root", str(site.root), "--device", "cuda"]
    assert main(["site", "join", str(server.consortium_file), *words]) == 0
    said = f'{site.settings_file} says device = "cuda", and no GPU is here: set device = '
    assert said in capsys.readouterr().out
    assert main(["site", "check", str(site.root)]) == 2
    assert said in capsys.readouterr().err
    with pytest.raises(SetupError, match="says device"):
        start_site(site)


@pytest.mark.parametrize(
    ("device", "why"), [("cuda:7", "and there are fewer GPUs here"), ("gpu", "which is no device: write cuda")]
)
def test_other_devices_that_are_not_here_have_sentences_of_their_own(
    device: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert f'site.toml says device = "{device}", {why}' in devices.device_trouble(device, file=tmp_path / "site.toml")


def test_a_device_that_is_there_is_no_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([(0, "1\n", ""), (1, "", "Traceback\nImportError: no CUDA library\n")])
    monkeypatch.setattr(
        devices.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, *next(answers))
    )
    assert devices.device_trouble("cuda", file=tmp_path) == ""
    assert "torch does not start here (ImportError: no CUDA library)" in devices.device_trouble("cuda", file=tmp_path)

    def slow(command: list[str], **_: object) -> None:
        raise subprocess.TimeoutExpired(command, 1.0)

    monkeypatch.setattr(devices.subprocess, "run", slow)
    assert devices.device_trouble("cuda", file=tmp_path) == "", "nobody can tell"


def test_starting_a_site_imports_no_torch() -> None:
    code = "import sys, nnunet_fedharm.federation.deploy.site_node; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_site_root_that_cannot_be_written_is_named(
    server: ServerFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "root" / "fedharm").mkdir(parents=True)
    (tmp_path / "root" / "fedharm" / "consortium").write_text("a file in the way")
    words = ["--site", SITES[0], "--device", "cpu", "--site-root"]
    assert main(["site", "join", str(server.consortium_file), *words, str(tmp_path / "root")]) == 2
    error = capsys.readouterr().err
    assert f"Cannot write {tmp_path / 'root' / 'fedharm' / 'consortium'}: File exists." in error
    assert "Choose a folder that this user may write." in error
    if sys.platform == "linux":
        assert main(["site", "join", str(server.consortium_file), *words, "/proc/sys"]) == 2
        assert "Cannot write /proc/sys/fedharm" in capsys.readouterr().err


def test_joining_is_refused_with_a_reason(
    server: ServerFolder, join_site: Callable[..., SiteFolder], tmp_path: Path
) -> None:
    with pytest.raises(SetupError, match="not among the sites of Test study: hospital-north, hospital-south"):
        join_site("hospital-west")
    with pytest.raises(SetupError, match="not what the coordinator read out"):
        join_site(fingerprint="0000-1111")
    with pytest.raises(SetupError, match="not among the consortium's addresses"):
        join_site(address="evil.example:9092")
    with pytest.raises(SetupError, match="does not exist"):
        join(server.consortium_file, tmp_path / "nowhere", JoinOptions(site=SITES[0]))
    join_site(fingerprint=server.consortium().fingerprint.upper())
    with pytest.raises(SetupError, match=r"This site is hospital-north, not hospital-south"):
        join(server.consortium_file, tmp_path / SITES[0], JoinOptions(site=SITES[1]))
    other = init_server(tmp_path / "other", ServerOptions(name="Other", hosts=["localhost"], sites=SITES))
    with pytest.raises(SetupError, match="This site belongs to Test study"):
        join(other.consortium_file, tmp_path / SITES[0], JoinOptions(site=SITES[0]))


def test_a_supernode_opens_no_door_to_other_machines(join_site: Callable[..., SiteFolder]) -> None:
    site = join_site()
    command = supernode_command(site, {**site.settings(), "node_config": {"warm-minutes": 5.0}}, 9999)
    parsed = _parse_args_run_supernode().parse_args(command[1:])
    assert parsed.host == "127.0.0.1", "Flower's own door at the site"
    assert not parsed.insecure
    assert not parsed.runtime_dependency_install
    assert parsed.health_server_address is None
    assert parsed.trusted_entities == site.trusted_entities
    assert parsed.isolation == "process", "else any user of this machine could take the site's work"
    config = parse_config_args([parsed.node_config])
    assert config == {
        "site": SITES[0],
        "site-root": str(site.root),
        "device": "cpu",
        "num-processes": 2,
        "warm-minutes": 5.0,
    }


def test_a_site_that_is_not_ready_does_not_start(
    join_site: Callable[..., SiteFolder], make_raw_dataset: Callable[..., Path]
) -> None:
    site = join_site()
    make_raw_dataset(site.root / "nnUNet_raw", name="Dataset002_Two", n_labelled=2)
    assert "does not answer" in check_site(site)
    site.node_key.chmod(0o644)
    with pytest.raises(SetupError, match="Others can read"):
        start_site(site)
    site.node_key.chmod(0o600)
    site.policy_file.write_text("[patients]\nprivate_epsilon = 6.0\ndelta = 0.9\n")
    with pytest.raises(
        PrivacyError, match=r"Site .*, Dataset002_Two: delta 0\.9 is no guarantee for 2 .* Set patients"
    ):
        check_site(site)
    site.policy_file.write_text("[work]\nmax_round = 3\n")
    with pytest.raises(FederationError, match=r"unknown rule work\.max_round"):
        start_site(site)
    site.policy_file.unlink()
    with pytest.raises(FederationError, match="does not exist"):
        start_site(site)
    site.policy_file.write_text("")
    shutil.rmtree(site.root / "nnUNet_raw")
    with pytest.raises(SetupError, match="holds no dataset"):
        start_site(site)


def test_a_child_that_ends_is_named_with_its_last_words(tmp_path: Path) -> None:
    with children(tmp_path / "logs", {"PATH": "/usr/bin:/bin"}) as family:
        family.start("helper", ["sh", "-c", "echo begins; printf '\\033[92mINFO\\033[0m: no key\\n'; exit 3"]).wait()
        with pytest.raises(FederationError, match=r"helper ended with status 3; .*begins \| INFO: no key"):
            family.check()
        other = family.start("other", ["sleep", "60"])
    assert other.poll() is not None, "children end with their parent"
    assert (tmp_path / "logs" / "helper.log").stat().st_mode & 0o077 == 0
    assert last_words(tmp_path / "none") == "(no output)"


@pytest.mark.skipif(sys.platform != "linux", reason="a Linux system call")
def test_a_parent_that_is_killed_leaves_no_orphans(tmp_path: Path) -> None:
    code = (
        "import pathlib, time\n"
        "from nnunet_fedharm.federation.deploy.processes import children\n"
        f"with children(pathlib.Path({str(tmp_path)!r}), {{'PATH': '/usr/bin:/bin'}}) as family:\n"
        "    print(family.start('child', ['sleep', '300']).pid, flush=True)\n"
        "    time.sleep(300)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    end = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < end, "the child lives on"
        time.sleep(0.05)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_takes_the_units(server: ServerFolder, join_site: Callable[..., SiteFolder]) -> None:
    for unit in (write_server_units(server)[0], write_site_units(join_site())[0]):
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_policy_command_prints_and_checks(
    join_site: Callable[..., SiteFolder], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["site", "policy"]) == 0
    assert tomllib.loads(capsys.readouterr().out)["patients"]["min_patients"] == 5
    site = join_site()
    assert main(["site", "policy", str(site.root)]) == 0
    assert "min_patients               5" in capsys.readouterr().out
    site.policy_file.write_text("[work]\ntrainers = ['nnUNetTrainer']\n")
    assert main(["site", "policy", str(site.root)]) == 2
    assert "names 'nnUNetTrainer' in work.trainers" in capsys.readouterr().err
