"""A consortium whose hospitals cannot reach one another: own network namespace, own user, own folder; TLS and node keys.

Run as root on Linux from the repository's root, with an empty folder that other users can pass through:

    python benchmarks/separation.py --data DATASET_FOLDER --root /srv/separation

Each site and the server get a Unix user of their own, a folder with mode 700, and a network namespace that one cable (veth)
joins to the server's namespace. No site has a route to another one. Everything is done with the commands of
`docs/how-to/two-hospitals.md`; at the end stock `nnUNetv2_predict` runs at each site. Prints a Markdown table of what was
tried, and writes it with the numbers to ROOT/separation.json. Users and namespaces are removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PORT = 9092
PREFIX = "sep"
PROGRAM = str(Path(sys.executable).parent / "nnunet-fedharm")
SMALL = [
    *("--val-iterations", "2", "--base-features", "8", "--max-features", "32"),
    *("--batch-size", "8", "--patch-size", "40x40", "--initial-lr", "0.1", "--momentum", "0.9"),
    *("--deadline-s", "200", "--join-wait-s", "120"),
]


@dataclass
class Place:
    """One machine that is none: a user, a folder and a network of its own."""

    name: str
    folder: Path

    @property
    def user(self) -> str:
        return f"{PREFIX}-{self.name.lower()}"

    @property
    def space(self) -> str:
        return self.user

    def make(self) -> None:
        """User, folder, namespace with its own loopback."""
        root(f"useradd --system --no-create-home --home-dir {self.folder} --shell /bin/sh {self.user}")
        self.folder.mkdir(parents=True, exist_ok=True)
        root(f"ip netns add {self.space}")
        root(f"ip -n {self.space} link set lo up")

    def own(self) -> None:
        """Everything in the folder is this user's alone."""
        root(f"chown -R {self.user}:{self.user} {self.folder}")
        root(f"chmod -R go-rwx {self.folder}")

    def remove(self) -> None:
        for command in (f"ip netns del {self.space}", f"userdel {self.user}"):
            subprocess.run(command.split(), check=False, capture_output=True)

    def words(self, command: list[str], extra: Mapping[str, str] | None = None) -> list[str]:
        """A command as this user in this network; a Python below somebody's private home is shown to it."""
        entry = pwd.getpwnam(self.user)
        environment = {
            "HOME": str(self.folder),
            "USER": self.user,
            "LOGNAME": self.user,
            "PATH": os.pathsep.join([str(Path(PROGRAM).parent), "/usr/bin", "/bin"]),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "LC_ALL": "C.UTF-8",
            **(extra or {}),
        }
        drop = f"exec setpriv --reuid {entry.pw_uid} --regid {entry.pw_gid} --clear-groups --no-new-privs"
        settings = " ".join(f"{key}={shlex.quote(value)}" for key, value in environment.items())
        inner = f"{drop} env -i {settings} {shlex.join(command)}"
        return [
            "ip",
            "netns",
            "exec",
            self.space,
            "unshare",
            "-m",
            "sh",
            "-ec",
            show_interpreter() + f"cd {self.folder}; {inner}",
        ]

    def run(self, command: list[str], extra: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.words(command, extra), capture_output=True, text=True, check=False)


@dataclass
class Trial:
    """What was tried, and what came of it."""

    rows: list[tuple[str, str, bool]] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def note(self, what: str, outcome: str, good: bool) -> None:
        self.rows.append((what, outcome, good))
        print(f"{'ok ' if good else 'BAD'} {what}: {outcome}", flush=True)

    def must_fail(self, what: str, done: subprocess.CompletedProcess[str], reason: str) -> None:
        text = (done.stdout + done.stderr).strip()
        self.note(what, reason if reason in text else text[-200:], done.returncode != 0 and reason in text)


def root(command: str) -> None:
    subprocess.run(shlex.split(command), check=True, capture_output=True)


