# SPDX-License-Identifier: Apache-2.0
"""Time and objective of spherical k-means: ``kdengine cluster`` against faiss.

    OMP_NUM_THREADS=2 python benchmarks/bench_kmeans.py [--rows 100000] [--k 1000] [--json FILE]

Unit rows around k random centres, as many iterations for both, from k rows drawn at random, labels
of all rows in the end. Ours is the whole command: it reads the rows from a file, keeps its state
after every iteration and writes what it found. ``faiss`` is ``Kmeans(spherical=True)`` on the CPU,
of all rows, which are in memory, and one search for the labels. The objective is the mean squared
distance of all rows to their nearest centroid in float64; ours gets no time if it is more than 1 %
above that of faiss.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import faiss
import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import common, race  # noqa: E402
from benchmarks.bench_assign import make_rows  # noqa: E402
from kdengine.cluster import cluster_command  # noqa: E402

COLUMNS = ["backend", "iterations", "s", "p20-p80", "vs faiss", "objective", "of faiss's"]
# of the objective above that of faiss
SLACK = 0.01


def ours(path: Path, k: int, iterations: int) -> Tensor:
    """Centroids by the command, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        cluster_command(path, folder, k=k, iterations=iterations, tolerance=0.0)
        return torch.from_numpy(np.load(Path(folder) / "centroids.npy"))


def by_faiss(rows: np.ndarray, k: int, iterations: int) -> Tensor:
    """Centroids by faiss, which would take 256 rows a centroid unless it is told otherwise."""
    found = faiss.Kmeans(
        rows.shape[1], k, niter=iterations, spherical=True, max_points_per_centroid=len(rows)
    )
    found.train(rows)
    found.assign(rows)
    return torch.from_numpy(found.centroids)


def objective(rows: Tensor, centroids: Tensor) -> float:
    """Mean squared distance to the nearest, in float64."""
    key = centroids.double()
    lengths = key.square().sum(1)
    total = 0.0
    for x in rows.double().split(4096):
        nearest = (lengths - 2 * x @ key.T).amin(1)
        total += float((x.square().sum(1) + nearest).sum())
    return total / len(rows)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--k", type=int, default=1000)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing, about")
    common.add_clock_option(parser)
    parser.add_argument("--json", help="append one JSON line a row to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    device = torch.device("cpu")
    rows, _ = make_rows(options.rows, 2 * options.k, options.width, device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        np.save(path, rows.numpy())
        asked = (options.k, options.iterations)
        field: dict[str, Callable[[], Tensor]] = {
            "torch": lambda: ours(path, *asked),
            "faiss": lambda: by_faiss(rows.numpy(), *asked),
        }
        objectives = {name: objective(rows, run()) for name, run in field.items()}
        right = objectives["torch"] <= (1 + SLACK) * objectives["faiss"]
        if not right:
            print(f"no time: objectives are {objectives}")
            return race.WRONG
        times = common.time_interleaved(field, device, options.seconds, options.clock)
    shown = []
    for name, time in times.items():
        row = {
            "benchmark": "kmeans",
            "rows": options.rows,
            "size": options.k,
            "width": options.width,
            "dtype": "float32",
            "backend": name,
            "iterations": options.iterations,
            "time": time._asdict(),
            "clock": options.clock,
            "time_vs_faiss": time.median_ms / times["faiss"].median_ms,
            "objective": objectives[name],
            "objective_vs_faiss": objectives[name] / objectives["faiss"],
            "faiss": common.version("faiss-cpu"),
        }
        common.append_json(options.json, {**row, **common.machine(device)})
        seconds = [x / 1e3 for x in time]
        shown.append(
            [
                name,
                str(options.iterations),
                f"{seconds[0]:.1f}",
                f"{seconds[1]:.1f}-{seconds[2]:.1f}",
                f"{row['time_vs_faiss']:.2f}",
                f"{objectives[name]:.5f}",
                f"{row['objective_vs_faiss']:.4f}",
            ]
        )
    common.show(f"k-means {options.rows} x {options.width}, k = {options.k}", COLUMNS, shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
