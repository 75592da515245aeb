# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels at sizes that only a GPU can run: offsets, memory, equal runs."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import losses, reference
from kdengine.ops import _backend, gradient, set_workspace, unit_feature
from kdengine_kernels import similarity as kernels

MIB = 2**20


@pytest.fixture(params=["G1", "G2"])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Strips of gradients in one phase, or in two, whatever the table says."""
    monkeypatch.setattr(kernels, "two_phase", lambda *_: request.param == "G2")
    return request.param


def unit(rows: int, width: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(rows, width, device="cuda", generator=generator)
    return F.normalize(x, dim=1).to(dtype)


def step(rows: int, width: int, scale: float = 14.3) -> list[Tensor]:
    """InfoNCE + CRD on random pairs that resemble each other; loss and gradients."""
    x, y, u, v = (unit(rows, width, seed) for seed in range(4))
    x, y = x.requires_grad_(), F.normalize(y + x.detach(), dim=1).requires_grad_()
    v = F.normalize(u + v, dim=1)
    s = torch.tensor(scale, device="cuda", requires_grad=True)
    loss = losses.similarity_loss(
        *(x, y, s),
        teacher_query=u,
        teacher_key=v,
        teacher_scale=50.0,
        soft_rows=0.5,
        soft_cols=0.5,
        backend="triton",
    )
    return [loss.detach(), *torch.autograd.grad(loss, (x, y, s)), x.detach(), y.detach(), u, v]


@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("width", "teacher_width"), [(512, 768), (768, 512), (1024, 1024)])
def test_variants_are_accurate(
    width: int, teacher_width: int, dtype: torch.dtype, scale: float, variant: str
) -> None:
    """A student close to its teacher, where student and teacher nearly cancel."""
    rows = 1500
    u, v = (unit(rows, teacher_width, seed, dtype) for seed in (2, 3))
    near = unit(teacher_width, width, 4, torch.float32)
    x, y = (
        F.normalize(w.float() @ near + 0.1 * unit(rows, width, seed, torch.float32), dim=1)
        for w, seed in ((u, 0), (v, 1))
    )
    x, y = (w.to(dtype).requires_grad_() for w in (x, y))
    weights = {"soft_rows": 0.7, "soft_cols": 0.4, "hard_rows": 0.2}

    def gradients(function, dtype: torch.dtype | None, **options: str) -> list[Tensor]:
        leaves = [w.detach().to(dtype or w.dtype).requires_grad_() for w in (x, y)]
        teacher = {"teacher_query": u, "teacher_key": v, "teacher_scale": scale}
        if dtype:
            teacher |= {name: teacher[name].to(dtype) for name in ("teacher_query", "teacher_key")}
        loss = function(*leaves, scale, **teacher, **weights, **options)
        # float16 holds gradients of this size
        found = torch.autograd.grad(rows * loss, leaves)
        return [loss.detach().double(), *(g.double() for g in found)]

    truth = gradients(reference.similarity_loss, torch.float64)
    ours = gradients(losses.similarity_loss, None, backend="triton")
    limit = {torch.bfloat16: 4e-3, torch.float16: 2e-3, torch.float32: 1e-4}[dtype]
    assert (ours[0] - truth[0]).abs() <= 1e-5 * max(1.0, truth[0].item())
    for g, true_g in zip(ours[1:], truth[1:], strict=True):
        assert (g - true_g).norm() <= limit * true_g.norm()


@pytest.fixture
def small_workspace(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The workspace of the low memory mode."""
    monkeypatch.setattr(_backend, "WORKSPACE", dict(_backend.WORKSPACE))
    set_workspace(64 * MIB)
    yield 64 * MIB


@pytest.mark.parametrize("width", [512, 640, 768, 1000])
def test_two_runs_are_equal_to_the_last_bit(width: int, variant: str) -> None:
    first, second = step(5000, width), step(5000, width)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_uninitialised_memory_is_never_read(variant: str) -> None:
    plain = step(3001, 512)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        # under this mode torch.empty fills with NaN
        assert torch.empty(3, device="cuda").isnan().all()
        poisoned = step(3001, 512)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(plain, poisoned, strict=True))


def test_strips_change_little(small_workspace: int, variant: str) -> None:
    """Strips of 64 MiB add up in another order."""
    low = step(16384, 512)
    set_workspace(640 * MIB)
    for x, y in zip(low[:4], step(16384, 512)[:4], strict=True):
        assert (x.double() - y.double()).norm() <= 1e-3 * y.double().norm()


