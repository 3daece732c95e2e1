"""Shared by all tests: one thread, no colours, seeded generators, no way out to the network."""

import os

# Before torch is imported anywhere: several workers share the cores, and bitwise tests need a fixed thread count.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["SAMGRAFT_OFFLINE"] = "1"
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ["NO_COLOR"] = "1"
# Set by the Makefile, and would change the commands that messages name.
os.environ.pop("SAMGRAFT_FRONT_END", None)

import pytest


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Tests own their generators; this only keeps an accidental global draw from flickering."""
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
