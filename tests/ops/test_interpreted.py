# SPDX-License-Identifier: Apache-2.0
"""Kernels on the CPU, against float64: Triton's in its interpreter, and the extension's.

The extension is a backend of its own here, in plain loops, and once more its GPU blocks are
emulated, with copies done as soon and as late as they may be. The interpreter cannot multiply
bfloat16 and does not emulate tf32; the rest is in tests/gpu.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import losses, reference
from kdengine.ops import _backend, extension, similarity
from kdengine_kernels import common, library, tuning
from kdengine_kernels import similarity as kernels

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1; tests/gpu runs them on a GPU", allow_module_level=True)

# numpy's, where a discarded branch of a kernel overflows
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

TERMS = ("hard_rows", "hard_cols", "soft_rows", "soft_cols")
# upstream gradients, different for every term
WEIGHTS = (0.7, -0.4, 1.3, 0.6)
# relative error of losses and of gradients
TOLERANCE = {
    torch.float32: (1e-6, 1e-5),
    torch.float16: (1e-5, 2e-3),
    torch.bfloat16: (1e-5, 4e-3),
}
BUILT = pytest.mark.skipif(bool(extension.why_not("cpu")), reason="kdengine._C is not built")
RUNNERS = ("triton G1", "triton G2", "cuda", "cuda emulated early", "cuda emulated late")
KINDS = [
    pytest.param((name, dtype), id=f"{name}-{str(dtype).removeprefix('torch.')}", marks=marks)
    for name, marks in zip(RUNNERS, ((), (), BUILT, BUILT, BUILT), strict=True)
    for dtype in TOLERANCE
    if not (name.startswith("triton") and dtype == torch.bfloat16)
]
SHAPES = {
    "1": (1, 1, 8, 8),
    "2": (2, 2, 5, 3),
    "63": (63, 63, 37, 16),
    "wide": (65, 130, 40, 80),
    "tall": (129, 33, 64, 32),
    "257": (257, 257, 32, 64),
}


@pytest.fixture(params=["G1", "G2"])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Strips of gradients in one phase, or in two, whatever the table says."""
    monkeypatch.setattr(kernels, "two_phase", lambda *_: request.param == "G2")
    return request.param


Use = Callable[[str], str]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """``use(runner)``: the name of the backend, which runs as the runner does from now on."""

    def chosen(runner: str) -> str:
        words = runner.split()
        name, how = words[0], words[-1]
        if name == "triton":
            # strips of gradients in one phase, which holds one teacher, or in two
            monkeypatch.setattr(kernels, "two_phase", lambda _, t, *__: how == "G2" or len(t) > 1)
        elif how != name:
            real = extension.call

            def call(name: str, *args: Any) -> None:
                with monkeypatch.context() as patch:
                    # it has the blocks of this op alone
                    if name.startswith("similarity"):
                        late = how == "late"
                        patch.setattr(extension, "place", lambda module, _: module.Emulated(late))
                    real(name, *args)

            monkeypatch.setattr(extension, "call", call)
        return name

    return chosen


@pytest.fixture(params=[*RUNNERS[:2], *(pytest.param(name, marks=BUILT) for name in RUNNERS[2:])])
def backend(request: pytest.FixtureRequest, use: Use) -> str:
    """Each backend, and the extension emulated."""
    return use(request.param)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, use: Use) -> tuple[str, torch.dtype]:
    """Each backend with each dtype that it can multiply here."""
    runner, dtype = request.param
    return use(runner), dtype


def unit(rows: int, width: int) -> Tensor:
    return F.normalize(torch.randn(rows, width, dtype=torch.float64), dim=1)


def paired(rows: int, cols: int, width: int) -> tuple[Tensor, Tensor]:
    """Features whose pairs resemble each other, as in training."""
    query, key = unit(rows, width), unit(cols, width)
    count = min(rows, cols)
    key[:count] = F.normalize(key[:count] + query[:count], dim=1)
    return query, key


def problem(rows: int, cols: int, width: int, teacher_width: int, scale: float) -> dict[str, Any]:
    query, key = paired(rows, cols, width)
    teacher_query, teacher_key = paired(rows, cols, teacher_width)
    return {
        "query": query,
        "key": key,
        "scale": scale,
        "labels": torch.randint(0, cols, (rows,)) if rows != cols else None,
        "col_labels": torch.randint(0, rows, (cols,)) if rows != cols else None,
        "teacher_query": teacher_query,
        "teacher_key": teacher_key,
        "teacher_scale": 1.5 * scale,
    }


