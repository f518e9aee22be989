import pytest


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests hold models of their own, on the CPU; accelerate would train elsewhere where there is a GPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
