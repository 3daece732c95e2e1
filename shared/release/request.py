"""The request and the result of ``samgraft release``, the same for both stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from samgraft.shared.release.load_back import Checked


@dataclass(frozen=True, kw_only=True)
class ReleaseRequest:
    """One release that the user wants."""

    run: Path
    """A finished run of either stage."""
    out: Path
    """Folder to create. It must not exist."""
    licence: str | None = None
    """SPDX name such as ``cc-by-4.0``. There is no default."""
    formats: tuple[str, ...] | None = None
    """Names of formats. None selects all that apply."""
    statement: str | None = None
    """Sentence of the releaser on origin, consent and de-identification of the scans."""
    identifiers: tuple[str, ...] = ()
    """Further strings that must not occur in any file."""
    continuable: bool = False
    """True to add decoder, teacher and optimizer of stage 1, after a membership audit."""

    @property
    def with_licence(self) -> str:
        """Complete command with a licence."""
        return f"samgraft release {self.run.name} --out {self.out.name} --license cc-by-4.0"


@dataclass(frozen=True, kw_only=True)
class Released:
    """Files that were released, and formats that were left out."""

    checked: list[Checked]
    left_out: list[str] = field(default_factory=list)
    """One line per format that does not apply, with the reason."""
