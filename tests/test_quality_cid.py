# SPDX-License-Identifier: Apache-2.0
"""The table of the CLIP-CID benchmark, and the words of its cells."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality_cid, quality_cid_table
from benchmarks.quality_cid_table import ALL, BALANCE, CLUSTER, INSTANCE, RANDOM, TASK
from kdengine import arguments
from kdengine.config import to_toml


def row(first: float, second: float) -> dict[str, Any]:
    metrics = {"s/image_to_text_R@1": first, "held-out/zeroshot-top1": second}
    own = {"images": 10, "passes": 2.0, "time_s": 9.0, "cpu_time_s": 8.0}
    return {**own, "metrics": metrics, "cost": {"steps": 5}}


def planned(out: Path, seed: int, *words: str) -> dict[str, quality_cid.Cell]:
    options = quality_cid.parse(["--out", str(out), "--seeds", f"{seed}-{seed}", *words])
    return {cell.variant: cell for cell in quality_cid.plan(options, out)}


def test_settings_tell_images_weights_and_clusters_but_no_places(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        line = ["--recipe", str(quality_cid.RECIPE)]
        (folder / "config.toml").write_text(to_toml(arguments.parse(line)))
    cells = planned(here, 0)
    settings = {name: cell.settings for name, cell in cells.items()}
    assert len(settings) == len(set(settings.values())) == 9
    # neither seed nor place
    found = planned(there, 7, "--data", BALANCE)
    assert {name: cell.settings for name, cell in found.items()}.items() < settings.items()
    for name, cell in planned(here, 0, "--data", ALL, "--k", "5").items():
        assert (cell.settings != settings[name]) == name.endswith(CLUSTER)
    config = arguments.parse(cells[f"{BALANCE}, {CLUSTER}"].words)
    own = config.method.clip_cid
    assert (own.task, own.instance, own.cluster, own.cluster_kl) == (1.0, 1.0, 1.0, 1.0)
    assert config.data.keep and config.data.keep != own.clusters
    config = arguments.parse(cells[f"{ALL}, {TASK}"].words)
    own = config.method.clip_cid
    assert (own.task, own.instance, own.cluster, own.cluster_kl) == (1.0, 0.0, 0.0, 0.0)
    assert config.data.keep is None and own.clusters == ""


def test_gains_are_by_seed_and_name_what_is_not_ahead() -> None:
    found = {
        (f"{ALL}, {TASK}", 0): row(0.1, 0.2),
        (f"{ALL}, {TASK}", 1): row(0.2, 0.2),
        (f"{ALL}, {INSTANCE}", 0): row(0.3, 0.3),
        (f"{ALL}, {INSTANCE}", 1): row(0.4, 0.06),
        (f"{RANDOM}, {TASK}", 0): row(0.1, 0.1),
    }
    _, _, line = quality_cid_table.gains(found, quality_cid_table.BY_LOSS)
    told = "+9.0 (+15.0, +3.0) | +20.0 (+20.0, +20.0) | -2.0 (+10.0, -14.0) | 1 of 2"
    assert f"all: + instance over InfoNCE | {told}" in line
    assert line.endswith("| held-out/top1 -14.0 |")
    _, _, line = quality_cid_table.gains(found, quality_cid_table.BY_DATA)
    # one seed of both
    assert "InfoNCE: random over all | -5.0 (-5.0) | +0.0 (+0.0) | -10.0 (-10.0) |" in line
    assert line.endswith("| 0 of 2 | all |")


def test_an_unknown_choice_of_images_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quality_cid.parse(["--data", "some"])
    assert "invalid choice: 'some'" in capsys.readouterr().err


def test_the_page_tells_what_balance_removed() -> None:
    sets = {"num_rows": 10, "num_kept": 6, "eps": 0.6, "num_sets": 2, "largest_set": 4}
    sets |= {"histogram": {"4": 1, "2": 1}, "largest_diameter": 0.75, "two_things": 0.9}
    sets |= {"share_of_sets_wider_than_eps": 0.5, "one_thing_of_removed": 0.8}
    sets |= {"removed_with_the_same_caption": 0.25}
    clusters = {"k": 3, "rows_in_one": [1, 3, 6], "objective": 0.4, "top": 2, "scale": 20.0}
    told = quality_cid_table.selection(
        [
            {"what": "clusters", "two_things": 0.5, **clusters},
            {"what": RANDOM, "num_kept": 6, "two_things": 0.4},
            {"what": BALANCE, **sets},
        ]
    )
    assert "6 of 10 images at eps 0.600 (cosine 0.820): 6 images lie in 2 sets" in told[0]
    assert "(1 of 2, 1 of 4), one of each stays. The largest has 4, 40.0% of all" in told[0]
    assert "25% have the very caption" in told[1] and "80% show one thing" in told[1]
    assert "50% of all images, 40% of the random and 90% of the balanced" in told[1]
    assert "3 clusters of all images, of 1 to 6 (median 3)" in told[3] and "0.800" in told[3]
