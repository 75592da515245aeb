# SPDX-License-Identifier: Apache-2.0
"""Blocks of columns give what the whole matrix gives, on every backend, without other processes."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import reference
from kdengine.distributed import Block, Exchange
from kdengine.losses import inputs, merging
from kdengine.losses.streamed import streamed
from kdengine.ops import Statistics, similarity

ROWS, KEYS, RANKS, OWN, WIDTH = 9, 6, 3, 1, 16
FIRST_ROW = OWN * ROWS
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)
BACKENDS = ["torch", pytest.param("triton", marks=interpreted)]


class Rehearsal(Exchange):
    """One of three ranks; the others' rows are known, and what it sends them is kept."""

    def __init__(self, everything: list[Tensor], **options: Any) -> None:
        super().__init__(None, **options)
        self.world_size, self.rank, self.everything = RANKS, OWN, everything
        self.home = torch.zeros_like(everything[0])
        self.others = [r for r in range(RANKS) if r != OWN]
        self.widths: list[list[int]] = []

    def _gather(self, block: Block, tensors: list[Tensor]) -> Callable[[], Block]:
        self.widths.append([x.shape[-1] for x in tensors])
        asked = [x for x in self.everything if any(torch.equal(own(x), t) for t in tensors)]
        ranks = [x.unflatten(0, (RANKS, KEYS))[self.others] for x in asked]
        return lambda: block._replace(tensors=[x[:, block.part].flatten(0, 1) for x in ranks])

    def start_home(self, gradient: Tensor, part: slice) -> Any:
        sent = gradient.unflatten(0, (len(self.others), -1))
        self.home.unflatten(0, (RANKS, KEYS))[self.others, part] += sent
        return SimpleNamespace(advance=lambda: None, arrive=lambda: torch.zeros_like(sent[0]))


def unit(rows: int, width: int = WIDTH) -> Tensor:
    return F.normalize(torch.randn(rows, width), dim=1)


def own(x: Tensor) -> Tensor:
    return x.tensor_split(RANKS)[OWN].clone()


def weighted(sides: list[Statistics | None], weights: list[Tensor]) -> Tensor:
    """A number that depends on everything which has a gradient."""
    wanted = [x for side in sides if side for x in (side.others, side.positive, side.gap)]
    return sum((w[: x.numel()] * x.flatten()).sum() for w, x in zip(weights, wanted, strict=False))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["one chunk", "4 chunks", "4 chunks, regathered"])
@pytest.mark.parametrize(
    ("sides", "learned"),
    [
        pytest.param((True, True, True, True), True, id="all"),
        pytest.param((True, True, False, False), True, id="InfoNCE"),
        pytest.param((True, False, True, False), True, id="rows of a teacher"),
        pytest.param((False, True, False, True), True, id="columns"),
        pytest.param((True, False, False, False), False, id="constant keys"),
    ],
)
def test_blocks_equal_the_whole(backend: str, how: str, sides: tuple, learned: bool) -> None:
    query, key, scale = unit(ROWS), unit(RANKS * KEYS), torch.tensor(9.0)
    teacher = [unit(ROWS, 8)], [unit(RANKS * KEYS, 8)]
    teacher_scale = torch.tensor([20.0])
    labels = torch.randint(0, RANKS * KEYS, (ROWS,))
    col_labels = torch.randint(0, RANKS * ROWS, (RANKS * KEYS,))
    weights = [torch.randn(RANKS * KEYS) for _ in range(6)]
    leaves = [query.clone().requires_grad_(), key.clone().requires_grad_(learned)]
    leaves.append(scale.clone().requires_grad_())
    names = dict(zip(("rows", "cols", "soft_rows", "soft_cols"), sides, strict=True))
    whole = similarity(
        *leaves,
        labels,
        col_labels - FIRST_ROW,
        teacher_query=teacher[0],
        teacher_key=teacher[1],
        teacher_scale=teacher_scale,
        **names,
        backend=backend,
    )
    value = weighted(list(whole), weights)
    expected = torch.autograd.grad(value, [x for x in leaves if x.requires_grad])

    given = [col_labels] if sides[1] else []
    exchange = Rehearsal(
        [key, *teacher[1], *given],
        num_chunks=1 if how == "one chunk" else 4,
        regather="regathered" in how,
    )
    mine = [query.clone().requires_grad_(), own(key).requires_grad_(learned)]
    mine.append(scale.clone().requires_grad_())
    features = inputs.Features(
        *mine, teacher[0], [own(v) for v in teacher[1]], teacher_scale, torch.float32
    )
    found = streamed(exchange, features, labels, own(col_labels), FIRST_ROW, sides, False, backend)
    for side, wanted in zip(found, whole, strict=True):
        assert (side is None) == (wanted is None)
        if side is not None and wanted is not None:
            near(merging.pack(side).flatten(1), merging.pack(wanted))
    gradients = torch.autograd.grad(
        weighted(list(found), weights), [x for x in mine if x.requires_grad]
    )
    near(gradients[0], expected[0])
    near(gradients[-1], expected[-1])
    if learned:
        all_keys = exchange.home.clone()
        all_keys.unflatten(0, (RANKS, KEYS))[OWN] += gradients[1]
        near(all_keys, expected[1])


