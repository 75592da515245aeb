# SPDX-License-Identifier: Apache-2.0
"""Linear probe: how well a linear classifier tells classes apart by frozen image embeddings.

    min over W, b of  C * sum_i [ lse_k (W x_i + b)_k - (W x_i + b)_label(i) ] + |W|^2 / 2

Decisions:
* x are the model's L2-normalised image embeddings, those that zero-shot and retrieval use; nothing
  is standardised. The offsets b are not penalised. Two classes have one row of W, the difference.
* C is chosen by the accuracy on a part of the training images: a fifth of each class (at least
  one, of a class with a single image none), drawn by the sample's number alone, so the same for
  every model. Of equally good C the smallest is taken. Then all training images are fitted anew.
* scikit-learn's L-BFGS in float64 on the CPU, wherever the embeddings were made: repeated on a
  machine it gives the same numbers. The time of a step grows with images times classes: it is
  meant for sets of some ten thousand images.
"""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from kdengine.data.index import DatasetIndex
from kdengine.data.noise import mix

logger = logging.getLogger(__name__)

# inverse strengths of the penalty: half decades; unit embeddings need large ones
GRID = tuple(float(f"{10 ** (half / 2):.3g}") for half in range(-4, 11))
NUM_FITS = len(GRID) + 1
SEED = 0
# the gradient of the mean loss; scikit-learn's 1e-4 is coarse for components of unit vectors
SOLVER = {"tol": 1e-6, "max_iter": 1000}


def probe_labels(train: DatasetIndex, test: DatasetIndex) -> tuple[np.ndarray, np.ndarray]:
    """The class of every training and every test image, by numbers common to both.

    Shards are compared by the numbers in their `.cls` members, class folders by their names.

    Returns:
        Two int64 arrays [n] and [m]; classes are numbered from 0 to C - 1, and each has a training
        image.

    Raises:
        ValueError: the two parts share an archive or folder, only one of them has class folders,
            there are fewer than two classes, a class folder has no good training image, or a class
            of the test part has none.
    """
    shared = {shard.tar for shard in train.shards} & {shard.tar for shard in test.shards}
    if shared:
        raise ValueError(f"TRAIN and TEST must be different images; both have {sorted(shared)[0]}")
    train_label, test_label = train.labels(), test.labels()
    if (train.classes is None) != (test.classes is None):
        raise ValueError(
            "TRAIN and TEST must both be shards, or both folders with a folder for each class; one "
            "of them is shards, and nothing says which folder has which number"
        )
    if train.classes is not None and test.classes is not None:
        empty = set(range(len(train.classes))) - set(train_label.tolist())
        if empty:
            raise ValueError(
                f"TRAIN: the class folder {train.classes[min(empty)]!r} has no good image; see "
                f"{train.quarantine_paths[0]}"
            )
        number = {name: number for number, name in enumerate(train.classes)}
        known = np.array([number.get(name, -1) for name in test.classes])
        unseen = [test.classes[label] for label in np.unique(test_label[known[test_label] < 0])]
        test_label = known[test_label]
    else:
        unseen = np.setdiff1d(test_label, train_label).tolist()
    if unseen:
        raise ValueError(
            f"TEST: no image of class {unseen[0]!r} is in TRAIN ({len(unseen)} classes are not); a "
            "classifier can only find what it was shown"
        )
    classes = np.unique(train_label)
    if len(classes) < 2:
        raise ValueError(f"TRAIN: expected at least two classes, got one, {classes[0]}")
    return np.searchsorted(classes, train_label), np.searchsorted(classes, test_label)


