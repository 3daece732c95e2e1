"""Two gloo processes: killed and resumed they end with the same bytes; a failure in one ends both."""

from __future__ import annotations

from pathlib import Path

import pytest
from process_pair import run_pair


@pytest.mark.slow
def test_two_processes__killed_and_resumed_same_bytes(tmp_path: Path) -> None:
    for done in run_pair(tmp_path, "resume"):
        assert done.returncode == 0, done.stderr[-2000:]
        assert "same bytes: True" in done.stdout


@pytest.mark.slow
def test_two_processes__stop_together(tmp_path: Path) -> None:
    """Only the second process hears the signal; NaN only in the second process's loss."""
    for done in run_pair(tmp_path, "stop"):
        assert done.returncode == 0, done.stderr[-2000:]
        assert "StoppedAndSaved at step 6" in done.stdout
        assert "NumericalError at step 4" in done.stdout
        assert "StorageError" in done.stdout
