# SPDX-License-Identifier: Apache-2.0
"""The losses on a GPU: accuracy against the float64 oracle, no waiting, graphs, compilation."""

import functools
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import losses, reference, reference_clusters
from kdengine.ops import _backend

DEVICE, DOUBLE = "cuda", torch.float64
UPSTREAM = 1.7


class Mode(NamedTuple):
    """A precision and what may be lost to it, relative to the size of the truth.

    ``upstream`` keeps gradients within the range of the dtype, as loss scaling does.
    """

    dtype: torch.dtype
    matmul: str
    loss: float
    features: float
    scale: float
    upstream: float = UPSTREAM


MODES = {
    "fp32": Mode(torch.float32, "highest", 1e-6, 1e-5, 1e-5),
    "tf32": Mode(torch.float32, "high", 1e-4, 4e-3, 2e-3),
    "bf16": Mode(torch.bfloat16, "highest", 1e-5, 4e-3, 5e-3),
    "fp16": Mode(torch.float16, "highest", 1e-5, 2e-3, 3e-3, 1024 * UPSTREAM),
}


@pytest.fixture(params=MODES.values(), ids=MODES)
def mode(request: pytest.FixtureRequest) -> Any:
    """Each precision, with torch's own setting of products undone afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param.matmul)
    yield request.param
    torch.set_float32_matmul_precision(before)


def backends(op: str) -> list[str]:
    return sorted(name for other, name in _backend.MODULES if other == op)


def runnable(op: str, name: str) -> str:
    """The name of a backend; skips where it cannot run."""
    reason = _backend.why_not(op, name, [torch.empty(0, device=DEVICE)])
    if reason:
        pytest.skip(f"backend {name} of {op}: {reason}")
    return name


@pytest.fixture(params=backends("similarity"))
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend of the relational losses."""
    return runnable("similarity", request.param)


@pytest.fixture(params=backends("similarity_rows"))
def rows_backend(request: pytest.FixtureRequest) -> str:
    """Each backend of the losses of rows alone."""
    return runnable("similarity_rows", request.param)


@pytest.fixture(params=backends("feature"))
def feature_backend(request: pytest.FixtureRequest) -> str:
    """Each backend of the feature distance."""
    return runnable("feature", request.param)


def unit(rows: int, width: int) -> Tensor:
    return F.normalize(torch.randn(rows, width, dtype=DOUBLE, device=DEVICE), dim=1)


def near(x: Tensor, noise: float) -> Tensor:
    return F.normalize(x + noise * unit(*x.shape), dim=1)


def rounded(mode: Mode, *tensors: Tensor) -> list[Tensor]:
    """The same numbers for all: what the mode's dtype can hold, in float64."""
    return [x.to(mode.dtype).to(DOUBLE) for x in tensors]


def differentiate(
    loss_of: Callable[..., Tensor], dtype: torch.dtype, upstream: float, *learned: Tensor
) -> list[Tensor]:
    """Loss, then its gradients over ``upstream``; a scale (0-D) is never of low precision."""
    number = DOUBLE if dtype == DOUBLE else torch.float32
    leaves = [x.detach().to(dtype if x.ndim else number).requires_grad_() for x in learned]
    loss = loss_of(*leaves)
    gradients = torch.autograd.grad(upstream * loss, leaves)
    return [loss.detach().double(), *(x.double() / upstream for x in gradients)]


