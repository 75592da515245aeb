# SPDX-License-Identifier: Apache-2.0
"""The op ``gradient`` on both backends: values, its own gradients, memory, refusals."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import losses, reference
from kdengine.ops import _backend, gradient, gradient_torch, similarity_product
from kdengine.ops.gradient import _backward, _forward
from kdengine.ops.gradient_blocks import _products, backward, forward

# numpy's, where a discarded branch of a kernel overflows
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
INTERPRETED = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)
SHAPES = [(1, 4), (2, 3), (63, 37), (130, 24)]
# relative errors of the gradients, and of their gradients; float16 rounds each strip
LOW = {
    ("torch", torch.float32): 1e-5,
    ("triton", torch.float32): 1e-5,
    ("triton", torch.float16): 4e-3,
}


def unit(rows: int, width: int) -> Tensor:
    return F.normalize(torch.randn(rows, width, dtype=torch.float64), dim=1)


def with_gradients(function: Any, x: Tensor, y: Tensor, scale: float, gain: float = 1.0) -> list:
    """The op's results, and the gradients of a random mix of them, scaled down by ``gain``."""
    x, y = (v.clone().requires_grad_() for v in (x, y))
    s = torch.tensor(scale, dtype=torch.float64).requires_grad_()
    found = function(x, y, s)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(v.shape, generator=generator, dtype=torch.float64) for v in found]
    total = gain * sum((w * v).sum() for w, v in zip(weights, found, strict=True))
    return [*found, *(v.double() / gain for v in torch.autograd.grad(total, (x, y, s)))]