def rounded(p: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in p.items()
    }


def terms_and_gradients(
    function: Any, p: dict[str, Any], gain: float = 1.0, **options: Any
) -> list[Tensor]:
    """The four terms, and the gradients of query, key and scale of their weighted sum.

    ``gain`` scales the loss up and the gradients down, as float16 training does.
    """
    query, key = (p[name].clone().requires_grad_() for name in ("query", "key"))
    scale = torch.tensor(p["scale"], dtype=torch.float64).requires_grad_()
    terms = function(**p | {"query": query, "key": key, "scale": scale}, **options)
    terms = [getattr(terms, name) for name in TERMS]
    total = gain * sum(w * x for w, x in zip(WEIGHTS, terms, strict=True))
    gradients = torch.autograd.grad(total, (query, key, scale))
    return [*(x.detach() for x in terms), *(x.double() / gain for x in gradients)]


def assert_accurate(
    backend: str, p: dict[str, Any], dtype: torch.dtype, least: float = 0.0
) -> None:
    """Errors within the tolerance, or within twice those of the dense loss in float32.

    Gradients shorter than ``least`` are what remains of terms that cancel.
    """
    p = rounded(p, dtype)
    # gradients of the order of 500, where float16 is at its best
    gain = 500 * len(p["query"]) / p["scale"] if dtype == torch.float16 else 1.0
    truth = terms_and_gradients(reference.similarity_terms, rounded(p, torch.float64))
    dense = terms_and_gradients(reference.similarity_terms, rounded(p, torch.float32))
    ours = terms_and_gradients(losses.similarity_terms, p, gain, backend=backend)
    loss_tolerance, gradient_tolerance = TOLERANCE[dtype]
    # one rounding of the largest logit in float32, and one of its exponential's exponent
    logit_error = 2**-23 * max(p["scale"], p["teacher_scale"])
    for i, name in enumerate([*TERMS, "query", "key", "scale"]):
        error, dense_error = ((x[i].double() - truth[i]).norm().item() for x in (ours, dense))
        size = truth[i].norm().item()
        if name in TERMS:
            allowed = max(loss_tolerance * max(size, 1.0), logit_error, 2 * dense_error)
        else:
            allowed = max(gradient_tolerance * max(size, least), 2 * dense_error)
            if name == "scale" and dtype == torch.bfloat16:
                # roundings of all cells add up, where cells of both signs nearly cancel
                allowed = max(allowed, 1e-6 / p["scale"])
        assert error <= allowed, (name, error, allowed)


@pytest.mark.parametrize("scale", [1e-3, 14.0, 100.0], ids="scale={}".format)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_terms_and_gradients_equal_the_oracle(shape: tuple, kind: Any, scale: float) -> None:
    backend, dtype = kind
    assert_accurate(backend, problem(*shape, scale), dtype)


def duplicates() -> dict[str, Any]:
    p = problem(64, 64, 32, 32, 100.0)
    return p | {name: p[name].repeat(2, 1)[::2] for name in ("query", "key")}


def negated_towers() -> dict[str, Any]:
    """Every cosine is -1 at scale 100: no exponential relative to a fixed shift survives."""
    query = unit(1, 32).expand(96, 32)
    return problem(96, 96, 32, 32, 100.0) | {"query": query, "key": -query}


def one_hot_teacher() -> dict[str, Any]:
    features = torch.eye(96, dtype=torch.float64)
    same = {"teacher_query": features, "teacher_key": features, "teacher_scale": 100.0}
    return problem(96, 96, 32, 96, 1e-3) | same


def uniform_teacher() -> dict[str, Any]:
    features = torch.eye(96, dtype=torch.float64)
    same = {"query": features, "key": features, "teacher_scale": 1e-3}
    return problem(96, 96, 96, 32, 100.0) | same


@pytest.mark.parametrize(
    "make", [duplicates, negated_towers, one_hot_teacher, uniform_teacher], ids=lambda f: f.__name__
)
def test_ugly_features(make: Any, kind: Any) -> None:
    backend, dtype = kind
    p = make()
    # every row of G holds weights of both signs that sum to about 1 / B, and in bfloat16 all of
    # the tolerance is the rounding of one that stands alone
    least = (1 + (dtype == torch.bfloat16)) * p["scale"] / len(p["query"]) ** 0.5
    assert_accurate(backend, p, dtype, least)


