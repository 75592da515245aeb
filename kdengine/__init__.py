# SPDX-License-Identifier: Apache-2.0
"""kdengine distils large CLIP models into small ones.

The public names load on first use, so that ``import kdengine`` stays light: it imports neither
torch nor triton, deepspeed, DALI or open_clip.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
MAX_PIXELS = 89_478_485
"""Largest image by default; Pillow, too, suspects a decompression bomb from here on (268 MB)."""
LOCAL_DIR = "local-dir:"
"""Before the path of a folder with a model's weights, as open_clip has it."""
__all__ = ["MAX_PIXELS", "ClipLoss", "DistillClipLoss", "__version__", "load_model"]

if TYPE_CHECKING:
    from kdengine.losses import ClipLoss, DistillClipLoss
    from kdengine.models import load_model

_HOME = {
    "ClipLoss": "kdengine.losses",
    "DistillClipLoss": "kdengine.losses",
    "load_model": "kdengine.models",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kdengine' has no attribute {name!r}; it has {__all__}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
