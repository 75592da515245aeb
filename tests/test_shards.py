# SPDX-License-Identifier: Apache-2.0
"""Shard lists as people write them."""

from pathlib import Path

import pytest

from kdengine.data.shards import existing, expand, folders_told


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        pytest.param("/d/a.tar", ["/d/a.tar"], id="plain"),
        pytest.param("/d/{8..10}.tar", ["/d/8.tar", "/d/9.tar", "/d/10.tar"], id="range"),
        pytest.param("/d/{008..010}", ["/d/008", "/d/009", "/d/010"], id="padded"),
        pytest.param("/d/{2..0}", ["/d/2", "/d/1", "/d/0"], id="downwards"),
        pytest.param("/d/{a,b}{0..1}", ["/d/a0", "/d/a1", "/d/b0", "/d/b1"], id="product"),
        pytest.param("/d/{a,{b,c}d}", ["/d/a", "/d/bd", "/d/cd"], id="nested"),
        pytest.param("/d/{x}{", ["/d/{x}{"], id="braces-that-say-nothing"),
        pytest.param("/d/{a,b", ["/d/{a,b"], id="unclosed"),
        pytest.param("/a.tar::/b{0..1}.tar", ["/a.tar", "/b0.tar", "/b1.tar"], id="joined"),
        pytest.param(["/a.tar", "/b.tar::/c.tar"], ["/a.tar", "/b.tar", "/c.tar"], id="sequence"),
        pytest.param("/a.tar::/a.tar", ["/a.tar", "/a.tar"], id="twice"),
    ],
)
def test_specification_names_paths(spec: str | list[str], expected: list[str]) -> None:
    assert expand(spec) == expected


def test_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert expand("a.tar") == [str(tmp_path / "a.tar")]


def test_folder_stands_for_its_archives(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "a.txt"):
        (tmp_path / name).touch()
    assert expand(str(tmp_path)) == [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]


def test_what_is_taken_of_folders_is_told(tmp_path: Path) -> None:
    for name in ("b/2.tar", "b/1.tar", "b/x.txt", "b/more/3.tar", "one/1.tar", "classes/cat/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    spec = f"{tmp_path}/b/{{1..2}}.tar::{tmp_path}/{{b,one}}::{tmp_path}/b/*.tar::{tmp_path}/b"
    assert folders_told(spec) == [
        f"all 2 .tar files directly in {tmp_path}/b, 1.tar to 2.tar",
        f"the only .tar file directly in {tmp_path}/one, 1.tar",
    ]
    assert folders_told(f"{tmp_path}/classes") == []
    with pytest.raises(FileNotFoundError, match="holds no .tar file"):
        folders_told(f"{tmp_path}/b/more/..::/")


@pytest.mark.parametrize(
    ("spec", "message"),
    [("/nowhere/a.tar", "there is no file /nowhere/a.tar"), ("/nowhere/{0..3}", "none of the 4")],
)
def test_shards_that_are_all_absent_are_refused(spec: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"^shards: {message}"):
        existing(spec)
    (tmp_path / "a.tar").touch()
    assert existing(f"{spec}::{tmp_path}/a.tar")[-1] == f"{tmp_path}/a.tar"


def test_wildcard_is_sorted(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar"):
        (tmp_path / name).touch()
    assert expand(str(tmp_path / "*.tar")) == [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]


def test_existing_file_with_braces_is_itself(tmp_path: Path) -> None:
    (tmp_path / "{0..1}.tar").touch()
    assert expand(str(tmp_path / "{0..1}.tar")) == [str(tmp_path / "{0..1}.tar")]


@pytest.mark.parametrize(
    "spec",
    ["pipe:aws s3 cp s3://b/0.tar -", "s3://bucket/{0..9}.tar", "https://x/0.tar", "/a::gs://b/0"],
)
def test_remote_shards_are_refused_with_advice(spec: str) -> None:
    with pytest.raises(ValueError, match="^shards: .*must be local files.*Mount.*or copy"):
        expand(spec)


@pytest.mark.parametrize("spec", ["", "::", []])
def test_empty_list_is_refused(spec: str | list[str]) -> None:
    with pytest.raises(ValueError, match="^shards: expected at least one"):
        expand(spec)


def test_endless_range_is_refused() -> None:
    with pytest.raises(ValueError, match="^shards: at most 1000000"):
        expand("/d/{0..999999999999}.tar")


@pytest.mark.parametrize("name", ["", "*.tar"], ids=["folder", "wildcard"])
def test_nothing_found_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="^shards: .*no"):
        expand(f"{tmp_path}/{name}")
