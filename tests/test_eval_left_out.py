# SPDX-License-Identifier: Apache-2.0
"""What kdengine eval says about images that were not evaluated."""

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from kdengine import models
from kdengine.cli import main


def photo(number: int) -> bytes:
    out = io.BytesIO()
    Image.effect_noise((40, 40), 60 + number).convert("RGB").save(out, "JPEG")
    return out.getvalue()


def shard(path: Path, samples: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, data in samples.items():
            for name, content in ((f"{key}.jpg", data), (f"{key}.txt", key.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    tower, spec = models.build_student("ViT-Pico-32", seed=0)
    folder = tmp_path_factory.mktemp("student")
    models.export_student(tower.state_dict(), spec, folder / "export")
    return f"{folder}/export"


def told(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """What the command prints, without lines between cells."""
    assert main(["eval", *words]) == 0
    printed = capsys.readouterr().out.replace("\u2502", " ")
    return [" ".join(line.split()) for line in printed.splitlines()]


def test_quarantined_images_and_lost_shards_are_told(student: str, tmp_path: Path, capsys) -> None:
    folder = tmp_path / ("a-long-name-" * 9)
    folder.mkdir()
    shard(folder / "0.tar", {f"k{n}": photo(n) for n in range(5)} | {"bad": b"<html>"})
    shard(folder / "1.tar", {"worse": b"<html>"})
    lines = told(capsys, student, "--retrieval", f"pairs={folder}/{{0..2}}.tar", f"all={folder}")
    assert "pairs quarantined 2 of 7" in lines and "all quarantined 2 of 7" in lines
    assert "pairs: not all of 3 shards could be read whole: archive-missing 1" in lines
    listed = next(line for line in lines if line.startswith("pairs: causes are listed in "))
    assert "worse" in Path(listed.removeprefix("pairs: causes are listed in ")).read_text()
    assert f"all: all 2 .tar files directly in {folder}, 0.tar to 1.tar" in lines


def test_class_folders_without_a_good_image_are_named(student: str, tmp_path: Path, capsys) -> None:
    for part, names in {"train": "abc", "test": "abcd"}.items():
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
    for n, name in enumerate(["train/a", "train/b", "train/c", "train/a", "test/a"]):
        (tmp_path / name / f"{n}.jpg").write_bytes(photo(n))
    (tmp_path / "test" / "c" / "bad.jpg").write_bytes(b"<html>")
    (tmp_path / "names").write_text("a\nb\nc\nd\ne\n")
    (tmp_path / "templates").write_text("{}\n")
    prompts = f"{tmp_path}/names;{tmp_path}/templates"
    words = ["--zeroshot", f"z={tmp_path}/test;{prompts}"]
    lines = told(capsys, student, *words, "--probe", f"p={tmp_path}/train;{tmp_path}/test")
    assert "z quarantined 1 of 2" in lines and "p quarantined, TEST 1 of 2" in lines
    assert "p quarantined, TRAIN 0 of 4" in lines
    assert "z: no good image in 3 of 4 class folders: b, c, d" in lines
    assert "p, TEST: no good image in 3 of 4 class folders: b, c, d" in lines
    assert not any(line.startswith("p, TRAIN: ") for line in lines)