def assert_accurate(
    mode: Mode, ours: Callable[..., Tensor], oracle: Callable[..., Tensor], *learned: Tensor
) -> None:
    """Within the mode's limits, plus twice the error of the dense loss in the same float32."""
    found = differentiate(ours, mode.dtype, mode.upstream, *learned)
    eager = differentiate(oracle, torch.float32, UPSTREAM, *learned)
    truth = differentiate(oracle, DOUBLE, UPSTREAM, *learned)
    limits = [mode.loss] + [mode.features if x.ndim else mode.scale for x in learned]
    # a loss is known to eps of its logits, and the gradient of scale to eps of a cosine
    eps = torch.finfo(torch.float32).eps
    largest = max([1.0, *(x.item() for x in learned if not x.ndim)])
    floors = [eps * largest] + [0.0 if x.ndim else eps for x in learned]
    for place, (x, y, true) in enumerate(zip(found, eager, truth, strict=True)):
        error, size = (x - true).norm().item(), true.norm().item()
        allowed = limits[place] * size + 2 * (y - true).norm().item() + floors[place]
        assert error <= allowed, f"{place}: error {error:.1e} of {size:.1e}, allowed {allowed:.1e}"


# a single cell, ragged tiles, and more than one strip
@pytest.mark.parametrize("shape", [(1, 1, 8), (127, 63, 64), (1000, 1000, 512)], ids=str)
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_hard_and_soft_terms_are_accurate(mode, backend, shape, scale) -> None:
    rows, cols, width = shape
    query, key, *teacher = rounded(
        mode, unit(rows, width), unit(cols, width), unit(rows, 40), unit(cols, 40)
    )
    options = {
        "labels": torch.randint(0, cols, (rows,), device=DEVICE),
        "col_labels": torch.randint(0, rows, (cols,), device=DEVICE),
        "teacher_scale": 50.0,
        "hard_rows": 0.3,
        "hard_cols": 0.7,
        "soft_rows": 1.1,
        "soft_cols": 0.4,
    }

    def loss_of(module: Any, **more: Any) -> Callable[..., Tensor]:
        def loss(query: Tensor, key: Tensor, scale: Tensor) -> Tensor:
            names = ("teacher_query", "teacher_key")
            given = {n: x.to(query.dtype) for n, x in zip(names, teacher, strict=True)}
            return module.similarity_loss(query, key, scale, **given, **options, **more)

        return loss

    number = torch.tensor(scale, dtype=DOUBLE, device=DEVICE)
    ours = loss_of(losses, backend=backend)
    assert_accurate(mode, ours, loss_of(reference), query, key, number)


@pytest.mark.parametrize("shape", [(1, 1, 8), (127, 63, 64), (1000, 3000, 512)], ids=str)
@pytest.mark.parametrize("margin", [0.0, 0.3])
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_clusters_are_accurate(mode, rows_backend, shape, margin, scale) -> None:
    rows, cols, width = shape
    labels = torch.randint(0, cols, (rows,), device=DEVICE)
    key = unit(cols, width)
    query, key = rounded(mode, near(key[labels], 1.0), key)

    def loss_of(module: Any, **more: Any) -> Callable[..., Tensor]:
        return lambda *x: module.cluster_cross_entropy(*x, labels, margin, **more)

    number = torch.tensor(scale, dtype=DOUBLE, device=DEVICE)
    ours = loss_of(losses, backend=rows_backend)
    assert_accurate(mode, ours, loss_of(reference), query, key, number)


@pytest.mark.parametrize("scale", [1.0, 30.0, 100.0])
def test_clusters_with_sparse_targets_are_accurate(mode, scale) -> None:
    """Targets of a teacher near the student, and of several positives."""
    num, clusters, top = 300, 2000, 16
    image, centroids = rounded(mode, near(unit(num, 96), 0.5), unit(clusters, 96))
    q, nearest = (scale * near(image, 0.3) @ centroids.T).softmax(1).topk(top)
    labels = nearest[:, 0].contiguous()
    learned = image, centroids, torch.tensor(scale, dtype=DOUBLE, device=DEVICE)

    def ours(*student: Tensor) -> Tensor:
        targets = {"nearest": nearest, "probabilities": q.float()}
        terms = losses.cluster_terms(*student, labels, **targets, num_positives=2)
        return terms.discrimination + terms.divergence

    def oracle(*student: Tensor) -> Tensor:
        positives = reference_clusters.multi_positive(*student, nearest[:, :2])
        return positives + reference_clusters.sparse_cluster_kl(*student, nearest, q)

    assert_accurate(mode, ours, oracle, *learned)


