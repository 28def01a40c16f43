"""A reader at a desk: runs commands of the pages, with sizes for two cores behind those that would train for hours."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import nibabel
import numpy as np

from nnunet_fedharm.cli import main
from nnunet_fedharm.federation.daemon import stop_process
from tests.docs.pages import BLOCKS, commands_of

ONE_PROCESS = " -npp 0 -nps 0"
"""For predictors: each process of nnU-Net's pools imports torch, which takes longer than these cases."""
# The patch is planned: the data are as small as it may be.
NETWORK = " --base-features 4 --max-features 8 --batch-size 2"
MORE = {
    r"nnunet-fedharm plan ": f"{NETWORK} --harmonizer-epochs 1 --segmenter-epochs 1"
    " --iterations-per-epoch 2 --val-iterations-per-epoch 1 -np 1 --skip-check",
    r"nnunet-fedharm (federate|server run) (?!.*--start-from)": NETWORK,  # a start brings its own
    r"nnunet-fedharm (federate|server run) ": " --segmenter-rounds 1 --local-epochs 1"
    " --iterations-per-epoch 1 --val-iterations 1 --device cpu --num-processes 1",
    r"nnunet-fedharm federate .*--quorum 8": " --quorum 4",
    r"nnunet-fedharm (federate|server run) .*--segmenter-rounds 0": " --segmenter-rounds 0",
    r"nnunet-fedharm (federate|server run) .*--harmonizer-rounds [1-9]": " --harmonizer-rounds 1",
    r"nnunet-fedharm (federate|plan) .*--patients-per-step": " --patients-per-step 2",
    # The noisy fingerprint of a dozen patients plans any patch.
    r"nnunet-fedharm federate (?!.*--start-from).*--epsilon": " --patch-size 16x16x16",
    r"nnunet-fedharm sites report (?!--findings)": " --permutations 3 --bootstrap 20 -np 1",
    r"nnunet-fedharm sites report --root": " --min-patients 2",
    r"nnunet-fedharm audit canaries ": " --canaries 200 --steps 5",
    r"nnunet-fedharm audit canaries .*--phase harmonizer ": " --canaries 32",
    r"nnunet-fedharm audit inversion ": " --iterations 3 --targets 1 --restarts 1 --others 1 --patch-size 16 16",
    r"nnunet-fedharm audit statistics ": " --draws 50 -np 1",
    r"nnunet-fedharm audit membership ": " --patches 2",
    r"nnunet-fedharm quality ": " --permutations 3 --trees 10",
    r"nnunet-fedharm (predict|harmonize|adapt) ": " --device cpu",
    r"nnunet-fedharm predict ": ONE_PROCESS,
    r"nnUNetv2_predict ": f" -device cpu{ONE_PROCESS}",
    r"nnUNetv2_predict_from_modelfolder ": " -device cpu -npp 1 -nps 1",
    r"nnUNetv2_train ": " -device cpu",
    r"nnUNetv2_train .*-p nnUNetStudyPlans": " -tr nnUNetTrainer_1epoch",
    r"nnUNetv2_(extract_fingerprint|preprocess) ": " -np 1",
    r"nnunet-fedharm (study )?slurm ": " --dry-run",
    r"nnunet-fedharm sites check ": " -np 1",
    r"nnunet-fedharm site join ": " --device cpu",
    r"nnunet-fedharm study run ": " --device cpu",
    r"pip install ": " --dry-run --no-index --no-deps",
    r"flwr run .*segmenter-rounds": ' -c "segmenter-rounds=1 iterations-per-epoch=1 val-iterations=1 base-features=4'
    ' max-features=8 batch-size=2"',
    r"flwr run .*harmonizer-rounds": ' -c "harmonizer-rounds=1"',
    r"flwr run .*site-report": ' -c "report-simulations=3 report-bootstrap=20"',
}
"""Beginning of a command -> what is put behind it, of all that fit; the last option counts."""


def at_hand(command: str) -> str:
    """A command with what MORE puts behind it, before the words that it hands on."""
    own, *others = command.split(" -- ")
    return " -- ".join([own + "".join(more for start, more in MORE.items() if re.match(start, command)), *others])


def program(name: str) -> str:
    """Path of a program of this Python's environment, or of the system."""
    found = shutil.which(name, path=path_of_programs())
    assert found, name
    return found


def path_of_programs() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def run(command: str, *, status: int = 0) -> str:
    """Run a command to its end, ours in this process, nnU-Net's as programs; what it printed."""
    program_name, *words = (os.path.expandvars(word) for word in shlex.split(at_hand(command)))
    if program_name == "nnunet-fedharm":
        output = io.StringIO()
        with redirect_stdout(output), redirect_stderr(output):
            ended = main(words)
        assert ended == status, f"{command}\n{output.getvalue()[-3000:]}"
        return output.getvalue()
    return finish([program(program_name), *words], status=status)


