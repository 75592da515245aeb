# SPDX-License-Identifier: Apache-2.0
"""A model of a loss's time over many ranks: measured compute, stated links.

    python benchmarks/distributed_model.py FILE.jsonl --out FILE.svg [--rows 1048576]

FILE has rows of ``bench_distributed.py --cases emulation``. Assumed:

* compute: each product of the b x N block at the rate of the emulation whose b is nearest; a chunk
  costs its share of the block's work;
* a link: ``Link``, the same for every rank; a collective takes its bytes over the bandwidth and one
  hop's latency for each other rank, as in a ring; collectives of a rank queue up;
* ours: chunks out while blocks are computed, one all-to-all of column statistics between forward
  and backward and one of their gradients, both exposed, chunks home while blocks are computed, by
  an all-to-all within nodes of eight at the bandwidth of a link, then one between nodes of an
  eighth of the bytes;
* open_clip: its gathers, its products (8 U with a teacher, 6 without; at our rate, although no GPU
  could hold its matrices) and its reduce-scatters one after the other;
* the towers take ``--towers-us`` a sample, data parallel; the sum of their gradients is not in it.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

UNITS = {"InfoNCE": (4, 6), "InfoNCE+CRD": (6, 8)}
# numbers a column: others, positive, mean, and four of a teacher
STATISTICS = {"InfoNCE": 3, "InfoNCE+CRD": 7}
MAX_RANKS = 4096
PER_NODE = 8
TOWERS_US = 700.0


class Link(NamedTuple):
    """What a rank's collectives run at.

    Attributes:
        bandwidth: bytes a second, of a large all-gather: inside a node over NVLink; a node's eight
            adapters of 50 GB/s carry one copy for its eight GPUs, which is faster.
        all_to_all: bytes a second, where every rank has something else to get: its adapter.
        hop_s: latency of one rank to the next, an eighth of them between nodes.
    """

    bandwidth: float = 350e9
    all_to_all: float = 50e9
    hop_s: float = 1.5e-6


class Case(NamedTuple):
    """A loss of one rank: b rows of N, widths of student and teacher, bytes of a number."""

    objective: str
    ranks: int
    rows: int
    width: int
    itemsize: int

    @property
    def matrices(self) -> int:
        """Student's, and the teacher's if there is one."""
        return 1 if self.objective == "InfoNCE" else 2

    def unit_s(self, rate: float) -> float:
        """Seconds of one product of the b x N block at ``rate`` FLOP/s."""
        return 2 * self.rows**2 * self.ranks * self.width / rate


def num_chunks(case: Case) -> int:
    """What ``Exchange`` takes."""
    from kdengine.distributed import default_chunks

    row_bytes = case.matrices * case.width * case.itemsize
    return default_chunks(case.ranks, case.rows, case.rows * row_bytes)


def home_s(case: Case, num_bytes: float, link: Link) -> float:
    """Seconds in which ``num_bytes`` of each rank's rows get to the owners that add them up."""
    mates = min(case.ranks, PER_NODE)
    nodes = case.ranks / mates
    within = (mates - 1) * nodes * num_bytes / link.bandwidth
    between = (nodes - 1) * num_bytes / link.all_to_all
    return within + between + (mates - 1 + nodes - 1) * link.hop_s


def ours_s(case: Case, rate: float, link: Link) -> tuple[float, float]:
    """Seconds of the loss forward and backward, and those of them that are communication."""
    chunks = num_chunks(case)
    units = UNITS[case.objective][0]
    forward = case.matrices * case.unit_s(rate)
    backward = (units - case.matrices) * case.unit_s(rate)
    others = (case.ranks - 1) * case.rows * case.width * case.itemsize / chunks
    latency = (case.ranks - 1) * link.hop_s
    out = others * case.matrices / link.bandwidth + latency
    home = home_s(case, case.rows * case.width * case.itemsize / chunks, link)
    own, rest = 1 / case.ranks, (case.ranks - 1) / case.ranks / chunks
    # forward: the own block, then each chunk when it is there
    now = own * forward
    for chunk in range(1, chunks + 1):
        now = max(now, chunk * out) + rest * forward
    # backward: each chunk's gradient leaves when it is made and the one before has left
    sent, made = 0.0, 0.0
    for _ in range(chunks):
        made += rest * backward
        sent = max(sent, made) + home
    now += max(sent, made + own * backward)
    columns = (case.ranks - 1) * case.rows * STATISTICS[case.objective] * 4
    now += 2 * (columns / link.all_to_all + latency)
    return now, now - forward - backward


def open_clip_s(case: Case, rate: float, link: Link) -> tuple[float, float]:
    """The same of open_clip's ``local_loss`` with ``gather_with_grad``."""
    others = (case.ranks - 1) * case.rows * case.width * case.itemsize
    # image and text out, of both; the gradients of both home
    collectives = 2 * case.matrices + 2
    wait = collectives * (others / link.bandwidth + (case.ranks - 1) * link.hop_s)
    return wait + UNITS[case.objective][1] * case.unit_s(rate), wait


