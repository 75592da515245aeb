# SPDX-License-Identifier: Apache-2.0
"""The table of the prompt distillation benchmark, and the words of its cells."""

from typing import Any

import pytest

from benchmarks import cells, quality_comkd
from kdengine import arguments
from kdengine.config import to_toml


def row(variant: str, seed: int, base: float, novel: float) -> dict[str, Any]:
    metrics = {"s/base-top1": base, "s/novel-top1": novel, "s/zeroshot-top1": 0.5}
    metrics["s/harmonic-mean"] = 2 * base * novel / (base + novel)
    own = {"set": "s", "variant": variant, "seed": seed, "time_s": 10.0, "gate": 0.25}
    return {**own, "metrics": metrics, "teacher": metrics}


def test_the_harmonic_mean_of_the_table_is_that_of_the_means() -> None:
    variant = "both (ComKD-CLIP)"
    _, lines = quality_comkd.table([row(variant, 0, 0.9, 0.1), row(variant, 1, 0.5, 0.7)])
    teacher, both = lines
    assert teacher[:2] == ["s", "teacher"] and both[:2] == ["s", variant]
    assert both[2].startswith("70.0") and both[3].startswith("40.0")
    assert both[4].startswith("50.9") and both[6] == "+0.25 to +0.25"


def test_settings_tell_variants_and_not_seeds(tmp_path: Any) -> None:
    words = ["--recipe", str(quality_comkd.RECIPE), "--classes.split", "x.json"]
    (tmp_path / "config.toml").write_text(to_toml(arguments.parse(words)))

    def settings(*more: str) -> str:
        return cells.digest([*words, *more], tmp_path)

    assert settings("--train.seed", "3") == settings("--train.seed", "4")
    assert settings("--method.comkd.align", "3.0") != settings("--method.comkd.align", "2.0")
    config = arguments.parse(words)
    assert config.method.comkd.kl == 1000.0 and config.method.comkd.kl_reduction == "mean"


def test_an_unknown_set_is_refused(tmp_path: Any) -> None:
    with pytest.raises(SystemExit):
        quality_comkd.parse(["--seeds", "x"])
    with pytest.raises(quality_comkd.common.Refusal, match="expected cifar10, scenes"):
        quality_comkd.main(["--sets", "nothing", "--out", str(tmp_path)])
