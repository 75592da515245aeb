# SPDX-License-Identifier: Apache-2.0
"""Losses over real gloo ranks against the float64 oracle on the concatenated batch, W = 1 to 4."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributed as dist

from kdengine import distributed, losses, reference
from kdengine.losses import merging
from kdengine.ops import Statistics

LOCAL_ROWS, WIDTH, TEACHER_WIDTH = 5, 6, 4
SCALE, TEACHER_SCALE, UPSTREAM = 7.0, 20.0, 1.7
WORLDS = [1, 2, 3, 4]
# how the features travel; 5 rows a rank go in chunks of 2, 1, 2 or of one
WAYS: dict[str, dict] = {
    "one chunk": {},
    "3 chunks, 2 ranks a node": {"num_chunks": 3, "per_node": 2},
    "9 chunks, again in the backward": {"num_chunks": 9, "regather": True},
}
ALL = {"hard_rows": 0.3, "hard_cols": 0.9, "soft_rows": 1.1, "soft_cols": 0.4}
HARD_ROWS = {"hard_rows": 1.0, "hard_cols": 0.0}
ROWS = {"hard_rows": 0.7, "hard_cols": 0.0, "soft_rows": 0.6}
SOFT = {"hard_rows": 0.0, "hard_cols": 0.0, "soft_rows": 0.6, "soft_cols": 0.8}
# keys, columns in all by number of ranks, weights, labels given
CASES = {
    "pairs": ("gathered", lambda w: w * LOCAL_ROWS, ALL, False),
    "pairs, labels given": ("gathered", lambda w: w * LOCAL_ROWS, ALL, True),
    "pairs, soft only": ("gathered", lambda w: w * LOCAL_ROWS, SOFT, False),
    "two captions an image": ("gathered", lambda w: 2 * w * LOCAL_ROWS, ALL, True),
    "constant keys": ("gathered", lambda w: w * LOCAL_ROWS, HARD_ROWS, False),
    "rows, keys learn": ("gathered", lambda w: 2 * w * LOCAL_ROWS, HARD_ROWS, True),
    "rows of one teacher": ("gathered", lambda w: 2 * w * LOCAL_ROWS, ROWS, True),
    "class texts, rows of one teacher": ("replicated", lambda w: 17, ROWS, True),
    "class texts": ("replicated", lambda w: 4, ALL, True),
    "class texts, rows only": ("replicated", lambda w: 17, HARD_ROWS, True),
    "sharded classes": ("sharded", lambda w: 3 * w, ALL, True),
    "uneven shards": ("sharded", lambda w: 4 * w - 1, ALL, True),
    "sharded, default labels": ("sharded", lambda w: 6 * w, HARD_ROWS, False),
}


def unit(rows: int, width: int) -> Tensor:
    return F.normalize(torch.randn(rows, width, dtype=torch.float64), dim=1)


def whole(case: str, world_size: int) -> tuple[Tensor, Tensor, dict]:
    """The concatenated problem, the same on every rank."""
    torch.manual_seed(3)
    _, num_cols, weights, has_labels = CASES[case]
    rows, cols = world_size * LOCAL_ROWS, num_cols(world_size)
    options = dict(weights)
    if "soft_rows" in weights:
        options |= {
            "teacher_query": (unit(rows, TEACHER_WIDTH), unit(rows, 3)),
            "teacher_key": (unit(cols, TEACHER_WIDTH), unit(cols, 3)),
            "teacher_scale": (20.0, 5.0),
        }
    if "one teacher" in case:
        options |= {k: v[:1] for k, v in options.items() if k.startswith("teacher")}
    if has_labels:
        options["labels"] = torch.randint(0, cols, (rows,))
        options["col_labels"] = torch.randint(0, rows, (cols,))
    return unit(rows, WIDTH), unit(cols, WIDTH), options


def cluster_problem(world_size: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(4)
    rows, num_clusters = world_size * LOCAL_ROWS, 4 * world_size + 1
    labels = torch.randint(0, num_clusters, (rows,))
    return unit(rows, WIDTH), unit(num_clusters, WIDTH), labels


def gd_teacher(world_size: int) -> list[Tensor]:
    torch.manual_seed(3)
    query, *_ = whole("pairs", world_size)
    return [unit(*query.shape), unit(*query.shape)]


def gd_of_rank(features: list[Tensor], dtype: torch.dtype, exchange: Any) -> list[Tensor]:
    """GD and its gradients of one rank that sees its own part only."""
    image, text, *teacher = (x.to(dtype) for x in features)
    leaves = [x.clone().requires_grad_() for x in (image, text)]
    leaves.append(torch.tensor(SCALE, dtype=dtype, requires_grad=True))
    loss = losses.gradient(*leaves, *teacher, TEACHER_SCALE, group=exchange)
    return [loss.detach(), *torch.autograd.grad(UPSTREAM * loss, leaves)]


def part(x: Tensor, rank: int, world_size: int) -> Tensor:
    return x.tensor_split(world_size)[rank]


def rank_loss(rank: int, world_size: int, case: str, way: str) -> list[Tensor]:
    """Loss and gradients of one rank that sees its own part only."""
    query, key, options = whole(case, world_size)
    keys = CASES[case][0]

    def rows(x: Tensor) -> Tensor:
        return part(x, rank, world_size)

    def cols(x: Tensor) -> Tensor:
        return x if keys == "replicated" else part(x, rank, world_size)

    for name in ("teacher_query", "teacher_key"):
        if name in options:
            options[name] = tuple(
                (rows if name == "teacher_query" else cols)(x) for x in options[name]
            )
    if "labels" in options:
        options["labels"], options["col_labels"] = (
            rows(options["labels"]),
            cols(options["col_labels"]),
        )
    query, key = rows(query).clone().requires_grad_(), cols(key).clone()
    key.requires_grad_(case != "constant keys")
    scale = torch.tensor([SCALE], dtype=torch.float64, requires_grad=True)
    exchange = distributed.Exchange(dist.group.WORLD, **WAYS[way])
    loss = losses.similarity_loss(query, key, scale, **options, keys=keys, group=exchange)
    (UPSTREAM * loss).backward()
    return [loss.detach(), query.grad, key.grad, scale.grad]


def rank_everything(rank: int, world_size: int) -> dict:
    """All that one process start can measure."""
    found: dict = {
        (case, way): rank_loss(rank, world_size, case, way) for case in CASES for way in WAYS
    }
    group = dist.group.WORLD
    image, text, _ = whole("pairs", world_size)
    image, text = (part(x, rank, world_size) for x in (image, text))
    leaves = [image.clone().requires_grad_(), text.clone().requires_grad_()]
    leaves.append(torch.tensor(SCALE, dtype=torch.float64, requires_grad=True))
    loss = losses.info_nce(*leaves, group=group)
    found["info_nce scale"] = torch.autograd.grad(loss, leaves)[2]

    image_part, centroids, labels = cluster_problem(world_size)
    learned = [part(x, rank, world_size).clone().requires_grad_() for x in (image_part, centroids)]
    learned.append(torch.tensor(SCALE, dtype=torch.float64, requires_grad=True))
    own_labels = part(labels, rank, world_size)
    options = {"margin": 0.3, "keys": "sharded", "group": group}
    loss = losses.cluster_cross_entropy(*learned, own_labels, **options)
    found["cluster"] = [loss.detach(), *torch.autograd.grad(loss, learned)]

    teacher = [part(x, rank, world_size) for x in gd_teacher(world_size)]
    for dtype in (torch.float64, torch.float32):
        found["gradient", dtype] = [
            gd_of_rank(
                [image, text, *teacher],
                dtype,
                distributed.Exchange(group, regather=again, per_node=2),
            )
            for again in (False, True, False)
        ]

    low = [x.bfloat16().requires_grad_() for x in (image, text)]
    loss = losses.info_nce(*low, SCALE, group=distributed.Exchange(group, per_node=2))
    found["bfloat16"] = [loss.detach(), *torch.autograd.grad(loss, low)]

    x = torch.full((2, 3), float(rank)).T.requires_grad_()
    gathered = distributed.gather_rows(x, group)
    # an expanded upstream gradient is not contiguous
    found["gather_rows"] = [gathered.detach(), *torch.autograd.grad(gathered.sum(), x)]
    parts = (10.0 * rank + torch.arange(world_size)).requires_grad_()
    exchanged = distributed.all_to_all(parts, group)
    weights = torch.arange(1.0, world_size + 1) * (rank + 1)
    found["all_to_all"] = [
        exchanged.detach(),
        *torch.autograd.grad((weights * exchanged).sum(), parts),
    ]
    found["uneven"] = refusal(torch.randn(2 * rank, 2))
    return found


def refusal(x: Tensor) -> str:
    try:
        losses.info_nce(x, x, 1.0, group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "accepted"


_RESULTS: dict[int, list[dict]] = {}


@pytest.fixture
def ranks(run_ranks):
    """What each rank found; the processes are started once a world size."""

    def results(world_size: int) -> list[dict]:
        if world_size not in _RESULTS:
            _RESULTS[world_size] = []  # what a failed start leaves
            _RESULTS[world_size] = run_ranks(rank_everything, world_size)
        return _RESULTS[world_size] or pytest.fail("the ranks failed in an earlier test")

    return results


def near(x: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(x.reshape(truth.shape), truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_mean_over_ranks_is_the_loss_of_the_whole_batch(
    ranks, case: str, way: str, world_size: int
) -> None:
    found = [result[case, way] for result in ranks(world_size)]
    query, key, options = whole(case, world_size)
    leaves = [query.requires_grad_(), key.requires_grad_()]
    leaves.append(torch.tensor(SCALE, dtype=torch.float64, requires_grad=True))
    loss = reference.similarity_loss(*leaves, **options)
    true_query, true_key, true_scale = torch.autograd.grad(UPSTREAM * loss, leaves)
    losses_, queries, keys, scales = zip(*found, strict=True)
    near(torch.stack(losses_).mean(), loss.detach())
    # data parallel averaging divides by W
    near(torch.cat(queries) / world_size, true_query)
    near(torch.stack(scales).mean(0), true_scale)
    mode = CASES[case][0]
    if case == "constant keys":
        assert keys == (None,) * world_size
    elif mode == "gathered":
        near(torch.cat(keys) / world_size, true_key)
    elif mode == "replicated":
        near(torch.stack(keys).mean(0), true_key)
    else:
        near(torch.cat(keys), true_key)


@pytest.mark.parametrize("world_size", WORLDS)
def test_each_rank_returns_its_own_rows_and_columns(ranks, world_size: int) -> None:
    query, key, options = whole("pairs", world_size)
    z = SCALE * query @ key.T
    for rank, result in enumerate(ranks(world_size)):
        own = part(torch.arange(len(query)), rank, world_size)
        expected = 0.0
        for logits, side in ((z, "rows"), (z.T, "cols")):
            log_p = logits.log_softmax(1)[own]
            expected -= options[f"hard_{side}"] * log_p[range(len(own)), own].mean()
            for u, v, r in zip(
                options["teacher_query"],
                options["teacher_key"],
                options["teacher_scale"],
                strict=True,
            ):
                teacher = r * (u @ v.T if side == "rows" else v @ u.T)
                log_q = teacher.log_softmax(1)[own]
                divergence = (log_q.exp() * (log_q - log_p)).sum(1).mean()
                expected += options[f"soft_{side}"] * divergence / 2
        near(result["pairs", "one chunk"][0], expected)


@pytest.mark.parametrize("world_size", WORLDS)
def test_gradient_of_scale_on_a_rank_is_that_of_its_value(ranks, world_size: int) -> None:
    image, text, _ = whole("pairs", world_size)
    for rank, result in enumerate(ranks(world_size)):
        scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
        own = part(torch.arange(len(image)), rank, world_size)
        value = (
            F.cross_entropy(scale * image[own] @ text.T, own)
            + F.cross_entropy(scale * text[own] @ image.T, own)
        ) / 2
        near(result["info_nce scale"], torch.autograd.grad(value, scale)[0])


@pytest.mark.parametrize("world_size", WORLDS)
def test_margin_over_sharded_clusters_equals_the_oracle(ranks, world_size: int) -> None:
    found = [result["cluster"] for result in ranks(world_size)]
    *features, labels = cluster_problem(world_size)
    leaves = [x.requires_grad_() for x in features]
    leaves.append(torch.tensor(SCALE, dtype=torch.float64, requires_grad=True))
    loss = reference.cluster_cross_entropy(*leaves, labels, 0.3)
    true_image, true_centroids, true_scale = torch.autograd.grad(loss, leaves)
    losses_, images, centroids, scales = zip(*found, strict=True)
    near(torch.stack(losses_).mean(), loss.detach())
    near(torch.cat(images) / world_size, true_image)
    near(torch.cat(centroids), true_centroids)
    near(torch.stack(scales).mean(), true_scale)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_gradient_distillation_over_ranks_equals_the_oracle(
    ranks, dtype: torch.dtype, error: float, world_size: int
) -> None:
    query, key, _ = whole("pairs", world_size)
    # what the ranks were given, without the rounding of their dtype
    image, text, *teacher = (x.to(dtype).double() for x in (query, key, *gd_teacher(world_size)))
    leaves = [image.requires_grad_(), text.requires_grad_()]
    leaves.append(torch.tensor(SCALE, dtype=torch.float64, requires_grad=True))
    loss = reference.gradient(*leaves, *teacher, TEACHER_SCALE)
    truth = [loss.detach(), *torch.autograd.grad(UPSTREAM * loss, leaves)]
    for runs in zip(*(result["gradient", dtype] for result in ranks(world_size)), strict=True):
        losses_, images, texts, scales = zip(*runs, strict=True)
        found = [torch.stack(losses_).mean(), torch.cat(images), torch.cat(texts)]
        # data parallel averaging divides by W
        found = [found[0], found[1] / world_size, found[2] / world_size, torch.stack(scales).mean()]
        for x, true_x in zip(found, truth, strict=True):
            assert (x.double() - true_x).norm() <= error * true_x.norm()


@pytest.mark.parametrize("world_size", WORLDS)
def test_gradient_distillation_gives_the_same_bits_again(ranks, world_size: int) -> None:
    for result in ranks(world_size):
        for dtype in (torch.float64, torch.float32):
            first, *others = result["gradient", dtype]
            assert all(torch.equal(x, y) for run in others for x, y in zip(first, run, strict=True))


@pytest.mark.parametrize("world_size", WORLDS)
def test_low_precision_features_travel_and_return(ranks, world_size: int) -> None:
    found = [result["bfloat16"] for result in ranks(world_size)]
    leaves = [x.bfloat16().double().requires_grad_() for x in whole("pairs", world_size)[:2]]
    loss = reference.info_nce(*leaves, SCALE)
    truth = torch.autograd.grad(loss, leaves)
    losses_, *gradients = zip(*found, strict=True)
    assert torch.stack(losses_).mean().item() == pytest.approx(loss.item(), rel=1e-6)
    for x, true_x in zip(gradients, truth, strict=True):
        x = torch.cat(x)
        assert x.dtype == torch.bfloat16
        error = (x.double() / world_size - true_x).norm() / true_x.norm()
        assert error < 4e-3


@pytest.mark.parametrize("world_size", WORLDS)
def test_gather_rows_sums_the_gradients_of_all_ranks(ranks, world_size: int) -> None:
    for result in ranks(world_size):
        gathered, gradient = result["gather_rows"]
        assert gathered.tolist() == [[r, r] for r in range(world_size) for _ in range(3)]
        assert gradient.tolist() == [[world_size] * 2] * 3


@pytest.mark.parametrize("world_size", WORLDS)
def test_all_to_all_sends_parts_and_returns_their_gradients(ranks, world_size: int) -> None:
    for rank, result in enumerate(ranks(world_size)):
        received, gradient = result["all_to_all"]
        assert received.tolist() == [10 * r + rank for r in range(world_size)]
        assert gradient.tolist() == [(rank + 1) * (r + 1) for r in range(world_size)]


@pytest.mark.parametrize("world_size", WORLDS[1:])
def test_uneven_batches_are_refused_on_every_rank_by_name(ranks, world_size: int) -> None:
    messages = {result["uneven"] for result in ranks(world_size)}
    assert len(messages) == 1
    sizes = ", ".join(f"rank {r}: {2 * r}" for r in range(world_size))
    assert f"query needs the same number of rows on every rank; {sizes} came" in messages.pop()


def test_without_a_group_there_is_one_rank() -> None:
    x = torch.randn(2, 3)
    assert (distributed.world_size(None), distributed.rank(None)) == (1, 0)
    assert torch.equal(distributed.gather_rows(x, None), x)
    assert torch.equal(distributed.gather_constant(x, None), x)
    assert torch.equal(distributed.all_to_all(x, None), x)
    assert torch.equal(distributed.average(x, None), x)


def test_parts_that_hold_nothing_vanish_in_a_merge() -> None:
    whole_side = torch.tensor([[1.0, 2.0], [-torch.inf, 0.5]])
    empty = torch.zeros(0, 2, 2)
    merged = merging.merge(
        Statistics(whole_side, torch.zeros(2, 2), torch.ones(2, 2), empty, empty, empty, empty)
    )
    expected = torch.tensor([1.0, torch.logaddexp(torch.tensor(2.0), torch.tensor(0.5))])
    torch.testing.assert_close(merged.others, expected)
    torch.testing.assert_close(merged.mean, torch.ones(2))
