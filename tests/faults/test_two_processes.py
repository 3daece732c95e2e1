"""Tests of training with two processes of the gloo backend."""

from __future__ import annotations

from pathlib import Path

import pytest
from process_pair import run_pair


@pytest.mark.slow
def test_fit__with_two_processes_killed_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    for done in run_pair(tmp_path, "resume"):
        assert done.returncode == 0, done.stderr[-2000:]
        assert "same bytes: True" in done.stdout


@pytest.mark.slow
def test_fit__with_a_failure_in_one_of_two_processes_stops_both(tmp_path: Path) -> None:
    """Signal and NaN occur in the second process only, the full disk in the first."""
    for done in run_pair(tmp_path, "stop"):
        assert done.returncode == 0, done.stderr[-2000:]
        assert "StoppedAndSaved at step 6" in done.stdout
        assert "NumericalError at step 4" in done.stdout
        assert "StorageError" in done.stdout
