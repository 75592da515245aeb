# SPDX-License-Identifier: Apache-2.0
"""Samples a second of the loader alone: DALI against Pillow and torchvision, on equal cores.

    python benchmarks/bench_data.py [--size 224] [--batch 128] [--cores 2] [--json FILE]

Contenders: ``DALI`` (``kdengine.data`` with decoding threads), ``DALI mixed`` (the same, decoding
on the GPU, where there is one) and ``PIL`` (open_clip's ``image_transform`` for training and its
tokenizer in the worker processes of a torch ``DataLoader``). All read the same samples of the same
tars in random order, on the same cores, with as many threads or workers as cores, and hand out
normalised float32 images and token ids on the device.

First the pixels are compared: for a batch of ours, Pillow's transform with the window that ours
drew. Then the contenders run in turn, each with a warm-up that empties what it had made ahead.
"""

import argparse
import contextlib
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from torch import Tensor
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import common, race, shards  # noqa: E402
from benchmarks.tar_pairs import Endless, TarPairs  # noqa: E402
from kdengine.data import DatasetIndex, ViewSpec, build_loader, ensure_index  # noqa: E402

MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
TOKENIZER = "simple:77"
PEER = "PIL"
# largest mean absolute difference of an image, of 255; a GPU's JPEG decoder rounds differently
LIMITS = {"DALI": 0.5, "DALI mixed": 1.0}
# batches that DALI and each worker of a DataLoader make ahead
AHEAD = 2
VERSIONS = ("nvidia-dali-cuda130", "pillow", "torchvision")
COLUMNS = ["contender", "on", "samples/s", "least-most", f"vs {PEER}", "pixels off, worst"]
COLUMNS += ["median"]
Batch = dict[str, Tensor]


class Contender(NamedTuple):
    """A running loader: the next batch on the device, and the batches it makes ahead."""

    name: str
    next_batch: Callable[[], Batch]
    ahead: int


def view_of(options: argparse.Namespace) -> ViewSpec:
    """What both make of an image."""
    return ViewSpec(options.size, MEAN, STD)


def pillow(pairs: TarPairs, options: argparse.Namespace, device: torch.device) -> Contender:
    """Worker processes, forked when the first batch is asked for."""
    loader = DataLoader(
        pairs,
        batch_size=options.batch,
        sampler=Endless(len(pairs)),
        num_workers=options.cores,
        prefetch_factor=AHEAD,
        pin_memory=device.type == "cuda",
    )
    batches = iter(loader)

    def next_batch() -> Batch:
        image, tokens = (x.to(device, non_blocking=True) for x in next(batches))
        return {"image": image, "tokens": tokens}

    return Contender(PEER, next_batch, AHEAD * options.cores)


def ours(
    name: str, index: DatasetIndex, options: argparse.Namespace, device: torch.device
) -> Contender:
    """The engine's loader, decoding on the CPU or on the GPU."""
    loader = build_loader(
        index,
        views={"image": view_of(options)},
        tokenizers={"tokens": TOKENIZER},
        batch_size=options.batch,
        num_threads=options.cores,
        device_id=device.index or 0 if name == "DALI mixed" else None,
        # Pillow's side has one caption a sample
        caption="first",
    )

    def move(x: torch.Tensor) -> torch.Tensor:
        pinned = x.pin_memory() if device.type == "cuda" and x.device.type == "cpu" else x
        return pinned.to(device, non_blocking=True)

    def next_batch() -> Batch:
        return {k: move(x) for k, x in next(loader).items()}

    return Contender(name, next_batch, AHEAD)


def compare(batch: Batch, pairs: TarPairs) -> dict[str, float]:
    """How far the pixels of a batch are from Pillow's for the same windows, and the tokens.

    Returns:
        ``worst`` and ``median`` over images of the mean absolute difference, of 255, and
        ``tokens``, the share of rows whose token ids differ.
    """
    transform = copy.deepcopy(pairs.transform)
    crop = transform.transforms[0]
    images, scale = batch["image"].cpu(), 255 * torch.tensor(STD).view(3, 1, 1)
    errors, num_wrong = [], 0
    for row, number in enumerate(batch["sample"].tolist()):
        window = batch["window"][row].tolist()
        # an attribute of the object hides the method that draws
        crop.get_params = lambda *_, window=window: window
        expected = transform(pairs.image(number))
        errors.append(((images[row] - expected).abs() * scale).mean().item())
        num_wrong += not torch.equal(batch["tokens"][row].cpu(), pairs.tokens(number))
    return {
        "worst": max(errors),
        "median": statistics.median(errors),
        "tokens": num_wrong / len(errors),
    }


def why_wrong(name: str, errors: dict[str, float]) -> str | None:
    """Why a contender gets no time; None if its batches are right."""
    if not errors["worst"] <= LIMITS[name]:
        return f"wrong: an image is off by {errors['worst']:.2f} of 255, allowed {LIMITS[name]}"
    return "wrong: token ids differ from open_clip's" if errors["tokens"] else None


