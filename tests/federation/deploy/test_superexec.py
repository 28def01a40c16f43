"""The site's helper: a process of its own for every message, forked from one that has imported Flower."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("the stock helper is used there", allow_module_level=True)

from flwr.supercore.constant import TASK_TYPE_TO_COMMAND, TaskType
from flwr.supercore.exit import add_exit_handler, exit_handler
from flwr.supercore.superexec import run_superexec as flower_loop
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResultStatus

from nnunet_fedharm.federation.deploy import site_node
from nnunet_fedharm.federation.deploy.superexec import ForkingExecutor, main


def spec(token: str = "secret", kind: TaskType = TaskType.CLIENT_APP) -> ExecutionSpec:
    return ExecutionSpec(
        task_type=kind,
        runtime_api_address="127.0.0.1:9",
        token=token,
        insecure=True,
        root_certificates_path=None,
        runtime_dependency_install=False,
        parent_pid=os.getpid(),
        suppress_output=False,
        task_id=1,
    )


def wait_until_forgotten(executor: ForkingExecutor) -> None:
    end = time.monotonic() + 30
    while executor._running:
        executor.reconcile()
        assert time.monotonic() < end
        time.sleep(0.01)


def test_every_message_has_a_process_of_its_own_that_inherits_no_duty(tmp_path: Path) -> None:
    def work(given: ExecutionSpec) -> None:
        default = all(signal.getsignal(one) == signal.SIG_DFL for one in (signal.SIGINT, signal.SIGTERM))
        found = f"{os.getpid()} {os.getppid()} {default} {len(exit_handler.registered_exit_handlers)}"
        (tmp_path / given.token).write_text(found)

    add_exit_handler(lambda: (tmp_path / "parent's").touch())
    former = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        executor = ForkingExecutor(work)
        for token in ("one", "two"):
            assert executor.launch(spec(token)).status == LaunchResultStatus.ACCEPTED
        wait_until_forgotten(executor)
    finally:
        signal.signal(signal.SIGTERM, former)
        exit_handler.registered_exit_handlers.pop()
    one, two = ((tmp_path / token).read_text().split() for token in ("one", "two"))
    assert len({one[0], two[0], str(os.getpid())}) == 3
    assert one[1:] == two[1:] == [str(os.getpid()), "True", "0"]
    assert not (tmp_path / "parent's").exists()


@pytest.mark.parametrize("ends", ["by itself", "as Flower ends", "by an error", "by a signal"])
def test_however_a_process_ends_the_helper_lives_on(ends: str, capfd: pytest.CaptureFixture[str]) -> None:
    def work(given: ExecutionSpec) -> None:
        if ends == "as Flower ends":
            sys.exit(1)
        if ends == "by an error":
            raise ValueError("out of order")
        if ends == "by a signal":
            os.kill(os.getpid(), signal.SIGKILL)

    executor = ForkingExecutor(work)
    executor.launch(spec())
    wait_until_forgotten(executor)
    shown = capfd.readouterr().err
    assert ("ValueError: out of order" in shown) == (ends == "by an error")
    assert "secret" not in shown


def test_other_work_is_started_as_flower_does(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda words, **_: started.append(words))
    executor = ForkingExecutor(lambda _: pytest.fail("forked"))
    assert executor.launch(spec(kind=TaskType.SERVER_APP)).status == LaunchResultStatus.ACCEPTED
    assert started[0][0] == TASK_TYPE_TO_COMMAND[TaskType.SERVER_APP]
    assert not executor._running


def test_flowers_loop_takes_this_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release of Flower that asks for its executor elsewhere must not go unnoticed."""
    monkeypatch.setattr(flower_loop, "get_executor", flower_loop.get_executor)
    monkeypatch.setattr(sys, "argv", ["flower-superexec", "--runtime-api-address", "127.0.0.1:9", "--insecure"])
    used: list[object] = []
    monkeypatch.setattr(flower_loop, "AutoExecPlugin", lambda **given: used.append(given["executor"]) or sys.exit(0))
    monkeypatch.setattr(flower_loop, "register_signal_handlers", lambda **_: None)
    monkeypatch.setattr(sys.modules["flwr.supercore.cli.flower_superexec"], "disable_process_dumping", lambda **_: None)
    with pytest.raises(SystemExit):
        main()
    assert isinstance(used[0], ForkingExecutor)


def test_a_site_uses_it() -> None:
    assert site_node.superexec() == [sys.executable, "-m", "nnunet_fedharm.federation.deploy.superexec"]
