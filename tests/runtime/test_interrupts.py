"""Stop signals: at once, or after the step that is being made."""

from __future__ import annotations

import signal
import threading

import pytest

from limbeck.runtime.interrupts import GracefulStop


class TestGracefulStop:
    def test_at_once(self) -> None:
        stop, before = GracefulStop(), signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as caught, stop.installed():
            signal.raise_signal(signal.SIGTERM)
        assert caught.value.args == (signal.SIGTERM,)
        assert signal.getsignal(signal.SIGINT) is before

    def test_deferred_then_raised(self, capsys: pytest.CaptureFixture[str]) -> None:
        stop, finished = GracefulStop(), []
        with pytest.raises(KeyboardInterrupt), stop.installed():
            with stop.deferred() as requested, stop.deferred():
                assert not requested()
                signal.raise_signal(signal.SIGINT)
                assert requested()
                finished.append("the write")
            stop.raise_if_requested()
        assert finished == ["the write"]
        assert "stopping after this step" in capsys.readouterr().err

    def test_second_time_at_once(self) -> None:
        stop = GracefulStop()
        with pytest.raises(KeyboardInterrupt), stop.installed(), stop.deferred():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        GracefulStop().raise_if_requested()

    @pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
    def test_of_terminals_and_schedulers(self, number: signal.Signals) -> None:
        stop, before = GracefulStop(), signal.getsignal(number)
        with pytest.raises(KeyboardInterrupt) as caught, stop.installed():
            signal.raise_signal(number)
        assert caught.value.args == (number,) and signal.getsignal(number) is before

    def test_nohup(self) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with GracefulStop().installed():
                signal.raise_signal(signal.SIGHUP)
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_outside_the_main_thread(self) -> None:
        before, entered = signal.getsignal(signal.SIGINT), []

        def other() -> None:
            with GracefulStop().installed():
                entered.append(signal.getsignal(signal.SIGINT) is before)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert entered == [True]
