# SPDX-License-Identifier: Apache-2.0
"""Commands that look at the embeddings of a data set."""

import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from kdengine import errors
from kdengine.cli.shared import print_table


def cluster(
    embeddings: Annotated[Positional[Path], arg(metavar="EMBEDDINGS")],
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    /,
    *,
    k: Annotated[int, arg(metavar="INT", help_behavior_hint="(required)")],
    iterations: int = 20,
    tolerance: float = 1e-4,
    seed: int = 0,
    teacher: int = 0,
    top: int = 64,
    scale: float = 100.0,
    keep: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="")] = None,
) -> int:
    """Spherical k-means of image embeddings: a label for every sample, and the centroids.

    Beside the labels of a shard lie the nearest centroids of every sample, their cosines and the
    logarithm of the sum over all centroids, from which follow the teacher's probabilities.

    An interrupted command is given again and goes on. Several ranks share the rows, started by
    'torchrun --nproc-per-node N -m kdengine.cli cluster ...'.

    Args:
        embeddings: Cache that 'kdengine cache' made, of which the mean over the stored crops of an
            image counts, or a .npy file with a row for each.
        out: Folder to write.
        k: Clusters; as many as there are images divided by 225 is what the paper's authors take.
        iterations: At most.
        tolerance: An iteration that lowers the objective by less than this share is the last.
        seed: Of the rows that the centroids start from.
        teacher: Which of the cache's teachers, from 0.
        top: Nearest centroids to write of every sample, 8 bytes each and 4 a sample; 0 for labels
            alone.
        scale: Of the teacher's softmax over the centroids, as a CLIP model's logit scale.
        keep: What 'kdengine balance' wrote of the same embeddings: the centroids are those of the
            images that stay, the others are given the nearest.
    """
    if min(k, iterations) < 1 or not tolerance >= 0:
        raise ValueError(
            "cluster: --k and --iterations must be at least 1, --tolerance at least 0; got "
            f"{k}, {iterations} and {tolerance:g}"
        )
    if top < 0 or not 0 < scale < float("inf"):
        raise ValueError(
            "cluster: --top must be at least 0 and --scale above 0 and finite; got "
            f"{top} and {scale}"
        )
    from kdengine.cluster import cluster_command

    try:
        told = cluster_command(
            embeddings,
            out,
            k=k,
            iterations=iterations,
            tolerance=tolerance,
            seed=seed,
            teacher=teacher,
            top=top,
            scale=scale,
            keep=keep,
        )
    except KeyboardInterrupt:
        what = "interrupted; complete iterations are kept, and the same command goes on from there"
        print(what, file=sys.stderr)
        return errors.EXIT_INTERRUPTED
    if told is not None:
        print_table(told)
    return 0


def balance(
    embeddings: Annotated[Positional[Path], arg(metavar="EMBEDDINGS")],
    out: Annotated[Positional[Path], arg(metavar="OUT")],
    /,
    *,
    rule: Literal["sets", "greedy", "random"] = "sets",
    eps: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")] = None,
    retention: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")] = None,
    cells: Annotated[int | None, arg(metavar="INT", help_behavior_hint="")] = None,
    probes: int = 3,
    seed: int = 0,
    teacher: int = 0,
    shards: Annotated[str | None, arg(metavar="SHARDS", help_behavior_hint="")] = None,
    index_dir: Annotated[str | None, arg(metavar="FOLDER", help_behavior_hint="")] = None,
) -> int:
    """Choose images that stand for all that are like them, for --data.keep (CLIP-CID).

    Beside the list lies, of 'sets', balance.svg: how large and wide the sets are, and the share
    kept at every threshold; with --shards also removed.html.

    Args:
        embeddings: Cache that 'kdengine cache' made, of which the mean over the stored crops of an
            image counts, or a .npy file with a row for each.
        out: Folder to write.
        rule: 'sets' joins images closer than the threshold, also by way of others, and keeps the
            most central of each set; 'greedy' keeps in order each that is near none kept before;
            'random' keeps any, the control without which the others say nothing.
        eps: Threshold, a distance of unit embeddings; by default that which keeps --retention of
            the images.
        retention: Share of the images to keep, in place of --eps; without either 0.563, the
            paper's.
        cells: Coarse cells that near images are looked for in; by default none up to 100,000
            images, whose pairs are all looked at, and above one for every 1,024.
        probes: Further cells that every image looks into.
        seed: Of what is random.
        teacher: Which of the cache's teachers, from 0.
        shards: The data, for a page of removed images beside those that stay.
        index_dir: Folder of its index; by default beside the shards.
    """
    if eps is not None and rule == "random":
        raise ValueError("balance: --rule random has no threshold; leave --eps away")
    if probes < 0 or (cells is not None and cells < 0):
        raise ValueError("balance: --cells and --probes must be at least 0")
    from kdengine.cluster import Wanted, balance_command

    wanted = Wanted(rule=rule, eps=eps, retention=retention, cells=cells, probes=probes, seed=seed)
    print_table(
        balance_command(
            embeddings, out, wanted, teacher=teacher, shards=shards, index_dir=index_dir
        )
    )
    return 0
