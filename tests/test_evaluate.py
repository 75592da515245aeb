# SPDX-License-Identifier: Apache-2.0
"""Metrics against brute force and open_clip, on one rank and on several, on real photos."""

import math

import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip_train.train import get_clip_metrics
from open_clip_train.zero_shot import accuracy

from kdengine import evaluate, models
from kdengine.data.tokenize import load_tokenizer
from kdengine.evaluate.embed import embed_images, embed_texts
from kdengine.evaluate.prompts import fill, read_classnames, read_templates
from kdengine.evaluate.retrieval import first_positive, recall_and_rank, retrieval_metrics
from kdengine.evaluate.zeroshot import class_embeddings, zeroshot_metrics

NAMES = ["dog", "cat", "red car", "{house}", "tree", "crane", "crane"]
TEMPLATES = ["a photo of a {}.", "the {c}"]


def unit(num: int, width: int = 8) -> torch.Tensor:
    return F.normalize(torch.randn(num, width), dim=-1)


def captions(num: int) -> list[list[str]]:
    """One to four captions an image, some of them the same for several images."""
    words = ["dog", "cat", "snow", "red", "runs", "two", "boat"]
    return [[f"{words[(i + j) % 7]} {i % 5} {j}" for j in range(1 + i % 4)] for i in range(num)]


def fake_loader(num: int, batch_size: int, rank: int = 0, world_size: int = 1, size: int = 32):
    """Batches as the loader of the data package makes them: shared out, padded, equally many."""
    image = torch.randn(num, 3, size, size, generator=torch.Generator().manual_seed(5))
    share = math.ceil(num / world_size)
    mine = list(range(num))[rank * share : (rank + 1) * share]
    for start in range(0, math.ceil(share / batch_size) * batch_size, batch_size):
        numbers = mine[start : start + batch_size]
        filled = torch.tensor(numbers + [0] * (batch_size - len(numbers)))
        valid = torch.arange(batch_size) < len(numbers)
        yield {"image": image[filled], "sample": filled, "valid": valid}


def small_model(seed: int = 0) -> models.TwoTower:
    return models.build_student("ViT-Pico-32", seed=seed).tower.eval()


def positions_by_sorting(query, key, query_label, key_label) -> list[int]:
    """The definition: sort all keys, stable, take the first positive."""
    found = []
    for row, label in zip(query.double() @ key.double().T, query_label.tolist(), strict=True):
        similarity = row.float().tolist()
        order = sorted(range(len(key)), key=lambda j: (-similarity[j], j))
        found.append(next(n for n, j in enumerate(order) if key_label[j] == label))
    return found


@pytest.mark.parametrize("chunk", [1, 4, 23, 64])
def test_positions_are_those_of_a_stable_sort(chunk):
    query, key = unit(23), unit(40)
    key[7] = key[3]
    query_label, key_label = torch.arange(23) % 11, torch.arange(40) % 11
    found = first_positive(query, key, query_label, key_label, chunk=chunk)
    assert found.tolist() == positions_by_sorting(query, key, query_label, key_label)


def test_equal_keys_are_ordered_by_number():
    key = unit(1).expand(5, -1).clone()
    found = first_positive(unit(5), key, torch.arange(5), torch.arange(5))
    assert found.tolist() == [0, 1, 2, 3, 4]


def test_the_best_of_several_positives_counts():
    key = torch.eye(4)
    query = torch.tensor([[0.1, 0.9, 0.5, 0.7]])
    found = first_positive(query, key, torch.tensor([1]), torch.tensor([1, 0, 1, 1]))
    assert found.tolist() == [1]


def test_query_without_a_positive_is_refused():
    with pytest.raises(ValueError, match="first is query 1 with label 9"):
        first_positive(unit(2), unit(3), torch.tensor([0, 9]), torch.arange(3))


def test_one_caption_metrics_are_those_of_open_clip():
    image, text = unit(50), unit(50)
    expected = get_clip_metrics(image, text, torch.tensor(100.0))
    found = retrieval_metrics(image, text, torch.arange(50))
    for name, value in expected.items():
        assert found[name] == found[f"1caption/{name}"] == pytest.approx(value), name


