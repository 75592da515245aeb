# SPDX-License-Identifier: Apache-2.0
"""The kdengine command: help, refusals, and index to pack to eval on real shards."""

import json
import shutil
from pathlib import Path

import pytest

from kdengine import cli
from kdengine.cli import COMMANDS, main
from kdengine.data.index import MAX_PIXELS


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


@pytest.mark.parametrize("command", [name for name in COMMANDS])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "--help" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["index"], "expected shards, got none"),
        (["index", "/nowhere/{0..3}.tar"], "/nowhere/0.tar"),
        (["index", "s3://bucket/0.tar"], "s3://bucket/0.tar"),
        (["report"], "expected folders of runs"),
        (["export", "/nowhere/run", "/nowhere/out"], "/nowhere/run"),
        (["eval", "/nowhere/model"], "expected at least one set"),
    ],
    ids=["no-shards", "missing-shard", "remote-shard", "no-runs", "no-run", "no-sets"],
)
def test_a_wrong_call_ends_with_its_mend_and_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, RuntimeError])
def test_an_error_of_training_is_printed_with_its_notes(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(words: tuple[str, ...]) -> int:
        error = kind("train: expected a length, got none")
        error.add_note("on rank 0 of 1; building")
        error.add_note("a second note")
        raise error

    monkeypatch.setattr(cli, "train", fails)
    assert main(["train"]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert printed[0] == "error: train: expected a length, got none"
    assert printed[1:] == ["on rank 0 of 1; building", "a second note"]


def test_eval_uses_the_index_of_the_limit_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}
    monkeypatch.setattr(
        "kdengine.evaluate.evaluate_command", lambda *_, **options: seen.update(options)
    )
    assert main(["eval", "/nowhere/model", "--max-pixels", "1000000"]) == 0
    assert seen["max_pixels"] == 1_000_000
    assert main(["eval", "/nowhere/model"]) == 0
    assert seen["max_pixels"] == MAX_PIXELS


def test_index_prints_what_was_kept_and_what_not(
    test_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("hostile-000.tar", "hostile-empty.tar", "cocomini-by-000.tar"):
        shutil.copy(test_data / name, tmp_path)
    shards = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    assert main(["index", *shards]) == 0
    printed = capsys.readouterr().out
    assert "126" in printed, "75 hostile and 51 good samples came"
    quarantined = list((tmp_path / ".kdengine").rglob("quarantine.jsonl"))
    assert quarantined and all(
        {"key", "shard", "cause"} <= json.loads(line).keys()
        for path in quarantined
        for line in path.read_text().splitlines()
    )


def test_pack_says_in_words_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.csv"
    table.write_text("filepath\ttitle\nnowhere.jpg\ta thing\n")
    assert main(["pack", str(table), str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().out
    assert "PackReport(" not in printed and "image-missing" in printed
