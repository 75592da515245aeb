# SPDX-License-Identifier: Apache-2.0
"""When an index is built, renewed, shared and refused."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdengine.data import build, store
from kdengine.data.index import MAX_PIXELS, DatasetIndex, ensure_index


def make_shard(path: Path, num_samples: int = 3, caption: str = "a cat", size: int = 8) -> str:
    image = io.BytesIO()
    Image.new("RGB", (size, size), 99).save(image, "JPEG")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number in range(num_samples):
            for name, data in (
                (f"{number:09d}.jpg", image.getvalue()),
                (f"{number:09d}.txt", f"{caption} {number}".encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def indexed(shards: str, **options) -> DatasetIndex:
    return ensure_index(shards, num_workers=0, **options)


def test_second_call_does_nothing(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "0.tar")
    first = indexed(shard, tokenizers=["simple:77"])
    again = indexed(shard, tokenizers=["simple:77"])
    assert (first.stats.num_shards, first.stats.num_captions) == (1, 3)
    assert (again.stats.num_shards, again.stats.num_captions) == (0, 0)
    assert again.shards == first.shards


def test_index_lies_beside_the_shards_and_spares_other_files(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "0.tar")
    (tmp_path / "0.idx").write_text("mine")
    index = indexed(shard)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".kdengine", "0.idx", "0.tar"]
    assert (tmp_path / "0.idx").read_text() == "mine"
    assert Path(index.shards[0].idx).is_relative_to(tmp_path / ".kdengine")


def test_index_folder_leaves_the_shards_alone(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "data" / "0.tar")
    index = indexed(shard, index_dir=str(tmp_path / "index"))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["0.tar"]
    assert Path(index.shards[0].idx).is_relative_to(tmp_path / "index")


def test_equal_names_from_two_folders_do_not_meet(tmp_path: Path) -> None:
    shards = [
        make_shard(tmp_path / side / "data" / "0.tar", caption=side) for side in ("left", "right")
    ]
    index = ensure_index(shards, index_dir=str(tmp_path / "index"), num_workers=0)
    assert index.texts(np.array([0, 3])) == [["left 0"], ["right 0"]]


@pytest.mark.parametrize("change", ["size", "time", "format", "dali", "file"])
def test_stale_index_is_rebuilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    shard = make_shard(tmp_path / "0.tar")
    index = indexed(shard)
    if change == "size":
        times = os.stat(shard)
        make_shard(tmp_path / "0.tar", num_samples=40)
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif change == "time":
        os.utime(shard, (0, 0))
    elif change == "format":
        monkeypatch.setattr(store, "FORMAT", store.FORMAT + 1)
    elif change == "dali":
        monkeypatch.setattr(store, "dali_version", lambda: "0")
    elif change == "file":
        Path(index.shards[0].idx).write_text("")
    again = indexed(shard)
    assert again.stats.num_shards == 1
    assert again.num_samples == {"size": 40}.get(change, 3)
    assert indexed(shard).stats.num_shards == 0


@pytest.mark.parametrize("index_dir", [None, "index"], ids=["beside", "apart"])
def test_indexes_by_other_limits_leave_each_other_alone(
    tmp_path: Path, index_dir: str | None
) -> None:
    shard = make_shard(tmp_path / "0.tar")
    place = {"index_dir": index_dir and str(tmp_path / index_dir)}
    index = indexed(shard, **place)
    strict = indexed(shard, max_pixels=63, **place)
    assert (index.num_samples, strict.num_samples) == (3, 0)
    assert index.texts(np.array([0])) == [["a cat 0"]], "still open on what it was opened on"
    for limit in (MAX_PIXELS, 63):
        assert indexed(shard, max_pixels=limit, **place).stats.num_shards == 0
    folders = sorted(path.parent.parent.name for path in tmp_path.rglob("meta.json"))
    assert folders == ["caption", "caption-max63"]


def test_only_the_changed_shard_is_validated(tmp_path: Path) -> None:
    for name in "012":
        make_shard(tmp_path / f"{name}.tar")
    indexed(str(tmp_path))
    make_shard(tmp_path / "1.tar", num_samples=5)
    index = indexed(str(tmp_path))
    assert (index.stats.num_shards, index.stats.num_samples) == (1, 5)
    assert [shard.num_samples for shard in index.shards] == [3, 5, 3]
    assert [shard.first for shard in index.shards] == [0, 3, 8]


def test_another_tokenizer_only_tokenises(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "0.tar")
    indexed(shard, tokenizers=["simple:77"])
    index = indexed(shard, tokenizers=["simple:77", "simple:16"])
    assert (index.stats.num_shards, index.stats.num_captions) == (0, 3)
    assert index.captions("simple:77").tokens(np.arange(3)).shape == (3, 77)
    assert index.captions("simple:16").tokens(np.arange(3)).shape == (3, 16)


def test_tokens_of_another_tokenizer_version_are_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = make_shard(tmp_path / "0.tar")
    indexed(shard, tokenizers=["simple:77"])
    monkeypatch.setattr(build, "tokenizer_version", lambda: "0")
    index = indexed(shard, tokenizers=["simple:77"])
    assert (index.stats.num_shards, index.stats.num_captions) == (0, 3)


def test_tokens_that_were_not_asked_for_are_refused_by_name(tmp_path: Path) -> None:
    index = indexed(make_shard(tmp_path / "0.tar"), tokenizers=["simple:77"])
    with pytest.raises(KeyError, match="simple:16.*only with.*simple:77"):
        index.captions("simple:16")


def test_tokenisation_in_chunks_keeps_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "TOKENS_CHUNK", 4)
    shard = make_shard(tmp_path / "0.tar", num_samples=11)
    chunked = indexed(shard, tokenizers=["simple:8"]).captions("simple:8").tokens(np.arange(11))
    monkeypatch.undo()
    whole = indexed(shard, tokenizers=["simple:8"], rebuild=True)
    np.testing.assert_array_equal(chunked, whole.captions("simple:8").tokens(np.arange(11)))


def test_big_shard_is_divided_among_the_workers(
    test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = str(test_data / "hostile-000.tar")
    whole = ensure_index(shard, index_dir=str(tmp_path / "whole"), num_workers=0)
    monkeypatch.setattr(build, "MIN_PART_BYTES", 200_000)
    divided = ensure_index(shard, index_dir=str(tmp_path / "divided"), num_workers=2)
    assert divided.summary() == whole.summary()
    assert Path(divided.shards[0].idx).read_text() == Path(whole.shards[0].idx).read_text()


def test_index_in_use_notices_that_it_was_rebuilt(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "0.tar")
    index = indexed(shard)
    indexed(shard, rebuild=True)
    with pytest.raises(RuntimeError, match="rebuilt or removed while it was in use"):
        index.key(0)


def test_pickled_index_is_small_and_whole(tmp_path: Path) -> None:
    index = indexed(make_shard(tmp_path / "0.tar", num_samples=500), tokenizers=["simple:77"])
    data = pickle.dumps((index, index.captions("simple:77")))
    assert len(data) < 3000
    copy, table = pickle.loads(data)
    assert copy.key(499) == "000000499"
    np.testing.assert_array_equal(
        table.tokens(np.arange(3)), index.captions("simple:77").tokens(np.arange(3))
    )


def test_missing_shard_is_reported_and_the_rest_is_used(tmp_path: Path) -> None:
    make_shard(tmp_path / "0.tar")
    index = indexed(str(tmp_path / "{0..1}.tar"))
    assert index.summary()["archives"] == {"archive-missing": 1}
    assert index.num_samples == 3
    make_shard(tmp_path / "1.tar")
    assert indexed(str(tmp_path / "{0..1}.tar")).num_samples == 6


def test_no_shard_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="^shards: none of the 4 shards exists"):
        indexed(str(tmp_path / "{0..3}.tar"))


def test_folder_that_cannot_be_written_is_refused_with_advice(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "0.tar")
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match="^index: .*not possible.*--index-dir"):
        indexed(shard, index_dir=str(tmp_path / "file" / "index"))


def test_ready_index_needs_no_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = make_shard(tmp_path / "0.tar")
    indexed(shard)

    def refuse(*_: object) -> None:
        raise AssertionError("an index that is up to date was locked")

    monkeypatch.setattr(store, "locked", refuse)
    assert indexed(shard).num_samples == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_pixels": 0}, "^index: .*--max-pixels.*at least 1; got 0"),
        ({"index_dir": ""}, "^index: .*--index-dir.*empty"),
        ({"num_workers": -1}, "^index: .*--workers.*at least 0; got -1"),
        ({"require": "sound"}, "^index: .*'caption' or 'label'"),
        ({"tokenizers": ["clip"]}, "'simple:CTX' or 'hf:NAME:CTX'"),
    ],
)
def test_bad_argument_is_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ensure_index(make_shard(tmp_path / "0.tar"), **{"num_workers": 0, **options})


def test_processes_that_index_at_once_share_the_work(tmp_path: Path) -> None:
    for name in "01":
        make_shard(tmp_path / f"{name}.tar", num_samples=200)
    code = (
        "import sys; from kdengine.data.index import ensure_index\n"
        "index = ensure_index(sys.argv[1], num_workers=0)\n"
        "print(index.num_samples, index.stats.num_shards)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [output[0] for output in outputs] == ["400"] * 3
    assert sum(int(output[1]) for output in outputs) == 2


def test_leftovers_of_a_killed_process_are_cleared(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "0.tar")
    leftover = tmp_path / ".kdengine" / "caption" / ".tmp-0123"
    leftover.mkdir(parents=True)
    indexed(shard)
    assert not leftover.exists()


def test_quarantine_survives_a_new_shard_beside_it(tmp_path: Path) -> None:
    (tmp_path / "0.tar").touch()
    make_shard(tmp_path / "1.tar")
    indexed(str(tmp_path / "{0..1}.tar"))
    (tmp_path / "2.tar").touch()
    index = indexed(str(tmp_path / "{1..2}.tar"))
    records = [json.loads(line) for line in Path(index.quarantine_paths[0]).open()]
    assert [Path(record["shard"]).name for record in records] == ["0.tar", "2.tar"]


def test_interrupted_indexing_is_taken_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    make_shard(tmp_path / "0.tar")
    (tmp_path / "1.tar").touch()
    monkeypatch.setattr(store, "write_root_quarantine", interrupt)
    with pytest.raises(KeyboardInterrupt):
        indexed(str(tmp_path))
    monkeypatch.undo()
    # the shards are done: only the list is missing
    monkeypatch.setattr(store, "write_shard", interrupt)
    index = indexed(str(tmp_path))
    assert index.num_samples == 3
    records = [json.loads(line) for line in Path(index.quarantine_paths[0]).open()]
    assert [record["cause"] for record in records] == ["archive-empty"]
