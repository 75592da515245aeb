# SPDX-License-Identifier: Apache-2.0
"""The op ``similarity`` on torch: dense truth, custom op contract, strips, memory, refusals."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kdengine.ops import (
    Statistics,
    _backend,
    set_workspace,
    similarity,
    similarity_product,
    similarity_torch,
)
from kdengine.ops.similarity import _backward, _forward

SHAPES = [
    (1, 1, 1, 1),
    (2, 3, 5, 2),
    (3, 2, 7, 11),
    (63, 65, 37, 13),
    (127, 63, 31, 64),
    (65, 127, 8, 3),
]


def unit(rows: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(torch.randn(rows, width, dtype=torch.float64), dim=1).to(dtype)


def problem(num_rows: int, num_cols: int, width: int, teacher_width: int) -> dict:
    """Two teachers, labels that repeat, and some rows and columns without a positive."""
    labels = torch.randint(0, num_cols, (num_rows,))
    col_labels = torch.randint(0, num_rows, (num_cols,))
    labels[5::7], col_labels[5::7] = -1, num_rows
    return {
        "query": unit(num_rows, width),
        "key": unit(num_cols, width),
        "scale": torch.tensor(9.0, dtype=torch.float64),
        "labels": labels,
        "col_labels": col_labels,
        "teacher_query": [unit(num_rows, teacher_width), unit(num_rows, width)],
        "teacher_key": [unit(num_cols, teacher_width), unit(num_cols, width)],
        "teacher_scale": torch.tensor([20.0, 3.0], dtype=torch.float64),
    }


def dense_side(z: Tensor, teachers: list[Tensor], labels: Tensor) -> Statistics:
    cells = labels[:, None] == torch.arange(z.shape[1])

    def others(x: Tensor) -> Tensor:
        return x.masked_fill(cells, -torch.inf).logsumexp(1)

    def mean(weights: Tensor, x: Tensor) -> Tensor:
        p = weights.masked_fill(cells, -torch.inf).softmax(1).nan_to_num(0)
        return (p * x).sum(1)

    return Statistics(
        others(z),
        (z * cells).sum(1),
        mean(z, z),
        torch.stack([others(t) for t in teachers]),
        torch.stack([(t * cells).sum(1) for t in teachers]),
        torch.stack([mean(t, t - z) for t in teachers]),
        torch.stack([mean(t, t) for t in teachers]),
    )


def dense(p: dict) -> tuple[Statistics, Statistics]:
    z = p["scale"] * p["query"] @ p["key"].T
    teachers = [
        r * u @ v.T
        for u, v, r in zip(p["teacher_query"], p["teacher_key"], p["teacher_scale"], strict=True)
    ]
    rows = dense_side(z, teachers, p["labels"])
    cols = dense_side(z.T, [t.T for t in teachers], p["col_labels"])
    return rows, cols


def run(p: dict, **options) -> tuple[Statistics, Statistics]:
    options = {"soft_rows": True, "soft_cols": True, "means": True} | options
    return similarity(**p, **options)


def with_gradients(function, p: dict, names: tuple[str, ...] = ("query", "key", "scale")) -> tuple:
    """All statistics, and the gradients of a sum of them with random weights."""
    p = p | {name: p[name].detach().clone().requires_grad_() for name in names}
    outputs = [x for side in function(p) for x in side]
    learned = [side[i] for side in (outputs[:7], outputs[7:]) for i in (0, 1, 5)]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.rand(x.shape, generator=generator, dtype=torch.float64) for x in learned]
    total = sum((w * x)[x > -torch.inf].sum() for w, x in zip(weights, learned, strict=True))
    return outputs, torch.autograd.grad(total, [p[name] for name in names])


def assert_near(ours: Tensor, truth: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours.double(), truth.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_and_gradients_equal_the_dense_ones(shape: tuple[int, ...]) -> None:
    p = problem(*shape)
    ours, gradients = with_gradients(run, p)
    truth, true_gradients = with_gradients(dense, p)
    for x, true_x in zip(ours, truth, strict=True):
        assert_near(x, true_x, 1e-12)
    for x, true_x in zip(gradients, true_gradients, strict=True):
        assert_near(x, true_x, 1e-10)


@pytest.mark.parametrize("height", [1, 2, 7, 64])
def test_height_of_the_strips_changes_nothing(height: int, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(63, 65, 37, 13)
    truth, true_gradients = with_gradients(run, p)
    monkeypatch.setitem(_backend.WORKSPACE, "cpu", 1)
    monkeypatch.setattr(similarity_product, "MIN_STRIP_ROWS", height)
    ours, gradients = with_gradients(run, p)
    for x, true_x in zip([*ours, *gradients], [*truth, *true_gradients], strict=True):
        assert_near(x, true_x, 1e-12)


def test_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_backend.WORKSPACE, "cpu", 1)
    monkeypatch.setattr(similarity_product, "MIN_STRIP_ROWS", 3)
    p = problem(5, 7, 4, 3)

    def learned(query: Tensor, key: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        sides = run(p | {"query": query, "key": key, "scale": scale})
        return tuple(x for side in sides for x in (side.others, side.positive, side.gap))

    inputs = [p[name].requires_grad_() for name in ("query", "key", "scale")]
    assert torch.autograd.gradcheck(learned, inputs)


def op_inputs(dtype: torch.dtype) -> list:
    p = problem(6, 5, 4, 3)
    features = [p[name].to(dtype).requires_grad_() for name in ("query", "key")]
    teachers = [[x.to(dtype) for x in p[name]] for name in ("teacher_query", "teacher_key")]
    scale = p["scale"].float().requires_grad_()
    labels = [p["labels"], p["col_labels"]]
    return [*features, scale, *labels, *teachers, p["teacher_scale"].float()]


FLAGS = {
    "everything": (True, True, True, True, True, False, False),
    "hard rows": (True, False, False, False, False, False, False),
    "attended": (True, False, False, False, False, True, False),
    "soft columns": (True, True, False, True, False, False, False),
    "hard rows, logits kept": (True, False, False, False, False, False, True),
    "soft rows, logits kept": (True, True, True, False, False, False, True),
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_the_forward(dtype: torch.dtype, flags: tuple[bool, ...]) -> None:
    torch.library.opcheck(_forward, (*op_inputs(dtype), *flags, "auto"))


@pytest.mark.parametrize("keep", [False, True], ids=["again", "kept"])
@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)], ids=str)
def test_opcheck_of_the_backward(needs: tuple[bool, ...], keep: bool) -> None:
    inputs = op_inputs(torch.float32)
    flags = (*FLAGS["everything"][:-1], keep)
    *statistics, _, logits = (x.detach() for x in _forward(*inputs, *flags, "auto"))
    grads = [torch.rand_like(x) for x in statistics]
    inputs = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
    torch.library.opcheck(_backward, (grads, *inputs, statistics, logits, *needs, "auto"))


def test_compiles_to_one_graph() -> None:
    p = problem(9, 8, 5, 4)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    ours, gradients = with_gradients(compiled, p)
    truth, true_gradients = with_gradients(run, p)
    for x, true_x in zip([*ours, *gradients], [*truth, *true_gradients], strict=True):
        assert_near(x, true_x, 1e-12)


SUBSETS = [names for n in (1, 2) for names in itertools.combinations(("query", "key", "scale"), n)]


@pytest.mark.parametrize("names", SUBSETS, ids=str)
def test_any_subset_of_gradients(names: tuple[str, ...]) -> None:
    p = problem(7, 6, 5, 4)
    _, gradients = with_gradients(run, p, names)
    _, true_gradients = with_gradients(dense, p, names)
    for x, true_x in zip(gradients, true_gradients, strict=True):
        assert_near(x, true_x, 1e-10)


def test_constant_inputs_leave_the_graph() -> None:
    rows, cols = run(problem(4, 5, 3, 2))
    assert not any(x.requires_grad for side in (rows, cols) for x in side)


def test_inputs_need_not_be_contiguous() -> None:
    p = problem(7, 6, 5, 4)
    strided = p | {
        "query": p["query"].T.contiguous().T,
        "key": torch.stack([p["key"], p["key"]], 1)[:, 0],
        "teacher_key": [x.T.contiguous().T for x in p["teacher_key"]],
    }
    for side, true_side in zip(run(strided), run(p), strict=True):
        for x, true_x in zip(side, true_side, strict=True):
            assert_near(x, true_x, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_inputs_give_float32_statistics_and_own_gradients(dtype: torch.dtype) -> None:
    query, key = unit(5, 4, dtype).requires_grad_(), unit(6, 4).float().requires_grad_()
    labels, scale = torch.arange(5), torch.tensor(5.0)
    rows, _ = similarity(query, key, scale, labels, torch.arange(6), cols=False)
    rows.others.sum().backward()
    assert rows.others.dtype == rows.positive.dtype == torch.float32
    assert (query.grad.dtype, key.grad.dtype) == (dtype, torch.float32)


def test_autocast_rounds_no_logits() -> None:
    query, key, labels = unit(9, 8).float(), unit(9, 8).float(), torch.arange(9)
    query.requires_grad_()

    def others() -> tuple[Tensor, Tensor]:
        rows, _ = similarity(query, key, torch.tensor(50.0), labels, labels, cols=False)
        return rows.others, torch.autograd.grad(rows.others.sum(), query)[0]

    plain = others()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = others()
    assert all(torch.equal(x, y) for x, y in zip(plain, mixed, strict=True))


def test_uninitialised_memory_is_never_read() -> None:
    p = problem(63, 65, 37, 13)
    plain = with_gradients(run, p)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        # under this mode torch.empty fills with NaN
        assert torch.empty(3).isnan().all()
        poisoned = with_gradients(run, p)
    finally:
        torch.use_deterministic_algorithms(False)
    for x, true_x in zip([*poisoned[0], *poisoned[1]], [*plain[0], *plain[1]], strict=True):
        assert torch.equal(x, true_x)


class Largest(TorchDispatchMode):
    """The largest number of elements of any tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_no_tensor_has_the_size_of_the_matrix() -> None:
    rows, width = 512, 16
    x, y, labels = unit(rows, width).float(), unit(rows, width).float(), torch.arange(rows)
    args = (x, y, torch.tensor(10.0), labels, labels, [x], [y], torch.ones(1))
    budget = 4 * 32 * (similarity_product.NUM_BUFFERS * rows + 3 * width)
    with Largest() as largest:
        flags = [True] * 5 + [False] * 2
        *stats, _, logits = similarity_torch.forward(*args, *flags, budget)
        grads = [torch.ones_like(s) for s in stats]
        similarity_torch.backward(grads, *args, stats, logits, True, True, True, budget)
    assert largest.elements == rows * 32