def show_interpreter() -> str:
    """Shell lines for a private mount namespace, if this Python lies below a folder that others may not pass."""
    base = Path(sys.executable).resolve().parent.parent
    shut = next((path for path in reversed(base.parents) if not path.stat().st_mode & 0o001), None)
    if shut is None:
        return ""
    return (
        f"mount --make-rprivate /; mkdir -p /run/sep-python; mount --bind {base} /run/sep-python; "
        f"mount -t tmpfs -o mode=755 none {shut}; mkdir -p {base}; mount --bind /run/sep-python {base}; "
    )


def cable(server: Place, site: Place, number: int) -> tuple[str, str]:
    """Join a site to the server and to nobody else; addresses of the server's end and of the site's."""
    ends = f"sv{number}", f"si{number}"
    addresses = f"10.77.{number}.1", f"10.77.{number}.2"
    root(f"ip link add {ends[0]} netns {server.space} type veth peer name {ends[1]} netns {site.space}")
    for place, end, address in zip((server, site), ends, addresses, strict=True):
        root(f"ip -n {place.space} addr add {address}/30 dev {end}")
        root(f"ip -n {place.space} link set {end} up")
    return addresses


def give_data(data: Path, base: Path, places: dict[str, Place]) -> None:
    """Each site's own share of the data set, copied; cases for the prediction are held out before."""
    from nnunet_fedharm.sites.split import SplitOptions, split_dataset

    split_dataset(data, base / "split", SplitOptions(held_out_fraction=0.2, link=False))
    for name, place in places.items():
        for part in (base / "split" / "sites" / name).iterdir():
            shutil.move(part, place.folder / part.name)
    shutil.rmtree(base / "split")


def set_up(trial: Trial, base: Path, server: Place, sites: dict[str, Place], addresses: dict[str, str]) -> None:
    """The steps of the guide: init, send, join, send back, register."""
    study = server.folder / "study"
    words = [PROGRAM, "server", "init", str(study), "--name", "Separation", "--port", str(PORT), "--sites", *sites]
    expect(server.run([*words, "--host", *addresses.values()]))
    for name, place in sites.items():
        shutil.copy(study / "consortium.toml", place.folder / "consortium.toml")  # by mail
        place.own()
        join = [PROGRAM, "site", "join", "consortium.toml", "--site", name, "--site-root", str(place.folder)]
        expect(place.run([*join, "--address", f"{addresses[name]}:{PORT}", "--device", "cpu", "--num-processes", "1"]))
        sent = server.folder / f"{name}.pub"
        shutil.copy(place.folder / "fedharm" / "consortium" / "node.pub", sent)  # by mail
        server.own()
        expect(server.run([PROGRAM, "server", "register", str(study), name, str(sent)]))
    trial.note("init, join and register at the server and each site", "done", True)


def try_to_cross(trial: Trial, server: Place, sites: dict[str, Place], ends: dict[str, tuple[str, str]]) -> None:
    """Whether a site can read or reach another one."""
    names = list(sites)
    for name, other in zip(names, [*names[1:], names[0]], strict=True):
        place, target = sites[name], sites[other]
        what = f"{name} reads the folder of {other}"
        trial.must_fail(what, place.run(["ls", str(target.folder)]), "Permission denied")
        key = target.folder / "fedharm" / "consortium" / "node.key"
        trial.must_fail(f"{name} reads the key of {other}", place.run(["cat", str(key)]), "Permission denied")
        what = f"{name} connects to {other} ({ends[other][1]})"
        trial.must_fail(what, place.run(connect(ends[other][1], PORT)), "unreachable")
    first = sites[names[0]]
    trial.must_fail("a site reads the server's folder", first.run(["ls", str(server.folder)]), "Permission denied")
    what = f"the server reads the folder of {names[0]}"
    trial.must_fail(what, server.run(["ls", str(first.folder)]), "Permission denied")


def connect(host: str, port: int) -> list[str]:
    return [sys.executable, "-c", f"import socket; socket.create_connection(('{host}', {port}), 5)"]


