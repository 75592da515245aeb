# SPDX-License-Identifier: Apache-2.0
"""The teachers of a run that trains from a cache: no model, only what was stored."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kdengine.cache import codec
from kdengine.cache.store import Store, key
from kdengine.data import ViewSpec
from kdengine.models import Features, TowerSpec


class CachedTeachers:
    """Embeddings that a loader read from a cache; see ``kdengine.teachers.Teachers``.

    Args:
        store: the cache; the loader replays it.
        dtype: of the embeddings that are handed out.
        device: where the teachers' scales live.
    """

    def __init__(self, store: Store, dtype: torch.dtype, device: torch.device) -> None:
        self._store = store
        self._entries = store.manifest.teachers
        self.specs: Sequence[TowerSpec] = [entry.spec for entry in self._entries]
        self._storage, self._dtype = store.manifest.storage, dtype
        self._scales = [torch.tensor(entry.scale, device=device) for entry in self._entries]
        self._digest = store.manifest.digest

    def views(self) -> dict[str, ViewSpec]:
        """None: the teachers have seen the images."""
        return {}

    def tokenizers(self) -> dict[str, str]:
        """None: the teachers have read the captions."""
        return {}

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Features, ...]:
        """Each teacher's unit embeddings [b, E] of a batch, and its scale."""
        return tuple(
            Features(self._rows(batch, number, "image"), self._rows(batch, number, "text"), scale)
            for number, scale in enumerate(self._scales)
        )

    def _rows(self, batch: Mapping[str, Tensor], number: int, modality: str) -> Tensor:
        parts = codec.arrays(self._storage)
        stored = {part: batch[key(number, modality, part)] for part in parts}
        return codec.decode(stored, self._storage, self._dtype)

    def checksum(self) -> int:
        """A number that changes with any teacher's weights, with the crops and the storage."""
        return int(self._digest[:15], 16)

    def rows(self) -> dict[str, str]:
        """A line for each teacher in the run's header."""
        manifest = self._store.manifest
        told = f"from {self._store.path}, {manifest.views} views in {manifest.storage}"
        several = len(self._entries) > 1
        return {
            f"teacher {i}" if several else "teacher": f"{entry.spec.label}, {told}, of "
            f"{entry.precision} passes"
            for i, entry in enumerate(self._entries, start=1)
        }
