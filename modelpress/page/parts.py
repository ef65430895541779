"""What a page is made of: facts, sections, tables and figures. Plain strings; the template escapes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup


@dataclass(frozen=True)
class Table:
    """Rows of text under heads; the first column names the row."""

    caption: str
    """What it shows; its accessible name."""
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    """Each as long as `heads`."""
    numbers: frozenset[int] = frozenset()
    """Columns that are set to the right."""
    note: str = ""
    """Under it."""
    folded: bool = False
    """Whether it is shown closed."""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.heads) for row in self.rows), self.caption


def listed(
    caption: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    most: int,
    numbers: frozenset[int] = frozenset(),
    *,
    folded: bool = False,
) -> Table:
    """A table of the first `most` rows, which says how many more there are."""
    note = f"{len(rows) - most:,} more are left out." if len(rows) > most else ""
    return Table(caption, heads, rows[:most], numbers, note, folded)


@dataclass(frozen=True)
class Figure:
    """A plot, with its numbers as a table behind it."""

    key: str
    """Its id in the page: letters, digits, dashes."""
    caption: str
    """What it shows, and how to read it."""
    svg: Markup
    """Of `svg.plot`."""
    table: Table | None = None
    """The same numbers as text."""


@dataclass(frozen=True)
class Link:
    """A word that leads to an address, where that is one of the web."""

    word: str
    address: str

    @property
    def leads(self) -> bool:
        """Whether a click on it is safe; else it is shown as text."""
        return self.address.startswith(("https://", "http://"))


@dataclass(frozen=True)
class Item:
    """A term and what is said of it."""

    term: str
    said: str
    code: bool = False
    """Whether it is a digest, a path or the like."""
    link: Link | None = None


@dataclass(frozen=True)
class Fact:
    """A figure for the head of the page."""

    name: str
    value: str
    note: str = ""
    mood: str = ""
    """`good`, `bad`, `open`, or nothing."""


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading."""

    key: str
    title: str
    lead: Sequence[str] = ()
    """Paragraphs."""
    points: Sequence[str] = ()
    """A list under them."""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    items: Sequence[Item] = ()
    """Terms under them."""
    code: Sequence[tuple[str, str]] = ()
    """Titles and long texts of fixed width, closed."""


@dataclass(frozen=True)
class Page:
    """A whole page."""

    title: str
    kind: str
    """What kind of page it is, above the title."""
    about: Sequence[Item]
    """Under the title."""
    facts: Sequence[Fact]
    sections: Sequence[Section]
    footer: str
    warnings: Sequence[str] = field(default=())
    """What the reader must know before all else."""


def present(sections: Iterable[Section | None]) -> list[Section]:
    """The sections that there are."""
    return [section for section in sections if section is not None]