def try_the_doors(trial: Trial, server: Place, sites: dict[str, Place], ends: dict[str, tuple[str, str]]) -> None:
    """What of the server a site reaches, and what of a site the server reaches."""
    name, place = next(iter(sites.items()))
    authority = place.folder / "fedharm" / "consortium" / "ca.crt"
    for path, status in (("/v1/control/start-run", 404), ("/v1/runtime/acquire-task", 404), ("/v1/fleet/get-run", 401)):
        code = (
            "import ssl, urllib.request as u, urllib.error as e\n"
            f"r = u.Request('https://{ends[name][0]}:{PORT}{path}', b'', {{'content-type': 'application/protobuf', "
            "'accept': 'application/protobuf'})\n"
            f"c = ssl.create_default_context(cafile='{authority}')\n"
            "try: print(u.urlopen(r, context=c).status)\nexcept e.HTTPError as error: print(error.code)"
        )
        found = place.run([sys.executable, "-c", code])
        trial.note(
            f"{name} asks the server for {path} without a key",
            found.stdout.strip() or found.stderr[-200:],
            found.stdout.strip() == str(status),
        )
    for name, place in sites.items():
        doors = doors_of(place)
        outside = [door for door in doors if not door.startswith("127.")]
        trial.note(f"ports that {name} opens to others", ", ".join(outside) or "none", not outside and bool(doors))


def doors_of(place: Place) -> list[str]:
    """Addresses on which anybody listens in a network, as soon as there is one."""
    command = ["ip", "netns", "exec", place.space, "ss", "-Hltn"]
    for _ in range(120):
        listing = subprocess.run(command, capture_output=True, text=True, check=True)
        if listing.stdout.strip():
            break
        time.sleep(0.5)
    return [line.split()[3] for line in listing.stdout.splitlines()]


