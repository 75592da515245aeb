# SPDX-License-Identifier: Apache-2.0
"""How large a model is; TinyCLIP's names and ratios leave the token embedding out."""

from torch import nn

TOKEN_EMBEDDINGS = ("token_embedding.weight", "word_embeddings.weight")
"""Their names' ends, in open_clip's text transformer and in those of Hugging Face."""


def parameter_counts(clip: nn.Module) -> dict[str, int]:
    """Parameters of the towers of an open_clip model."""
    sizes = {name: p.numel() for name, p in clip.named_parameters()}
    total = sum(sizes.values())
    tokens = sum(size for name, size in sizes.items() if name.endswith(TOKEN_EMBEDDINGS))
    image = sum(size for name, size in sizes.items() if name.startswith("visual."))
    return {
        "image": image,
        "text, without token embedding": total - image - tokens,
        "both, without token embedding": total - tokens,
        "token embedding": tokens,
        "all": total,
    }


def size_in_words(clip: nn.Module) -> str:
    """``115.4 M parameters, 90.1 M without token embedding``."""
    counts = parameter_counts(clip)
    both = [counts[name] / 1e6 for name in ("all", "both, without token embedding")]
    return f"{both[0]:.1f} M parameters, {both[1]:.1f} M without token embedding"