def rates(rows: Sequence[dict[str, Any]], objective: str) -> dict[int, float]:
    """FLOP/s of the emulations of an objective with default chunks, by b; the largest N counts."""
    found: dict[int, tuple[int, float]] = {}
    for row in rows:
        fits = row.get("case") == "emulation" and row.get("objective") == objective
        if fits and row["backend"] == "kdengine" and row["variant"] == "default chunks":
            flops = UNITS[objective][0] * 2 * row["rows"] ** 2 * row["size"] * row["width"]
            rate = flops / (1e-3 * row["loss_ms"])
            found[row["rows"]] = max(found.get(row["rows"], (0, 0.0)), (row["size"], rate))
    return {b: rate for b, (_, rate) in found.items()}


def model(
    rows: Sequence[dict[str, Any]], total: int, towers_us: float, link: Link
) -> list[dict[str, Any]]:
    """A row for each objective and number of ranks, 8 to 4096."""
    found = []
    for objective in UNITS:
        by_rows = rates(rows, objective)
        if not by_rows:
            continue
        like = next(row for row in rows if row.get("case") == "emulation")
        itemsize = 2 if like["dtype"] == "bfloat16" else 4
        ranks = 8
        while ranks <= MAX_RANKS and ranks <= total:
            case = Case(objective, ranks, total // ranks, like["width"], itemsize)
            nearest = min(by_rows, key=lambda b: abs(math.log(b / case.rows)))
            for backend, seconds in (("kdengine", ours_s), ("open_clip", open_clip_s)):
                loss_s, waits_s = seconds(case, by_rows[nearest], link)
                found.append(
                    {
                        "case": "model",
                        "objective": objective,
                        "backend": backend,
                        "size": ranks,
                        "rows": case.rows,
                        "width": case.width,
                        "dtype": like["dtype"],
                        "device": like["device"],
                        "variant": f"{num_chunks(case)} chunks" if backend == "kdengine" else "",
                        "loss_ms": 1e3 * loss_s,
                        "exposed_ms": 1e3 * waits_s,
                        "step_ms": 1e3 * loss_s + 1e-3 * towers_us * case.rows,
                        "measured_rows": nearest,
                        "tflops": by_rows[nearest] / 1e12,
                    }
                )
            ranks *= 2
    return found


def assumptions(rows: Sequence[dict[str, Any]], total: int, towers_us: float, link: Link) -> str:
    """In one line, for the table and the figure."""
    rate = ", ".join(f"{x:.3g}" for x in sorted({row["tflops"] for row in rows}))
    return (
        f"N = {total:,}; products at {rate} TFLOP/s (measured on {rows[0]['device']}); "
        f"collectives at {link.bandwidth / 1e9:g} GB/s a rank, "
        f"all-to-all {link.all_to_all / 1e9:g}, {1e6 * link.hop_s:g} us a hop; "
        f"towers {towers_us:g} us a sample (assumed)"
    )


def draw(rows: Sequence[dict[str, Any]], title: str, out: Path) -> None:
    """Times against the number of ranks; the ending of ``out`` says which format."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    colours = {"kdengine": "#c1272d", "open_clip": "#222222"}
    figure, grid = plt.subplots(
        1, len(UNITS), figsize=(5.2 * len(UNITS), 4.0), squeeze=False, layout="constrained"
    )
    for axes, objective in zip(grid[0], UNITS, strict=True):
        for backend, colour in colours.items():
            own = [r for r in rows if r["objective"] == objective and r["backend"] == backend]
            for key, style in (("step_ms", ":"), ("loss_ms", "-"), ("exposed_ms", "--")):
                words = {
                    "step_ms": "step",
                    "loss_ms": "loss",
                    "exposed_ms": "exposed communication",
                }
                axes.plot(
                    [r["size"] for r in own],
                    [r[key] for r in own],
                    style,
                    color=colour,
                    label=f"{backend}: {words[key]}",
                )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        sizes = sorted({r["size"] for r in rows})
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30, ha="right")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(objective, fontsize=10)
        axes.set_xlabel("ranks")
        axes.set_ylabel("ms (model)")
        axes.grid(True, color="#dddddd", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=8)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(out, dpi=150)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", help="results of bench_distributed.py")
    parser.add_argument("--out", type=Path, required=True, help="PNG or SVG")
    parser.add_argument("--rows", type=int, default=1 << 20, help="the global batch N")
    parser.add_argument("--towers-us", type=float, default=TOWERS_US, help="a sample, assumed")
    options = parser.parse_args(arguments)
    measured = [json.loads(x) for f in options.files for x in f.read_text().splitlines()]
    rows = model(measured, options.rows, options.towers_us, Link())
    if not rows:
        sys.exit("distributed_model: rows of --cases emulation are needed; none came")
    title = assumptions(rows, options.rows, options.towers_us, Link())
    print(title)
    draw(rows, title, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