def start(place: Place, command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as stream:
        return subprocess.Popen(place.words(command), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)


def wait_for(log: Path, text: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while text not in log.read_text():
        if time.monotonic() > end:
            raise SystemExit(f"{log} did not say {text!r}: {log.read_text()}")
        time.sleep(0.5)


def train(
    trial: Trial,
    base: Path,
    server: Place,
    sites: dict[str, Place],
    ends: dict[str, tuple[str, str]],
    options: list[str],
) -> None:
    """Server, sites, one run; signals end them."""
    study = server.folder / "study"
    processes = [start(server, [PROGRAM, "server", "start", str(study)], base / "server.out")]
    try:
        wait_for(base / "server.out", "sites may connect", 90)
        for name, place in sites.items():
            processes.append(start(place, [PROGRAM, "site", "start", str(place.folder)], base / f"{name}.out"))
            wait_for(base / f"{name}.out", "calls", 60)
        try_the_doors(trial, server, sites, ends)
        began = time.monotonic()
        done = server.run([PROGRAM, "server", "run", str(study), "-d", "910", *SMALL, *options])
        print(done.stdout + done.stderr)
        trial.numbers["run_s"] = round(time.monotonic() - began)
        trial.note("the run over TLS with node keys", done.stdout.strip().splitlines()[-1][:120], done.returncode == 0)
    finally:
        for process in processes[::-1]:
            for pid in (process.pid, *children_of(process.pid)):
                subprocess.run(["kill", str(pid)], check=False, capture_output=True)
        statuses = [process.wait(90) for process in processes]
    trial.note("server and sites end on SIGTERM", ", ".join(map(str, statuses)), not any(statuses))


def children_of(pid: int) -> list[int]:
    """Direct children: `ip netns exec` and the shell replace themselves, so mostly none."""
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in listing.stdout.split()] if "nnunet-fedharm" not in command_of(pid) else []


def command_of(pid: int) -> str:
    return subprocess.run(["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout


def predict(trial: Trial, sites: dict[str, Place], cases: int, kind: str) -> None:
    """Stock prediction at each site with the folder that the federation left there, and its Dice."""
    for name, place in sites.items():
        raw = next((place.folder / "nnUNet_raw").glob("Dataset910_*"))
        chosen = sorted((raw / "labelsTs").iterdir())[:cases]
        for folder in ("few", "truth"):
            (place.folder / folder).mkdir()
        for label in chosen:
            shutil.copy(label, place.folder / "truth")
            for image in (raw / "imagesTs").glob(f"{label.name.removesuffix('.nii.gz')}_*"):
                shutil.copy(image, place.folder / "few")
        place.own()
        paths = {f"nnUNet_{part}": str(place.folder / f"nnUNet_{part}") for part in ("raw", "preprocessed", "results")}
        program = str(Path(PROGRAM).parent / "nnUNetv2_predict")
        model = f"-d 910 -tr nnUNetTrainerFedHarm{kind.capitalize()} -p nnUNetFedHarmPlans -c 2d -f all -device cpu -npp 1 -nps 1"
        done = place.run([program, "-i", "few", "-o", "predicted", *model.split(), "--disable_tta"], paths)
        found = len(list((place.folder / "predicted").glob("*.nii.gz")))
        good = done.returncode == 0 and found == len(chosen)
        trial.note(
            f"stock nnUNetv2_predict at {name}", f"{found} of {len(chosen)} cases" if good else done.stderr[-300:], good
        )
        if good:
            score = place.run([PROGRAM, "evaluate", "-p", "predicted", "-g", "truth", "-o", "metrics.json"])
            metrics = json.loads((place.folder / "metrics.json").read_text()) if score.returncode == 0 else {}
            trial.numbers.setdefault("evaluation", {})[name] = metrics.get("mean", metrics)


def expect(done: subprocess.CompletedProcess[str]) -> None:
    if done.returncode:
        raise SystemExit(f"{done.args[-1]}\n{done.stdout}{done.stderr}")


def main() -> int:
    """Everything; status 1 where anything was not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="Dataset910_HippocampusSites")
    parser.add_argument(
        "--root", type=Path, required=True, help="empty folder; others have to be able to pass through it"
    )
    parser.add_argument("--sites", nargs="+", help="default: all of the data set")
    parser.add_argument("--rounds", type=int, default=3, help="segmenter rounds (default: 3)")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of a round (default: 10)")
    parser.add_argument("--harmonizer", default="curve", help="kind (default: curve, with one round)")
    parser.add_argument("--cases", type=int, default=3, help="held-out cases that each site predicts (default: 3)")
    parser.add_argument("--no-run", action="store_true", help="stop before the training")
    arguments = parser.parse_args()
    if os.geteuid() or shutil.which("ip") is None:
        raise SystemExit("This benchmark makes users and network namespaces: run it as root, on Linux with iproute2.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that users and namespaces are removed then too
    base = arguments.root.resolve()
    base.mkdir(parents=True, exist_ok=True)
    base.chmod(0o711)
    names = arguments.sites or sorted(json.loads((arguments.data / "sites.json").read_text())["sites"])
    server, sites = Place("server", base / "server"), {name: Place(name, base / name) for name in names}
    trial = Trial()
    try:
        for place in (server, *sites.values()):
            place.make()
        ends = {name: cable(server, place, number) for number, (name, place) in enumerate(sites.items(), 1)}
        give_data(arguments.data, base, sites)
        for place in (server, *sites.values()):
            place.own()
        set_up(trial, base, server, sites, {name: pair[0] for name, pair in ends.items()})
        try_to_cross(trial, server, sites, ends)
        if arguments.no_run:
            return 0
        options = ["--segmenter-rounds", str(arguments.rounds), "--harmonizer", arguments.harmonizer]
        options += ["--iterations-per-epoch", str(arguments.steps)]
        options += ["--harmonizer-rounds", "1"] if arguments.harmonizer == "curve" else []
        train(trial, base, server, sites, ends, options)
        predict(trial, sites, arguments.cases, arguments.harmonizer)
    finally:
        for place in (server, *sites.values()):
            place.remove()
    print("\n| tried | outcome | as it should be |\n|---|---|---|")
    print("\n".join(f"| {what} | {outcome} | {'yes' if good else '**no**'} |" for what, outcome, good in trial.rows))
    print(json.dumps(trial.numbers, indent=1))
    (base / "separation.json").write_text(json.dumps({"rows": trial.rows, "numbers": trial.numbers}, indent=1))
    return 0 if all(good for _, _, good in trial.rows) else 1


if __name__ == "__main__":
    sys.exit(main())
