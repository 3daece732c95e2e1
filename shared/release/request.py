"""What a user asks of ``samgraft release``, whatever the stage of the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from samgraft.shared.release.load_back import Checked


@dataclass(frozen=True, kw_only=True)
class ReleaseRequest:
    """One release."""

    run: Path
    """A finished run of either stage."""
    out: Path
    """Folder to create; must not exist."""
    licence: str | None = None
    """SPDX name such as ``cc-by-4.0``; asked for, never guessed."""
    formats: tuple[str, ...] | None = None
    """Names of formats; None takes all that apply."""
    statement: str | None = None
    """Words of the releaser on the data: origin, consent, de-identification."""
    identifiers: tuple[str, ...] = ()
    """Further strings that must occur in no byte."""
    continuable: bool = False
    """Stage 1: add what continues the self-supervised training, after an audit of what it gives away."""

    @property
    def with_licence(self) -> str:
        """The command with a licence, ready to paste."""
        return f"samgraft release {self.run.name} --out {self.out.name} --license cc-by-4.0"


@dataclass(frozen=True, kw_only=True)
class Released:
    """What was released and what was not."""

    checked: list[Checked]
    left_out: list[str] = field(default_factory=list)
    """One line per format that does not apply, with the reason."""
