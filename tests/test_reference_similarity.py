# SPDX-License-Identifier: Apache-2.0
"""The dense oracle of the similarity op: its terms, weights, labels, teachers and extremes."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import reference


def unit_rows(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def _problem(rows: int = 6, cols: int = 6) -> dict[str, Any]:
    return {
        "query": unit_rows(rows, 5),
        "key": unit_rows(cols, 5),
        "scale": torch.tensor(11.0, dtype=torch.float64),
        "teacher_query": unit_rows(rows, 3),
        "teacher_key": unit_rows(cols, 3),
        "teacher_scale": 13.0,
    }


def _terms_by_loops(problem: dict, labels: list[int], col_labels: list[int]) -> list[float]:
    z = (problem["scale"] * problem["query"] @ problem["key"].T).tolist()
    t = (problem["teacher_scale"] * problem["teacher_query"] @ problem["teacher_key"].T).tolist()

    def one_side(z: list, t: list, labels: list[int]) -> list[float]:
        hard = soft = entropy = 0.0
        for z_row, t_row, label in zip(z, t, labels, strict=True):
            p = [math.exp(x) / math.fsum(map(math.exp, z_row)) for x in z_row]
            q = [math.exp(x) / math.fsum(map(math.exp, t_row)) for x in t_row]
            hard -= math.log(p[label])
            soft += math.fsum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
            entropy -= math.fsum(b * math.log(b) for b in q)
        return [x / len(labels) for x in (hard, soft, entropy)]

    rows = one_side(z, t, labels)
    cols = one_side(list(zip(*z, strict=True)), list(zip(*t, strict=True)), col_labels)
    return [x for pair in zip(rows, cols, strict=True) for x in pair]


@pytest.mark.parametrize(
    ("rows", "cols", "labels", "col_labels"),
    [
        pytest.param(6, 6, None, None, id="square"),
        pytest.param(6, 6, [2, 0, 1, 5, 4, 3], None, id="labels leave col_labels at j"),
        pytest.param(6, 6, None, [3, 3, 3, 0, 1, 2], id="col_labels leave labels at i"),
        pytest.param(4, 7, [6, 6, 0, 2], [0, 1, 2, 3, 3, 2, 1], id="wide"),
        pytest.param(7, 4, [0, 1, 2, 3, 3, 2, 1], None, id="tall"),
        pytest.param(1, 5, [4], [0, 0, 0, 0, 0], id="one row"),
        pytest.param(5, 1, [0, 0, 0, 0, 0], [4], id="one column"),
    ],
)
def test_terms_equal_the_definition(rows: int, cols: int, labels: Any, col_labels: Any) -> None:
    problem = _problem(rows, cols)
    expected = _terms_by_loops(
        problem, labels or list(range(rows)), col_labels or list(range(cols))
    )
    terms = reference.similarity_terms(
        **problem,
        labels=None if labels is None else torch.tensor(labels),
        col_labels=None if col_labels is None else torch.tensor(col_labels),
    )
    assert [x.item() for x in terms] == pytest.approx(expected, rel=1e-12, abs=1e-13)


def test_terms_have_finite_differences_with_labels_and_several_teachers() -> None:
    problem = _problem(4, 6)
    query, key, scale = (problem[k].requires_grad_() for k in ("query", "key", "scale"))
    teachers = {
        "teacher_query": (problem["teacher_query"], unit_rows(4, 2)),
        "teacher_key": (problem["teacher_key"], unit_rows(6, 2)),
        "teacher_scale": (13.0, 3.0),
    }
    labels, col_labels = torch.tensor([5, 1, 1, 0]), torch.tensor([0, 1, 2, 3, 0, 1])

    def terms(query: Tensor, key: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        found = reference.similarity_terms(
            query, key, scale, labels=labels, col_labels=col_labels, **teachers
        )
        return tuple(found[:4])

    assert torch.autograd.gradcheck(terms, (query, key, scale))


def test_entropies_are_detached() -> None:
    problem = _problem()
    problem["query"].requires_grad_()
    problem["teacher_query"].requires_grad_()
    terms = reference.similarity_terms(**problem)
    assert all(x.requires_grad for x in terms[:4])
    assert not any(x.requires_grad for x in terms[4:])


def test_lse_has_finite_differences() -> None:
    inputs = (unit_rows(4, 3), unit_rows(6, 3), torch.tensor([5.0], dtype=torch.float64))
    exclude = torch.tensor([0, 5, 2, 2])
    for value in inputs:
        value.requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: reference.similarity_lse(*x, exclude), inputs)


def test_lse_leaves_out_exactly_the_excluded_column() -> None:
    query, key = unit_rows(3, 4), unit_rows(5, 4)
    exclude = torch.tensor([4, 0, 2])
    found = reference.similarity_lse(query, key, 10.0, exclude=exclude)
    for i, left_out in enumerate(exclude.tolist()):
        kept = [j for j in range(5) if j != left_out]
        expected = (10.0 * query[i] @ key[kept].T).exp().sum().log()
        assert found[i].item() == pytest.approx(expected.item(), rel=1e-13)


def test_lse_without_exclusion_is_the_log_of_the_whole_sum() -> None:
    query, key = unit_rows(3, 4), unit_rows(5, 4)
    expected = (10.0 * query @ key.T).exp().sum(1).log()
    found = reference.similarity_lse(query, key, 10.0)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)


def test_several_teachers_are_the_mean_of_divergences_and_of_entropies() -> None:
    first, second = _problem(), _problem()
    student = {k: first.pop(k) for k in ("query", "key", "scale")}
    second = {k: v for k, v in second.items() if k.startswith("teacher")}
    second["teacher_query"] = second["teacher_query"][:, :2]
    second["teacher_key"] = second["teacher_key"][:, :2]
    alone = [reference.similarity_terms(**student, **teacher) for teacher in (first, second)]
    together = reference.similarity_terms(**student, **{k: (first[k], second[k]) for k in first})
    for name in reference.SimilarityTerms._fields:
        mean = (getattr(alone[0], name) + getattr(alone[1], name)) / 2
        assert getattr(together, name).item() == pytest.approx(mean.item(), rel=1e-13)


def test_loss_is_the_weighted_sum_of_terms() -> None:
    problem = _problem()
    terms = reference.similarity_terms(**problem)
    weights = {"hard_rows": 0.3, "hard_cols": 0.7, "soft_rows": 1.1, "soft_cols": 2.3}
    expected = sum(w * getattr(terms, name).item() for name, w in weights.items())
    found = reference.similarity_loss(**problem, **weights).item()
    assert found == pytest.approx(expected, rel=1e-14)


def test_default_weights_are_info_nce_even_with_a_teacher() -> None:
    problem = _problem()
    expected = reference.info_nce(problem["query"], problem["key"], problem["scale"])
    assert reference.similarity_loss(**problem).item() == expected.item()


def test_switched_off_terms_are_zero_and_the_others_unchanged() -> None:
    problem = _problem()
    whole = reference.similarity_terms(**problem)._asdict()
    part = reference.similarity_terms(**problem, hard_cols=False, soft_rows=False)._asdict()
    off = {"hard_cols", "soft_rows", "teacher_entropy_rows"}
    for name, value in part.items():
        assert value.item() == (0.0 if name in off else whole[name].item())


def test_without_a_teacher_the_soft_terms_are_zero() -> None:
    problem = {k: v for k, v in _problem().items() if not k.startswith("teacher")}
    terms = reference.similarity_terms(**problem)
    assert all(x > 0 for x in terms[:2])
    assert [x.item() for x in terms[2:]] == [0.0] * 4


def test_term_of_weight_zero_may_be_undefined() -> None:
    # more columns than rows: the default positive of column 5 does not exist, and is not asked for
    query, key = unit_rows(3, 4), unit_rows(6, 4)
    loss = reference.similarity_loss(query, key, 5.0, hard_rows=1.0, hard_cols=0.0)
    expected = F.cross_entropy(5.0 * query @ key.T, torch.arange(3))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-13)


@pytest.mark.parametrize("shape", ["float", "0-D", "[1]"])
def test_scale_may_be(shape: str) -> None:
    problem = _problem()
    scale = {"float": 11.0, "0-D": problem["scale"], "[1]": problem["scale"][None]}[shape]
    expected = reference.similarity_terms(**problem)
    found = reference.similarity_terms(**problem | {"scale": scale})
    assert all(x.shape == () for x in found)
    assert [x.item() for x in found] == [x.item() for x in expected]


def test_normalize_makes_lengths_irrelevant_for_student_and_teacher() -> None:
    problem = _problem()
    expected = reference.similarity_terms(**problem)
    for name in ("query", "key", "teacher_query", "teacher_key"):
        problem[name] *= torch.rand(6, 1, dtype=torch.float64) + 0.1
    assert reference.similarity_terms(**problem)[2].item() != pytest.approx(expected[2].item())
    found = reference.similarity_terms(**problem, normalize=True)
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-12, atol=1e-13)


def test_scale_gradient_is_the_radial_part_of_both_feature_gradients() -> None:
    problem = _problem()
    query, key, scale = (problem[k].requires_grad_() for k in ("query", "key", "scale"))
    reference.similarity_loss(**problem, soft_rows=0.4, soft_cols=0.9).backward()
    by_query = (query * query.grad).sum().item()
    assert (scale * scale.grad).item() == pytest.approx(by_query, rel=1e-12)
    assert (key * key.grad).sum().item() == pytest.approx(by_query, rel=1e-12)


def test_logit_gradient_is_the_weighted_difference_of_probabilities() -> None:
    problem = _problem(4, 6)
    # the identity as key width makes query.grad the gradient of the logits themselves
    query = (problem["query"] @ problem["key"].T * problem["scale"]).detach().requires_grad_()
    labels, col_labels = torch.tensor([5, 1, 1, 0]), torch.tensor([0, 1, 2, 3, 0, 1])
    weights = {"hard_rows": 0.3, "hard_cols": 0.7, "soft_rows": 1.1, "soft_cols": 2.3}
    problem |= {"query": query, "key": torch.eye(6, dtype=torch.float64), "scale": 1.0}
    reference.similarity_loss(**problem, labels=labels, col_labels=col_labels, **weights).backward()
    t = problem["teacher_scale"] * problem["teacher_query"] @ problem["teacher_key"].T
    one_hot = F.one_hot(labels, 6).to(t), F.one_hot(col_labels, 4).T.to(t)
    p, q = (query.softmax(1), query.softmax(0)), (t.softmax(1), t.softmax(0))
    expected = sum(
        ((hard + soft) * p[side] - soft * q[side] - hard * one_hot[side]) / (4, 6)[side]
        for side, hard, soft in ((0, 0.3, 1.1), (1, 0.7, 2.3))
    )
    torch.testing.assert_close(query.grad, expected, rtol=1e-12, atol=1e-14)
    assert query.grad.sum().item() == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0, 1e4])
def test_opposed_towers_stay_finite(scale: float) -> None:
    query = unit_rows(6, 5).requires_grad_()
    loss = reference.similarity_loss(
        query,
        -query.detach(),
        scale,
        teacher_query=query.detach(),
        teacher_key=query.detach(),
        teacher_scale=scale,
        soft_rows=1.0,
        soft_cols=1.0,
    )
    loss.backward()
    assert loss.isfinite()
    assert query.grad.isfinite().all()


def test_one_hot_teacher_is_the_hard_loss() -> None:
    # at scale 1e4 every other teacher probability underflows to 0 and must contribute 0, not nan
    query, key, eye = unit_rows(6, 5), unit_rows(6, 5), torch.eye(6, dtype=torch.float64)
    terms = reference.similarity_terms(
        query, key, 10.0, teacher_query=eye, teacher_key=eye, teacher_scale=1e4
    )
    assert terms.soft_rows.item() == pytest.approx(terms.hard_rows.item(), rel=1e-13)
    assert terms.soft_cols.item() == pytest.approx(terms.hard_cols.item(), rel=1e-13)
    assert terms.teacher_entropy_rows.item() == 0


def test_confident_rows_keep_their_relative_accuracy() -> None:
    query = torch.eye(3, dtype=torch.float64, requires_grad=True)
    loss = reference.info_nce(query, torch.eye(3, dtype=torch.float64), 100.0)
    loss.backward()
    assert loss.item() == pytest.approx(2 * math.exp(-100), rel=1e-12, abs=0)
    # off the diagonal both directions give e^-100 / 3 each, weighted 1/2 and scaled by 100
    expected = 100 * math.exp(-100) / 3
    assert query.grad[0, 1].item() == pytest.approx(expected, rel=1e-12, abs=0)
    assert query.grad[0, 0].item() == pytest.approx(-2 * expected, rel=1e-12, abs=0)