def near(x: Tensor, y: Tensor) -> None:
    assert x.shape == y.shape and (x - y).norm() <= 3e-6 * y.norm()


def test_a_constant_that_is_here_travels_no_more() -> None:
    key, teacher = unit(RANKS * KEYS), unit(RANKS * KEYS, 8)
    mine = [own(key), own(teacher)]
    exchange = Rehearsal([key, teacher], num_chunks=4)

    def rows_of(tensors: list[Tensor]) -> list[Tensor]:
        """All ranks' rows, put together from the blocks."""
        whole = [torch.empty(RANKS, *x.shape) for x in tensors]
        for block in exchange.blocks(tensors):
            for x, rows in zip(whole, block.tensors, strict=True):
                block.put_rows(x, rows)
        return [x.flatten(0, 1) for x in whole]

    with exchange.once(mine[1]):
        for asked, moves in ((mine, [WIDTH, 8]), (mine, [WIDTH]), (mine[1:], []), (mine, [WIDTH])):
            exchange.widths.clear()
            found = rows_of(asked)
            expected = [key, teacher][-len(asked) :]
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
            assert exchange.widths == [moves] * 4
        assert torch.equal(exchange.gather(mine[1]), teacher)
    exchange.widths.clear()
    rows_of(mine)
    assert exchange.widths == [[WIDTH, 8]] * 4
    with pytest.raises(ValueError, match="expected constants"), exchange.once(key.requires_grad_()):
        pass


def test_second_derivatives_are_refused() -> None:
    x, key = unit(ROWS).requires_grad_(), unit(RANKS * KEYS)
    y = own(key).requires_grad_()
    features = inputs.Features(x, y, torch.tensor(3.0), [], [], torch.zeros(0), torch.float32)
    exchange = Rehearsal([key])
    labels, sides = torch.arange(ROWS), (True, True, False, False)
    rows, _ = streamed(exchange, features, labels, None, FIRST_ROW, sides, False, "torch")
    assert rows is not None
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(rows.others.sum(), x, create_graph=True)


class Thread(Exchange):
    """One of many ranks, each a thread of this process."""

    def __init__(self, rank: int, board: list, barrier: threading.Barrier, per_node: int) -> None:
        super().__init__(None, per_node=per_node)
        self.world_size, self.rank, self.board, self.barrier = len(board), rank, board, barrier

    def _begin(
        self, what: str, collective: Callable, received: Tensor, sent: Tensor, **options: Any
    ) -> Callable[[], None]:
        self.board[self.rank] = sent.split(options["input_split_sizes"])
        self.barrier.wait()
        pieces = [theirs[self.rank] for theirs in self.board]
        assert [len(x) for x in pieces] == options["output_split_sizes"]
        received.copy_(torch.cat(pieces))
        self.barrier.wait()
        return lambda: None


def key_gradients(x: Tensor, y: Tensor, scale: float, world_size: int) -> list[Tensor]:
    """What the rows of each rank say about all keys of InfoNCE."""
    features = x, y, torch.tensor(scale)
    own, none = torch.arange(len(x)), torch.empty(0)
    sides = (True, True, False, False, False, False, False)
    stats = torch.ops.kdengine.similarity_forward(
        *features, own, own, [], [], none, *sides, "torch"
    )[:4]
    wanted = [(s[0] - s[1]).sigmoid() / (2 * len(x)) for s in stats[:2]]
    row_grads, col_grads = (torch.stack([w, -w]) for w in wanted)
    return [
        torch.ops.kdengine.similarity_backward(
            *([row_grads[:, rows], col_grads, *stats[2:]], x[rows], *features[1:]),
            *(own[rows], own - rows[0], [], [], none, [stats[0][:, rows], *stats[1:]]),
            *(none.view(0, 0, 0), False, True, False, "torch"),
        )[1]
        for rows in own.chunk(world_size)
    ]


@pytest.mark.parametrize(("world_size", "per_node"), [(8, 0), (64, 0), (64, 8), (6, 4)])
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_bfloat16_gradients_are_as_exact_for_any_number_of_ranks(
    world_size: int, per_node: int, scale: float
) -> None:
    x = unit(8 * world_size, 64)
    y = F.normalize(x + 0.06 * torch.randn_like(x), dim=1)
    x, y = x.bfloat16(), y.bfloat16()
    leaf = y.double().requires_grad_()
    truth = torch.autograd.grad(reference.info_nce(x.double(), leaf, scale), leaf)[0]
    said = key_gradients(x, y, scale, world_size)
    board, barrier = [None] * world_size, threading.Barrier(world_size, timeout=30)
    with ThreadPoolExecutor(world_size) as pool:
        found = pool.map(
            lambda r: Thread(r, board, barrier, per_node).sum_home(said[r], torch.bfloat16),
            range(world_size),
        )
        mine = torch.cat(list(found)).bfloat16()
    error, around_a_ring = (
        (z.double() - truth).norm() / truth.norm() for z in (mine, sum(said, torch.zeros_like(y)))
    )
    assert error < 4e-3
    if world_size == 64 and scale < 100:
        assert around_a_ring > 8e-3