@pytest.mark.parametrize("num_cols", [1, 63, 64, 65])
def test_rows_of_a_strip_are_aligned(num_cols: int) -> None:
    for dtype in (torch.float16, torch.float32):
        strip = library.new_strip(torch.empty(1, 8, dtype=dtype), 5, num_cols)
        assert strip.shape == (5, num_cols) and strip.dtype == dtype
        assert strip.stride(0) * strip.itemsize % 16 == 0 and strip.stride(0) < num_cols + 16


def test_few_programs_repeat_many_tiles(monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """Where a flag is up, each program of the repetition loops over its tiles."""
    monkeypatch.setattr(common, "num_processors", lambda _: 1)
    cpu = torch.device("cpu")
    assert [common.num_programs(9, cpu, is_rare=rare) for rare in (False, True)] == [9, 2]
    p = negated_towers()
    # at least 2 x 3 tiles of 64 x 64
    p |= {name: p[name].repeat(2, 1)[:170] for name in p if name.endswith(("query", "key"))}
    assert_accurate("triton", p, torch.float32, least=p["scale"] / 170**0.5)


def test_student_that_equals_its_teacher_has_nothing_to_learn(kind: Any) -> None:
    backend, dtype = kind
    p = rounded(problem(96, 96, 32, 32, 14.0), dtype)
    p |= {"teacher_query": p["query"], "teacher_key": p["key"], "teacher_scale": 14.0}
    query = p["query"].clone().requires_grad_()
    terms = losses.similarity_terms(**p | {"query": query}, backend=backend)
    (gradient,) = torch.autograd.grad(terms.soft_rows + terms.soft_cols, query)
    assert terms.soft_rows.abs() < 1e-6 and terms.soft_cols.abs() < 1e-6
    assert gradient.norm() < 1e-6


def statistics(p: dict[str, Any], names: tuple[str, ...], **options: Any) -> list[Tensor]:
    """All statistics of the op, and gradients of a random mix of the differentiable ones."""
    p = p | {name: p[name].detach().clone().requires_grad_() for name in names}
    sides = similarity(**p, means=True, **options)
    outputs = [x for side in sides if side for x in side]
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for side in sides:
        for x in (side.others, side.positive, side.gap) if side else ():
            weight = torch.rand(x.shape, generator=generator, dtype=torch.float64)
            total = total + (weight * x.double())[x > -torch.inf].sum()
    return [*outputs, *torch.autograd.grad(total, [p[name] for name in names])]


def raw_problem(rows: int, cols: int) -> dict[str, Any]:
    """Two teachers, and some rows and columns without a positive."""
    labels, col_labels = torch.randint(0, cols, (rows,)), torch.randint(0, rows, (cols,))
    labels[5::7], col_labels[5::7] = -1, rows
    return {
        "query": unit(rows, 40),
        "key": unit(cols, 40),
        "scale": torch.tensor(9.0, dtype=torch.float64),
        "labels": labels,
        "col_labels": col_labels,
        "teacher_query": [unit(rows, 24), unit(rows, 40)],
        "teacher_key": [unit(cols, 24), unit(cols, 40)],
        "teacher_scale": torch.tensor([20.0, 3.0], dtype=torch.float64),
    }


def single(p: dict[str, Any], num_teachers: int = 2) -> dict[str, Any]:
    def low(value: Any) -> Any:
        if isinstance(value, list):
            return [x.float() for x in value[:num_teachers]]
        return value.float() if value.is_floating_point() else value

    return {k: low(v) for k, v in p.items()} | {
        "teacher_scale": p["teacher_scale"][:num_teachers].float()
    }


SIDES = {
    "all": {"soft_rows": True, "soft_cols": True},
    "hard": {},
    "rows": {"cols": False, "soft_rows": True},
    "cols": {"rows": False, "soft_cols": True},
    "soft rows": {"soft_rows": True},
    "soft cols": {"soft_cols": True},
}


@pytest.mark.parametrize("num_teachers", [1, 2])
@pytest.mark.parametrize("flags", SIDES.values(), ids=SIDES)
def test_statistics_of_every_side_equal_those_in_float64(
    flags: dict, num_teachers: int, backend: str
) -> None:
    p = single(raw_problem(70, 150), num_teachers)
    double = {
        k: [x.double() for x in v]
        if isinstance(v, list)
        else v
        if v.dtype == torch.int64
        else v.double()
        for k, v in p.items()
    }
    names = ("query", "key", "scale")
    truth = statistics(double, names, backend="torch", **flags)
    ours = statistics(p, names, backend=backend, **flags)
    for x, true_x in zip(ours, truth, strict=True):
        torch.testing.assert_close(x.double(), true_x, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "names", [("query",), ("key",), ("scale",), ("key", "scale")], ids="-".join
)
def test_each_gradient_alone(names: tuple[str, ...], backend: str) -> None:
    # strips run along the rows whatever is needed
    p = single(raw_problem(50, 40))
    together = statistics(p, ("query", "key", "scale"), backend=backend, **SIDES["all"])
    alone = statistics(p, names, backend=backend, **SIDES["all"])
    for name, x in zip(names, alone[-len(names) :], strict=True):
        true_x = together[["query", "key", "scale"].index(name) - 3]
        torch.testing.assert_close(x, true_x, rtol=1e-6, atol=1e-6)


def statistics_of_rows(p: dict[str, Any], names: tuple[str, ...], **options: Any) -> list[Tensor]:
    p = p | {name: p[name].detach().clone().requires_grad_() for name in names}
    side, _ = similarity(**p, cols=False, **options)
    weights = torch.linspace(0.3, 2, len(side.others), dtype=torch.float64)
    mixed = weights * (side.others - 0.7 * side.positive).double()
    total = mixed[side.others > -torch.inf].sum()
    return [side.others, side.positive, *torch.autograd.grad(total, [p[name] for name in names])]


@pytest.mark.parametrize("budget", [1, 1 << 30], ids=["strips", "one strip"])
@pytest.mark.parametrize("features", ["random", "one cell", "no survivor"])
def test_rows_against_constant_keys_take_no_backward(
    features: str, kind: Any, budget: int, monkeypatch: Any
) -> None:
    backend, dtype = kind
    p = raw_problem(*(1, 1) if features == "one cell" else (200, 150))
    if features == "no survivor":
        # cosines of -1 at scale 100, in the second strip alone
        p["query"][128:] = -p["key"][:1]
        p |= {"key": p["key"][:1].expand(150, 40).contiguous(), "scale": torch.tensor(100.0)}
    p = {k: v for k, v in p.items() if not k.startswith("teacher")}
    for name in ("query", "key"):
        p[name] = p[name].to(dtype)
    monkeypatch.setitem(_backend.WORKSPACE, "cpu", budget)
    monkeypatch.setattr(_backend.choose("similarity", [p["query"]], backend), "backward", None)
    # so that a repetition has fewer programs than tiles
    monkeypatch.setattr(common, "num_processors", lambda _: 1)
    ours = statistics_of_rows(p, ("query", "scale"), backend=backend)
    double = {k: v.double() if v.is_floating_point() else v for k, v in p.items()}
    truth = statistics_of_rows(double, ("query", "scale"), backend="torch")
    for x, true_x, tolerance in zip(ours, truth, [1e-6, 1e-6, 0, 0], strict=True):
        tolerance = tolerance or TOLERANCE[dtype][1]
        finite = true_x.isfinite()
        assert torch.equal(x.isfinite(), finite)
        size = true_x[finite].norm().clamp(min=p["scale"].double() / 10)
        assert (x.double() - true_x)[finite].norm() <= 2 * tolerance * size, (x, true_x)


def test_strips_and_variants_change_nothing(monkeypatch: Any, variant: str) -> None:
    p = single(raw_problem(300, 90), 1)
    names = ("query", "key", "scale")
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "two_phase", lambda *_: False)
        whole = statistics(p, names, backend="triton", **SIDES["all"])
    monkeypatch.setitem(_backend.WORKSPACE, "cpu", 1)
    for x, true_x in zip(
        statistics(p, names, backend="triton", **SIDES["all"]), whole, strict=True
    ):
        torch.testing.assert_close(x, true_x, rtol=2e-6, atol=2e-5)


