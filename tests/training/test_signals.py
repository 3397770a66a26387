import os
import signal

import pytest

from training import signals
from training.signals import Stopped, StopSignal


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_asked_for_after_the_step(signum):
    with StopSignal(1) as stop:
        assert stop.after_step() == 0
        os.kill(os.getpid(), signum)
        assert stop.after_step() == signum
    assert Stopped(signum, 7).status == 128 + signum
    assert f"{signum.name} after step 7" in str(Stopped(signum, 7))


def test_the_handlers_before_come_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignal(1):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize(("later", "status"), [(0.0, 0), (60.0, -signal.SIGTERM)])
def test_a_second_signal_ends_the_process_unless_it_is_the_first_again(monkeypatch, later, status):
    child = os.fork()
    if child == 0:
        now = 0.0
        signals.time.monotonic = lambda: now
        with StopSignal(1):
            os.kill(os.getpid(), signal.SIGINT)
            now = later
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
