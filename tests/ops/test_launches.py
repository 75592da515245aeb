# SPDX-License-Identifier: Apache-2.0
"""What a loss launches on a GPU, counted in the interpreter: the cost of small batches."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter

from kdengine import losses
from kdengine.methods import ClipKD
from kdengine.models import Features
from kdengine.ops import _backend, extension, moments

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

# numpy's, where a discarded branch of a kernel overflows
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

# what a GPU does nothing for
FREE = {"detach", "view", "_unsafe_view", "expand", "select", "slice", "transpose", "t", "alias"}
FREE |= {"unsqueeze", "unbind", "empty", "new_empty", "empty_like", "as_strided", "permute", "mT"}
FREE |= {"promote_types", "scalar_tensor", "reshape", "is_same_size"}
PRODUCTS = ("mm", "addmm_", "addmm")


class Operations(TorchDispatchMode):
    """Counts operations of torch that work on a tensor with elements."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        unchanged = isinstance(out, Tensor) and any(out is x for x in args)
        if func.namespace != "aten" or name in FREE or (unchanged and not name.endswith("_")):
            return out
        if not isinstance(out, Tensor) or out.numel():
            self.counts[name] += 1
        return out


@contextlib.contextmanager
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Counts by kernel, and by operation of torch, also inside of the ops."""
    counts: Counter[str] = Counter()
    execute, running = interpreter.GridExecutor.__call__, _backend.running
    mode = Operations(counts)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        counts[self.fn.__name__] += 1
        # the interpreter copies its arguments
        with _disable_current_modes():
            return execute(self, *args, **options)

    @contextlib.contextmanager
    def inside(x: Tensor) -> Iterator[None]:
        # a mode does not see into a custom op
        with running(x), mode:
            yield

    with monkeypatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", call)
        patch.setattr(_backend, "running", inside)
        with mode:
            yield counts


@pytest.mark.parametrize("with_teacher", [False, True], ids=["InfoNCE", "InfoNCE + CRD"])
def test_launches_of_a_loss_and_its_gradients(
    with_teacher: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y, u, v = (F.normalize(torch.randn(128, 32), dim=1) for _ in range(4))
    leaves = [w.requires_grad_() for w in (x, y, torch.tensor(14.3))]
    options: dict[str, Any] = {"backend": "triton"}
    if with_teacher:
        options |= {"teacher_query": u, "teacher_key": v, "teacher_scale": torch.tensor(50.0)}
        options |= {"soft_rows": 0.5, "soft_cols": 0.5}
    with launches(monkeypatch) as counts:
        loss = losses.similarity_loss(*leaves, **options)
    kernels = {name: n for name, n in counts.items() if name.endswith("_kernel")}
    # two of each: one is the repetition, which returns at once
    assert kernels == {
        "_statistics_kernel": 2,
        "_finalise_kernel": 2,
        "_terms_forward_kernel": 1,
    }
    assert sum(counts.values()) - 5 <= 12, counts
    with launches(monkeypatch) as counts:
        torch.autograd.grad(loss, leaves)
    kernels = {name: n for name, n in counts.items() if name.endswith("_kernel")}
    assert kernels == {
        "_terms_backward_kernel": 1,
        "_coefficients_kernel": 1,
        "_gradient_kernel": 2,
        "_positives_kernel": 1,
    }
    assert sum(counts[name] for name in PRODUCTS) == 2
    assert sum(counts.values()) - 7 <= 22, counts


def test_image_and_text_share_a_launch_of_feature_distillation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image, text, *teachers = (torch.randn(16, 32) for _ in range(4))
    students = [image.requires_grad_(), text.requires_grad_()]
    with launches(monkeypatch) as counts:
        loss, units = losses.unit_feature(students, teachers, backend="triton")
    # and the sum of the distances, and what it is divided by
    assert counts == {"_feature_forward_kernel": 1, "sum": 1, "div": 1}
    loss = loss + (units[0] @ units[1].mT).sum()
    with launches(monkeypatch) as counts:
        torch.autograd.grad(loss, students)
    assert counts["_feature_backward_kernel"] == 1


def test_moments_of_student_and_teacher_share_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = torch.randn(70, 32, requires_grad=True), torch.randn(70, 32)
    with launches(monkeypatch) as counts:
        mean, variance = moments(student, teacher, backend="triton")
    assert counts == {"_moments_kernel": 1}
    with launches(monkeypatch) as counts:
        torch.autograd.grad(mean.sum() + variance.sum(), student)
    assert counts["_moments_gradient_kernel"] == 1


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls of the extension, each of which is one launch of one kernel on a GPU."""
    if reason := extension.why_not("cpu"):
        pytest.skip(reason)
    counts: Counter[str] = Counter()
    real = extension.call

    def call(name: str, *args: Any) -> None:
        counts[name] += 1
        real(name, *args)

    monkeypatch.setattr(extension, "call", call)
    return counts


def test_image_and_text_share_a_call_of_the_extension(calls: Counter[str]) -> None:
    method = ClipKD(32, [32], backend="cuda", crd=0.0, icl=0.0)
    student, teacher = (
        Features(*(torch.randn(16, 32, requires_grad=grad) for _ in range(2)), torch.tensor(14.3))
        for grad in (True, False)
    )
    masked = torch.randn(16, 32, requires_grad=True)
    for given in ((), (masked,)):
        calls.clear()
        terms = method(student, [teacher], *given)
        assert calls["feature_forward"] == 1
        sum(terms.values()).backward()
        assert (calls["feature_forward"], calls["feature_backward"]) == (1, 1)


def test_what_follows_from_partial_sums_is_one_call_each_way(calls: Counter[str]) -> None:
    x, y, u, v = (F.normalize(torch.randn(300, 32), dim=1) for _ in range(4))
    options: dict[str, Any] = {"teacher_query": u, "teacher_key": v, "teacher_scale": 50.0}
    options |= {"soft_rows": 0.5, "soft_cols": 0.5, "backend": "cuda"}
    loss = losses.similarity_loss(x.requires_grad_(), y.requires_grad_(), 14.3, **options)
    assert calls == {"similarity_statistics": 1, "similarity_finalise": 1, "terms_forward": 1}
    loss.backward()
    # and one call a strip of the matrix
    del calls["similarity_gradient"]
    assert len(calls) == 4 and set(calls.values()) == {1} and calls["terms_backward"] == 1
