# SPDX-License-Identifier: Apache-2.0
"""Teachers run once: a training from a cache is the training with live teachers, without them."""

import fcntl
import json
import os
import shutil
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdengine.cache import CachedTeachers, Store, build_cache
from kdengine.cache.store import _map
from kdengine.data import ViewSpec, build_loader, ensure_index
from kdengine.data.limits import MAPS
from kdengine.models import build_student, build_teacher, export_student
from kdengine.ranks import Ranks

CPU = torch.device("cpu")

# relative difference of a step's loss against a live teacher, for 20 steps
LIMITS = {"fp32": 1e-5, "bf16": 1e-3, "int8": 1e-2}

# runs 'kdengine cache' on each list of words in one process
SEVERAL = "import json, sys; from kdengine.precompute import command; " + (
    "print([command(words) for words in json.loads(sys.argv[1])])"
)
SIZES = ["--views", "2", "--batch-size", "20"]


def test_losses_are_those_of_the_live_teacher(
    caches: Any, words: Any, train_here: Any, records: Any, teacher: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "teacher"
    shutil.copytree(teacher, moved)
    options = {"method__name": "clip_kd", "train__steps": 20}
    live = {"distill__distill_model": f"local-dir:{moved}", "distill__cache": caches["fp32"]}
    several = {**options, "train__steps": 3, "train__accum_freq": 3, "train__batch_size": 5}
    told = train_here(
        [*words("live", **options, **live), "--distill.cache-live"],
        [*words("live-in-parts", **several, **live), "--distill.cache-live"],
    )
    # the others must do without the teacher's folder
    shutil.rmtree(moved)
    lines = [words(x, **options, distill__cache=caches[x]) for x in LIMITS]
    # a run without a teacher sees the same crops, to be compared
    alone = {**options, "method__name": "clip", "train__steps": 1}
    lines.append(words("alone", **alone, distill__cache=caches["fp32"]))
    lines.append(words("in-parts", **several, distill__cache=caches["fp32"]))
    told += train_here(*lines)
    assert [code for code, _ in told] == [0] * 7, told
    expected = records(tmp_path / "runs" / "live")
    assert len({r["loss"] for r in expected}) == 20
    whole = np.array([r["loss"] for r in expected])
    (first,) = records(tmp_path / "runs" / "alone")
    np.testing.assert_allclose(first["loss"], expected[0]["loss/task"], rtol=1e-6)
    in_parts, live_in_parts = (
        np.array([r["loss"] for r in records(tmp_path / "runs" / name)])
        for name in ("in-parts", "live-in-parts")
    )
    np.testing.assert_allclose(in_parts, live_in_parts, rtol=LIMITS["fp32"])
    for storage, limit in LIMITS.items():
        found = records(tmp_path / "runs" / storage)
        for term in ("loss", "loss/crd", "loss/fd", "loss/icl"):
            mine, theirs = (np.array([r[term] for r in x]) for x in (found, expected))
            assert (np.abs(mine - theirs) <= limit * whole).all(), (storage, term, mine - theirs)


def test_resumed_run_repeats_its_losses_bit_by_bit(
    caches: Any, words: Any, train_here: Any, records: Any, tmp_path: Path
) -> None:
    shared = {"method__name": "clip_kd", "distill__cache": caches["bf16"]}
    shared |= {"train__steps": 9, "run__save_every_n_steps": 4, "run__keep_last": 3}
    whole = words("run", **shared)
    (first,) = train_here(whole)
    before = records(tmp_path / "runs" / "run")
    again, other = train_here(
        [*whole, "--resume", "4"], [*words("run", **shared | {"train__seed": 1}), "--resume", "4"]
    )
    assert first[0] == again[0] == 0, (first, again)
    after = records(tmp_path / "runs" / "run")
    assert [r["step"] for r in after] == list(range(1, 10))
    for name in ("loss", "grad_norm"):
        assert [r[name] for r in after] == [r[name] for r in before]
    assert other[0] is None


def test_ranks_share_the_work_and_an_interrupted_cache_goes_on(
    caches: Any, command: Any, run: Any, tmp_path: Path
) -> None:
    one, two = caches["bf16"], tmp_path / "two"
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "kdengine.cli", "cache"]
    done = run([*ranks, *command(two, *SIZES)])
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted(path.relative_to(one) for path in one.rglob("*.npy"))
    # in each of two shards two views of windows and embeddings, and the captions
    assert len(files) == 2 * (2 * 2 + 1)
    for file in files:
        assert np.array_equal(np.load(one / file), np.load(two / file)), file
    # one view is gone, as if it had been interrupted
    for shard in sorted((two / "shards").iterdir()):
        (shard / "view-1").rename(shard / ".partial-view-1")
    kept = {path: path.stat().st_mtime_ns for path in two.glob("shards/*/[tv]*/*.npy")}
    lines = [command(two, *SIZES)] * 2
    done = run(["-c", SEVERAL, json.dumps(lines)])
    assert "96 embedded now" in done.stdout and "all there before" in done.stdout, done.stdout
    assert len(kept) == 6 and all(x.stat().st_mtime_ns == time for x, time in kept.items())
    assert all(np.array_equal(np.load(one / file), np.load(two / file)) for file in files)
    assert not list(two.rglob(".partial*"))