@pytest.mark.parametrize("learned", ["query and key", "query"])
@pytest.mark.parametrize("noise", [1.0, 0.05], ids=["early", "late"])
def test_rows_of_a_teacher_are_accurate(mode, rows_backend, noise, learned) -> None:
    """Late in a distillation student and teacher nearly cancel."""
    query, key = unit(1000, 512), unit(3000, 512)
    query, key = rounded(mode, query, key)
    teacher = rounded(mode, near(query, noise), near(key, noise))

    def loss_of(module: Any, **more: Any) -> Callable[..., Tensor]:
        def loss(query: Tensor, *rest: Tensor) -> Tensor:
            keys, number = (key.to(query.dtype), *rest) if learned == "query" else rest
            constant = [x.to(query.dtype) for x in teacher]
            return module.logit_kl(query, keys, number, *constant, 50.0, **more)

        return loss

    number = torch.tensor(50.0, dtype=DOUBLE, device=DEVICE)
    leaves = [query, number] if learned == "query" else [query, key, number]
    assert_accurate(mode, loss_of(losses, backend=rows_backend), loss_of(reference), *leaves)


def test_each_term_is_accurate(mode, backend) -> None:
    image = unit(127, 64)
    image, text = rounded(mode, image, near(image, 1.0))
    teacher = rounded(mode, near(image, 0.5), near(text, 0.5))

    def terms_of(module: Any, dtype: torch.dtype, **more: Any) -> Any:
        student, constant = ([x.to(dtype) for x in pair] for pair in ((image, text), teacher))
        given = dict(zip(("teacher_query", "teacher_key"), constant, strict=True))
        return module.similarity_terms(*student, 20.0, teacher_scale=30.0, **given, **more)

    found = terms_of(losses, mode.dtype, backend=backend)
    eager, truth = terms_of(reference, torch.float32), terms_of(reference, DOUBLE)
    for name in truth._fields:
        true = getattr(truth, name).item()
        allowed = mode.loss * max(1.0, true) + 2 * abs(getattr(eager, name).item() - true)
        assert true > 1e-3 and abs(getattr(found, name).item() - true) <= allowed, name


@pytest.mark.parametrize("noise", [0.3, 0.0])
def test_confident_pairs_keep_their_relative_accuracy(backend, noise) -> None:
    """1 - p is down to 1e-17 here: a difference from 1 would see nothing of it."""
    image = unit(96, 64)
    image, text = (x.float().double() for x in (image, near(image, noise)))
    number = torch.tensor(60.0, dtype=DOUBLE, device=DEVICE)
    found = differentiate(
        lambda *x: losses.similarity_loss(*x, backend=backend),
        torch.float32,
        UPSTREAM,
        *(image, text, number),
    )
    truth = differentiate(reference.similarity_loss, DOUBLE, UPSTREAM, image, text, number)
    for x, true in zip(found, truth, strict=True):
        # what logits of size 60 resolve
        assert (x - true).norm() <= 3 * 60 * torch.finfo(torch.float32).eps * true.norm()


def test_log_sum_exp_is_accurate(mode, backend) -> None:
    query, key = rounded(mode, unit(127, 64), unit(63, 64))
    exclude = torch.randint(0, 63, (127,), device=DEVICE)
    weights = torch.rand(127, device=DEVICE)

    def ours(*x: Tensor) -> Tensor:
        return (weights * losses.similarity_lse(*x, exclude=exclude, backend=backend)).sum()

    def oracle(*x: Tensor) -> Tensor:
        return (weights * reference.similarity_lse(*x, exclude)).sum()

    number = torch.tensor(14.3, dtype=DOUBLE, device=DEVICE)
    assert_accurate(mode, ours, oracle, query, key, number)


