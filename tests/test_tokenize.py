# SPDX-License-Identifier: Apache-2.0
"""Tokenizer ids and what they name."""

import sys

import pytest
import torch

from kdengine.data import tokenize
from kdengine.data.tokenize import load_tokenizer, parse_tokenizer_id

TEXTS = ["a photo of a cat", "<|endoftext|> & caf\u00e9", "word " * 200]


@pytest.mark.parametrize(
    ("tokenizer_id", "parts"),
    [
        ("simple:77", ("simple", "", 77, {})),
        ("simple:77?clean=canonicalize", ("simple", "", 77, {"clean": "canonicalize"})),
        ("hf:timm/ViT-B-16-SigLIP:64", ("hf", "timm/ViT-B-16-SigLIP", 64, {})),
        ("hf:C:/models/x:32?strip_sep_token=true", ("hf", "C:/models/x", 32,
                                                    {"strip_sep_token": True})),
    ],
)  # fmt: skip
def test_id_has_parts(tokenizer_id: str, parts: tuple) -> None:
    assert parse_tokenizer_id(tokenizer_id) == parts


@pytest.mark.parametrize(
    "tokenizer_id",
    ["", "simple", "simple:", "simple:x", "simple:1", "simple:a:77", "hf:77", "bpe:77"],
)
def test_malformed_id_is_refused(tokenizer_id: str) -> None:
    with pytest.raises(ValueError, match="^tokenizer .*'simple:CTX' or 'hf:NAME:CTX'"):
        load_tokenizer(tokenizer_id)


@pytest.mark.parametrize("context_length", [77, 16])
def test_simple_tokenizer_is_that_of_open_clip(context_length: int) -> None:
    import open_clip

    expected = open_clip.get_tokenizer("ViT-B-32")(TEXTS, context_length=context_length)
    tokenizer = load_tokenizer(f"simple:{context_length}")
    assert torch.equal(tokenizer(TEXTS), expected)
    assert int(expected.max()) < tokenizer.vocab_size


def test_memory_of_words_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "CACHE_LIMIT", 3)
    tokenizer = load_tokenizer("simple:16")
    texts = [f"{first}{second}" for first in "abcd" for second in "xyz"]
    together = tokenizer(texts)
    one_by_one = torch.cat([tokenizer([text]) for text in texts])
    assert torch.equal(one_by_one, together)
    assert len(tokenizer._inner.cache) < 10


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RuntimeError, match="pip install transformers"):
        load_tokenizer("hf:some/model:64")
