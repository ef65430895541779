"""Text to token ids, by a fast tokenizer that is a file of the pack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from modelpress.errors import CorruptionError, InputError, SetupError, WorkloadError
from modelpress.process.spec import TextInput

MAX_TOKENIZER_BYTES: Final = 2**27
MAX_TEXT_BYTES: Final = 2**17
"""Of one text: some twenty thousand words, which took an eighth of a second, and the worst text a quarter."""
MAX_TEXTS_BYTES: Final = 2**21
"""Of all texts of a call: four seconds of one core at the worst."""
MAX_TOKENS: Final = 2**24
"""Of a padded batch."""


class TextReader:
    """Makes token ids of texts. Safe to call from threads.

    Args:
        spec: what the description says.
        tokenizer: the tokenizer's file.

    Raises:
        CorruptionError: it is none that the installed package `tokenizers` reads.
        WorkloadError: texts may not even be as long as what it adds to each.
        SetupError: the package is missing.
    """

    def __init__(self, spec: TextInput, tokenizer: bytes) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise SetupError("reading texts", found="no tokenizers", fix="pip install tokenizers") from error
        doing, expected = f"reading {spec.tokenizer}", "a fast tokenizer that the installed package `tokenizers` knows"
        if len(tokenizer) > MAX_TOKENIZER_BYTES:
            raise CorruptionError(doing, found=f"{len(tokenizer)} bytes", expected=f"at most {MAX_TOKENIZER_BYTES}")
        try:
            made = tokenizers.Tokenizer.from_str(tokenizer.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise CorruptionError(doing, found=str(error), expected=expected) from error
        except Exception as error:
            if type(error) is not Exception:  # the package raises no type of its own
                raise
            raise CorruptionError(doing, found=str(error)[:200], expected=expected) from error
        special = made.num_special_tokens_to_add(is_pair=False)
        if spec.max_length < special:  # the package would cut nothing then
            raise WorkloadError(
                f"setting up {spec.tokenizer}",
                found=f"max_length {spec.max_length}",
                expected=f"{special} or more: the tokenizer adds so many tokens to each text",
            )
        made.enable_truncation(spec.max_length)
        made.enable_padding(pad_id=spec.pad_id, pad_token=spec.pad_token)
        self._spec, self._tokenizer = spec, made

    def read(self, texts: Sequence[bytes]) -> dict[str, np.ndarray]:
        """Ids, mask and types by the names of the graph's inputs, each (texts, longest) int64; at least one token long.

        Raises:
            InputError: a text is too long, or no UTF-8; or all of them are too long.
        """
        decoded, total = [], 0
        for number, text in enumerate(texts):
            doing = f"reading text {number}"
            if len(text) > MAX_TEXT_BYTES:
                raise InputError(doing, found=f"{len(text)} bytes", expected=f"at most {MAX_TEXT_BYTES}")
            total += len(text)
            if total > MAX_TEXTS_BYTES:
                raise InputError(doing, found=f"{total} bytes up to it", expected=f"at most {MAX_TEXTS_BYTES} in all")
            try:
                decoded.append(text.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise InputError(doing, found=f"byte {error.start} that is no UTF-8", expected="UTF-8") from error
        encodings = self._tokenizer.encode_batch(decoded)
        longest = max((len(encoding.ids) for encoding in encodings), default=0)
        if longest * len(encodings) > MAX_TOKENS:
            raise InputError(
                "reading texts", found=f"{longest * len(encodings)} tokens, padded", expected=f"at most {MAX_TOKENS}"
            )
        # A text without a token has no place in the graph: it becomes padding.
        shape = (len(encodings), max(longest, 1))
        arrays = {self._spec.ids: np.full(shape, self._spec.pad_id, np.int64)}
        if self._spec.mask is not None:
            arrays[self._spec.mask] = np.zeros(shape, np.int64)
        if self._spec.types is not None:
            arrays[self._spec.types] = np.zeros(shape, np.int64)
        if longest:
            arrays[self._spec.ids][:] = [encoding.ids for encoding in encodings]
            if self._spec.mask is not None:
                arrays[self._spec.mask][:] = [encoding.attention_mask for encoding in encodings]
            if self._spec.types is not None:
                arrays[self._spec.types][:] = [encoding.type_ids for encoding in encodings]
        return arrays
