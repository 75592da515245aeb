# SPDX-License-Identifier: Apache-2.0
"""What methods with prompts refuse before training, and what they make of classes and texts."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kdengine import prompting
from kdengine.config import Classes, Data, Method, Model, Prompt, RunConfig, Train
from kdengine.data.tokenize import load_tokenizer
from kdengine.ranks import Ranks

NAMES = ["cat", "dog", "polar bear"]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A first stage on three classes of four images; the last image of each is to test on."""
    parts: dict[str, list] = {"train": [], "val": [], "test": []}
    for label, name in enumerate(NAMES):
        for n in range(4):
            path = tmp_path / "set" / name / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((20, 20, 3), 60 * label + n, np.uint8)).save(path)
            parts["test" if n == 3 else "train"].append([f"{name}/{n}.png", label, name])
    (tmp_path / "split.json").write_text(json.dumps(parts))
    vision = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    (tmp_path / "model.json").write_text(
        json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text})
    )
    return RunConfig(
        data=Data(train_data=str(tmp_path / "set"), workers=1),
        classes=Classes(split=str(tmp_path / "split.json")),
        model=Model(model=str(tmp_path / "model.json")),
        method=Method(name="comkd_teacher"),
        prompt=Prompt(depth=2),
        train=Train(batch_size=2, steps=1),
    )


def build(config: RunConfig, **sections: Any) -> prompting.Parts:
    changed = {
        name: dataclasses.replace(getattr(config, name), **fields)
        for name, fields in sections.items()
    }
    return prompting.build(
        dataclasses.replace(config, **changed), Ranks(0, 1, 0, torch.device("cpu"))
    )


def test_text_prompts_start_from_the_words_of_the_template(config: RunConfig) -> None:
    parts = build(config, prompt={"depth": 1})
    assert parts.teachers is None and parts.class_tokens.shape == (3, 16)
    texts = [f"a photo of a {name}." for name in NAMES]
    assert torch.equal(parts.class_tokens, load_tokenizer("simple:16")(texts))
    made = parts.student.tower
    clip: Any = made.clip
    # one layer of prompts that start from its words is the model without prompts
    with_prompts = made.encode_text(parts.class_tokens)
    words = clip.token_embedding(parts.class_tokens[0, 1:5]) + clip.positional_embedding[1:5]
    torch.testing.assert_close(clip.transformer.prompts[0], words)
    assert with_prompts.shape == (3, 8)


def test_a_half_has_numbers_from_zero_and_its_own_names(config: RunConfig) -> None:
    parts = build(config, classes={"half": "novel"})
    batch = next(parts.data.loader)
    parts.data.loader.close()
    assert batch["label"].tolist() == [0, 0] and len(parts.class_tokens) == 1
    assert parts.data.identity["num_samples"] == 3
    assert parts.data.rows["classes"] == "1 of 3 (novel)"
    few = build(config, classes={"shots": 2})
    assert few.data.identity["num_samples"] == 6
    assert few.data.identity["shards"] != parts.data.identity["shards"]


def test_images_that_are_not_there_are_told(config: RunConfig) -> None:
    Path(config.data.train_data, "dog", "1.png").write_bytes(b"no image")
    parts = build(config)
    assert parts.data.identity["num_samples"] == 8
    assert parts.data.rows["missing"].startswith("1 listed images, the first dog/1.png (1 of")
    for n in (0, 2):
        Path(config.data.train_data, "dog", f"{n}.png").unlink()
    with pytest.raises(ValueError, match="no image of class 'dog' is there to train on .1 of 3"):
        build(config)


@pytest.mark.parametrize(
    ("sections", "match"),
    [
        ({"classes": {"split": ""}}, "classes.split: method comkd_teacher learns from images with"),
        ({"data": {"train_data": ""}}, "data: expected images to train on, got none"),
        ({"prompt": {"text_tokens": 5}}, "'a photo of a {}.' has 4 words before the name, and 5"),
        ({"prompt": {"depth": 3}}, "tower has 2 layers, fewer than the 3"),
        ({"method": {"name": "comkd"}}, "method comkd: expected a teacher, got none"),
    ],
)
def test_what_does_not_fit_is_refused(config: RunConfig, sections: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build(config, **sections)


@pytest.mark.parametrize(
    ("sections", "match"),
    [
        ({"train": {"accum_freq": 2}}, "train.accum_freq: expected 1 with method comkd_teacher"),
        ({"train": {"zero_stage": 3}}, "train.zero_stage: expected at most 2 with method"),
        ({"train": {"torchcompile": True}}, "train.torchcompile: expected False with"),
        ({"prune": {"target": 0.5}}, "prune.target: expected 0 with method"),
        ({"distill": {"cache": "x"}}, "distill.cache: expected none, as crops are drawn anew"),
        ({"data": {"dataset_type": "synthetic"}}, "data.dataset_type: expected webdataset"),
        ({"classes": {"shots": -1}}, "classes.shots: expected a number >= 0, got -1"),
        ({"classes": {"template": "a photo"}}, "classes.template: expected {} where the class"),
        ({"prompt": {"depth": 0}}, "prompt.depth: expected a number >= 1, got 0"),
    ],
)
def test_settings_that_mean_nothing_to_prompts_are_refused(
    config: RunConfig, sections: dict, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        build(config, **sections)


def test_a_tokenizer_without_a_start_token_is_refused(config: RunConfig) -> None:
    with pytest.raises(
        ValueError, match="start token of open_clip's own tokenizer, and .* has hf:"
    ):
        prompting.first_words(torch.zeros(1, 16), 4, "hf:x:16", config)
