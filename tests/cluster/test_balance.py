# SPDX-License-Identifier: Apache-2.0
"""Semantic balance: planted copies found exactly, whatever the order, the shards and the way."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from kdengine import reference_assign as reference
from kdengine.cli import main
from kdengine.cluster import (
    Wanted,
    balance_command,
    candidates,
    kmeans,
    open_embeddings,
    picture,
)
from kdengine.cluster.forest import Forest, greedy_cover
from kdengine.cluster.search import Found
from kdengine.cluster.sets import Sets, central, diameter
from kdengine.data import ensure_index

WIDTH, EPS = 24, 0.05


def planted(num_single: int = 120, sizes: tuple[int, ...] = (3, 5, 7, 3, 9)) -> tuple:
    """Rows far from each other, sets of near copies of some, and the set of each row.

    A set is a centre and members around it, so that its most central member is the centre.
    """
    generator = torch.Generator().manual_seed(0)
    centers = F.normalize(torch.randn(num_single, WIDTH, generator=generator), dim=1)
    rows, owners, central_rows = [centers], list(range(num_single)), list(range(num_single))
    for number, size in enumerate(sizes):
        noise = F.normalize(torch.randn((size - 1) // 2, WIDTH, generator=generator), dim=1)
        noise = 0.02 * torch.cat([noise, -noise])
        rows.append(F.normalize(centers[number] + noise, dim=1))
        owners += [number] * len(noise)
    return torch.cat(rows), np.array(owners), np.array(central_rows)


def read(out: Path, name: str = "keep") -> np.ndarray:
    return np.load(out / f"{name}.npy")


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "manifest.json").read_text())


def partition(stands: np.ndarray) -> set[frozenset]:
    return {frozenset(np.flatnonzero(stands == x)) for x in np.unique(stands)}


def oracle_sets(rows: torch.Tensor, eps: float) -> np.ndarray:
    """The smallest number in the set of each row, by relaxation over all pairs."""
    pairs = reference.range_join(rows.double(), eps=eps).numpy()
    roots = np.arange(len(rows))
    while True:
        before = roots.copy()
        for i, j in pairs:
            roots[[i, j]] = min(roots[i], roots[j])
        if np.array_equal(before, roots):
            return roots


@pytest.mark.parametrize("cells", [0, 6], ids=["exact", "cells"])
@pytest.mark.parametrize("block", [32 << 20, 4 * WIDTH * 17], ids=["one block", "blocks"])
def test_planted_copies_are_found_and_the_centre_stays(
    cells: int, block: int, write_array: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kmeans, "BLOCK_BYTES", block)
    rows, owners, centers = planted()
    wanted = Wanted(eps=EPS, cells=cells)
    balance_command(write_array(rows), tmp_path / "out", wanted)
    assert np.array_equal(np.flatnonzero(read(tmp_path / "out")), centers)
    assert np.array_equal(read(tmp_path / "out", "stands"), owners)
    told = manifest(tmp_path / "out")
    assert told["num_sets"] == 5 and told["histogram"] == {"3": 2, "5": 1, "7": 1, "9": 1}
    assert told["eps"] == EPS and told["num_kept"] == 120
    assert told["largest_diameter"] <= 0.0401
    if cells:
        assert told["recall_of_pairs"] == told["recall_in_sets"] == 1.0


def test_order_changes_no_set(write_array: Any, tmp_path: Path) -> None:
    rows = planted()[0]
    rows = F.normalize(rows + 0.01 * torch.randn(rows.shape), dim=1)
    order = torch.randperm(len(rows))
    for name, x in (("plain", rows), ("shuffled", rows[order])):
        balance_command(write_array(x), tmp_path / name, Wanted(eps=0.9))
    stands = read(tmp_path / "plain", "stands")
    shuffled = order.numpy()[read(tmp_path / "shuffled", "stands")]
    again = np.empty_like(shuffled)
    again[order.numpy()] = shuffled
    assert partition(stands) == partition(again)
    large = np.bincount(stands, minlength=len(rows))[stands] > 2
    assert large.any() and np.array_equal(stands[large], again[large])


def test_shards_change_nothing(write_cache: Any, write_array: Any, tmp_path: Path) -> None:
    rows, owners, _ = planted()
    whole = write_array(rows)
    balance_command(whole, tmp_path / "whole", Wanted(eps=EPS))
    cuts = [0, 40, 41, 100, len(rows)]
    pieces = {
        f"{i}.tar-{i:012d}": rows[None, a:b]
        for i, (a, b) in enumerate(zip(cuts[:-1], cuts[1:], strict=True))
    }
    # the last one is written first
    cache = write_cache(tmp_path / "cache", dict(reversed(pieces.items())))
    balance_command(cache, tmp_path / "shards", Wanted(eps=EPS))
    folders = [tmp_path / "shards" / "shards" / name for name in pieces]
    for name in ("keep", "stands"):
        parts = np.concatenate([read(folder, name) for folder in folders])
        assert np.array_equal(parts, read(tmp_path / "whole", name))
    assert manifest(tmp_path / "shards")["histogram"] == manifest(tmp_path / "whole")["histogram"]


@pytest.mark.parametrize("rule", ["sets", "greedy", "random"])
@pytest.mark.parametrize("retention", [0.3, 0.563, 0.95])
def test_as_many_stay_as_asked(
    rule: Any, retention: float, write_array: Any, tmp_path: Path
) -> None:
    rows = F.normalize(torch.randn(400, 8), dim=1)
    path = write_array(rows)
    balance_command(path, tmp_path / "out", Wanted(rule=rule, retention=retention))
    keep, told = read(tmp_path / "out"), manifest(tmp_path / "out")
    assert keep.sum() == told["num_kept"]
    slack = 4 if rule == "greedy" else 0
    assert abs(keep.sum() - round(400 * retention)) <= slack
    if rule == "sets":
        # as they are read: once more made unit length
        rows = open_embeddings(path).read(0, 400)
        roots = oracle_sets(rows, told["eps"])
        assert partition(read(tmp_path / "out", "stands")) == partition(roots)
        assert len(np.unique(oracle_sets(rows, told["eps"] * (1 - 1e-9)))) > keep.sum()


def test_the_central_image_is_the_nearest_to_the_mean(write_array: Any, tmp_path: Path) -> None:
    rows = F.normalize(torch.randn(150, 6), dim=1)
    balance_command(write_array(rows), tmp_path / "out", Wanted(eps=0.45))
    stands = read(tmp_path / "out", "stands")
    found = [sorted(x) for x in partition(stands) if len(x) > 2]
    assert len(found) > 5
    for members in found:
        x = rows[members].double()
        kept = members[int((x - x.mean(0)).norm(dim=1).argmin())]
        assert set(stands[members]) == {kept}
    pairs = [sorted(x) for x in partition(stands) if len(x) == 2]
    assert pairs and all(stands[pair[1]] == pair[0] for pair in pairs)


def test_greedy_cover_keeps_in_order(write_array: Any, tmp_path: Path) -> None:
    rows = F.normalize(torch.randn(200, 6), dim=1)
    balance_command(write_array(rows), tmp_path / "out", Wanted(rule="greedy", eps=0.6))
    kept: list[int] = []
    for row in range(len(rows)):
        distances = (rows[kept].double() - rows[row].double()).norm(dim=1)
        if not bool((distances < 0.6).any()):
            kept.append(row)
    assert np.array_equal(np.flatnonzero(read(tmp_path / "out")), kept)
    stands = read(tmp_path / "out", "stands")
    away = (rows.double() - rows[stands].double()).norm(dim=1)
    assert bool((away < 0.6).all())


def test_a_forest_needs_no_edges_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdengine.cluster.forest.PENDING", 50)
    rows = torch.randn(90, 3, dtype=torch.float64)
    rows[40:50] = rows[:10]
    pairs = reference.range_join(rows, eps=1.0).numpy()
    lengths = (rows[pairs[:, 0]] - rows[pairs[:, 1]]).norm(dim=1).numpy()
    forest = Forest(90)
    for part in np.array_split(np.random.default_rng(0).permutation(len(pairs)), 9):
        forest.add(pairs[part], lengths[part])
        forest.add(pairs[part[:3]], lengths[part[:3]])
    assert len(pairs) > 300 and len(forest.lengths()) < 90
    for eps in (1e-12, 0.2, 0.4, 0.7, 1.0):
        assert np.array_equal(forest.sets(eps), oracle_sets(rows, eps))
        assert 90 - np.sum(forest.lengths() < eps) == len(np.unique(oracle_sets(rows, eps)))
    assert forest.threshold(90) == 0.0 and forest.threshold(0) is None


def test_a_cover_of_a_chain() -> None:
    chain = np.array([[0, 1], [1, 2], [2, 3], [3, 4]])
    assert greedy_cover(5, chain).tolist() == [0, 0, 2, 2, 4]


def test_a_mean_may_be_shared_and_a_set_may_be_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    square = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)
    assert central(square) == 0 and diameter(square, 0) == 2
    monkeypatch.setattr("kdengine.cluster.sets.EXACT_DIAMETER", 3)
    assert diameter(square, 2) == 2


def test_cells_lose_few_pairs_and_say_how_many(write_array: Any, tmp_path: Path) -> None:
    rows = F.normalize(torch.randn(1500, 6), dim=1)
    path = write_array(rows)
    balance_command(path, tmp_path / "all", Wanted(eps=0.25))
    told = []
    for probes in (0, 4):
        out = tmp_path / f"cells-{probes}"
        balance_command(path, out, Wanted(eps=0.25, cells=20, probes=probes))
        told.append(manifest(out))
    assert told[0]["recall_of_pairs"] < told[1]["recall_of_pairs"] <= 1
    assert told[1]["recall_of_pairs"] > 0.97
    assert told[0]["num_kept"] > told[1]["num_kept"] >= manifest(tmp_path / "all")["num_kept"]
    # what the sample says is what holds for all pairs
    pairs = reference.range_join(rows.double(), eps=0.25).numpy()
    cells = candidates.make_cells(
        open_embeddings(path), 20, 0, 0, torch.device("cpu"), lambda more: None
    )
    exact = cells.are_candidates(pairs).mean()
    assert told[0]["recall_of_pairs"] == pytest.approx(exact, abs=0.03)


def test_removed_images_are_shown_beside_those_that_stay(
    scenes: Path, write_cache: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = str(next(scenes.glob("*train*.tar")))
    (shard,) = (index := ensure_index(shards)).shards
    rows = F.normalize(torch.randn(shard.num_samples, WIDTH), dim=1)
    rows[10:14] = F.normalize(rows[3] + 0.01 * torch.randn(4, WIDTH), dim=1)
    cache = write_cache(tmp_path / "cache", {shard.label: rows[None]})
    balance_command(cache, tmp_path / "out", Wanted(eps=0.2), shards=shards)
    page = (tmp_path / "out" / "removed.html").read_text()
    assert page.count("<figure") == 5 and page.count('class="kept"') == 1
    assert "4 of 48 images removed" in page
    # distances as the threshold is one, and how wide the set is
    x = F.normalize(rows, dim=1).double()
    (kept,) = {int(row) for row in np.load(next((tmp_path / "out").rglob("stands.npy")))[10:14]}
    for row in {3, 10, 11, 12, 13} - {kept}:
        assert f"{float((x[row] - x[kept]).norm()):.5f} \u00b7 {index.key(row)}" in page
    own = x[[3, 10, 11, 12, 13]]
    assert f"5 images, up to {float(torch.cdist(own, own).max()):.5f} apart<" in page
    assert "Rule &#x27;sets&#x27;: images closer" in page and "a distance of 0.20000" in page
    assert 'href="balance.svg"' in page and "chains" not in page
    assert all(index.key(n) in page for n in (3, 10, 11, 12, 13))
    assert Image.open(io.BytesIO(index.image_bytes(10))).size == (64, 64)
    narrow = 0.9 * manifest(tmp_path / "out")["largest_diameter"]
    balance_command(cache, tmp_path / "chain", Wanted(eps=narrow), shards=shards)
    page = (tmp_path / "chain" / "removed.html").read_text()
    assert "100.0% of the sets are wider than the threshold: chains" in page
    assert page.count("apart, wider than the threshold<") == 1
    balance_command(cache, tmp_path / "greedy", Wanted(eps=0.2, rule="greedy"), shards=shards)
    page = (tmp_path / "greedy" / "removed.html").read_text()
    assert "Rule &#x27;greedy&#x27;" in page and "balance.svg" not in page
    # its shards are those of the embeddings, or there is nothing to show: said before the search
    monkeypatch.setattr("kdengine.cluster.balance.Search", None)
    other = str(next(scenes.glob("*val*.tar")))
    with pytest.raises(ValueError, match="none of the shards .* is one whose embeddings"):
        balance_command(cache, tmp_path / "more", Wanted(eps=0.2), shards=other)
    # what was written is what training takes
    assert index.keep(tmp_path / "out").num_read == 44


def test_another_result_is_not_overwritten(
    scenes: Path, write_cache: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = str(next(scenes.glob("*train*.tar")))
    (shard,) = ensure_index(shards).shards
    rows = F.normalize(torch.randn(shard.num_samples, WIDTH), dim=1)
    rows[10:14] = F.normalize(rows[3] + 0.01 * torch.randn(4, WIDTH), dim=1)
    cache = write_cache(tmp_path / "cache", {shard.label: rows[None]})
    out = tmp_path / "out"

    def files() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    balance_command(cache, out, Wanted(eps=0.2), shards=shards)
    before = files()
    assert str(out / "removed.html") in before
    for wanted, message in (
        (Wanted(eps=0.3), "holds another result: --eps 0.2, not 0.3; give the options it was made"),
        (Wanted(eps=0.2, rule="greedy", seed=1), "--rule sets, not greedy; --seed 0, not 1; give"),
        (Wanted(retention=0.5), "--eps 0.2, not none"),
    ):
        with pytest.raises(ValueError, match=message):
            balance_command(cache, out, wanted)
    assert files() == before
    # the same again searches nothing and writes the page where it is asked for
    (out / "removed.html").unlink()
    monkeypatch.setattr("kdengine.cluster.balance.Search", None)
    balance_command(cache, out, Wanted(eps=0.2), shards=shards)
    assert files() == before


@pytest.mark.parametrize("largest", [2, 9, 14_000])
def test_numbers_of_the_plot_are_plain(largest: int, tmp_path: Path) -> None:
    sets = Sets(np.arange(0), np.array([2, 2, largest]), np.array([0.1, 0.2, 0.3]))
    found = Found(np.arange(0), np.ones(0), 0.4, sets, np.linspace(0, 1, 9))
    picture.draw(tmp_path / "a.svg", found, 20_000)
    plot = (tmp_path / "a.svg").read_text()
    assert "$" not in plot and "mathdefault" not in plot
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", plot)
    for label in {2: ["1", "2"], 9: ["2", "5"], 14_000: ["10", "10,000"]}[largest]:
        assert labels.count(label) >= 2
    assert len(labels) < 50


def test_the_command_tells_what_it_found(
    write_array: Any, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path, out = str(write_array(planted()[0])), str(tmp_path / "out")
    assert main(["balance", path, out, "--eps", "0.05"]) == 0
    told = capsys.readouterr().out
    assert "balance.svg" in told
    assert "120 of 142, 84.51%" in told and f"--data.keep {out}" in told.replace("\n", "")
    assert (tmp_path / "out" / "balance.svg").read_text().count("<g id") > 10
    # the same again is told again
    assert main(["balance", path, out, "--eps", "0.05"]) == 0
    assert capsys.readouterr().out == told
    assert main(["balance", path, str(tmp_path / "any"), "--rule", "random"]) == 0
    assert "80 of 142" in capsys.readouterr().out
    for words, message in (
        (
            [path, out, "--retention", "0"],
            "balance: expected --retention above 0 and up to 1, got 0.0",
        ),
        ([path, out, "--eps", "2.5"], "balance: expected --eps between 0 and 2, got 2.5"),
        (
            [path, out, "--eps", "0.1", "--retention", "0.5"],
            "balance: --eps says how many images stay, and so does --retention; got 0.1 and 0.5",
        ),
        (
            [path, out, "--rule", "random", "--shards", "x.tar"],
            "balance: of what --rule random removes there is no page",
        ),
        ([path, out, "--rule", "random", "--eps", "1"], "balance: --rule random has no threshold"),
        ([path, out, "--probes", "-1"], "balance: --cells and --probes must be at least 0"),
        ([path, str(tmp_path), "--eps", "1"], f"balance: {tmp_path} is not empty and holds no"),
        (["/nowhere", out], "embeddings: /nowhere does not exist"),
    ):
        assert main(["balance", *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}") and error.count("\n") == 1
