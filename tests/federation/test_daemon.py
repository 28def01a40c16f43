"""How a daemon's owner is stopped, and what that must not do to the processes that it forks."""

from __future__ import annotations

import multiprocessing
import signal
import time

import pytest

from nnunet_fedharm.federation.daemon import terminate_as_interrupt


def test_sigterm_stops_the_owner_like_ctrl_c_and_the_former_handler_is_back_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), terminate_as_interrupt():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_forked_worker_dies_of_sigterm_as_if_there_were_no_handler() -> None:
    context = multiprocessing.get_context("fork")
    with terminate_as_interrupt():
        worker = context.Process(target=time.sleep, args=(60,))
        worker.start()
        worker.terminate()
        worker.join(20)
    assert worker.exitcode == -signal.SIGTERM
