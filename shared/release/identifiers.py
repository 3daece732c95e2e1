r"""Search for known identifiers in bytes.

An identifier is a string that names a person, a place or a machine: an original patient id, a source folder, the user,
the host. One Aho-Corasick pass finds all of them at once, so that the time does not depend on their number.

- Bytes of text and of unknown binary files are searched for every spelling that :func:`spellings` lists, in UTF-8,
  Latin-1, UTF-16 and UTF-32.
- Readable text is also searched after it was normalised (escapes resolved, accents and separators removed), in which
  ``M%C3%BCller_Anna``, ``Anna M&uuml;ller`` and ``MU\u0308LLER, ANNA`` are one string.
- Runs of base64 and of hexadecimal digits in text are decoded, and the result is searched in the same two ways for
  identifiers of at least ``MIN_NORMALISED`` letters.
- Numbers (weights, pixels) are searched only for identifiers that are too long to occur in them by chance.
"""

from __future__ import annotations

import base64
import html
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import permutations
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

MIN_WORD = 6
"""Shorter identifiers (``root`` has 4 characters) are searched as whole words, and in text only."""
MIN_NORMALISED = 8
"""Fewest letters of an identifier that is searched without separators. Shorter ones occur inside ordinary words."""
MIN_IN_NUMBERS = 8
"""Characters of the shortest identifier that is searched in numbers."""
KNOWN = "known identifier"
"""Kind of the identifiers that the user or the run gives."""
CHANCE = 1e-6
"""Accepted probability that one release is refused because its numbers read like an identifier."""
MAX_PERMUTED_WORDS = 3
_SEPARATORS = re.compile(r"[\W_]+")
# Shorter runs cannot hold an identifier of MIN_NORMALISED letters. Mail programs break long ones into lines.
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{10,}(?:\r?\n[A-Za-z0-9+/_-]+)*")
_HEX = re.compile(rb"(?:[0-9A-Fa-f]{2}[ :]?){8,}")
_URL_SAFE = bytes.maketrans(b"-_", b"+/")
_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})|\\x([0-9a-fA-F]{2})")
_WITHOUT_STROKE = str.maketrans({"ø": "o", "ł": "l", "đ": "d", "æ": "ae", "œ": "oe", "ı": "i"})
"""Letters that Unicode does not decompose into a letter and an accent."""
_TRANSLITERATION = str.maketrans({"ä": "ae", "ö": "oe", "ü": "ue", "å": "aa", "ø": "oe"})
"""Spellings of letters in systems without accents, such as ``MUELLER`` in DICOM files."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Identifier:
    """One string to search for."""

    kind: str
    """Description for a message, such as "host name". The string itself is never repeated."""
    text: str


class IdentifierSearch:
    """All identifiers of a release, prepared once.

    Args:
        identifiers: Strings to search for; empty ones are left out.
    """

    def __init__(self, identifiers: Iterable[Identifier]) -> None:
        known = [i for i in identifiers if i.text.strip(" /\\")]
        long = [i for i in known if len(i.text) >= MIN_WORD]
        self._words = [(i.kind, _word_pattern(i.text)) for i in known if len(i.text) < MIN_WORD]
        # Short names ("Li, Anna") and ids ("P-01") are compared word by word, in every order.
        self._short = {words: i.kind for i in known if i.kind == KNOWN for words in _short_word_orders(i.text)}
        self._exact = _Automaton({form: i.kind for i in long for form in encodings(i.text)})
        self._normalised = _Automaton({form.encode(): i.kind for i in known for form in normalised_forms(i.text)})
        ascii_texts = {i.text.lower(): i.kind for i in long if i.text.isascii() and len(i.text) >= MIN_IN_NUMBERS}
        self._in_numbers = _Automaton({text.encode(): kind for text, kind in ascii_texts.items()})
        # Printable runs, which make the search of numbers fast, do not contain these identifiers.
        self._not_ascii = _Automaton(
            {
                form: i.kind
                for i in long
                if not i.text.isascii()
                for form in encodings(i.text)
                if len(form) >= 2 * MIN_WORD
            }
        )

    def in_text(self, content: bytes) -> Iterator[tuple[int, str]]:
        """Yield offset and kind of every identifier in bytes of text or of an unknown binary format."""
        yield from self._exact.find(content.lower())

    def in_readable(self, text: bytes) -> Iterator[tuple[int, str]]:
        """Yield the kind of every identifier in readable text in any spelling, with the offset 0."""
        for kind, pattern in self._words:
            if pattern.search(text):
                yield 0, kind
        plain = _plain(text.decode("utf-8", errors="replace"))
        for _, kind in self._normalised.find(_SEPARATORS.sub("", plain).encode("utf-8", "replace")):
            yield 0, kind
        if self._short:
            words = _SEPARATORS.split(plain)
            for length in {len(order) for order in self._short}:
                windows = zip(*(words[start:] for start in range(length)), strict=False)
                yield from ((0, self._short[window]) for window in windows if window in self._short)

    def in_encoded(self, text: bytes) -> Iterator[tuple[int, str]]:
        """Yield the kind of every identifier in base64 or hexadecimal digits, with the offset 0."""
        decoded = b"\0".join(_decoded_runs(text))
        for _, kind, length in self._exact.find_with_length(decoded.lower()):
            if length >= MIN_NORMALISED:  # a shorter one may occur in a hash by chance
                yield 0, kind
        plain = _plain(decoded.decode("utf-8", "replace")) if self._normalised else ""
        yield from (
            (0, kind) for _, kind in self._normalised.find(_SEPARATORS.sub("", plain).encode("utf-8", "replace"))
        )

    def in_numbers(
        self, content: bytes, runs: Iterable[tuple[int, int, bytes]], *, num_bytes: int
    ) -> Iterator[tuple[int, str]]:
        """Yield offset and kind of every identifier in numbers that is too long to occur there by chance.

        Args:
            content: Bytes of a piece of the numbers.
            runs: Its :func:`long_runs` of at least ``MIN_IN_NUMBERS`` characters.
            num_bytes: Length of all numbers of the release.
        """
        shortest = self.shortest_in_numbers(num_bytes)
        for start, width, run in runs:
            for offset, kind, length in self._in_numbers.find_with_length(run.lower()):
                if length >= shortest:
                    yield start + width * offset, kind
        for offset, kind, length in self._not_ascii.find_with_length(content.lower()) if self._not_ascii else ():
            if length >= shortest:
                yield offset, kind

    def shortest_in_numbers(self, num_bytes: int) -> int:
        """Return the length from which no identifier is expected in so many random bytes.

        A random byte equals a given letter in either case with probability 1/128.
        """
        expected = max(1, num_bytes) * max(1, len(self._in_numbers)) / CHANCE
        return max(MIN_IN_NUMBERS, math.ceil(math.log(expected) / math.log(128)))


class _Automaton:
    """Aho-Corasick automaton that gives the kind of each match."""

    def __init__(self, kinds: dict[bytes, str]) -> None:
        # Imported here, because only a release searches.
        from ahocorasick_rs import BytesAhoCorasick, Implementation

        self._patterns = list(kinds)
        self._kinds = list(kinds.values())
        # The DFA is twice as fast as the default and takes a few MB per thousand patterns.
        size = sum(map(len, self._patterns))
        implementation = Implementation.DFA if size < 200_000 else Implementation.ContiguousNFA
        self._automaton = BytesAhoCorasick(self._patterns, implementation=implementation) if kinds else None

    def __len__(self) -> int:
        return len(self._patterns)

    def find(self, content: bytes) -> Iterator[tuple[int, str]]:
        """Yield offset and kind of every match."""
        for offset, kind, _ in self.find_with_length(content):
            yield offset, kind

    def find_with_length(self, content: bytes) -> Iterator[tuple[int, str, int]]:
        """Yield offset, kind and length of every match, overlapping ones too."""
        if self._automaton is None or not content:
            return
        for pattern, start, end in self._automaton.find_matches_as_indexes(content, overlapping=True):
            yield start, self._kinds[pattern], end - start


def spellings(text: str) -> set[str]:
    """Return the spellings of an identifier that differ in more than the case of ASCII letters."""
    forms = {unicodedata.normalize(form, text) for form in ("NFC", "NFD")}
    return {cased for form in forms for cased in (form, form.lower(), form.upper(), form.title())}


def encodings(text: str) -> set[bytes]:
    """Return the bytes of an identifier in every spelling and encoding, with ASCII letters in lower case."""
    found: set[bytes] = set()
    for spelling in spellings(text):
        for name in ("utf-8", "latin-1", "utf-16-le", "utf-16-be", "utf-32-le"):
            try:
                found.add(spelling.encode(name).lower())
            except UnicodeEncodeError:  # Latin-1 does not have every letter
                continue
    return found


def unescape(text: str) -> str:
    """Resolve the escapes of URLs, HTML, JSON and Python in text."""
    text = html.unescape(unquote(text))
    return _ESCAPE.sub(lambda match: chr(int(match.group(1) or match.group(2), 16)), text)


def _plain(text: str) -> str:
    """Return text with escapes resolved and without case and accents."""
    folded = unescape(text).casefold()
    # Most ids and almost all texts, which nothing below changes.
    if folded.isascii():
        return folded
    decomposed = unicodedata.normalize("NFKD", folded.translate(_WITHOUT_STROKE))
    # Format characters, such as soft hyphens and zero-width spaces, are invisible.
    kept = (letter for letter in decomposed if not unicodedata.combining(letter))
    return "".join(letter for letter in kept if letter.isascii() or unicodedata.category(letter) != "Cf")


def normalise(text: str) -> str:
    """Return text with escapes resolved and without case, accents and separators."""
    return _SEPARATORS.sub("", _plain(text))


def _word_orders(text: str) -> set[tuple[str, ...]]:
    """Return the words of an identifier without case and accents, in every order."""
    orders: set[tuple[str, ...]] = set()
    lower = unicodedata.normalize("NFC", text).casefold()
    for spelling in {lower, lower.translate(_TRANSLITERATION)}:
        words = [word for word in _SEPARATORS.split(_plain(spelling)) if word]
        orders |= set(permutations(words)) if len(words) <= MAX_PERMUTED_WORDS else {tuple(words)}
    return orders


def _short_word_orders(text: str) -> set[tuple[str, ...]]:
    """Return the word orders of an identifier that is too short for the search without separators."""
    orders = _word_orders(text)
    # A single character would be found in almost every text.
    return {words for words in orders if 2 <= len("".join(words)) < MIN_NORMALISED}


def normalised_forms(text: str) -> set[str]:
    """Return the normalised identifier, with its words in every order."""
    forms = {"".join(order) for order in _word_orders(text)}
    return {form for form in forms if len(form) >= MIN_NORMALISED}


def _decoded_runs(text: bytes) -> Iterator[bytes]:
    """Yield the decoded bytes of runs of base64 and hexadecimal digits, from each position at which they may begin."""
    for match in _BASE64.finditer(text):
        run = b"".join(match.group().split()).translate(_URL_SAFE)
        for start in range(4):
            # A rest of one character holds no byte.
            part = run[start:-1] if len(run[start:]) % 4 == 1 else run[start:]
            yield base64.b64decode(part + b"=" * (-len(part) % 4))
    for match in _HEX.finditer(text):
        digits = re.sub(rb"[ :]", b"", match.group())
        yield from (bytes.fromhex(digits[start : len(digits) - (len(digits) - start) % 2].decode()) for start in (0, 1))


def long_runs(content: bytes, min_length: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield start, bytes per character and characters of every long printable run, in ASCII and then in UTF-16.

    In random numbers almost every position is excluded by a few passes of NumPy; a regular expression alone reads 40 MB
    per second.

    Args:
        content: Bytes to search.
        min_length: Shortest run in characters, at least 7.
    """
    array = np.frombuffer(content, np.uint8)
    printable = (array - np.uint8(0x20)) < np.uint8(0x5F)
    yield from ((start, 1, array[start:end].tobytes()) for start, end in _runs(printable, min_length))
    yield from ((start, 2, run) for start, run in _utf16_runs(array, min_length))


