"""Numbers with their nouns, for messages and reports."""


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """Return a number with its noun, such as ``1 scan`` and ``2 scans``.

    Args:
        number: Count.
        singular: Noun for 1, with a verb where the sentence has one after it (``patient is``).
        plural: Noun for other numbers; None adds an s.
    """
    return f"{number} {singular if number == 1 else plural or f'{singular}s'}"