def test_batch_holds_the_crop_and_what_each_teacher_made_of_it(
    shards: str, teacher: Path, tiny: Path, tmp_path: Path
) -> None:
    index = ensure_index(shards, tokenizers=["simple:16", "simple:24"])
    # of another size, width and context length than the first
    models = [build_teacher(f"local-dir:{teacher}"), build_teacher(str(tiny), allow_random=True)]
    assert len({(m.spec.preprocess.size, m.spec.embed_dim, m.spec.tokenizer) for m in models}) == 2
    options = {"views": 2, "storage": "fp32", "seed": 0, "ranks": Ranks(0, 1, 0, CPU)}
    made = build_cache(index, models, ["a", "b"], tmp_path / "out", **options, batch_size=20)
    assert (made.num_samples, made.num_captions, made.num_made) == (96, 96, 3 * 96)
    store = Store(tmp_path / "out")
    store.check(index)
    store.attach(index)
    teachers = CachedTeachers(store, torch.float32, CPU)
    loader = build_loader(
        index,
        views={f"image_{k}": ViewSpec.like(m.spec.preprocess) for k, m in enumerate(models)},
        tokenizers={f"tokens_{k}": m.spec.tokenizer for k, m in enumerate(models)},
        batch_size=32,
        num_threads=1,
        shuffle_buffer=32,
        replay=store,
    )
    seen = set()
    for _ in range(6):
        batch = next(loader)
        stored = teachers(batch)
        for k, (model, found) in enumerate(zip(models, stored, strict=True)):
            live = model(batch[f"image_{k}"], batch[f"tokens_{k}"])
            for mine, theirs in zip(found[:2], live[:2], strict=True):
                unit = torch.nn.functional.normalize(theirs, dim=1)
                torch.testing.assert_close(mine, unit, rtol=0, atol=3e-6)
            assert float(found.scale) == float(live.scale)
        seen |= set(
            zip(batch["sample"].tolist(), map(tuple, batch["window"].tolist()), strict=True)
        )
    loader.close()
    # of every sample two crops were seen, and no third
    assert 96 < len(seen) <= 2 * 96
    counts = np.unique([number for number, _ in seen], return_counts=True)[1]
    assert counts.max() == 2


def test_cache_that_does_not_fit_is_refused_with_the_reason(
    caches: Any,
    command: Any,
    run: Any,
    words: Any,
    train_here: Any,
    teacher: Path,
    shards: str,
    tmp_path: Path,
) -> None:
    out, unfinished = caches["bf16"], tmp_path / "unfinished"
    other = shutil.copy(Path(shards).parent / "00000.tar", tmp_path / "other.tar")
    shutil.copytree(out, unfinished)
    shutil.rmtree(next((unfinished / "shards").iterdir()) / "text")
    trained, larger = tmp_path / "trained", tmp_path / "larger"
    for folder, seed, size in ((trained, 4, 48), (larger, 3, 64)):
        config = json.loads((teacher / "open_clip_config.json").read_text())["model_cfg"]
        config["vision_cfg"]["image_size"] = size
        (tmp_path / "config.json").write_text(json.dumps(config))
        student = build_student(str(tmp_path / "config.json"), seed=seed)
        export_student(student.tower.clip.state_dict(), student.spec, folder)
    openai = {"distill__distill_model": "ViT-B-32", "distill__distill_pretrained": "openai"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"data__train_data": other}, "lacks 1 shard of this run"),
        ({"distill__cache": unfinished}, "is not finished for 1 shard of this run"),
        ({"distill__distill_model": f"local-dir:{trained}"}, "its weights are not those of"),
        ({"distill__distill_model": f"local-dir:{larger}"}, "the size of teacher"),
        (openai, "the run names ViT-B-32 / openai"),
        ({"distill__cache": tmp_path}, "is not a cache"),
        ({"data__dataset_type": "synthetic", "data__train_num_samples": 64}, "synthetic data"),
    ]
    fits = {"method__name": "clip_kd", "distill__cache": out}
    told = train_here(*(words(f"r{i}", **fits | x) for i, (x, _) in enumerate(cases)))
    for (code, error), (_, expected) in zip(told, cases, strict=True):
        assert code is None and expected in error, (expected, error)
    captionless = tmp_path / "captionless.tar"
    with tarfile.open(other) as source, tarfile.open(captionless, "w") as target:
        for member in source:
            if member.name.endswith(".jpg"):
                target.addfile(member, source.extractfile(member))
    refused = [
        (command(tmp_path / "new", "--data.train-data", str(captionless)), "no good sample"),
        (command(out, "--views", "3"), "views is 2, not 3"),
        (command(tmp_path / "new", "--distill.cache", str(out)), "leave it away"),
        (command(teacher), "is not empty and not a cache"),
        (command(tmp_path / "new", "--views", "0"), "expected at least one view"),
        (command(Path("local-dir:x")), "give OUT first"),
        (command(tmp_path / "other.tar"), "expected a folder that can be made"),
    ]
    done = run(["-c", SEVERAL, json.dumps([line for line, _ in refused])])
    lines = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert f"{[2] * len(refused)}" in done.stdout and len(lines) == len(refused), done.stderr
    for line, (_, expected) in zip(lines, refused, strict=True):
        assert expected in line


