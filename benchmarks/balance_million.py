# SPDX-License-Identifier: Apache-2.0
"""``kdengine balance`` in coarse cells at a million rows: time, memory, recall, what stays.

    OMP_NUM_THREADS=2 python benchmarks/balance_million.py [--rows 1000000] [--json FILE]

Planted rows: topics whose sizes fall as 1 / rank, originals around them, and copies of originals;
an original has s - 1 copies with a probability that falls as s^-2.5, about half of all rows are
copies, and a copy is 0.02 to 0.5 from its original. The threshold is calibrated to the share that
CLIP-CID keeps. The row says what the command's manifest says and of the rows that go the share for
which a row of the same original stays (``own_stand``). The peak of resident memory has the pages of
the mapped file of rows in it, which the system may drop: ``anonymous`` is what it may not, by
samples of every half second.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402

from benchmarks import common  # noqa: E402

NUM_TOPICS = 5000
# how far originals are from the centre of their topic, and copies from their original
TOPIC_RADIUS, COPY_RADIUS = 0.8, (0.02, 0.5)
EXPONENT, MOST_COPIES = 2.5, 10_000
# rows that are made at once
BLOCK = 1 << 16
TOLD = ("num_kept", "retention", "eps", "cells", "probes", "num_pairs", "recall_of_pairs")
TOLD += ("recall_in_sets", "num_sets", "largest_set", "largest_diameter")


def plant(path: Path, num_rows: int, width: int, seed: int) -> np.ndarray:
    """Write the rows, in random order; the original of each."""
    draw = np.random.default_rng(seed)
    sizes = np.arange(1, MOST_COPIES + 1)
    chances = sizes**-EXPONENT
    counts = draw.choice(sizes, num_rows, p=chances / chances.sum())
    originals = np.repeat(np.arange(num_rows), counts)[:num_rows]
    is_copy = np.r_[False, originals[1:] == originals[:-1]]
    ranks = 1 / np.arange(1, NUM_TOPICS + 1)
    topics = draw.choice(NUM_TOPICS, num_rows, p=ranks / ranks.sum())
    centres = unit(draw.standard_normal((NUM_TOPICS, width), np.float32))
    low, high = np.log(COPY_RADIUS)
    radii = np.exp(draw.uniform(low, high, num_rows)) * is_copy
    order = draw.permutation(num_rows)
    rows = np.lib.format.open_memmap(path, "w+", np.float32, (num_rows, width))
    for first in range(0, num_rows, BLOCK):
        some = order[first : first + BLOCK]
        # an original is made again for each of its copies, from a seed of its own
        own = originals[some]
        spread = unit(noise(own, width, seed))
        base = unit(centres[topics[own]] + TOPIC_RADIUS * spread)
        away = unit(draw.standard_normal((len(some), width), np.float32))
        rows[first : first + BLOCK] = unit(base + radii[some, None].astype(np.float32) * away)
    rows.flush()
    return originals[order]


def noise(numbers: np.ndarray, width: int, seed: int) -> np.ndarray:
    """Normal numbers that belong to each number."""
    unique, places = np.unique(numbers, return_inverse=True)
    made = [np.random.Generator(np.random.SFC64([seed, n])) for n in unique]
    return np.stack([g.standard_normal(width, np.float32) for g in made])[places]


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def run(words: Sequence[str]) -> dict[str, Any]:
    """Run the command; its time and memory.

    Raises:
        SystemExit: it failed.
    """
    start, anonymous = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", "kdengine.cli", *words], cwd=ROOT)
    while not (done := os.wait4(process.pid, os.WNOHANG))[0]:
        status = Path(f"/proc/{process.pid}/status").read_text()
        lines = [line.split() for line in status.splitlines() if line.startswith("RssAnon")]
        anonymous = max([anonymous, *(int(line[1]) for line in lines)])
        time.sleep(0.5)
    if done[1]:
        raise SystemExit(f"balance failed with status {done[1]}")
    return {
        "time_s": round(time.perf_counter() - start, 1),
        "cpu_time_s": round(done[2].ru_utime + done[2].ru_stime, 1),
        "peak_rss_mib": done[2].ru_maxrss // 1024,
        "anonymous_mib": anonymous // 1024,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--cells", type=int, help="in place of the command's choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="append one JSON line to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "rows.npy", Path(folder) / "out"
        originals = plant(path, options.rows, options.width, options.seed)
        words = ["balance", str(path), str(out)]
        words += ["--cells", str(options.cells)] if options.cells else []
        cost = run(words)
        told = json.loads((out / "manifest.json").read_text())
        stands, gone = np.load(out / "stands.npy"), ~np.load(out / "keep.npy")
    row = {
        "benchmark": "balance",
        "rows": options.rows,
        "width": options.width,
        "seed": options.seed,
        **cost,
        **{name: told[name] for name in TOLD},
        "copies": float(1 - len(np.unique(originals)) / options.rows),
        "own_stand": float((originals[stands[gone]] == originals[gone]).mean()),
        **common.machine(torch.device("cpu")),
    }
    common.append_json(options.json, row)
    print(json.dumps(row, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