def test_offsets_beyond_32_bits(variant: str) -> None:
    """At 65536 rows the matrix has 2^32 cells; the last rows against the dense loss in float64."""
    rows = 65536
    loss, grad_query, _, _, x, y, u, v = step(rows, 256)
    sample = torch.arange(rows - 32, rows, device="cuda")
    x, y, u, v = (w.double() for w in (x, y, u, v))
    col_z, col_t = ([] for _ in range(2))
    for part in torch.arange(rows, device="cuda").split(4096):
        col_z.append((14.3 * y[part] @ x.T).logsumexp(1))
        col_t.append((50.0 * v[part] @ u.T).logsumexp(1))
    z, t = 14.3 * x[sample] @ y.T, 50.0 * u[sample] @ v.T
    # InfoNCE + CRD, each half rows and half columns
    gradient_z = z.softmax(1) + (z - torch.cat(col_z)).exp()
    gradient_t = 0.5 * (t.softmax(1) + (t - torch.cat(col_t)).exp())
    pull = gradient_z - gradient_t
    pull[torch.arange(32), sample] -= 1
    truth = 14.3 * pull @ y / rows
    error = (grad_query[sample].double() - truth).norm() / truth.norm()
    assert error < 4e-3 and loss.isfinite()


@pytest.mark.parametrize("low_memory", [False, True], ids=["sum on top", "low memory"])
@pytest.mark.parametrize("num_bytes", [64 * MIB, 640 * MIB], ids=["64 MiB", "640 MiB"])
def test_peak_memory_is_the_workspace(
    monkeypatch: pytest.MonkeyPatch, num_bytes: int, low_memory: bool, variant: str
) -> None:
    rows, width = 32768, 512
    monkeypatch.setattr(_backend, "WORKSPACE", dict(_backend.WORKSPACE))
    set_workspace(num_bytes, low_memory=low_memory)
    x, y, u, v = (unit(rows, width, seed) for seed in range(4))
    x, y = x.requires_grad_(), y.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    teacher = {"teacher_query": u, "teacher_key": v, "teacher_scale": 50.0}
    weights = {"soft_rows": 0.5, "soft_cols": 0.5, "backend": "triton"}
    losses.similarity_loss(x, y, 14.3, **teacher, **weights).backward()
    extra = torch.cuda.max_memory_allocated() - before
    # gradients of both towers, the float32 sum of the keys', and 40 numbers a row and a column
    results = 2 * 2 * rows * width + (not low_memory) * 4 * rows * width + 40 * 4 * 2 * rows
    # the matrix library's own workspace comes from torch's allocator, too
    assert extra <= num_bytes + results + 32 * MIB, extra / MIB


def test_gradient_distillation_equals_the_oracle() -> None:
    x, y = (unit(1500, 192, seed, torch.float32) for seed in range(2))
    weights = [torch.randn(1500, 192, device="cuda", dtype=torch.float64) for _ in range(2)]

    def run(function, x: Tensor, y: Tensor) -> list[Tensor]:
        x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
        found = function(x, y, torch.tensor(20.0, device="cuda", dtype=x.dtype))
        total = sum((w * g).sum() for w, g in zip(weights, found, strict=True))
        return [*found, *torch.autograd.grad(total, (x, y))]

    ours = run(lambda *args: gradient(*args, backend="triton"), x, y)
    truth = run(reference.info_nce_gradients, x.double(), y.double())
    for g, true_g in zip(ours, truth, strict=True):
        assert (g.double() - true_g).norm() <= 5e-5 * true_g.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 5), (1000, 512), (4097, 640), (33, 1500)], ids=str)
def test_unit_rows_come_with_the_distances(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, y, u, v = (3 * torch.randn(shape, device="cuda").to(dtype) for _ in range(4))
    weights = torch.randn(shape, device="cuda").to(dtype)

    def run(students: list[Tensor], teachers: list[Tensor], backend: str | None) -> list[Tensor]:
        students = [z.clone().requires_grad_() for z in students]
        if backend:
            distances, rows = unit_feature(students, teachers, backend=backend)
        else:
            rows = [F.normalize(z, dim=1) for z in students]
            pairs = zip(rows, teachers, strict=True)
            distances = torch.stack([(z - F.normalize(t, dim=1)).square().sum(1) for z, t in pairs])
        total = sum((i + weights.to(z.dtype) * z).double().sum() for i, z in enumerate(rows))
        total = total + 3 * distances.double().sum()
        return [distances, *rows, *torch.autograd.grad(total, students)]

    truth = run([x.double(), y.double()], [u.double(), v.double()], None)
    for name in ("torch", "triton", "cuda"):
        if _backend.why_not("feature", name, [x]):
            continue
        for z, true_z in zip(run([x, y], [u, v], name), truth, strict=True):
            limit = 2 * max(1e-6, torch.finfo(z.dtype).eps)
            assert (z.double() - true_z).norm() <= limit * true_z.norm().clamp(min=1), name