@pytest.fixture
def small(shards: str, tiny: Path, tmp_path: Path) -> tuple[Any, Any, Path]:
    """An index, a random teacher, and a cache of one view of it."""
    index = ensure_index(shards, index_dir=str(tmp_path / "index"), tokenizers=["simple:16"])
    model = build_teacher(str(tiny), allow_random=True)
    fill(index, model, tmp_path / "small")
    return index, model, tmp_path / "small"


def fill(index: Any, model: Any, out: Path) -> Any:
    options = {"views": 1, "storage": "bf16", "seed": 0, "ranks": Ranks(0, 1, 0, CPU)}
    return build_cache(index, [model], ["a"], out, **options, num_threads=1)


def test_unit_that_was_cut_short_is_not_complete(small: Any) -> None:
    index, model, out = small
    file = next(out.glob("shards/*/view-0/teacher-0.npy"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="is not finished for 1 shard"):
        Store(out).check(index)
    assert fill(index, model, out).num_made == 48
    assert file.read_bytes() == whole
    Store(out).check(index)


def test_file_with_other_bytes_than_were_written_is_refused(small: Any) -> None:
    index, _, out = small
    for file in out.glob("shards/*/text/teacher-0.npy"):
        data = bytearray(file.read_bytes())
        data[-2] ^= 1
        file.write_bytes(bytes(data))
    store = Store(out)
    store.check(index)
    store.attach(index)
    numbers = np.arange(4)
    with pytest.raises(RuntimeError, match=r"text/teacher-0.npy is damaged.*remove the folder"):
        store.windows(numbers, numbers * 0)


def test_cache_that_goes_away_meanwhile_is_named(small: Any) -> None:
    index, _, out = small
    store = Store(out)
    store.attach(index)
    views = {"image": ViewSpec(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}
    loader = build_loader(index, views=views, tokenizers={}, batch_size=8, replay=store)
    shutil.rmtree(out / "shards")
    with pytest.raises(RuntimeError, match="stored views cannot be read: cache: .*windows.npy"):
        next(loader)


def test_two_commands_do_not_fill_one_cache(small: Any) -> None:
    index, model, out = small
    with open(out / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another command fills"):
            fill(index, model, out)
    assert fill(index, model, out).num_made == 0


def test_same_shard_from_two_folders_is_stored_once(
    shards: str, tiny: Path, tmp_path: Path
) -> None:
    source = Path(shards).parent / "00000.tar"
    copies = [tmp_path / folder / source.name for folder in ("a", "b")]
    for copy in copies:
        copy.parent.mkdir()
        shutil.copy(source, copy)
    options = {"index_dir": str(tmp_path / "index"), "tokenizers": ["simple:16"]}
    index = ensure_index([str(copy) for copy in copies], **options)
    model = build_teacher(str(tiny), allow_random=True)
    made = fill(index, model, tmp_path / "out")
    assert (made.num_samples, made.num_made, index.num_samples) == (48, 96, 96)
    Store(tmp_path / "out").check(index)


def test_maps_of_a_cache_are_bounded_and_counted(small: Any, monkeypatch: Any) -> None:
    index, _, out = small
    store = Store(out)
    store.attach(index)
    monkeypatch.setattr("kdengine.cache.store._map", lru_cache(2)(_map.__wrapped__))
    before = len(os.listdir("/proc/self/fd"))
    numbers = np.arange(96)
    zeros = np.zeros(96, np.int64)
    whole = [store.windows(numbers, zeros), *store.rows(numbers, zeros, zeros).values()]
    assert len(os.listdir("/proc/self/fd")) - before <= 2 + 8
    assert len(whole) == 3 and all(len(part) == 96 for part in whole)
    assert _map.cache_info().maxsize == MAPS
