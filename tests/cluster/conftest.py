# SPDX-License-Identifier: Apache-2.0
"""Caches of embeddings that no teacher has made."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from kdengine.cache import Manifest, codec, store
from kdengine.cache.manifest import TeacherEntry
from kdengine.models.spec import PreprocessSpec, TowerSpec


@pytest.fixture
def write_cache() -> Callable[..., Path]:
    """``write_cache(folder, {shard folder: [views, n, E]}, storage)``: a complete cache."""

    def write(folder: Path, shards: Mapping[str, torch.Tensor], storage: str = "fp32") -> Path:
        views, _, width = next(iter(shards.values())).shape
        spec = TowerSpec(
            name="none",
            model_cfg={},
            preprocess=PreprocessSpec(),
            tokenizer="simple:77",
            context_length=77,
            embed_dim=width,
        )
        entry = TeacherEntry(spec=spec, weights="0" * 64, scale=100.0, precision="fp32")
        folder.mkdir()
        Manifest((entry,), views, storage, 0, (0.9, 1.0), (0.75, 4 / 3)).write(folder)
        for name, values in shards.items():
            for view in range(views):
                rows = torch.nn.functional.normalize(values[view].float(), dim=1)
                arrays = {
                    store.array_name(0, part): stored
                    for part, stored in codec.encode(rows, storage).items()
                }
                facts = {"rows": len(rows), "error_sum": 0.0, "error_max": 0.0}
                store.write_unit(folder / "shards" / name, store.view_name(view), arrays, facts)
        return folder

    return write


@pytest.fixture
def write_array(tmp_path: Path) -> Callable[[torch.Tensor], Path]:
    """``write_array(rows)``: a .npy file of them."""

    def write(rows: torch.Tensor) -> Path:
        path = tmp_path / f"rows-{len(list(tmp_path.glob('rows-*')))}.npy"
        np.save(path, rows.numpy())
        return path

    return write