@pytest.mark.parametrize("normalize", [False, True], ids=["as given", "normalised"])
def test_feature_distance_is_accurate(mode, feature_backend, normalize) -> None:
    student, teacher = rounded(mode, 3 * unit(127, 65), unit(127, 65))

    def ours(x: Tensor) -> Tensor:
        given = teacher.to(x.dtype)
        return losses.feature(x, given, normalize=normalize, backend=feature_backend)

    def oracle(x: Tensor) -> Tensor:
        return reference.feature(x, teacher.to(x.dtype), normalize=normalize)

    assert_accurate(mode, ours, oracle, student)


@pytest.mark.parametrize("rows", [7, 2000])
@pytest.mark.parametrize("name", backends("moments"))
def test_moment_alignment_is_accurate(mode, name, rows) -> None:
    # moments differ by more than rounding
    student, teacher = rounded(mode, 3 * unit(rows, 65), unit(rows, 65) + 0.5)
    name = runnable("moments", name)

    def ours(x: Tensor) -> Tensor:
        return losses.moment_alignment(x, teacher.to(x.dtype), backend=name)

    def oracle(x: Tensor) -> Tensor:
        return reference.moment_alignment(x, teacher.to(x.dtype))

    assert_accurate(mode, ours, oracle, student)


def distillation(
    query: Tensor, key: Tensor, scale: Tensor, *teacher: Tensor, backend: str
) -> Tensor:
    """All losses of CLIP-KD that a backend has, with a student as wide as its teacher."""
    image, text = teacher
    relational = losses.similarity_loss(
        *(query, key, scale),
        teacher_query=image,
        teacher_key=text,
        teacher_scale=30.0,
        soft_rows=0.5,
        soft_cols=0.5,
        normalize=True,
        backend=backend,
    )
    x, y, u, v = (F.normalize(z, dim=1) for z in (query, key, image, text))
    distance = functools.partial(losses.feature, normalize=True, backend=backend)
    interactive = losses.interactive_contrastive(x, y, scale, u, v, backend=backend)
    features = distance(query, image) + distance(key, text)
    total = relational + interactive + 100 * features
    if ("gradient", backend) not in _backend.MODULES:
        return total
    return total + 1e3 * losses.gradient(x, y, scale, u, v, 30.0, backend=backend)


def batch(seed: int) -> list[Tensor]:
    """Image, text and scale, which learn, and the teacher's image and text."""
    torch.manual_seed(seed)
    features = [torch.randn(96, 64, device=DEVICE) for _ in range(4)]
    learned = [*features[:2], torch.tensor([14.3 + seed], device=DEVICE)]
    return [*(x.requires_grad_() for x in learned), *features[2:]]


def step(
    inputs: list[Tensor], backend: str, loss_of: Callable[..., Tensor] = distillation
) -> list[Tensor]:
    loss = loss_of(*inputs, backend=backend)
    return [loss, *torch.autograd.grad(loss, inputs[:3])]


def assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    for x, true in zip(found, expected, strict=True):
        assert true.norm() > 0 and (x - true).norm() <= 1e-5 * true.norm()


def test_losses_never_wait_for_the_device(backend: str) -> None:
    inputs = batch(0)
    # what happens once, such as the workspace of cuBLAS
    step(inputs, backend)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, *_ = step(inputs, backend)
        with pytest.raises(RuntimeError, match="synchroniz"):
            loss.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_losses_replay_on_new_numbers(backend: str) -> None:
    inputs = batch(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(inputs, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(inputs, backend)
    old = step(inputs, backend)
    with torch.no_grad():
        for held, fresh in zip(inputs, batch(1), strict=True):
            held.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    assert_near(captured, step(inputs, backend))
    assert (captured[0] - old[0]).abs() > 1e-2 * old[0].abs()


def test_losses_compile_to_one_graph(backend: str) -> None:
    pytest.importorskip("triton")
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("torch.compile needs a C compiler for the launchers of its kernels")
    inputs = batch(0)
    torch.compiler.reset()
    compiled = torch.compile(distillation, fullgraph=True)
    assert_near(step(inputs, backend, compiled), step(inputs, backend))