@pytest.mark.parametrize("scale", [1e-3, 14.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_and_their_gradients_equal_autograd(shape: tuple, scale: float) -> None:
    x, y = unit(*shape), unit(*shape)
    ours = with_gradients(gradient, x, y, scale)
    truth = with_gradients(reference.info_nce_gradients, x, y, scale)
    for v, true_v in zip(ours, truth, strict=True):
        torch.testing.assert_close(v, true_v, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-3, 14.0, 100.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [pytest.param(*key, marks=INTERPRETED if key[0] == "triton" else ()) for key in LOW],
    ids=str,
)
def test_low_precision_is_close(
    backend: str, dtype: torch.dtype, shape: tuple, scale: float
) -> None:
    x, y = (unit(*shape).to(dtype) for _ in range(2))
    gain = shape[0] / scale if dtype == torch.float16 else 1.0
    ours = with_gradients(lambda *args: gradient(*args, backend=backend), x, y, scale, gain)
    truth = with_gradients(reference.info_nce_gradients, x.double(), y.double(), scale)
    dense = with_gradients(reference.info_nce_gradients, x.float(), y.float(), scale)
    for v, true_v, dense_v in zip(ours, truth, dense, strict=True):
        error, dense_error = ((w.double() - true_v).norm() for w in (v, dense_v))
        # float32 knows a logit of 100 to 6e-6, and its softmax to as much
        allowed = (1 + scale / 25) * LOW[backend, dtype] * true_v.norm() + 2 * dense_error
        assert error <= allowed + 1e-12, (error.item(), allowed.item())


class Threads:
    """A ``Spread`` over threads, of which one runs at a time."""

    def __init__(self, rank: int, board: list, barrier: threading.Barrier, turn: Any) -> None:
        self.rank, self.board, self.barrier, self.turn = rank, board, barrier, turn

    def _show(self, x: Tensor) -> list[Tensor]:
        self.board[self.rank] = x
        self.turn.release()
        self.barrier.wait()
        shown = list(self.board)
        self.barrier.wait()
        self.turn.acquire()
        return shown

    def gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._show(x))

    def to_owners(self, x: Tensor) -> Tensor:
        return torch.stack([y.chunk(len(self.board), 1)[self.rank] for y in self._show(x)])

    def sum_home(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        parts = [y.chunk(len(self.board))[self.rank] for y in self._show(x.to(dtype))]
        return torch.stack(parts).sum(0)


@pytest.mark.parametrize(
    ("backend", "dtype", "error"),
    [
        ("torch", torch.float64, 1e-11),
        ("torch", torch.float32, 1e-5),
        pytest.param("triton", torch.float32, 1e-5, marks=INTERPRETED),
    ],
)
@pytest.mark.parametrize("shape", [(1, 5), (45, 13)], ids=str)
def test_blocks_of_rows_are_those_of_the_whole(
    backend: str, dtype: torch.dtype, error: float, shape: tuple
) -> None:
    num_ranks, (rows, width) = 3, shape
    x, y, u, r = (unit(num_ranks * rows, width).to(dtype) for _ in range(4))
    # unequal lengths: ranks scale their own
    u[:rows] *= 1e-4
    scale = torch.tensor(9.0, dtype=dtype)
    leaves = [v.double().requires_grad_() for v in (x, y, scale)]
    truth = list(reference.info_nce_gradients(*leaves))
    total = (u.double() * truth[0]).sum() + (r.double() * truth[1]).sum()
    truth += torch.autograd.grad(total, leaves)
    board, barrier, turn = [None] * num_ranks, threading.Barrier(num_ranks), threading.Lock()

    def one_rank(rank: int) -> list[Tensor]:
        with turn:
            spread, own = Threads(rank, board, barrier, turn), slice(rank * rows, (rank + 1) * rows)
            *grads, of_rows, of_cols = forward(x[own], y, scale, spread, backend)
            stats = (of_rows, of_cols, grads)
            found = backward((u[own], r[own]), x[own], y, scale, *stats, spread, backend)
            return [*grads, *found]

    with ThreadPoolExecutor(num_ranks) as pool:
        *features, scales = zip(*pool.map(one_rank, range(num_ranks)), strict=True)
    found = [*(torch.cat(v) for v in features), torch.stack(scales).sum()]
    for v, true_v in zip(found, truth, strict=True):
        assert (v.double() - true_v).norm() <= error * true_v.norm()


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_backend.WORKSPACE, "cpu", 1)
    monkeypatch.setattr(similarity_product, "MIN_STRIP_ROWS", 3)
    leaves = [unit(7, 4), unit(7, 4), torch.tensor(6.0, dtype=torch.float64)]
    assert torch.autograd.gradcheck(gradient, [v.requires_grad_() for v in leaves])


def test_opcheck() -> None:
    leaves = [unit(5, 3).float(), unit(5, 3).float(), torch.tensor(6.0)]
    inputs = [v.requires_grad_() for v in leaves]
    torch.library.opcheck(_forward, (*inputs, "auto"))
    x, y, s = (v.detach() for v in leaves)
    g_x, g_y, rows, cols = _forward(x, y, s, "auto")
    torch.library.opcheck(_backward, (g_x, g_y, x, y, s, rows, cols, g_x, g_y, "auto"))
    torch.library.opcheck(_products, (x, y, s, rows, cols, rows, 0, g_x, g_y, "auto"))


def test_no_tensor_has_the_size_of_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest allocation of the backward is a strip."""
    rows, width = 512, 16
    budget = 4 * 32 * (similarity_product.NUM_BUFFERS * rows + 3 * width)
    monkeypatch.setitem(_backend.WORKSPACE, "cpu", budget)
    sizes = []
    real = gradient_torch.cut

    def seen(logits: Any, budget: int) -> Any:
        strips, buffer = real(logits, budget)
        sizes.append(buffer.numel())
        return strips, buffer

    monkeypatch.setattr(gradient_torch, "cut", seen)
    with_gradients(gradient, unit(rows, width).float(), unit(rows, width).float(), 10.0)
    assert sizes == [rows * 32]


def test_first_order_only_and_backends_by_name() -> None:
    x = unit(3, 2).requires_grad_()
    g_x, _ = gradient(x, x.detach(), torch.tensor(5.0, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="first order only"):
        torch.autograd.grad(g_x.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="float64"):
        gradient(x, x, torch.tensor(5.0), backend="triton")


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 3), (5, 3), (4, 3), (4, 3)), "text is .5, 3."),
        (((4, 3), (4, 3), (4, 2), (4, 2)), "project the student"),
        (((0, 3), (0, 3), (0, 3), (0, 3)), "at least one row"),
    ],
    ids=["rows", "width", "empty"],
)
def test_loss_refuses_with_advice(shapes: tuple, message: str) -> None:
    image, text, teacher_image, teacher_text = (torch.ones(*shape) for shape in shapes)
    with pytest.raises(ValueError, match=f"gradient: .*{message}"):
        losses.gradient(image, text, 10.0, teacher_image, teacher_text, 20.0)