def test_several_captions_count_each_and_any_of_them_hits():
    image, text = unit(12), unit(30)
    owner = torch.arange(30) % 12
    found = retrieval_metrics(image, text, owner)
    number = torch.arange(12)
    forward = torch.tensor(positions_by_sorting(image, text, number, owner))
    backward = torch.tensor(positions_by_sorting(text, image, owner, number))
    assert found["image_to_text_R@5"] == pytest.approx((forward < 5).double().mean().item())
    assert found["text_to_image_R@1"] == pytest.approx((backward < 1).double().mean().item())
    assert found["text_to_image_mean_rank"] == pytest.approx(backward.double().mean().item() + 1)


def test_one_caption_protocol_keeps_the_first_caption_of_each_image():
    image, text = unit(6), unit(18)
    owner = torch.arange(6).repeat_interleave(3)
    found = retrieval_metrics(image, text, owner)
    expected = get_clip_metrics(image, text[::3], torch.tensor(1.0))
    for name, value in expected.items():
        assert found[f"1caption/{name}"] == pytest.approx(value)


def test_a_model_that_maps_everything_to_one_point_scores_chance():
    image, text = unit(1).expand(100, -1), unit(1).expand(100, -1)
    found = retrieval_metrics(image, text, torch.arange(100))
    assert found["image_to_text_R@1"] == pytest.approx(0.01)
    assert found["text_to_image_mean_rank"] == pytest.approx(50.5)


def test_median_rank_is_rounded_down():
    found = recall_and_rank(torch.tensor([0, 1, 2, 3]), "x")
    assert (found["x_median_rank"], found["x_mean_rank"]) == (2, 2.5)


def test_accuracy_is_that_of_open_clip():
    image, classes, labels = unit(200), unit(10), torch.randint(0, 10, (200,))
    top1, top5 = accuracy(100 * image @ classes.T, labels, topk=(1, 5))
    found = zeroshot_metrics(image, classes, labels)
    assert found["zeroshot-top1"] == pytest.approx(top1 / 200)
    assert found["zeroshot-top5"] == pytest.approx(top5 / 200)


def test_mean_per_class_recall_averages_over_classes_with_images():
    classes = torch.eye(4)
    image = classes[[0, 0, 0, 1, 2]]
    found = zeroshot_metrics(image, classes, torch.tensor([0, 0, 0, 1, 3]))
    assert found["zeroshot-mean-per-class-recall"] == pytest.approx((1 + 1 + 0) / 3)
    assert found["zeroshot-top1"] == pytest.approx(4 / 5)


def test_class_embeddings_are_those_of_open_clip():
    model = small_model()
    tokenizer = load_tokenizer("simple:16")
    found = class_embeddings(model, NAMES, TEMPLATES, tokenizer, batch_size=5)
    texts = [lambda name: f"a photo of a {name}.", lambda name: f"the {name}"]
    expected = open_clip.build_zero_shot_classifier(model.clip, tokenizer, NAMES, texts)
    torch.testing.assert_close(found, expected.T)