def shell(text: str, *, status: int = 0) -> str:
    """Run lines as bash does, each with what MORE puts behind it; what they printed."""
    lines = [f"{line[: len(line) - len(line.lstrip())]}{at_hand(line.strip())}" for line in text.splitlines()]
    return finish([program("bash"), "-e", "-c", "\n".join(lines)], status=status)


def finish(words: list[str], *, status: int = 0, seconds: float = 800) -> str:
    """Run a program to its end; what it printed. It and what it started do not outlive a test that is given up."""
    environment = {**os.environ, "nnUNet_n_proc_DA": "0", "PATH": path_of_programs()}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output = process.communicate(timeout=seconds)[0]
    finally:
        if process.poll() is None:
            stop_process(process)
    assert process.returncode == status, f"{words}\n{output[-4000:]}"
    return output


def follow(
    commands: Iterable[str],
    *,
    after: Mapping[str, Callable[[], None]] | None = None,
    instead: Mapping[str, Callable[[str], object]] | None = None,
) -> str:
    """Run commands in the order of their page; what they printed.

    Args:
        after: beginning of a command -> what a reader does after it, as the page says.
        instead: beginning of a command -> who runs it in the place of `run`.
    """
    after, instead, used, text = after or {}, instead or {}, set(), ""
    for command in commands:
        runner = next((key for key in instead if command.startswith(key)), None)
        text += str(run(command) if runner is None else instead[runner](command) or "")
        for key in (key for key in after if command.startswith(key)):
            after[key]()
            used.add(key)
        used |= {runner} - {None}
    assert used == {*after, *instead}, "steps of the reader that came with no command"
    return text


class Terminal:
    """Where a command stays; its output goes to a file."""

    def __init__(self, words: list[str], output: Path, environment: Mapping[str, str] | None = None) -> None:
        self.output = output
        environment = {**os.environ, "nnUNet_n_proc_DA": "0", "PATH": path_of_programs(), **(environment or {})}
        with output.open("ab") as stream:
            self.process = subprocess.Popen(words, env=environment, stdout=stream, stderr=subprocess.STDOUT)

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_for(self, text: str, *, seconds: float = 300) -> None:
        """Wait until the command has written a text."""
        end = time.monotonic() + seconds
        while text not in self.text:
            ended = self.process.poll() is not None and text not in self.text
            assert not ended, f"it ended without {text!r}: {self.text[-3000:]}"
            assert time.monotonic() < end, f"it did not write {text!r}: {self.text[-3000:]}"
            time.sleep(0.2)

    def stop(self, number: int = signal.SIGTERM, *, seconds: float = 90) -> int:
        """Signal the command and wait for its end; its status."""
        self.process.send_signal(number)
        return self.process.wait(seconds)


@contextmanager
def terminals(folder: Path) -> Iterator[Callable[..., Terminal]]:
    """Opens terminals by a name and a shell line; all are closed at the end, with what was started in them."""
    opened: list[Terminal] = []

    def open_one(name: str, text: str, environment: Mapping[str, str] | None = None) -> Terminal:
        words = [program("bash"), "-c", text]
        opened.append(Terminal(words, folder / f"{name}.out", environment))
        return opened[-1]

    try:
        yield open_one
    finally:
        for terminal in reversed(opened):
            stop_process(terminal.process)


def block_with(page: str, text: str) -> str:
    """The one shell block of a page that has this text."""
    (found,) = [block.text for block in BLOCKS if block.page == page and block.language == "" and text in block.text]
    return found


def lines_with(page: str, text: str) -> list[str]:
    """Its commands."""
    (found,) = [
        commands_of(block) for block in BLOCKS if block.page == page and block.language == "" and text in block.text
    ]
    return found


def toml_blocks(page: str) -> list[str]:
    return [block.text for block in BLOCKS if block.page == page and block.language == "toml"]


def images(folder: Path) -> dict[str, np.ndarray]:
    """Voxels of the volumes in a folder, by file name."""
    return {path.name: np.asanyarray(nibabel.load(path).dataobj) for path in sorted(folder.glob("*.nii.gz"))}


TINY_STUDY = {
    "harmonizer_epochs": "1",
    "segmenter_epochs": "1",
    "iterations_per_epoch": "2",
    "val_iterations_per_epoch": "1",
    "base_features": "4",
    "max_features": "8",
    "num_processes": "1",
}
"""Key of a study's file -> value, for `edit_study`."""


def edit_study(folder: str | Path, values: Mapping[str, str]) -> None:
    """Set values in a study's file, as a reader with an editor does."""
    file = Path(folder, "study.toml")
    text = file.read_text()
    for key, value in values.items():
        text, found = re.subn(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.M)
        assert found == 1, f"{key} stands {found} times in {file}"
    file.write_text(text)


def same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    """Whether two folders hold the same volumes, voxel by voxel."""
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