def test_two_runs_are_equal_to_the_last_bit(backend: str) -> None:
    p = single(raw_problem(130, 90), 1)
    names = ("query", "key", "scale")
    first, second = (statistics(p, names, backend=backend, **SIDES["all"]) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_uninitialised_memory_is_never_read(backend: str) -> None:
    p = single(raw_problem(63, 65), 1)
    names = ("query", "key", "scale")
    plain = statistics(p, names, backend=backend, **SIDES["all"])
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        # under this mode torch.empty fills with NaN
        assert torch.empty(3).isnan().all()
        poisoned = statistics(p, names, backend=backend, **SIDES["all"])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(plain, poisoned, strict=True))


def test_inputs_need_not_be_contiguous(backend: str) -> None:
    p = single(raw_problem(20, 30))
    strided = p | {
        "query": p["query"].T.contiguous().T,
        "key": torch.stack([p["key"], p["key"]], 1)[:, 0],
        "labels": torch.stack([p["labels"], p["labels"]], 1)[:, 0],
    }
    for x, true_x in zip(
        statistics(strided, ("query", "key", "scale"), backend=backend, **SIDES["all"]),
        statistics(p, ("query", "key", "scale"), backend=backend, **SIDES["all"]),
        strict=True,
    ):
        torch.testing.assert_close(x, true_x, rtol=1e-6, atol=1e-6)