def test_imagenet_words_and_templates_are_those_of_open_clip():
    names, templates = read_classnames("imagenet"), read_templates("imagenet")
    assert names == list(open_clip.IMAGENET_CLASSNAMES)
    expected = [template("tench") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert [fill(template, "tench") for template in templates] == expected


def run_both(rank: int, world_size: int, batch_size: int, alone: bool = False) -> dict[str, float]:
    """Retrieval and classification of 37 images on every rank, or in one process without group."""
    group = None if alone else dist.group.WORLD
    model, tokenizer = small_model(), load_tokenizer("simple:16")
    labels = torch.arange(37) % 7

    image = embed_images(model, fake_loader(37, batch_size, rank, world_size), 37, group=group)
    shared = {"batch_size": 8, "group": group}
    found = evaluate.evaluate_retrieval(model, image, captions(37), tokenizer, **shared)
    return found | evaluate.evaluate_zeroshot(
        model, image, labels, NAMES, TEMPLATES, tokenizer, **shared
    )


def test_metrics_do_not_depend_on_the_batch_size():
    assert run_both(0, 1, 4, alone=True) == run_both(0, 1, 37, alone=True)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_gets_the_metrics_of_one_process(run_ranks, world_size):
    expected = run_both(0, 1, 4, alone=True)
    assert len(expected) == 24
    assert run_ranks(run_both, world_size, 4) == [expected] * world_size


FAULTS = {
    "nan": "images: the embeddings of 5 of 10 are not finite (first numbers: [5, 6, 7, 8, 9])",
    "missing": "each of 10 samples once; 1 are missing, 0 came more than once",
    "double": "1 are missing, 1 came more than once",
}


def fail_on_one_rank(rank: int, world_size: int) -> dict[str, str]:
    """What this rank says about each fault, which only rank 1 has."""
    said = {}
    for fault in FAULTS:
        model, batches = small_model(), list(fake_loader(10, 3, rank, world_size))
        if rank == 1 and fault == "nan":
            model.clip.visual.proj.data[0, 0] = torch.nan
        elif rank == 1 and fault == "missing":
            batches[0]["valid"][0] = False
        elif rank == 1:
            batches[0]["sample"][0] = 0
        try:
            embed_images(model, batches, 10, group=dist.group.WORLD)
        except RuntimeError as error:
            said[fault] = str(error)
    return said


def test_a_fault_on_one_rank_is_an_error_on_all(run_ranks):
    for said in run_ranks(fail_on_one_rank, 2):
        assert {fault: FAULTS[fault] in said.get(fault, "") for fault in FAULTS} == {
            fault: True for fault in FAULTS
        }


def test_text_embeddings_that_are_not_finite_are_an_error():
    model = small_model()
    model.clip.text_projection.data[0, 0] = torch.inf
    with pytest.raises(RuntimeError, match="^texts: .*2 of 2 are not finite"):
        embed_texts(model, ["a dog", "a cat"], load_tokenizer("simple:16"))


def test_sample_beyond_the_set_is_an_error():
    with pytest.raises(RuntimeError, match="1 numbers are too large"):
        embed_images(small_model(), fake_loader(6, 3), 5)


def test_loader_without_a_batch_is_an_error():
    with pytest.raises(RuntimeError, match="^images: .*gave no batch"):
        embed_images(small_model(), [], 5)


def test_padding_does_not_count():
    batch = next(fake_loader(3, 5))
    batch["image"][3:] = torch.nan
    found = embed_images(small_model(), [batch], 3)
    assert found.shape == (3, 32)


def test_embeddings_stand_in_the_order_of_samples():
    model = small_model()
    batches = list(fake_loader(10, 4))
    found = embed_images(model, reversed(batches), 10)
    torch.testing.assert_close(found, embed_images(model, batches, 10))


def test_embedding_texts_makes_no_graph():
    found = embed_texts(small_model(), ["a dog"], load_tokenizer("simple:16"))
    assert not found.requires_grad
    assert found.norm().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("labels", "match"),
    [([0, 1, 7], "sample 2 has label 7"), ([0, -1, 0], "sample 1 has label -1"), ([], "no sample")],
    ids=["large", "none", "empty"],
)
def test_labels_that_are_no_class_are_refused(labels, match):
    with pytest.raises(ValueError, match=match):
        evaluate.evaluate_zeroshot(
            small_model(), torch.ones(3, 32), labels, NAMES, TEMPLATES, load_tokenizer("simple:16")
        )


def test_sample_without_caption_is_refused():
    with pytest.raises(ValueError, match="^captions: .*1 of 2 have none, the first is sample 1"):
        evaluate.evaluate_retrieval(
            small_model(), torch.ones(2, 32), [["a"], []], load_tokenizer("simple:16")
        )


def test_braces_in_class_names_mean_nothing():
    assert fill("a {c} here", "{}") == "a {} here"


@pytest.mark.parametrize(
    ("read", "text", "match"),
    [
        (read_classnames, "dog\n\ncat\n", "line 2 is blank"),
        (read_classnames, "", "file is empty"),
        (read_templates, "a photo of a dog\n", "expected {} or {c}"),
        (read_templates, "\n", "file is empty"),
    ],
    ids=["blank name", "no name", "no place", "no template"],
)
def test_malformed_prompt_files_are_refused(tmp_path, read, text, match):
    (tmp_path / "file.txt").write_text(text)
    with pytest.raises(ValueError, match=match):
        read(str(tmp_path / "file.txt"))


def test_missing_prompt_file_is_named():
    with pytest.raises(FileNotFoundError, match="/nowhere.txt .No such file"):
        read_classnames("/nowhere.txt")
