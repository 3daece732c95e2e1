"""The request and the result of ``samgraft release``, the same for both stages."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from samgraft.shared.config import read_stored_config
from samgraft.shared.errors import UsageError
from samgraft.shared.release.load_back import Checked
from samgraft.shared.store.files import is_address
from samgraft.shared.store.names import names_path, read_names_file

MIN_NAME = 8
"""Fewest characters of a name of a scan or a patient that is searched in a release."""


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
    force: bool = False
    """True to release a model that segments hardly anything or did not improve."""
    continuable: bool = False
    """True to add decoder, teacher and optimizer of stage 1, after a membership audit."""

    def refuse_warnings(self, warnings: Sequence[str]) -> None:
        """Refuse a model that failed in its training, unless the user insists.

        Raises:
            UsageError: If there is a warning and ``force`` is False.
        """
        if warnings and not self.force:
            raise UsageError(
                f"{' '.join(warnings)} --force releases it nevertheless, and its card then states this.",
                where=self.run.name,
                kept="the run; nothing was released",
            )

    @property
    def known_identifiers(self) -> list[str]:
        """Strings that must not occur, which are those of the user and the names of the scans of the run's store."""
        return [*self.identifiers, *_names_of_scans(self.run)]

    @property
    def with_licence(self) -> str:
        """Complete command with a licence."""
        run, out = shlex.quote(str(self.run)), shlex.quote(str(self.out))
        return f"make release RUN={run} OUT={out} LICENSE=cc-by-4.0"


def _names_of_scans(run: Path) -> set[str]:
    """Return names of patients and scans from the owner's tables beside the stores of a run."""
    file = run / "config.yaml"
    data = read_stored_config(file).get("data", {}) if file.is_file() else {}
    names = set()
    for path in (data.get("store"), *(data.get("labelled") or ())):
        # A store that was moved or is remote has no table here. The names are an extra check, not a condition.
        table = names_path(Path(str(path)))
        if path and not is_address(path) and table.is_file():
            for name in read_names_file(table).by_series.values():
                names |= {name.scan, name.patient}
    # A short name such as 001 occurs in any text, and would stop every release.
    return {name for name in names if len(name) >= MIN_NAME}


@dataclass(frozen=True, kw_only=True)
class Released:
    """Files that were released, and formats that were left out."""

    checked: list[Checked]
    left_out: list[str] = field(default_factory=list)
    """One line per format that does not apply, with the reason."""
