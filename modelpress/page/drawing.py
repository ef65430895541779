"""What a page's own code, the plotting library or the template refuses, as one error that names its place."""

from __future__ import annotations

import traceback
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jinja2 import TemplateError

from modelpress.errors import PageError

UNDRAWABLE = (
    ArithmeticError,  # a number that is no float any more
    AssertionError,
    AttributeError,
    ET.ParseError,  # the library's own SVG, read again
    ImportError,  # the library loads parts of itself when it first draws
    LookupError,
    MemoryError,
    OSError,  # the library looks for fonts
    RuntimeError,
    TemplateError,
    TypeError,
    ValueError,
)
"""What drawing raises on numbers and words that nobody foresaw. A record may hold any, and no list of matplotlib's own
errors exists; what stops a process (a signal, an exit) and errors of ours, which say more, are not among them."""
FIX = (
    "what the page is drawn from is not lost: a release in which this is mended draws it; please report it, it is a "
    "fault of modelpress"
)
_PACKAGE = str(Path(__file__).parents[1])


@contextmanager
def drawing(doing: str) -> Iterator[None]:
    """Draw in this block.

    Raises:
        PageError: something in it can't be drawn; the cause is the error itself.
    """
    try:
        yield
    except UNDRAWABLE as error:
        found = f"{type(error).__name__} in {_place(error)}: {str(error)[:300]}"
        raise PageError(doing, found=found, expected="numbers and words that can be drawn", fix=FIX) from error


def _place(error: BaseException) -> str:
    """The innermost line of modelpress that it went through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    ours = [frame for frame in frames if frame.filename.startswith(_PACKAGE)] or frames
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
