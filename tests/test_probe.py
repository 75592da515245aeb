# SPDX-License-Identifier: Apache-2.0
"""The linear probe: its solution, its choice of C, and what it refuses."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score

from kdengine.evaluate import probe
from kdengine.evaluate.probe import GRID, choose_strength, held_out, linear_probe, probe_labels


def clusters(num: int, noise: float, num_classes: int = 4, seed: int = 0):
    """Unit embeddings around a centre a class, classes of unequal size, and their labels."""
    random = np.random.default_rng(seed)
    label = random.choice(num_classes, num, p=np.arange(1, num_classes + 1) / 10)
    centre = np.random.default_rng(99).normal(size=(num_classes, 16))
    x = torch.from_numpy(centre[label] + noise * random.normal(size=(num, 16)))
    return F.normalize(x.float()), label


def test_separable_classes_are_told_apart() -> None:
    found = linear_probe(*clusters(200, 0.05), *clusters(100, 0.05, seed=1))
    assert found["probe-top1"] == found["probe-mean-per-class-recall"] == 1.0
    assert found["probe-classes"] == 4 and found["probe-C"] in GRID


def test_labels_without_meaning_are_guessed() -> None:
    x, y = clusters(300, 0.5)[0], clusters(300, 0.5, seed=1)[0]
    random = np.random.default_rng(0)
    found = linear_probe(x, random.integers(0, 4, 300), y, random.integers(0, 4, 300))
    assert abs(found["probe-top1"] - 0.25) < 0.1


def test_the_solution_is_scikit_learns() -> None:
    (x, label), (y, truth) = clusters(400, 2.0), clusters(300, 2.0, seed=1)
    found = linear_probe(x, label, y, truth)
    direct = LogisticRegression(C=found["probe-C"], tol=1e-6, max_iter=1000)
    hits = direct.fit(x.double().numpy(), label).predict(y.double().numpy()) == truth
    assert found["probe-top1"] == hits.mean() and 0.5 < hits.mean() < 0.95
    by_class = [hits[truth == name].mean() for name in range(4)]
    assert found["probe-mean-per-class-recall"] == pytest.approx(np.mean(by_class))
    assert found["probe-mean-per-class-recall"] != pytest.approx(found["probe-top1"], abs=1e-3)


def test_of_more_than_five_classes_the_five_likeliest_count() -> None:
    random = np.random.default_rng(0)
    label, truth = np.arange(160) % 8, random.integers(0, 8, 120)
    centre = random.normal(size=(8, 16))
    x, y = (
        F.normalize(torch.from_numpy(centre[own] + 3.0 * random.normal(size=(len(own), 16))))
        for own in (label, truth)
    )
    found = linear_probe(x, label, y, truth)
    direct = LogisticRegression(C=found["probe-C"], tol=1e-6, max_iter=1000).fit(x.numpy(), label)
    logits = direct.decision_function(y.numpy())
    assert found["probe-top5"] == pytest.approx(top_k_accuracy_score(truth, logits, k=5))
    assert found["probe-top1"] < found["probe-top5"] < 1.0


def test_the_solution_minimises_the_stated_objective() -> None:
    x, label = clusters(120, 1.0)
    solver = probe._solver(3.0)
    probe._fit(solver, x.double().numpy(), label, "C = 3")
    weight = torch.tensor(solver.coef_, requires_grad=True)
    offset = torch.tensor(solver.intercept_, requires_grad=True)
    logits = x.double() @ weight.T + offset
    entropy = F.cross_entropy(logits, torch.from_numpy(label), reduction="sum")
    (3.0 * entropy + weight.square().sum() / 2).backward()
    scale = 3.0 * len(x)
    assert weight.grad.abs().max() < 2e-6 * scale and offset.grad.abs().max() < 2e-6 * scale


def test_c_is_the_best_on_the_held_out_part() -> None:
    x, label = clusters(400, 2.0)
    values, held = x.double().numpy(), held_out(label)
    scores = []
    for strength in GRID:
        direct = LogisticRegression(C=strength, tol=1e-6, max_iter=1000)
        direct.fit(values[~held], label[~held])
        scores.append((direct.predict(values[held]) == label[held]).mean())
    assert max(scores) - min(scores) > 0.05
    assert choose_strength(values, label) == GRID[int(np.argmax(scores))]


def test_test_images_do_not_choose_c() -> None:
    (x, label), (y, truth) = clusters(200, 1.0), clusters(100, 1.0, seed=1)
    first = linear_probe(x, label, y, truth)
    second = linear_probe(x, label, y, (truth + 1) % 4)
    assert first["probe-C"] == second["probe-C"] and first["probe-top1"] > second["probe-top1"]


def test_the_probe_repeats_itself() -> None:
    parts = (*clusters(200, 1.0), *clusters(100, 1.0, seed=1))
    assert linear_probe(*parts) == linear_probe(*parts)


@pytest.mark.parametrize("grid", [(1e-9, 10.0), (1e-9, 10.0, 20.0)], ids=["end", "within"])
def test_the_best_at_the_end_of_the_grid_is_told(caplog, monkeypatch, grid) -> None:
    monkeypatch.setattr(probe, "GRID", grid)
    x, label = clusters(100, 0.1)
    assert choose_strength(x.double().numpy(), label) == 10.0
    assert ("C = 10, is the best; a weaker one" in caplog.text) == (grid[-1] == 10.0)


def test_every_fit_is_told() -> None:
    told: list[tuple[int, int]] = []
    linear_probe(*clusters(80, 0.1), *clusters(40, 0.1), advance=lambda *done: told.append(done))
    assert told == [(1, 1)] * probe.NUM_FITS


def test_two_classes_are_told_apart() -> None:
    parts = [
        (x[label < 2], label[label < 2]) for x, label in (clusters(300, 0.1), clusters(99, 0.1))
    ]
    found = linear_probe(*parts[0], *parts[1])
    assert found["probe-top1"] == found["probe-top5"] == 1.0 and found["probe-classes"] == 2


def test_a_fifth_of_every_class_is_held_out() -> None:
    label = np.repeat([3, 5, 7, 9], [100, 10, 2, 1])
    held = held_out(label)
    assert [int(held[label == name].sum()) for name in (3, 5, 7, 9)] == [20, 2, 1, 0]
    assert np.array_equal(held, held_out(label))
    # drawn, not taken from one end
    assert 0 < held[:50].sum() < 20


def test_classes_of_one_image_each_leave_nothing_to_choose_by() -> None:
    with pytest.raises(ValueError, match="at least two images.*each of the 3 classes has one"):
        held_out(np.arange(3))


class Shards:
    """Stands for an index of shards."""

    classes = None

    def __init__(self, labels: list[int], tar: str = "a.tar") -> None:
        self._labels = np.array(labels)
        self.shards = [type("Shard", (), {"tar": tar})]
        self.quarantine_paths = ("/q",)

    def labels(self) -> np.ndarray:
        return self._labels


class Folders(Shards):
    """Stands for an index of class folders."""

    def __init__(self, classes: list[str], labels: list[int], tar: str = "a") -> None:
        super().__init__(labels, tar)
        self.classes = tuple(classes)


def test_shards_share_their_numbers() -> None:
    train, test = probe_labels(Shards([7, 2, 9, 2]), Shards([9, 7], "b.tar"))
    assert train.tolist() == [1, 0, 2, 0] and test.tolist() == [2, 1]


def test_class_folders_share_their_names() -> None:
    train = Folders(["bird", "cat", "dog"], [0, 1, 2])
    labels, other = probe_labels(train, Folders(["cat", "dog"], [0, 1, 1], "b"))
    assert labels.tolist() == [0, 1, 2] and other.tolist() == [1, 2, 2]


@pytest.mark.parametrize(
    ("train", "test", "match"),
    [
        (Shards([0, 1]), Shards([0, 4, 5], "b"), "no image of class 4 is in TRAIN .2 classes"),
        (Shards([3, 3]), Shards([3], "b"), "at least two classes, got one, 3"),
        (Shards([0, 1]), Shards([0, 1]), "must be different images; both have a.tar"),
        (Shards([0, 1]), Folders(["x"], [0], "b"), "must both be shards, or both folders"),
        (Folders(["x", "y"], [0, 1]), Folders(["x", "z"], [0, 1], "b"), "class 'z' is in TRAIN"),
        (Folders(["x", "y"], [0, 0]), Folders(["x"], [0], "b"), "'y' has no good image; see /q"),
        (Folders(["x"], [0]), Folders(["x"], [0], "b"), "at least two classes"),
    ],
    ids=["unseen", "one class", "same", "mixed", "unseen name", "missing in train", "one name"],
)
def test_what_no_classifier_can_learn_is_refused(train, test, match) -> None:
    with pytest.raises(ValueError, match=match):
        probe_labels(train, test)


def test_a_solution_that_is_none_yet_is_told(caplog, monkeypatch) -> None:
    monkeypatch.setitem(probe.SOLVER, "max_iter", 2)
    linear_probe(*clusters(100, 1.0), *clusters(50, 1.0, seed=1))
    assert caplog.text.count("not converged after 2 steps") == 1
