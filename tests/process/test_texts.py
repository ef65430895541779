"""Texts as a served model reads them: padded, cut and masked; what is no text, or no tokenizer, is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from modelpress.errors import CorruptionError, InputError, WorkloadError
from modelpress.process import TextInput, text


def tokenizer(**changes: Any) -> bytes:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 7, "[UNK]": 1, "a": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    document = json.loads(made.to_str()) | changes
    return json.dumps(document).encode()


def tokens(texts: list[bytes], **changes: Any) -> dict[str, Any]:
    spec = TextInput.model_validate({"max_length": 4, "pad_id": 7} | changes)
    return {name: array.tolist() for name, array in text.TextReader(spec, tokenizer()).read(texts).items()}


def test_texts_are_padded_cut_and_masked() -> None:
    assert tokens([b"a", b"a b a a a a"]) == {
        "input_ids": [[2, 7, 7, 7], [2, 1, 2, 2]],
        "attention_mask": [[1, 0, 0, 0], [1, 1, 1, 1]],
    }
    found = tokens([b"a a"], ids="x", mask=None, types="t")
    assert found == {"x": [[2, 2]], "t": [[0, 0]]}


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ([b"a", b"\xff"], "byte 0 that is no UTF-8"),
        ([b"a\xed\xa0\x80"], "byte 1 that is no UTF-8"),  # a surrogate
        ([b"a " * 5_000_000], "10000000 bytes"),
        ([b"a" * 100_000] * 30, "bytes up to it"),
    ],
)
def test_what_is_no_text_is_refused(texts: list[bytes], said: str) -> None:
    with pytest.raises(InputError, match=said):
        tokens(texts)


def test_tokens_of_all_texts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_TOKENS", 11)
    with pytest.raises(InputError, match="12 tokens, padded"):
        tokens([b"a a a a", b"a", b"a"])


@given(st.lists(st.text(), min_size=1, max_size=4))
def test_any_text_has_tokens(texts: list[str]) -> None:
    encoded = [one.encode("utf-8", "surrogatepass") for one in texts]
    found = tokens(encoded) if not any("\ud800" <= c <= "\udfff" for one in texts for c in one) else None
    assert found is None or len(found["input_ids"]) == len(texts)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b'{"model": {"type": "Pickle"}}', b"[" * 100_000])
def test_a_file_that_is_no_tokenizer_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptionError, match=r"tokenizer\.json"):
        text.TextReader(TextInput(max_length=4), data)


def test_a_length_that_the_special_tokens_fill_is_refused() -> None:
    """The package cuts nothing where fewer tokens are allowed than it adds."""
    made = tokenizers.Tokenizer.from_str(tokenizer().decode())
    made.post_processor = tokenizers.processors.TemplateProcessing("[UNK] $A [UNK]", special_tokens=[("[UNK]", 1)])
    data = made.to_str().encode()
    reader = text.TextReader(TextInput(max_length=3), data)
    assert reader.read([b"a a a a"])["input_ids"].tolist() == [[1, 2, 1]]
    with pytest.raises(WorkloadError, match="2 or more"):
        text.TextReader(TextInput(max_length=1), data)