def linear_probe(
    train: Tensor,
    train_label: np.ndarray,
    test: Tensor,
    test_label: np.ndarray,
    *,
    advance: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, float]:
    """Fit a linear classifier on some embeddings and score it on others.

    Formula: see the head of the module.

    Shapes: train [n, D], test [m, D], rows L2-normalised; labels [n] and [m] in [0, C), every class
    among the training labels. ``advance`` is called with (1, 1) after each of ``NUM_FITS`` fits.

    Returns:
        ``probe-top1``, ``probe-top5`` (1 for five classes or fewer) and
        ``probe-mean-per-class-recall`` (over the classes that have a test image), all fractions;
        ``probe-classes`` and the chosen ``probe-C``.

    Memory: O((n + m) * (D + C)), float64.

    Raises:
        ValueError: no class has the two training images that the choice of C needs.
    """
    x, label = train.cpu().double().numpy(), train_label
    strength = choose_strength(x, label, advance)
    fitted = _solver(strength)
    _fit(fitted, x, label, f"C = {strength:g}")
    advance(1, 1)
    place = _places(fitted, test.cpu().double().numpy(), test_label)
    correct = place < 1
    total = np.bincount(test_label, minlength=label.max() + 1)
    hits = np.bincount(test_label, weights=correct, minlength=len(total))
    return {
        "probe-top1": float(correct.mean()),
        "probe-top5": float((place < 5).mean()),
        "probe-mean-per-class-recall": float((hits[total > 0] / total[total > 0]).mean()),
        "probe-classes": float(len(total)),
        "probe-C": strength,
    }


def choose_strength(
    x: np.ndarray, label: np.ndarray, advance: Callable[[int, int], None] = lambda *_: None
) -> float:
    """The C of ``GRID`` with the best accuracy on the part that ``held_out`` names.

    Shapes: x [n, D]; label [n].

    Raises:
        ValueError: see ``held_out``.
    """
    held = held_out(label)
    scores = []
    # from strong to weak, each fit starting where the last one ended
    solver = _solver(GRID[0], warm_start=True)
    for strength in GRID:
        solver.set_params(C=strength)
        _fit(solver, x[~held], label[~held], None)
        scores.append(float((solver.predict(x[held]) == label[held]).mean()))
        advance(1, 1)
    best = int(np.argmax(scores))
    if best == len(GRID) - 1:
        logger.warning(
            "linear probe: the weakest penalty of the grid, C = %g, is the best; a weaker one may "
            "be better still, which embeddings need that hardly differ, as of an untrained model",
            GRID[best],
        )
    return GRID[best]


def held_out(label: np.ndarray) -> np.ndarray:
    """Which training images choose C: a fifth of each class, bool [n].

    Raises:
        ValueError: no class has two images.
    """
    held = np.zeros(len(label), bool)
    noise = mix(SEED, np.arange(len(label)))
    for name in np.unique(label):
        own = np.flatnonzero(label == name)
        num = max(1, round(len(own) / 5)) if len(own) > 1 else 0
        held[own[np.argsort(noise[own], kind="stable")[:num]]] = True
    if not held.any():
        raise ValueError(
            "TRAIN: expected a class with at least two images, one to fit and one to choose C by; "
            f"each of the {len(label)} classes has one"
        )
    return held


def _places(fitted: Any, x: np.ndarray, label: np.ndarray) -> np.ndarray:
    """How many classes a classifier puts before the true one, [m]; of equals the smaller."""
    logits = fitted.decision_function(x)
    if logits.ndim == 1:
        # of two classes: the difference
        logits = np.stack([-logits, logits], axis=1)
    own = np.take_along_axis(logits, label[:, None], axis=1)
    before = np.arange(logits.shape[1]) < label[:, None]
    return ((logits > own) | ((logits == own) & before)).sum(axis=1)


def _solver(strength: float, **options: Any) -> Any:
    # scikit-learn takes a second to import, which only a probe should pay
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=strength, **SOLVER, **options)


def _fit(solver: Any, x: np.ndarray, label: np.ndarray, what: str | None) -> None:
    """Fit, and tell of a solution that matters (``what``) and is not one yet."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        solver.fit(x, label)
    if what and solver.n_iter_.max() >= solver.max_iter:
        logger.warning(
            "linear probe: %s: not converged after %d steps; the accuracy may be a little off",
            what,
            solver.max_iter,
        )
