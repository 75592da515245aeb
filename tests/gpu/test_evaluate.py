# SPDX-License-Identifier: Apache-2.0
"""Evaluation on a GPU gives the numbers of the CPU."""

import numpy as np
import pytest
import torch

NUM_IMAGES, CLASSES = 64, ("red", "green", "blue", "gray")


def test_evaluation_gives_the_numbers_of_the_cpu(
    picture, encode, write_shard, tmp_path, monkeypatch
) -> None:
    pytest.importorskip("open_clip", reason="students are built by open_clip")
    pytest.importorskip("nvidia.dali", reason="decoding needs DALI")
    from kdengine import models
    from kdengine.evaluate import parse_eval_sets, run_evaluation

    # the least difference may turn a rank: full products, and images that need no resize
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    samples = [
        {
            "png": encode(picture(number, (32, 32)), "PNG"),
            "txt": f"picture {number * 37} of a {CLASSES[number % 4]} thing".encode(),
            "cls": str(number % 4).encode(),
        }
        for number in range(NUM_IMAGES)
    ]
    shard = write_shard(tmp_path / "0.tar", samples)
    for number, sample in enumerate(samples):
        own = tmp_path / "tree" / CLASSES[number % 4]
        own.mkdir(parents=True, exist_ok=True)
        (own / f"{number}.png").write_bytes(sample["png"])
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    (tmp_path / "templates.txt").write_text("a {} thing\na photo of something {}\n")
    prompts = f"{tmp_path}/names.txt;{tmp_path}/templates.txt"
    words = [f"classes={shard};{prompts}", f"folders={tmp_path}/tree;{prompts}"]
    sets = parse_eval_sets([f"pairs={shard}"], words)
    tower, spec = models.build_student("ViT-Pico-32", seed=0)
    cpu, gpu = (
        run_evaluation(
            tower.to(device), spec, sets, index_dir=str(tmp_path / "index"), device=device
        )
        for device in ("cpu", "cuda")
    )
    assert gpu == pytest.approx(cpu, abs=1e-3)
    assert {"pairs/image_to_text_R@1", "classes/zeroshot-top1"} <= cpu.keys()
    # not all alike, which a model that sees nothing would be too
    assert 1 < cpu["pairs/image_to_text_mean_rank"] < NUM_IMAGES
    assert cpu["folders/zeroshot-top1"] == pytest.approx(cpu["classes/zeroshot-top1"])


def test_a_probe_takes_embeddings_from_the_gpu() -> None:
    from kdengine.evaluate.probe import linear_probe

    label = np.arange(200) % 4
    centre = torch.randn(4, 16)
    train, test = (
        torch.nn.functional.normalize(centre[label] + torch.randn(200, 16)) for _ in "ab"
    )
    found = linear_probe(train.cuda(), label, test.cuda(), label)
    assert found == linear_probe(train, label, test, label)
