# SPDX-License-Identifier: Apache-2.0
"""A cache filled and replayed on a GPU: its crops, its embeddings, an exact resume."""

import json
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

CUDA = torch.device("cuda", 0)
TOWER = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
# distance of unit rows: what is stored, and a GPU's products in other batches
LIMITS = {"fp32": 1e-3, "bf16": 4e-3, "int8": 2e-2}


@pytest.fixture(autouse=True)
def _packages() -> None:
    pytest.importorskip("nvidia.dali", reason="decoding needs DALI")
    pytest.importorskip("open_clip", reason="the teacher is one of its models")


@pytest.fixture
def index(write_shard, picture, encode, tmp_path) -> Any:
    from kdengine.data import ensure_index

    def samples(first: int) -> list[dict[str, bytes]]:
        return [
            {
                "jpg": encode(picture(n, (60 + n, 50)), "JPEG", quality=92),
                "txt": f"picture {n}".encode(),
            }
            for n in range(first, first + 24)
        ]

    shards = [write_shard(tmp_path / f"{i}.tar", samples(24 * i)) for i in range(2)]
    options = {"index_dir": str(tmp_path / "index"), "tokenizers": ["simple:16"]}
    return ensure_index(shards, num_workers=0, **options)


@pytest.fixture
def teacher(tmp_path) -> Any:
    from kdengine.models import build_teacher

    (tmp_path / "tower.json").write_text(json.dumps(TOWER))
    return build_teacher(str(tmp_path / "tower.json"), allow_random=True, device=CUDA)


@pytest.mark.parametrize("storage", LIMITS)
def test_replayed_batch_is_what_the_teacher_makes_of_it(index, teacher, tmp_path, storage) -> None:
    from kdengine.cache import CachedTeachers, Store, build_cache
    from kdengine.ranks import Ranks

    me = Ranks(0, 1, 0, CUDA)
    options = {"views": 2, "storage": storage, "seed": 0, "ranks": me, "batch_size": 10}
    made = build_cache(index, [teacher], ["a"], tmp_path / "out", **options)
    assert made is not None and (made.num_samples, made.num_captions) == (48, 48)
    store = Store(tmp_path / "out")
    store.check(index)
    store.attach(index)
    cached = CachedTeachers(store, torch.float32, CUDA)
    for batch in islice(loader(index, store), 4):
        (found,), live = cached(batch), teacher(batch["image"], batch["tokens"])
        assert found.image.device == found.scale.device == CUDA
        for mine, theirs in zip(found[:2], live[:2], strict=True):
            assert (mine - F.normalize(theirs, dim=1)).norm(dim=1).max() < LIMITS[storage]
        torch.testing.assert_close(found.scale, live.scale.reshape(()))


def test_resume_replays_the_same_views(index, teacher, tmp_path) -> None:
    from kdengine.cache import Store, build_cache
    from kdengine.ranks import Ranks

    options = {"views": 2, "storage": "bf16", "seed": 0, "ranks": Ranks(0, 1, 0, CUDA)}
    build_cache(index, [teacher], ["a"], tmp_path / "out", **options)
    store = Store(tmp_path / "out")
    store.attach(index)
    first = loader(index, store)
    for _ in range(2):
        next(first)
    state = first.state_dict()
    expected = [next(first) for _ in range(4)]
    again = loader(index, store)
    again.load_state_dict(state)
    for wanted, found in zip(expected, again, strict=False):
        for name in wanted:
            assert torch.equal(wanted[name], found[name]), name
    windows = np.concatenate([batch["window"].cpu().numpy() for batch in expected])
    assert (windows[:, 2:] > 0).all()


def loader(index: Any, store: Any) -> Any:
    from kdengine.data import ViewSpec, build_loader

    seen = store.manifest.teachers[0].spec.preprocess
    return build_loader(
        index,
        views={"image": ViewSpec(seen.size, seen.mean, seen.std)},
        tokenizers={"tokens": "simple:16"},
        batch_size=12,
        shuffle_buffer=16,
        num_threads=2,
        device_id=0,
        replay=store,
    )
