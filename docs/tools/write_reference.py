"""Reference pages of the documentation, written from the code.

python docs/tools/write_reference.py docs
"""

from __future__ import annotations

import sys
from pathlib import Path

from command_pages import command_pages
from formats_page import formats_page
from python_page import python_page
from samgraft.shared.errors import ExitCode
from settings_page import attribute_docs, settings_page

NOTE = "<!-- Written by `make docs` from the code; edit the texts there. -->"


def reference_pages() -> dict[str, str]:
    """Return the Markdown of every generated page by its path below ``docs``."""
    return {
        **{f"commands/{name}": text for name, text in command_pages().items()},
        "reference/settings.md": settings_page(NOTE),
        "reference/python.md": python_page(NOTE),
        "reference/formats.md": formats_page(NOTE),
        "reference/exit_codes.md": exit_codes_page(),
    }


def exit_codes_page() -> str:
    """Return the table of exit codes."""
    meaning = attribute_docs(ExitCode)
    rows = [f"| {code.value} | {code.name.lower().replace('_', ' ')} | {meaning[code.name]} |" for code in ExitCode]
    lines = [NOTE, "", "# Exit codes", "", "Scripts and schedulers may rely on them.", ""]
    return "\n".join([*lines, "| code | name | meaning |", "|---|---|---|", *rows, ""]).replace("``", "`")


def main(docs: Path) -> int:
    """Write the pages and remove those of commands that no longer exist."""
    pages = reference_pages()
    for folder in ("commands", "reference"):
        (docs / folder).mkdir(parents=True, exist_ok=True)
        for stale in set((docs / folder).glob("*.md")) - {docs / name for name in pages}:
            stale.unlink()
    for name, text in pages.items():
        (docs / name).write_text(text, encoding="utf-8")
    sys.stdout.write(f"{len(pages)} pages in {docs}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