def take_turn(contender: Contender, options: argparse.Namespace, num_samples: int) -> float:
    """Samples a second of one contender, over whole batches."""
    for _ in range(contender.ahead + 1):
        contender.next_batch()
    _wait()
    count, start = 0, time.perf_counter()
    while True:
        contender.next_batch()
        count += options.batch
        passed = time.perf_counter() - start
        if passed >= options.seconds and count >= options.passes * num_samples:
            break
    _wait()
    rate = count / (time.perf_counter() - start)
    # what it makes ahead must not run in the next one's turn
    time.sleep(1.5 * contender.ahead * options.batch / rate)
    return rate


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def contest(options: argparse.Namespace, journal: common.Journal) -> bool:
    """Compare, time, print and write; whether all of ours are right."""
    device = torch.device(options.device)
    pattern = shards.training_shards(options.data, options.scratch)
    index = ensure_index(
        pattern,
        index_dir=str(options.scratch / "index"),
        tokenizers=[TOKENIZER],
        num_workers=options.cores,
        progress=True,
    )
    pairs = TarPairs(index, view_of(options), TOKENIZER)
    names = ["DALI", "DALI mixed"] if device.type == "cuda" else ["DALI"]
    identity = {"benchmark": "data", "case": os.path.basename(pattern), "rows": options.batch}
    identity |= {"size": options.size, "cores": options.cores}
    timing = {**identity, "backend": "timing"}
    if journal.has({**identity, "backend": PEER}) or journal.has(timing):
        return True
    print(f"{index.num_samples} samples of {pattern}, {options.cores} cores", flush=True)
    # its workers are forked here, before DALI and the GPU have started
    field = {PEER: pillow(pairs, options, device)}
    field[PEER].next_batch()
    where = common.machine(device) | {name: common.version(name) for name in VERSIONS}
    errors: dict[str, dict[str, float]] = {}
    reasons: dict[str, str] = {}
    for name in names:
        own = {**identity, "backend": name}
        journal.start(own)
        contender = ours(name, index, options, device)
        errors[name] = compare(contender.next_batch(), pairs)
        told = " ".join(f"{key} {error:.3f}" for key, error in errors[name].items())
        reason = why_wrong(name, errors[name])
        print(f"  {name}: pixels off by {told} {reason or ''}", flush=True)
        if reason:
            reasons[name] = reason
            journal.add(own, errors=errors[name], reason=reason, **where)
        else:
            field[name] = contender
    journal.start(timing)
    rates: dict[str, list[float]] = {name: [] for name in field}
    for number in range(options.repeats):
        for name, contender in field.items():
            rates[name].append(take_turn(contender, options, index.num_samples))
            print(f"  {number + 1}/{options.repeats} {name}: {rates[name][-1]:.0f} samples/s")
    peer = statistics.median(rates[PEER])
    shown = []
    for name, values in rates.items():
        row = {
            "samples_per_second": statistics.median(values),
            "samples_per_second_each": values,
            "ratio": statistics.median(values) / peer,
            "errors": errors.get(name),
            "num_samples": index.num_samples,
            "passes": options.passes,
        }
        journal.add({**identity, "backend": name}, **row, **where)
        shown.append(cells(name, device, row))
    title = f"{options.size} px, batch {options.batch}, {options.cores} cores: {where['device']}"
    common.show(title, COLUMNS, shown)
    for name, reason in reasons.items():
        print(f"  no time for {name}: {reason}", flush=True)
    return not reasons


def cells(name: str, device: torch.device, row: dict[str, Any]) -> list[str]:
    """A row of the printed table."""
    each, errors = row["samples_per_second_each"], row["errors"]
    return [
        name,
        device.type,
        f"{row['samples_per_second']:.0f}",
        f"{min(each):.0f}-{max(each):.0f}",
        f"{row['ratio']:.2f}",
        *(f"{errors[key]:.3f}" if errors else "" for key in ("worst", "median")),
    ]


@contextlib.contextmanager
def on_cores(number: int) -> Iterator[None]:
    """Keep this process, and the threads and processes that it starts, on so many cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:number])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    available = len(os.sched_getaffinity(0))
    parser.add_argument("--data", help="shards; without, Flickr8k or rendered scenes")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--cores", type=int, default=min(available, 16), help="for each contender")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each contender")
    parser.add_argument("--passes", type=float, default=1.0, help="over the data a turn, at least")
    parser.add_argument("--seconds", type=float, default=5.0, help="a turn, at least")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scratch", type=Path, default=shards.SCRATCH, help="for index and scenes")
    parser.add_argument("--json", help="append one JSON line a row to this file")
    parser.add_argument("--resume", action="store_true", help="go on behind the rows of that file")
    options = parser.parse_args(arguments)
    if not 1 <= options.cores <= available:
        parser.error(f"--cores: expected 1 to {available}, those of this process; {options.cores} "
                     "came; give fewer, or start on more")  # fmt: skip
    for name in ("size", "batch", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1; {getattr(options, name)} came")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    journal = common.Journal(options.json, resume=options.resume)
    with on_cores(options.cores):
        torch.set_num_threads(1)
        right = contest(options, journal)
    return 0 if right else race.WRONG


if __name__ == "__main__":
    sys.exit(common.command(main))
