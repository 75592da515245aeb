# SPDX-License-Identifier: Apache-2.0
"""The kdengine command: help, refusals, and index to pack to eval on real shards."""

import json
import shutil
from pathlib import Path

import pytest

from kdengine.cli import COMMANDS, main


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
