# SPDX-License-Identifier: Apache-2.0
"""From a tokenizer id to token ids: `simple:77`, `hf:NAME:CTX`, with options after a `?`."""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

if TYPE_CHECKING:
    import torch

# open_clip's tokenizer remembers every word it ever saw; a long indexing run must not
CACHE_LIMIT = 500_000


class Tokenizer:
    """An open_clip tokenizer with a fixed context length.

    Attributes:
        context_length: tokens per text, start and end tokens included.
        vocab_size: ids are below it.
    """

    def __init__(self, inner: Any, context_length: int, vocab_size: int) -> None:
        self._inner = inner
        self.context_length = context_length
        self.vocab_size = vocab_size

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Token ids of the texts, int64 [n, context_length]."""
        cache = getattr(self._inner, "cache", None)
        if isinstance(cache, dict) and len(cache) > CACHE_LIMIT:
            special = {word: part for word, part in cache.items() if word == part}
            cache.clear()
            cache.update(special)
        return self._inner(texts, context_length=self.context_length)


def parse_tokenizer_id(tokenizer_id: str) -> tuple[str, str, int, dict[str, Any]]:
    """The parts of a tokenizer id: kind, name ("" for simple), context length, options.

    Raises:
        ValueError: the id is not of the form `simple:CTX` or `hf:NAME:CTX`, either with
            `?option=value&...` (the keys of open_clip's `tokenizer_kwargs`).
    """
    body, _, query = tokenizer_id.partition("?")
    kind, _, rest = body.partition(":")
    name, _, context = rest.rpartition(":")
    if kind not in ("simple", "hf") or not context.isdigit() or int(context) < 2:
        raise ValueError(_malformed(tokenizer_id))
    if (kind == "hf") != bool(name):
        raise ValueError(_malformed(tokenizer_id))
    words: dict[str, Any] = {"true": True, "false": False}
    options = {key: words.get(value, value) for key, value in parse_qsl(query)}
    return kind, name, int(context), options


def load_tokenizer(tokenizer_id: str) -> Tokenizer:
    """The tokenizer that an id names.

    `simple:CTX` is open_clip's byte-pair tokenizer, which needs no network; `hf:NAME:CTX` a Hugging
    Face tokenizer through open_clip, NAME a hub repository or a local folder.

    Returns:
        A callable: list of n texts -> int64 tensor [n, CTX].

    Raises:
        ValueError: the id is malformed.
        RuntimeError: the tokenizer's files or the package that reads them are not there.
    """
    kind, name, context_length, options = parse_tokenizer_id(tokenizer_id)
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    if kind == "simple":
        simple = SimpleTokenizer(context_length=context_length, **options)
        return Tokenizer(simple, context_length, simple.vocab_size)
    try:
        inner = HFTokenizer(name, context_length=context_length, **options)
    except ImportError as error:
        raise RuntimeError(
            f"tokenizer {tokenizer_id!r}: it needs the package transformers, which is missing "
            f"({error}). Run: pip install transformers"
        ) from error
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"tokenizer {tokenizer_id!r}: its files could not be read ({error}). With no "
            "network, give the path of a local folder in place of the name"
        ) from error
    return Tokenizer(inner, context_length, len(inner.tokenizer))


@functools.cache
def tokenizer_version() -> str:
    """Version of the tokenizer code; token ids made by another version are made anew."""
    return version("open_clip_torch")


def _malformed(tokenizer_id: str) -> str:
    return (
        f"tokenizer {tokenizer_id!r}: expected 'simple:CTX' or 'hf:NAME:CTX' with CTX >= 2; the "
        "default of CLIP models is 'simple:77'"
    )
