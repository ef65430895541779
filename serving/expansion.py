"""What JSON takes in memory once it is read, bounded before it is.

Two bytes of a body can become an object of sixty: a body of the allowed size, made of `[],[],[]…`, would take some
thirty times its size. So what begins a value is counted first, and each is taken for the most that it can cost.
"""

from __future__ import annotations

from serving.refusals import TooLargeError

MAX_JSON_BYTES = 256 * 2**20
"""For a request's whole JSON. Numbers take 56 bytes by this reckoning: four and a half million of them fit."""

# Bytes, on a 64-bit CPython, for each character that begins a value: the object with what the garbage collector puts
# before it, the reference to it (8), and the parser's own node (16). tests/serving/test_expansion.py measures them.
_LIST, _DICT, _EMPTY_DICT = 120, 248, 120
_NEXT = 56
"""A comma: one more number or string in a list, or member of an object."""
_MEMBER = 224
"""A colon: its key, and its place in a table that is up to three times too large."""
_QUOTE = 24
"""Half of what a string takes beside its characters, more than a number does."""
MOST_PER_BYTE = 128
"""No body takes more than this times its size: smaller ones need no counting."""


def estimate(text: bytes) -> int:
    """Bytes that the objects of this JSON take at most, with the parser's own while it runs.

    Characters within strings count as if they stood outside: what is full of commas is taken for more than it is.
    """
    lists, dicts, empty = text.count(b"["), text.count(b"{"), text.count(b"{}")
    commas, colons, quotes = text.count(b","), text.count(b":"), text.count(b'"')
    # One character beyond the first plane makes four bytes of each other one in its string.
    wide = 1 if text.isascii() and b"\\u" not in text else 4
    characters = len(text) * wide if quotes else 0
    containers = lists * _LIST + (dicts - empty) * _DICT + empty * _EMPTY_DICT
    return len(text) + characters + containers + commas * _NEXT + colons * _MEMBER + quotes * _QUOTE


def check_expansion(text: bytes, most: int) -> None:
    """Refuse JSON that would take more than `most` bytes.

    Raises:
        TooLargeError: it would.
    """
    if len(text) * MOST_PER_BYTE <= most:
        return
    found = estimate(text)
    if found > most:
        expected = f"at most {most}; tensors as binary data take no more than their bytes"
        raise TooLargeError("body", found=f"JSON that takes up to {found} bytes once it is read", expected=expected)
