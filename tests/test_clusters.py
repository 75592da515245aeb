# SPDX-License-Identifier: Apache-2.0
"""``cluster_terms`` against the dense oracle, on one rank and over several."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kdengine import losses, reference, reference_clusters

DOUBLE = torch.float64
# features of images and clusters, of a teacher of another width, and what is told of them
NUM_IMAGES, NUM_CLUSTERS, TOP = 12, 14, 4
SCALE = 9.0


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape, dtype=DOUBLE), dim=1)


def problem(top: int = TOP) -> dict[str, Tensor]:
    torch.manual_seed(0)
    teacher_image, teacher_centroids = unit(NUM_IMAGES, 7), unit(NUM_CLUSTERS, 7)
    q = (20.0 * teacher_image @ teacher_centroids.T).softmax(1)
    probabilities, nearest = q.topk(top)
    return {
        "image": unit(NUM_IMAGES, 5),
        "centroids": unit(NUM_CLUSTERS, 5),
        "teacher_image": teacher_image,
        "teacher_centroids": teacher_centroids,
        "nearest": nearest,
        "probabilities": probabilities,
        "labels": nearest[:, 0].contiguous(),
    }


def leaves(given: dict[str, Tensor]) -> list[Tensor]:
    scale = torch.tensor(SCALE, dtype=DOUBLE)
    return [x.clone().requires_grad_() for x in (given["image"], given["centroids"], scale)]


SPARSE, DENSE = ("nearest", "probabilities"), ("teacher_image", "teacher_centroids")
# options of the loss, and which of the problem's tensors it gets
CASES: dict[str, tuple[dict, tuple[str, ...]]] = {
    "hard": ({}, ()),
    "margin": ({"margin": 0.3}, ()),
    "sparse": ({}, SPARSE),
    "sparse, warm": ({"temperature": 2.0, "margin": 0.2}, SPARSE),
    "sparse alone": ({"discrimination": False, "temperature": 0.5}, SPARSE),
    "dense": ({"teacher_scale": 20.0}, DENSE),
    "dense, warm": ({"teacher_scale": 20.0, "temperature": 2.0, "margin": 0.2}, DENSE),
    "positives": ({"num_positives": 3}, ("nearest",)),
    "positives and sparse": ({"num_positives": TOP}, SPARSE),
}


def truth(case: str, given: dict[str, Tensor], student: list[Tensor]) -> list[Tensor]:
    options, tensors = CASES[case]
    temperature, positives = options.get("temperature", 1.0), options.get("num_positives", 1)
    zero = torch.zeros((), dtype=DOUBLE)
    hard = divergence = zero
    if positives > 1:
        hard = reference_clusters.multi_positive(*student, given["nearest"][:, :positives])
    elif options.get("discrimination", True):
        margin = options.get("margin", 0.0)
        hard = reference.cluster_cross_entropy(*student, given["labels"], margin)
    if "probabilities" in tensors:
        divergence = reference_clusters.sparse_cluster_kl(
            *student, given["nearest"], given["probabilities"], temperature=temperature
        )
    if "teacher_image" in tensors:
        teacher = given["teacher_image"], given["teacher_centroids"], 20.0
        divergence = reference.cluster_kl(*student, *teacher, temperature=temperature)
    return [hard, divergence]


def ours(case: str, given: dict[str, Tensor], student: list[Tensor], **ways) -> list[Tensor]:
    options, names = CASES[case]
    tensors = {name: given[name] for name in names}
    return list(losses.cluster_terms(*student, given["labels"], **options, **tensors, **ways))


def gradients(terms: list[Tensor], student: list[Tensor]) -> tuple[Tensor, ...]:
    weighted = sum(w * term for w, term in zip((0.7, 1.3), terms, strict=True))
    return torch.autograd.grad(weighted, student)


def near(x: Tensor, true_x: Tensor, error: float = 1e-10) -> None:
    torch.testing.assert_close(x.to(DOUBLE), true_x, rtol=error, atol=error)


@pytest.mark.parametrize("case", CASES)
def test_terms_and_gradients_are_those_of_the_oracle(case: str) -> None:
    given = problem()
    student = leaves(given)
    found, expected = ours(case, given, student), truth(case, given, student)
    for x, true_x in zip(found, expected, strict=True):
        near(x, true_x)
    pairs = zip(gradients(found, student), gradients(expected, student), strict=True)
    for x, true_x in pairs:
        near(x, true_x)


@pytest.mark.parametrize("case", CASES)
def test_low_precision_stays_near(case: str) -> None:
    given = {k: x.float() if x.is_floating_point() else x for k, x in problem().items()}
    student = [x.detach().float().requires_grad_() for x in leaves(given)]
    doubled = [x.detach().double().requires_grad_() for x in student]
    exact = {k: x.double() if x.is_floating_point() else x for k, x in given.items()}
    found, expected = ours(case, given, student), truth(case, exact, doubled)
    for x, true_x in zip(found, expected, strict=True):
        assert x.dtype == torch.float32
        near(x, true_x, 3e-6)
    pairs = zip(gradients(found, student), gradients(expected, doubled), strict=True)
    for x, true_x in pairs:
        near(x, true_x, 3e-5)


def test_autocast_rounds_no_logit() -> None:
    given = {k: x.float() if x.is_floating_point() else x for k, x in problem().items()}
    student = [x.detach().float().requires_grad_() for x in leaves(given)]
    plain = ours("sparse", given, student)
    with torch.autocast("cpu", torch.bfloat16):
        cast = ours("sparse", given, student)
    for x, y in zip(cast, plain, strict=True):
        assert torch.equal(x, y)
    pairs = zip(gradients(cast, student), gradients(plain, student), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("case", ["sparse", "positives"])
def test_gradcheck(case: str) -> None:
    given = problem()
    options, names = CASES[case]
    tensors = {name: given[name] for name in names}

    def call(*student: Tensor) -> Tensor:
        return sum(losses.cluster_terms(*student, given["labels"], **options, **tensors))

    assert torch.autograd.gradcheck(call, leaves(given))


def test_sparse_kl_is_exact_where_the_targets_are_all() -> None:
    given = problem()
    student = leaves(given)
    q = (20.0 * given["teacher_image"] @ given["teacher_centroids"].T).softmax(1)
    probabilities, nearest = q.sort(dim=1, descending=True)
    whole = {"nearest": nearest, "probabilities": probabilities}
    found = losses.cluster_terms(*student, given["labels"], **whole).divergence
    teacher = given["teacher_image"], given["teacher_centroids"], 20.0
    expected = reference.cluster_kl(*student, *teacher)
    near(found, expected)
    pair = zip(*(torch.autograd.grad(x, student) for x in (found, expected)), strict=True)
    for x, true_x in pair:
        near(x, true_x)


def test_sparse_kl_is_at_most_the_whole_and_zero_of_equals() -> None:
    given = problem()
    student = leaves(given)
    teacher = given["teacher_image"], given["teacher_centroids"], 20.0
    found = losses.cluster_terms(*student, given["labels"], **{k: given[k] for k in SPARSE})
    assert 0 < found.divergence < reference.cluster_kl(*student, *teacher)
    twin = given["teacher_image"], given["teacher_centroids"], 20.0
    same = losses.cluster_terms(*twin, given["labels"], **{k: given[k] for k in SPARSE})
    assert abs(same.divergence.item()) < 1e-12


@pytest.mark.parametrize("scale", [14.0, 30.0, 100.0])
def test_bfloat16_of_an_over_confident_student(scale: float) -> None:
    """It leaves little to the rest, of which its teacher has a twentieth."""
    torch.manual_seed(0)
    centroids = F.normalize(torch.randn(400, 64), dim=1)
    labels = torch.arange(32)
    image = F.normalize(centroids[:32] + 0.05 * torch.randn(32, 64), dim=1)
    nearest = (labels[:, None] + torch.arange(8)) % 400
    probabilities = torch.tensor([0.6, *[0.05] * 7]).expand(32, 8)
    low = [x.bfloat16().requires_grad_() for x in (image, centroids)]
    exact = [x.detach().double().requires_grad_() for x in low]
    targets = {"nearest": nearest, "probabilities": probabilities}
    found = losses.cluster_terms(*low, scale, labels, **targets).divergence
    truth = reference_clusters.sparse_cluster_kl(*exact, scale, nearest, probabilities)
    assert abs(found.item() - truth.item()) <= 1e-5 * truth.item()
    pairs = zip(torch.autograd.grad(found, low), torch.autograd.grad(truth, exact), strict=True)
    for x, true_x in pairs:
        assert (x.double() - true_x).norm() <= 4e-3 * true_x.norm()


@pytest.mark.parametrize("num_positives", [1, 2])
def test_confident_students_keep_their_digits(num_positives: int) -> None:
    """Named columns have all but 1e-13 of each row; float32 has 1e-7 of a sum."""
    torch.manual_seed(0)
    pairs = F.normalize(torch.randn(40, 64), dim=1).repeat_interleave(2, 0)
    centroids = F.normalize(pairs + 0.01 * torch.randn(80, 64), dim=1)
    nearest = torch.arange(80).view(40, 2)
    image = F.normalize(centroids[::2] + 0.01 * torch.randn(40, 64), dim=1)
    given = {"nearest": nearest, "probabilities": torch.tensor([0.6, 0.399]).expand(40, 2)}
    labels, scale = nearest[:, 0].contiguous(), torch.tensor(60.0)
    student = [x.requires_grad_() for x in (image, centroids, scale)]
    exact = [x.detach().double().requires_grad_() for x in student]
    found = losses.cluster_terms(*student, labels, **given, num_positives=num_positives)
    if num_positives == 1:
        hard = reference.cluster_cross_entropy(*exact, labels)
    else:
        hard = reference_clusters.multi_positive(*exact, nearest)
    truth = [hard, reference_clusters.sparse_cluster_kl(*exact, nearest, given["probabilities"])]
    for x, true_x in zip(found, truth, strict=True):
        assert abs(x.item() - true_x.item()) <= 1e-6 * max(1.0, abs(true_x.item()))
        ours = torch.autograd.grad(x, student, retain_graph=True)
        theirs = torch.autograd.grad(true_x, exact, retain_graph=True)
        for g, true_g in zip(ours, theirs, strict=True):
            # the logits themselves are rounded at 60
            assert (g.double() - true_g).norm() <= 3e-4 * true_g.norm()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_confident_students_stay_finite(scale: float) -> None:
    """All mass on a named column, where the rest is below the digits of float32."""
    torch.manual_seed(0)
    centroids = F.normalize(torch.randn(14, 32), dim=1).requires_grad_()
    labels = torch.arange(12)
    image = centroids.detach()[:12].clone().requires_grad_()
    nearest = torch.stack([labels, (labels + 1) % 14], 1)
    for probabilities in ([0.5, 0.5], [1.0, 0.0], [0.2, 0.1]):
        found = losses.cluster_terms(
            image,
            centroids,
            scale,
            labels,
            nearest=nearest,
            probabilities=torch.tensor(probabilities).expand(12, 2),
            num_positives=2,
        )
        for grad in torch.autograd.grad(sum(found), (image, centroids)):
            assert grad.isfinite().all()
        assert all(x.isfinite() for x in found)


REFUSED = {
    "margin of several": ({"num_positives": 2, "margin": 0.1}, "a margin is for one positive"),
    "too many positives": ({"num_positives": 9}, "num_positives=9 came with 4 columns"),
    "two targets": ({"teacher_scale": 1.0}, "probabilities or a teacher's; both came"),
    "shapes": ({"probabilities": torch.ones(2, 2)}, r"columns of nearest, \(12, 4\)"),
    "labels": ({"nearest": torch.arange(4).expand(12, 4)}, "first column of nearest is the label"),
    "columns": ({"nearest": torch.full((12, 4), 99)}, r"nearest are numbers in 0..13"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_with_advice(changes: dict, message: str) -> None:
    given = problem()
    tensors = {name: given[name] for name in SPARSE}
    if "teacher_scale" in changes:
        tensors |= {name: given[name] for name in DENSE}
    with pytest.raises(ValueError, match=f"cluster_terms: .*{message}"):
        losses.cluster_terms(*leaves(given), given["labels"], **tensors | changes)


# of each image all clusters are known
WHOLE = "all, sparse"


def rank_terms(rank: int, world_size: int) -> dict[str, list[Tensor]]:
    """Loss and gradients of each case of this rank's rows and clusters, the first with fewer."""
    found = {}
    rows = slice(NUM_IMAGES * rank // world_size, NUM_IMAGES * (rank + 1) // world_size)
    edges = [0, *(3 + 11 * r // (world_size - 1) for r in range(world_size))]
    cols = slice(edges[rank], edges[rank + 1])
    for case in (*CASES, WHOLE):
        given = problem(NUM_CLUSTERS if case == WHOLE else TOP)
        own = {k: x[cols if "centroids" in k else rows] for k, x in given.items()}
        student = leaves(own)
        name = case.removeprefix("all, ")
        terms = ours(name, own, student, keys="sharded", group=dist.group.WORLD)
        found[case] = [x.detach() for x in terms] + list(gradients(terms, student))
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_clusters_over_ranks_equal_the_oracle(run_ranks, world_size: int) -> None:
    results = run_ranks(rank_terms, world_size)
    for case in (*CASES, WHOLE):
        given = problem(NUM_CLUSTERS if case == WHOLE else TOP)
        student = leaves(given)
        expected = truth(case.removeprefix("all, "), given, student)
        image, centroids, scale = gradients(expected, student)
        parts = list(zip(*(result[case] for result in results), strict=True))
        for x, true_x in zip(parts, [x.detach() for x in expected], strict=False):
            near(torch.stack(x).mean(), true_x)
        # data parallel averaging divides by W; a shard's gradient is the loss's own
        near(torch.cat(parts[2]) / world_size, image)
        near(torch.cat(parts[3]), centroids)
        near(torch.stack(parts[4]).mean(), scale)
