# SPDX-License-Identifier: Apache-2.0
"""The demo's data set: training shards, a retrieval set and a zero-shot set.

Layout of img2dataset: plain tar, the members of a sample adjacent, nine-digit keys (five for the
shard, four for the sample). Equal seeds give equal bytes.

=========================== ==========================================================
scenes-train-NNN.tar        pictures with five captions each; no held-out combination
scenes-val-000.tar          25 families of 20 pictures that differ in a few details,
                            each with five captions that name all of them
scenes-zeroshot.tar         single things, all of held-out combinations, as classes
scenes-classnames.txt       all combinations of colour and shape
scenes-templates.txt        prompts
=========================== ==========================================================
"""

import io
import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from kdengine.demo.drawing import IMAGE_SIZE, render
from kdengine.demo.scenes import (
    COMBINATIONS,
    HELD_OUT,
    SEEN,
    TEMPLATES,
    Scene,
    describe,
    sample_family,
    sample_scene,
)

# raised whenever equal seeds no longer give equal bytes
VERSION = 1
NUM_CAPTIONS = 5
FAMILY_SIZE = 20
VAL_SHARD, ZEROSHOT_SHARD = 1000, 2000


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many pictures there are of each kind."""

    num_shards: int = 8
    shard_size: int = 1000
    num_val: int = 500
    num_per_class: int = 40


@dataclass(frozen=True)
class Sample:
    """One sample before it is drawn."""

    scene: Scene
    captions: tuple[str, ...]
    label: int | None = None


def render_data(folder: Path, seed: int = 0, sizes: Sizes | None = None) -> bool:
    """Write the data set into ``folder`` unless it is there.

    The folder appears whole or not at all.

    Returns:
        Whether it was drawn; False when the same data were there already.

    Raises:
        FileExistsError: the folder holds something else.
    """
    sizes = sizes or Sizes()
    wanted = {"version": VERSION, "seed": seed, **asdict(sizes)}
    stamp = folder / "scenes.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == wanted:
        return False
    if folder.exists():
        raise FileExistsError(
            f"demo: {folder} exists but does not hold the scenes of seed {seed}; remove it, or "
            "choose another folder with --out"
        )
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    jobs: list[tuple[Callable[[int, Sizes, int], list[Sample]], str, int]] = [
        (train_samples, f"scenes-train-{shard:03}.tar", shard) for shard in range(sizes.num_shards)
    ]
    jobs += [
        (val_samples, "scenes-val-000.tar", VAL_SHARD),
        (zeroshot_samples, "scenes-zeroshot.tar", ZEROSHOT_SHARD),
    ]
    # not forked: the caller may hold threads
    workers = min(len(jobs), len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_write, partial / n, make, seed, sizes, s) for make, n, s in jobs]
        for future in futures:
            future.result()
    names = [" ".join(combination) for combination in COMBINATIONS]
    (partial / "scenes-classnames.txt").write_text("\n".join(names) + "\n")
    (partial / "scenes-templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    (partial / "scenes.json").write_text(json.dumps(wanted) + "\n")
    partial.rename(folder)
    return True


def train_samples(seed: int, sizes: Sizes, shard: int) -> list[Sample]:
    """Samples of one training shard: half single things, half pairs, none held out."""
    rng = random.Random(f"scenes/{seed}/train/{shard}")
    samples = []
    for _ in range(sizes.shard_size):
        scene = sample_scene(rng, SEEN, rng.choice((1, 2)))
        samples.append(Sample(scene, tuple(describe(scene, rng, NUM_CAPTIONS, full=False))))
    return samples


def val_samples(seed: int, sizes: Sizes, shard: int) -> list[Sample]:
    """Samples of the retrieval set; no two scenes have the same full description."""
    rng = random.Random(f"scenes/{seed}/val/{shard}")
    scenes: dict[object, Scene] = {}
    while len(scenes) < sizes.num_val:
        for scene in sample_family(rng, FAMILY_SIZE):
            scenes.setdefault(scene.described, scene)
    kept = list(scenes.values())[: sizes.num_val]
    rng.shuffle(kept)
    return [Sample(s, tuple(describe(s, rng, NUM_CAPTIONS, full=True))) for s in kept]


def zeroshot_samples(seed: int, sizes: Sizes, shard: int) -> list[Sample]:
    """Samples of the zero-shot set: single things that training never saw in this combination."""
    rng = random.Random(f"scenes/{seed}/zeroshot/{shard}")
    combinations = HELD_OUT * sizes.num_per_class
    return [
        Sample(sample_scene(rng, (combination,), 1), (), COMBINATIONS.index(combination))
        for combination in combinations
    ]


def _write(
    path: Path, make: Callable[[int, Sizes, int], list[Sample]], seed: int, sizes: Sizes, shard: int
) -> None:
    rng = random.Random(f"scenes/{seed}/pixels/{shard}")
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, sample in enumerate(make(seed, sizes, shard)):
            for name, content in _members(f"{shard:05}{number:04}", sample, rng):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _members(key: str, sample: Sample, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    yield f"{key}.jpg", render(sample.scene, rng)
    if sample.label is not None:
        yield f"{key}.cls", str(sample.label).encode()
        return
    yield f"{key}.txt", sample.captions[0].encode()
    size = {"width": IMAGE_SIZE, "height": IMAGE_SIZE}
    about = {
        "key": key,
        "url": "",
        "caption": sample.captions[0],
        "captions": sample.captions,
        "status": "success",
        **size,
        **{f"original_{name}": pixels for name, pixels in size.items()},
        "scene": asdict(sample.scene),
    }
    yield f"{key}.json", json.dumps(about).encode()