@pytest.mark.parametrize("labels", ["pairs", "repeated"])
@pytest.mark.parametrize("num_teachers", [0, 1, 2])
def test_logits_that_fit_are_kept_and_change_nothing(
    num_teachers: int, labels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem(40, 50, 6, 4)
    if labels == "pairs":
        p |= {"labels": torch.arange(40), "col_labels": torch.arange(50)}
    p |= {name: p[name][:num_teachers] for name in p if name.startswith("teacher")}
    soft = num_teachers > 0
    monkeypatch.setattr(similarity_product, "MIN_STRIP_ROWS", 64)
    counted, strip = [], similarity_product.Product.strip
    monkeypatch.setattr(
        similarity_product.Product,
        "strip",
        lambda self, *args: counted.append(self.is_known) or strip(self, *args),
    )

    def run_soft(q: dict) -> tuple:
        return run(q, soft_rows=soft, soft_cols=soft, means=False)

    # twice the bytes of all matrices, and one less
    num_bytes = 2 * 8 * 40 * 50 * (1 + num_teachers)
    monkeypatch.setitem(_backend.WORKSPACE, "cpu", num_bytes)
    kept, kept_gradients = with_gradients(run_soft, p)
    # a product a matrix in the forward, none in the backward
    assert counted == [False] * (1 + num_teachers) + [True] * (1 + num_teachers)
    monkeypatch.setitem(_backend.WORKSPACE, "cpu", num_bytes - 1)
    counted.clear()
    again, again_gradients = with_gradients(run_soft, p)
    assert True not in counted
    for x, y in zip([*kept, *kept_gradients], [*again, *again_gradients], strict=True):
        assert_near(x, y, 1e-12)


def test_kept_logits_serve_a_second_backward() -> None:
    p = problem(40, 50, 6, 4)
    p |= {name: p[name].requires_grad_() for name in ("query", "key", "scale")}
    for labels in (p["labels"], torch.arange(40)):
        rows, cols = run(p | {"labels": labels}, means=False)
        inputs = [p["query"], p["key"], p["scale"]]
        outputs = [rows.others, cols.positive, rows.gap]
        ones = [torch.ones_like(x) for x in outputs]
        first = torch.autograd.grad(outputs, inputs, ones, retain_graph=True)
        second = torch.autograd.grad(outputs, inputs, ones)
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_without_gradients_no_logits_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    p, seen, real = problem(40, 50, 6, 4), [], similarity_torch.forward
    # the last argument but one
    monkeypatch.setattr(similarity_torch, "forward", lambda *x: seen.append(x[-2]) or real(*x))
    run(p)
    p["key"].requires_grad_()
    run(p)
    with torch.no_grad():
        run(p)
    assert seen == [False, True, False]


def test_workspace_bounds_the_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "WORKSPACE", dict(_backend.WORKSPACE))
    real, sizes = similarity_product.cut, []

    def seen(student: similarity_product.Product, *args: int) -> tuple:
        strips, buffer = real(student, *args)
        sizes.append(buffer.numel() * buffer.itemsize)
        return strips, buffer

    monkeypatch.setattr(similarity_torch, "cut", seen)
    x = unit(2048, 4).float().requires_grad_()
    labels, scale = torch.arange(2048), torch.tensor(5.0)
    for num_bytes in (1 << 20, 4 << 20):
        set_workspace(num_bytes)
        rows, _ = similarity(x, x, scale, labels, labels, cols=False)
        rows.others.sum().backward()
    # a quarter, forward and backward
    quarters = [1 << 18, 1 << 18, 1 << 20, 1 << 20]
    assert all(0.95 * x < size <= x for x, size in zip(quarters, sizes, strict=True))
    with pytest.raises(ValueError, match="at least 1 MiB"):
        set_workspace(1000)