def _runs(printable: npt.NDArray[np.bool_], min_length: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of every run of at least ``min_length`` true values."""
    # A run of 7 covers an aligned block of 4. In random numbers a block in 53 is printable, but only one in a thousand
    # of them is part of a long run, as its 4 neighbours on both sides show.
    length = len(printable) // 4 * 4
    first = 4 * np.flatnonzero(printable[:length].view(np.uint32) == 0x01010101)
    padded = np.concatenate([np.zeros(4, bool), printable, np.zeros(8, bool)])
    left, right = np.zeros(len(first), int), np.zeros(len(first), int)
    reaches_left, reaches_right = np.ones(len(first), bool), np.ones(len(first), bool)
    for step in range(4):
        reaches_left &= padded[first + 3 - step]
        reaches_right &= padded[first + 8 + step]
        left += reaches_left
        right += reaches_right
    end = 0
    for block in first[left + 4 + right >= min(min_length, 8)].tolist():
        if block < end:
            continue
        start, end = block, block + 4
        while start and printable[start - 1]:
            start -= 1
        while end < len(printable) and printable[end]:
            end += 1
        if end - start >= min_length:
            yield start, end


def _utf16_runs(array: Bytes, min_length: int) -> Iterator[tuple[int, bytes]]:
    """Yield start and characters of every printable run in which every second byte is zero."""
    words = array[: len(array) // 8 * 8].view(np.uint64)
    # 7 characters of UTF-16 fill 14 bytes and therefore an aligned word of 8 bytes, in either byte order.
    odd_zero = (words & np.uint64(0xFF00FF00FF00FF00)) == 0
    even_zero = (words & np.uint64(0x00FF00FF00FF00FF)) == 0
    candidates = np.flatnonzero((odd_zero | even_zero) & (words != 0))
    ends = [0, 0]
    for word in candidates.tolist():
        parity = 0 if odd_zero[word] else 1
        characters = array[8 * word + parity : 8 * word + 8 : 2]
        if not ((characters >= 0x20) & (characters <= 0x7E)).all() or 8 * word < ends[parity]:
            continue
        start = end = 8 * word + parity
        while start >= 2 and array[start - 1] == 0 and 0x20 <= array[start - 2] <= 0x7E:
            start -= 2
        while end < len(array) and 0x20 <= array[end] <= 0x7E and (end + 1 == len(array) or array[end + 1] == 0):
            end += 2
        ends[parity] = end
        run = array[start:end:2].tobytes()
        if len(run) >= min_length:
            yield start, run


def _word_pattern(text: str) -> re.Pattern[bytes]:
    return re.compile(rb"(?<![A-Za-z0-9_])" + re.escape(text.encode()) + rb"(?![A-Za-z0-9_])", re.IGNORECASE)
