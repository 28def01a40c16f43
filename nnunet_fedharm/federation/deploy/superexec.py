"""Flower's SuperExec of a site: asks the SuperNode for messages, and forks the process of each instead of starting it.

Run as `python -m nnunet_fedharm.federation.deploy.superexec` with the words of `flower-superexec`. Flower 1.41 starts
`flwr-clientapp` anew for every message, which imports Flower's database, web server and their like before it reads the message:
2 to 3 s of processor time in every round. Here Flower is imported once. A forked process has done nothing yet, lives for one
message with its own token, and runs Flower's own function, as the stock one does; so it is as separate from the next.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable

from flwr.supercore.cli.flower_superexec import flower_superexec
from flwr.supercore.constant import TaskType
from flwr.supercore.exit import exit_handler
from flwr.supercore.superexec import run_superexec as flower_loop
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supercore.tls import validate_and_resolve_root_certificates
from flwr.supernode.runtime.run_clientapp import run_clientapp


def answer_message(spec: ExecutionSpec) -> None:
    """What `flwr-clientapp` does after its imports, in the same words; ends with SystemExit."""
    run_clientapp(
        runtime_api_address=spec.runtime_api_address,
        token=spec.token,
        insecure=spec.insecure,
        certificates=validate_and_resolve_root_certificates(spec.root_certificates_path, spec.insecure),
        parent_pid=spec.parent_pid,
        runtime_dependency_install=spec.runtime_dependency_install,
    )


class ForkingExecutor(SubprocessExecutor):
    """Flower's executor of processes on this machine; those of a ClientApp are forked.

    Args:
        work: what a forked process does.
    """

    def __init__(self, work: Callable[[ExecutionSpec], None] = answer_message) -> None:
        self._work = work
        self._running: set[int] = set()

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Fork a process for a message; anything else is started as Flower does."""
        if spec.task_type != TaskType.CLIENT_APP:
            return super().launch(spec)
        sys.stdout.flush()
        sys.stderr.flush()
        number = os.fork()
        if number == 0:
            self._be_child(spec)
        self._running.add(number)
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Forget processes that have ended; Flower calls this before it asks for the next message."""
        self._running = {number for number in self._running if os.waitpid(number, os.WNOHANG)[0] == 0}

    def _be_child(self, spec: ExecutionSpec) -> None:
        status = 1
        try:
            # What the parent does on signals and at its end is not this process's business.
            exit_handler.registered_exit_handlers.clear()
            for received in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
                signal.signal(received, signal.SIG_DFL)
            self._work(spec)
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:  # noqa: BLE001 - the end of this process, whose caller is the parent's loop
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def main() -> None:
    """`flower-superexec` with the executor above."""
    flower_loop.get_executor = lambda *_, **__: ForkingExecutor()
    flower_superexec()


if __name__ == "__main__":
    main()