def test_strips_are_bounded_for_wide_matrices() -> None:
    x, y = torch.ones(100, 1), torch.ones(1_000_000, 1)
    strips, buffer = similarity_product.cut(
        similarity_product.Product(x, y, torch.ones(()), torch.float32, 1), 1 << 20
    )
    assert buffer.shape == (similarity_product.MIN_STRIP_ROWS, 1_000_000)
    assert [s.stop - s.start for s in strips] == [16] * 6 + [4]


def test_create_graph_is_refused() -> None:
    query, labels = unit(3, 2).requires_grad_(), torch.arange(3)
    rows, _ = similarity(query, unit(3, 2), torch.tensor(2.0).double(), labels, labels, cols=False)
    with pytest.raises(RuntimeError, match="first order only; create_graph=True came"):
        torch.autograd.grad(rows.others.sum(), query, create_graph=True)


def test_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="backend is one of .*'torch'.*; 'numpy' came"):
        similarity(*[unit(2, 2)] * 2, torch.tensor(1.0), *[torch.arange(2)] * 2, backend="numpy")


def test_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_backend.MODULES, ("absent", "triton"), "kdengine_kernels.absent")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="kdengine_kernels.absent cannot be imported .*use back"):
        _backend.choose("absent", [torch.ones(1)], "triton")