def test_features_may_begin_anywhere_in_a_buffer(backend: str) -> None:
    p = single(raw_problem(20, 30))
    buffer = torch.empty(p["query"].numel() + 1)
    shifted = buffer[1:].view_as(p["query"]).copy_(p["query"])
    assert shifted.data_ptr() % 16
    for x, true_x in zip(
        statistics(p | {"query": shifted}, ("key", "scale"), backend=backend, **SIDES["all"]),
        statistics(p, ("key", "scale"), backend=backend, **SIDES["all"]),
        strict=True,
    ):
        assert torch.equal(x, true_x)


def test_a_single_row_of_another_matrix_is_read_as_it_is(backend: str) -> None:
    """Its stride means nothing to torch, which calls it contiguous."""
    whole = unit(3, 13).float()
    row = whole[:1, :8]
    key, labels = unit(5, 8).float(), torch.tensor([2])
    found, _ = similarity(
        *(row, key, torch.tensor(9.0), labels, torch.full((5,), -1)), cols=False, backend=backend
    )
    z = 9.0 * row @ key.T
    z[0, 2] = -torch.inf
    torch.testing.assert_close(found.others, z.logsumexp(1), rtol=1e-6, atol=1e-6)


def test_float64_is_refused_by_name() -> None:
    x = unit(4, 3)
    with pytest.raises(RuntimeError, match="'triton' was asked for, but .*float64"):
        losses.similarity_loss(x, x, 10.0, backend="triton")


@pytest.mark.parametrize(
    ("width", "teachers", "itemsize", "expected"),
    [
        (512, [], 2, False),
        (512, [768], 2, True),
        (640, [512], 2, True),
        (512, [1024], 2, False),
        (2048, [512], 2, False),
        (512, [768], 4, False),
        (1024, [1024, 1024], 4, True),
    ],
)
def test_the_table_of_variants(
    width: int, teachers: list[int], itemsize: int, expected: bool
) -> None:
    assert tuning.two_phase(width, teachers, itemsize, True) is expected
    # a second teacher has no other way
    assert tuning.two_phase(width, teachers, itemsize, False) is (len(teachers) > 1)


@pytest.mark.parametrize(
    ("rows", "cols", "num_bytes", "expected"),
    [(32768, 32768, 640 << 20, True), (32768, 131072, 640 << 20, False)]
    + [(32768, 32768, 64 << 20, False), (300, 300, 4 << 20, True), (300, 3000, 1 << 20, False)],
)
def test_two_phases_need_room_for_a_strip_of_targets(
    rows: int, cols: int, num_bytes: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Chosen(Exception):
        pass

    def stop(*_: Any, two_phase: bool, **__: Any) -> Any:
        raise Chosen(two_phase)

    monkeypatch.setattr(kernels, "gradients", stop)
    low = {"dtype": torch.float16, "device": "cpu"}
    query, key = torch.empty(rows, 512, **low), torch.empty(cols, 512, **low)
    stats = [
        torch.empty(2, rows),
        torch.empty(2, cols),
        torch.empty(1, 4, rows),
        torch.empty(1, 4, cols),
    ]
    labels = torch.zeros(rows, dtype=torch.int64), torch.zeros(cols, dtype=torch.int64)
    scales = torch.ones(()), torch.ones(1)
    with pytest.raises(Chosen) as found:
        kernels.backward(
            stats,
            query,
            key,
            scales[0],
            *labels,
            [query],
            [key],
            scales[1],
            stats,
            torch.empty(0),
            True,
            True,
            True,
            num_bytes,
        )
    assert found.value.args == (expected,)


def test_no_entry_of_the_table_is_for_an_unknown_kernel() -> None:
    kinds = {kind.removesuffix("_exact") for kind, _ in tuning.TABLE}
    for kind in kinds:
        assert {size for name, size in tuning.TABLE if name == kind} == {2, 4}
