# SPDX-License-Identifier: Apache-2.0
"""From the metrics of single data sets to the numbers that papers on prompts print.

* Base to novel: a model is trained on a data set and tested on the images of each half of its
  classes, among the classes of that half. Over several data sets the harmonic mean is that of the
  mean accuracies, not the mean of harmonic means.
* Cross-dataset: the mean over the target data sets, each with all its classes. An inductive method
  has one model, of the source; PromptKD and ComKD-CLIP have one for each target, whose student saw
  the target's unlabelled training images.
* Domain generalisation: the mean over the variants of a data set, by a model of that data set.

A student that was distilled on images of novel classes, with their names, is transductive: its
numbers do not compare with those of methods that saw base classes alone.
"""

from collections.abc import Mapping

BASE, NOVEL, HARMONIC, TOP1 = "base-top1", "novel-top1", "harmonic-mean", "zeroshot-top1"


def harmonic_mean(base: float, novel: float) -> float:
    """``2 b n / (b + n)``; 0 where both are."""
    return 2 * base * novel / (base + novel) if base + novel else 0.0


def base_to_novel(metrics: Mapping[str, float]) -> dict[str, float]:
    """Mean base and novel accuracy of all sets, and the harmonic mean of these.

    Args:
        metrics: ``{"<set>/<metric>": value}``, of one model or of several.

    Raises:
        ValueError: no set has halves.
    """
    base, novel = (_mean(_of_sets(metrics, name), name) for name in (BASE, NOVEL))
    return {BASE: base, NOVEL: novel, HARMONIC: harmonic_mean(base, novel)}


def mean_top1(metrics: Mapping[str, float], source: str) -> dict[str, float]:
    """Accuracy on the source and the mean over all other sets: cross-dataset, and domains.

    Args:
        metrics: ``{"<set>/<metric>": value}``, of one model or of several.
        source: name of the set that was trained on; it need not be among them.

    Raises:
        ValueError: there is no other set.
    """
    found = _of_sets(metrics, TOP1)
    own = {source: found.pop(source)} if source in found else {}
    return {**own, "mean": _mean(found, TOP1)}


def _of_sets(metrics: Mapping[str, float], metric: str) -> dict[str, float]:
    pairs = ((*name.rpartition("/")[::2], value) for name, value in metrics.items())
    return {one: value for one, found, value in pairs if found == metric}


def _mean(values: Mapping[str, float], metric: str) -> float:
    if not values:
        raise ValueError(f"protocol: expected {metric} of at least one set, got none")
    return sum(values.values()) / len(values)
