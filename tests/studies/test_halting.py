"""Who hears a signal, and when."""

import signal
import threading

import pytest

from dsdistill.engine.observe import StopRequest
from dsdistill.studies.halting import Halted, Halting, Interruption


@pytest.fixture
def file(tmp_path):
    return tmp_path / "stop"


def test_scoring_is_given_up_at_once(file):
    with pytest.raises(Halted) as caught, Halting(file, patient=True):
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.signum == signal.SIGTERM


def test_a_synthesis_is_stopped_by_the_engine_and_a_second_signal_acts_at_once(file):
    with Halting(file) as halting, halting.synthesis(), StopRequest(active=True) as engine:
        signal.raise_signal(signal.SIGINT)
        halting.check(None)
        assert engine.signum == signal.SIGINT
        with pytest.raises(Halted):
            signal.raise_signal(signal.SIGINT)


def test_a_patient_synthesis_is_left_to_the_engine_however_many_signals_come(file):
    with Halting(file, patient=True) as halting:
        with halting.synthesis(), StopRequest(active=True) as engine:
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
                halting.check(None)
            assert engine.signum == signal.SIGTERM
        with pytest.raises(Halted):
            halting.settle()


def test_a_signal_before_the_engine_listens_is_passed_on(file):
    with Halting(file, patient=True) as halting, halting.synthesis():
        signal.raise_signal(signal.SIGTERM)
        with StopRequest(active=True) as engine:
            assert engine.signum is None
            halting.check(None)
            assert engine.signum == signal.SIGTERM


def test_the_file_asks_as_a_signal_does(file):
    with Halting(file) as halting, halting.synthesis(), StopRequest(active=True) as engine:
        halting.check(None)
        halting.settle()
        assert engine.signum is None
        file.touch()
        halting.check(None)
        assert engine.signum == signal.SIGTERM
        with pytest.raises(Halted):
            halting.settle()


def test_a_thread_is_stopped_by_the_file(file):
    file.touch()
    caught = []

    def work():
        try:
            with Halting(file) as halting, halting.synthesis():
                halting.check(None)
        except Halted as halted:
            caught.append(halted.signum)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert caught == [signal.SIGTERM]


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where the tests themselves run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_second_signal_to_a_study_acts_at_once(file):
    with Interruption(file) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signum == signal.SIGINT
        assert file.exists()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