def test_backend_without_its_device_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU and the tensors are on 'cpu'"):
        _backend.choose("similarity", [torch.ones(1)], "triton")


def test_auto_is_torch_on_cpu() -> None:
    assert _backend.choose("similarity", [torch.ones(1)], "auto") is similarity_torch


def attended_and_not(monkeypatch: pytest.MonkeyPatch, p: dict, names: tuple[str, ...]) -> tuple:
    """Rows against constant keys, and the same with keys whose gradient is then ignored."""
    plain = {k: v for k, v in p.items() if not k.startswith("teacher")}
    calls = []
    real = similarity_torch.backward
    monkeypatch.setattr(similarity_torch, "backward", lambda *args: calls.append(1) or real(*args))

    def rows_only(q: dict) -> tuple:
        return (similarity(**q, cols=False)[0],)

    def run_with(learned: tuple[str, ...]) -> tuple:
        q = plain | {name: plain[name].clone().requires_grad_() for name in learned}
        (side,) = rows_only(q)
        weights = torch.linspace(0.3, 2, len(side.others), dtype=side.others.dtype)
        total = (weights * (side.others - 0.7 * side.positive))[side.others > -torch.inf].sum()
        gradients = torch.autograd.grad(total, [q[name] for name in names])
        return side.others, side.positive, *gradients

    attended = run_with(names)
    assert not calls
    with_keys = run_with((*names, "key"))
    assert calls
    return attended, with_keys


@pytest.mark.parametrize("names", [("query",), ("scale",), ("query", "scale")], ids="-".join)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_constant_keys_cost_two_products_and_change_nothing(
    shape: tuple, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_backend.WORKSPACE, "cpu", 1)
    attended, with_keys = attended_and_not(monkeypatch, problem(*shape), names)
    for x, true_x in zip(attended, with_keys, strict=True):
        assert_near(x, true_x, 1e-12)
