# SPDX-License-Identifier: Apache-2.0
"""Progressive pruning by one command: stages, stopped in the second, given again."""

import json
from pathlib import Path

from kdengine.models import load_model
from kdengine.pruning import lacking

STAGE = """
[prune]
target = {target}
steps = 2
warmup = 1
mask_lr = 0.5

[train]
batch_size = 16
steps = {steps}
"""


def test_stages_are_runs_that_go_on(train_here, words, records, tmp_path) -> None:
    names = [str(tmp_path / f"{name}.toml") for name in ("half", "quarter")]
    for path, target, steps in zip(names, (0.5, 0.75), (4, 5), strict=True):
        Path(path).write_text(STAGE.format(target=target, steps=steps))
    (tmp_path / "all.toml").write_text(f"stages = {json.dumps(names)}\n")
    line = words("both")
    for option in ("--train.steps", "--train.batch-size"):
        at = line.index(option)
        del line[at : at + 2]
    line = ["--recipe", str(tmp_path / "all.toml"), *line]
    # the second stage cannot be read at first
    Path(names[1]).write_text(STAGE.format(target=0.4, steps=5))
    ((code, error),) = train_here(line)
    assert code is None and "lacks already" in error
    Path(names[1]).write_text(STAGE.format(target=0.75, steps=5))
    assert train_here(line, line) == [(0, ""), (0, "")]
    runs = tmp_path / "runs" / "both"
    for name, steps, target in (("half", 4, 0.5), ("quarter", 5, 0.75)):
        assert [r["step"] for r in records(runs / name)] == list(range(1, steps + 1))
        assert abs(lacking(load_model(runs / name / "export").spec) - target) < 0.01
        assert "nothing left to train" in (runs / name / "out.log").read_text()
