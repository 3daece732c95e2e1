"""Written tensors: whole or not there, readable by whom they should be, and what the disk refuses is said plainly."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from samgraft.shared.weights import tensor_files
from samgraft.shared.weights.tensor_files import save_pth, save_tensors

Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize("save", [save_tensors, save_pth])
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_written_files__may_be_read_by_whom_the_umask_lets(
    save: Callable[[Tensors, Path], None], umask: int, mode: int, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        save({"a": torch.ones(2)}, tmp_path / "w")
    finally:
        os.umask(before)
    assert [(p.name, p.stat().st_mode & 0o777) for p in tmp_path.iterdir()] == [("w", mode)]


@pytest.mark.parametrize(
    ("save", "error"),
    [
        (save_tensors, SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")),
        (save_pth, RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598")),
    ],
)
def test_full_disk__is_said_as_the_system_says_it_and_leaves_no_half_file(
    save: Callable[[Tensors, Path], None], error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Tensors, path: Path, **__: object) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(tensor_files, "save_file", full)
    monkeypatch.setattr(torch, "save", full)
    usage = shutil.disk_usage(tmp_path)._replace(free=3)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="No space left on device") as refusal:
        save({"a": torch.ones(2)}, tmp_path / "w")
    assert (refusal.value.errno, refusal.value.filename) == (errno.ENOSPC, "w")
    assert list(tmp_path.iterdir()) == []
