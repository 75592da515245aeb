# SPDX-License-Identifier: Apache-2.0
"""A tiny training with two teachers that share neither size nor width nor context."""

import json

import pytest

from kdengine.checkpoint.folder import checkpoints, read_meta
from kdengine.config import load_recipe


def test_two_unequal_teachers_teach_one_student(train_here, words, records, tiny, tmp_path) -> None:
    other = json.loads(tiny.read_text())
    other["embed_dim"] = 24
    other["vision_cfg"]["image_size"] = 48
    other["text_cfg"]["context_length"] = 32
    path = tmp_path / "other.json"
    path.write_text(json.dumps(other))
    runs = tmp_path / "runs"
    models = [f"local-dir:{runs}/small/export", str(path)]
    tags = ["", f"{runs}/large/export/open_clip_model.safetensors"]

    def student(name: str, *which: int, steps: int = 1, **fields: object) -> list[str]:
        line = words(name, method__name="clip_kd", train__steps=steps, **fields)
        chosen = [[values[i] for i in which] for values in (models, tags)]
        line += ["--distill.distill-model", *chosen[0], "--distill.distill-pretrained", *chosen[1]]
        return line

    told = train_here(
        words("small", train__steps=1),
        words("large", train__steps=1, model__model=path),
        student("by_small", 0),
        student("by_large", 1),
        student("by_both", 0, 1),
        student("by_both", 0, 1, steps=2, run__resume="latest"),
        student("by_both", 1, 0, steps=3, run__resume="latest"),
    )
    assert [code for code, _ in told[:-1]] == [0] * 6, told
    first = {name: records(runs / name)[0] for name in ("by_small", "by_large", "by_both")}
    alone = first["by_small"]["loss/crd"], first["by_large"]["loss/crd"]
    # of the same student and pairs the divergence from both is the mean of that from each
    assert first["by_both"]["loss/crd"] == pytest.approx(sum(alone) / 2, rel=1e-5)
    assert abs(alone[0] - alone[1]) > 1e-4 * alone[0]
    assert first["by_both"]["loss/task"] == pytest.approx(first["by_small"]["loss/task"], rel=1e-6)
    assert len(records(runs / "by_both")) == 2
    config = load_recipe(str(runs / "by_both" / "config.toml"))
    assert config.distill.teachers() == [(models[0], None), (models[1], tags[1])]
    log = (runs / "by_both" / "out.log").read_text()
    assert "teacher 1" in log and "teacher 2" in log and "48 px, width 24, frozen" in log
    # heads and fusions belong to an order of the teachers
    assert told[-1][0] is None and "the teacher's weights changed" in told[-1][1]
    assert read_meta(checkpoints(runs / "by_both")[-1])["identity"]["teacher"]
