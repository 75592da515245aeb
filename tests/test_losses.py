# SPDX-License-Identifier: Apache-2.0
"""What the losses mean and what they refuse: terms, flags, scales, teachers, keys, arguments."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import losses, reference
from kdengine.ops import similarity_product

DOUBLE = torch.float64
TERMS = ("hard_rows", "hard_cols", "soft_rows", "soft_cols")


def unit(rows: int, width: int) -> Tensor:
    return F.normalize(torch.randn(rows, width, dtype=DOUBLE), dim=1)


def evaluate(module, query: Tensor, key: Tensor, scale: float, **options) -> list[Tensor]:
    """Loss, then gradients of query, key and scale, for an upstream gradient of 1.7."""
    leaves = [x.clone().requires_grad_() for x in (query, key)]
    leaves.append(torch.tensor(scale, dtype=DOUBLE, requires_grad=True))
    loss = module.similarity_loss(*leaves, **options)
    return [loss.detach(), *torch.autograd.grad(1.7 * loss, leaves)]


def teacher(rows: int, cols: int) -> dict:
    return {"teacher_query": unit(rows, 3), "teacher_key": unit(cols, 3), "teacher_scale": 8.0}


def test_each_term_gets_its_own_upstream_gradient() -> None:
    query, key = unit(7, 5), unit(9, 5)
    weights = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=DOUBLE)
    options = teacher(7, 9) | {"col_labels": torch.randint(0, 7, (9,))}
    found = []
    for module in (losses, reference):
        leaves = [x.clone().requires_grad_() for x in (query, key)]
        terms = module.similarity_terms(*leaves, 6.0, **options)
        found.append(torch.autograd.grad(terms[:4], leaves, weights.unbind()))
    for x, truth in zip(*found, strict=True):
        torch.testing.assert_close(x, truth, rtol=1e-10, atol=1e-10)


def test_terms_and_entropies_equal_the_oracle_for_several_teachers() -> None:
    query, key = unit(9, 5), unit(7, 5)
    options = {
        "labels": torch.randint(0, 7, (9,)),
        "teacher_query": (unit(9, 3), unit(9, 6), unit(9, 2)),
        "teacher_key": (unit(7, 3), unit(7, 6), unit(7, 2)),
        "teacher_scale": (4.0, torch.tensor(20.0), torch.tensor([80.0])),
    }
    ours = losses.similarity_terms(query.requires_grad_(), key, 9.0, **options)
    truth = reference.similarity_terms(query, key, 9.0, **options)
    for x, true_x in zip(ours, truth, strict=True):
        torch.testing.assert_close(x, true_x, rtol=1e-12, atol=1e-12)
    assert not ours.teacher_entropy_rows.requires_grad
    assert not ours.teacher_entropy_cols.requires_grad


@pytest.mark.parametrize("on", range(4), ids=TERMS)
def test_terms_switched_off_are_zero_and_the_others_unchanged(on: int) -> None:
    options = teacher(6, 6)
    query, key = unit(6, 5), unit(6, 5)
    everything = losses.similarity_terms(query, key, 6.0, **options)
    flags = {name: i == on for i, name in enumerate(TERMS)}
    alone = losses.similarity_terms(query, key, 6.0, **options, **flags)
    assert [x.item() != 0 for x in alone[:4]] == list(flags.values())
    torch.testing.assert_close(alone[on], everything[on])


def test_hard_terms_alone_skip_the_teachers_product(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    strip = similarity_product.Product.strip
    monkeypatch.setattr(
        similarity_product.Product, "strip", lambda *args: counted.append(1) or strip(*args)
    )
    options = teacher(6, 6)
    query = unit(6, 5).requires_grad_()
    losses.similarity_loss(query, unit(6, 5), 6.0, **options).backward()
    assert len(counted) == 2
    losses.similarity_loss(query, unit(6, 5), 6.0, **options, soft_rows=0.1).backward()
    assert len(counted) == 6


@pytest.mark.parametrize("scale", [7.0, torch.tensor(7.0), torch.tensor([7.0])], ids=repr)
def test_scale_is_a_number_or_a_tensor_of_one(scale) -> None:
    query, key = unit(5, 4), unit(5, 4)
    torch.testing.assert_close(
        losses.similarity_loss(query, key, scale), reference.similarity_loss(query, key, 7.0)
    )


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_gradient_of_scale_has_its_shape(shape: tuple) -> None:
    scale = torch.full(shape, 7.0, requires_grad=True)
    losses.similarity_loss(unit(5, 4), unit(5, 4), scale).backward()
    assert scale.grad.shape == shape
    assert scale.grad != 0


def test_normalize_takes_raw_rows() -> None:
    query, key, u, v = (3 * torch.randn(9, 5, dtype=DOUBLE) for _ in range(4))
    options = {"teacher_query": u, "teacher_key": v, "teacher_scale": 8.0, "normalize": True}
    options |= {"soft_rows": 0.3, "soft_cols": 0.4}
    ours = evaluate(losses, query, key, 6.0, **options)
    for x, truth in zip(ours, evaluate(reference, query, key, 6.0, **options), strict=True):
        torch.testing.assert_close(x, truth, rtol=1e-10, atol=1e-12)


def test_permuted_pairs_permute_the_gradients() -> None:
    query, key = unit(33, 8), unit(33, 8)
    order = torch.randperm(33)
    loss, *gradients = evaluate(losses, query, key, 10.0)
    permuted = evaluate(losses, query[order], key[order], 10.0)
    expected = [loss, gradients[0][order], gradients[1][order], gradients[2]]
    for x, truth in zip(permuted, expected, strict=True):
        torch.testing.assert_close(x, truth, rtol=1e-12, atol=1e-12)


def test_constant_key_gets_no_gradient() -> None:
    query, key = unit(6, 5).requires_grad_(), unit(6, 5)
    losses.similarity_loss(query, key, 6.0).backward()
    assert query.grad is not None
    assert key.grad is None


def test_loss_under_autocast_is_the_plain_one() -> None:
    image, text = (x.float() for x in (unit(9, 8), unit(9, 8)))
    plain = losses.similarity_loss(image, text, 60.0, normalize=True)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = losses.similarity_loss(image, text, 60.0, normalize=True)
    assert torch.equal(plain, mixed)


def test_whole_loss_compiles_to_one_graph() -> None:
    def loss(query: Tensor, key: Tensor, scale: Tensor, u: Tensor, v: Tensor) -> Tensor:
        options = {"teacher_query": u, "teacher_key": v, "teacher_scale": 9.0, "normalize": True}
        return losses.similarity_loss(query, key, scale, **options, soft_rows=1.0)

    args = [torch.randn(6, 5, requires_grad=True) for _ in range(2)]
    args += [torch.tensor([5.0], requires_grad=True), unit(6, 3).float(), unit(6, 3).float()]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = [torch.autograd.grad(f(*args), args[:3]) for f in (compiled, loss)]
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)


def test_lse_equals_the_oracle_with_and_without_exclusion() -> None:
    query, key = unit(9, 5).requires_grad_(), unit(7, 5).requires_grad_()
    for exclude in (None, torch.randint(0, 7, (9,))):
        ours = losses.similarity_lse(query, key, 9.0, exclude=exclude)
        truth = reference.similarity_lse(query, key, 9.0, exclude)
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
        weights = torch.linspace(-1, 2, 9, dtype=DOUBLE)
        gradients = [torch.autograd.grad((weights * x).sum(), (query, key)) for x in (ours, truth)]
        for x, true_x in zip(*gradients, strict=True):
            torch.testing.assert_close(x, true_x, rtol=1e-10, atol=1e-10)


def test_lse_of_nothing_is_minus_infinity() -> None:
    lse = losses.similarity_lse(unit(1, 3), unit(1, 3), 9.0, exclude=torch.tensor([0]))
    assert lse.item() == -torch.inf


@pytest.mark.parametrize("keys", ["gathered", "replicated", "sharded"])
def test_keys_mean_the_same_in_one_process(keys: str) -> None:
    query, key, labels = unit(9, 5), unit(7, 5), torch.randint(0, 7, (9,))
    options = {"labels": labels, "hard_cols": 0.0}
    ours = losses.similarity_loss(query, key, 6.0, **options, keys=keys)
    torch.testing.assert_close(ours, reference.similarity_loss(query, key, 6.0, **options))


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_sharp_clusters_with_a_margin_stay_finite(margin: float) -> None:
    centroids = unit(32, 16).float()
    image = centroids.clone().requires_grad_()
    losses.cluster_cross_entropy(image, centroids, 64.0, torch.arange(32), margin).backward()
    assert image.grad.isfinite().all()


def test_margin_softmax_follows_from_lse() -> None:
    image, centroids, labels = unit(9, 5), unit(7, 5), torch.randint(0, 7, (9,))
    others = losses.similarity_lse(image, centroids, 16.0, exclude=labels)
    angle = (image * centroids[labels]).sum(1).acos()
    loss = F.softplus(others - 16.0 * (angle + 0.2).cos(), threshold=100).mean()
    truth = reference.cluster_cross_entropy(image, centroids, 16.0, labels, 0.2)
    torch.testing.assert_close(loss, truth, rtol=1e-10, atol=1e-12)


def bare(**changes) -> dict:
    return {"query": unit(4, 3), "key": unit(4, 3), "scale": 5.0} | changes


LABELS = torch.arange(4)
REFUSED = {
    "unequal widths": (bare(key=unit(4, 2)), ValueError, r"\(4, 3\) but key is \(4, 2\).*head"),
    "three dimensions": (bare(query=torch.ones(4, 3, 1)), ValueError, "shape \\(rows, width\\)"),
    "no rows": (bare(query=torch.ones(0, 3), key=torch.ones(0, 3)), ValueError, "at least one row"),
    "integers": (
        bare(query=torch.ones(4, 3).long()),
        TypeError,
        "floating point tensor; torch.int",
    ),
    "many scales": (bare(scale=torch.ones(2)), ValueError, "scale is one floating point number"),
    "scale of words": (bare(scale="5"), TypeError, "scale is a float or a tensor; str came"),
    "weight tensor": (bare(hard_rows=torch.ones(())), TypeError, "weight is a float; Tensor came"),
    "float labels": (bare(labels=torch.ones(4)), TypeError, "labels needs to be an int64 tensor"),
    "few labels": (bare(labels=LABELS[:3]), ValueError, "labels needs one number for each of 4"),
    "label too big": (bare(labels=LABELS + 1), ValueError, "labels are numbers in 0..3; 1..4 came"),
    "negative label": (bare(col_labels=LABELS - 1), ValueError, "in 0..3; -1..2 came"),
    "more rows than columns": (bare(query=unit(5, 3)), ValueError, "without labels, number i of 5"),
    "more columns than rows": (
        bare(key=unit(5, 3), labels=LABELS),
        ValueError,
        "without col_labels, number i of 5 .* only 4; give col_labels or switch hard_cols off",
    ),
    "unknown keys": (bare(keys="local"), ValueError, "keys is one of .*'sharded'.*; 'local' came"),
    "soft without teacher": (bare(soft_rows=0.5), ValueError, "soft_rows=0.5 .* need a teacher"),
    "half a teacher": (bare(teacher_query=unit(4, 3)), ValueError, "come together"),
    "unequal tuples": (
        bare(**teacher(4, 4) | {"teacher_scale": (1.0, 2.0)}),
        ValueError,
        "tuples of one length; 1, 1, 2 came",
    ),
    "teacher of other rows": (
        bare(**teacher(4, 5)),
        ValueError,
        r"rows and the device of the student; teacher_query \(4, 3\) and teacher_key \(5, 3\)",
    ),
    "teacher that learns": (
        bare(**teacher(4, 4) | {"teacher_key": unit(4, 3).requires_grad_()}),
        ValueError,
        "teacher_key is a constant .* torch.no_grad",
    ),
    "teacher scale that learns": (
        bare(**teacher(4, 4) | {"teacher_scale": torch.ones(1, requires_grad=True)}),
        ValueError,
        "teacher_scale is a constant",
    ),
}


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_with_advice(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"similarity_(loss|terms): .*{message}"):
        losses.similarity_loss(**arguments)


FEATURE_REFUSED = {
    "unequal rows": ((unit(4, 3), unit(5, 3)), {}, "same number of rows"),
    "unequal widths": ((unit(4, 3), unit(4, 2)), {}, "projection head"),
    "reduction": ((unit(4, 3), unit(4, 3)), {"reduction": "max"}, "'max' came"),
    "teacher that learns": ((unit(4, 3), unit(4, 3).requires_grad_()), {}, "teacher is a constant"),
}


@pytest.mark.parametrize(
    ("pair", "options", "message"), FEATURE_REFUSED.values(), ids=FEATURE_REFUSED
)
def test_feature_refuses_with_advice(pair: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"feature: .*{message}"):
        losses.feature(*pair, **options)


def test_modalities_of_several_shapes_are_refused() -> None:
    students = [unit(4, 3), unit(4, 2)]
    with pytest.raises(ValueError, match=r"unit_feature: .* the shapes \[\(4, 2\), \(4, 3\)\]"):
        losses.unit_feature(students, students)
    with pytest.raises(ValueError, match="unit_feature: .*; 2 and 1 came"):
        losses.unit_feature([students[0]] * 2, [students[0]])


def test_interactive_contrastive_refuses_a_teacher_that_learns() -> None:
    features = [unit(4, 3) for _ in range(3)]
    with pytest.raises(ValueError, match="interactive_contrastive: teacher_text is a constant"):
        losses.interactive_contrastive(*features[:2], 5.0, features[2], unit(4, 3).requires_grad_())
