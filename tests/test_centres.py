# SPDX-License-Identifier: Apache-2.0
"""Class-parallel centres: samples, row-sparse AdamW, ranks, and what a checkpoint keeps."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from kdengine import centres as module
from kdengine import losses
from kdengine.centres import Assigned, Centres, uniform

NUM_CLUSTERS, WIDTH, NUM_IMAGES = 50, 6, 12
OPTIONS = {"betas": (0.9, 0.98), "eps": 1e-6, "wd": 0.1}


def assigned(step: int, rows: slice = slice(None)) -> Assigned:
    """Clusters of a step's images; some centres are named by none."""
    generator = torch.Generator().manual_seed(step)
    scores = torch.rand(NUM_IMAGES, NUM_CLUSTERS - 7, generator=generator)
    values, nearest = scores.topk(3)
    return Assigned(nearest[rows, 0].contiguous(), nearest[rows], (values / 4)[rows])


def images(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + step)
    return F.normalize(torch.randn(NUM_IMAGES, WIDTH, generator=generator), dim=1)


def train(centres: Centres, steps: int, rank: int = 0, world_size: int = 1) -> list[Tensor]:
    """The losses of some steps, and this rank's centres behind them."""
    rows = slice(NUM_IMAGES * rank // world_size, NUM_IMAGES * (rank + 1) // world_size)
    found = []
    for step in range(steps):
        drawn = centres.draw(assigned(step, rows), step)
        key = losses.unit_rows(drawn.centres)
        terms = losses.cluster_terms(
            images(step)[rows],
            key,
            16.0,
            drawn.assigned.label,
            nearest=drawn.assigned.nearest,
            probabilities=drawn.assigned.probabilities,
            keys="sharded",
            group=centres.group,
        )
        sum(terms).backward()
        centres.finish(0.05, applied=True)
        found.append(sum(terms).detach())
    return [torch.stack(found), centres.state_dict()["centres"]]


def test_sampled_at_ratio_one_is_dense() -> None:
    """A sample of everything gives the numbers of no sample, to the bit."""
    dense = Centres(NUM_CLUSTERS, width=WIDTH, **OPTIONS)
    sampled = Centres(NUM_CLUSTERS, width=WIDTH, ratio=1 - 1e-12, **OPTIONS)
    drawn = sampled.draw(assigned(0), 0)
    assert torch.equal(drawn.assigned.label, assigned(0).label)
    for x, y in zip(train(sampled, 4), train(dense, 4), strict=True):
        assert torch.equal(x, y)


def test_a_sample_has_what_the_batch_names_and_a_share_of_the_rest() -> None:
    centres = Centres(NUM_CLUSTERS, width=WIDTH, ratio=0.2)
    given = assigned(0)
    sizes = []
    for step in range(200):
        drawn = centres.draw(given, step)
        whole = centres.state_dict()["centres"]
        assert torch.equal(drawn.centres[drawn.assigned.label], whole[given.label])
        assert torch.equal(drawn.centres[drawn.assigned.nearest], whole[given.nearest])
        sizes.append(len(drawn.centres))
    others = NUM_CLUSTERS - len(given.nearest.unique())
    mean = (sum(sizes) / len(sizes)) - (NUM_CLUSTERS - others)
    # binomial: four deviations of the mean
    assert abs(mean - 0.2 * others) < 4 * (0.16 * others / len(sizes)) ** 0.5
    assert len(set(sizes)) > 3


def test_numbers_are_uniform_and_differ_between_steps() -> None:
    first, second = (uniform(100_000, 3, step, torch.device("cpu")) for step in (0, 1))
    assert 0 <= first.min() and first.max() < 2**31
    counts = torch.histc(first.double(), 64)
    # chi squared with 63 degrees of freedom
    assert ((counts - counts.mean()).square() / counts.mean()).sum() < 120
    assert abs(torch.corrcoef(torch.stack([first.double(), second.double()]))[0, 1]) < 0.02
    assert abs(torch.corrcoef(torch.stack([first[1:].double(), first[:-1].double()]))[0, 1]) < 0.02
    # splitmix64 of this counter, by hand in whole numbers
    x = (7 * 0x9E3779B97F4A7C15 + module._mixed(3 * 0x100000001B3)) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    assert int(first[7]) == (x ^ x >> 31) >> 33


def test_rows_take_the_steps_of_adamw_that_drew_them() -> None:
    """Others keep centre and state, bit by bit; each drawn row is one of torch's own AdamW."""
    centres = Centres(NUM_CLUSTERS, width=WIDTH, ratio=0.1, **OPTIONS)
    start = centres.state_dict()["centres"].clone()
    twins = [start[n].clone().requires_grad_() for n in range(NUM_CLUSTERS)]
    options = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
    theirs = [torch.optim.AdamW([twin], lr=0.05, **options) for twin in twins]
    for step in range(6):
        before = {name: x.clone() for name, x in centres.state_dict().items()}
        drawn = centres.draw(assigned(step), step)
        rows, _ = centres._drawn
        weights = torch.linspace(-1, 1, drawn.centres.numel()).view_as(drawn.centres)
        (drawn.centres * weights).sum().backward()
        centres.finish(0.05, applied=step != 3)
        after = centres.state_dict()
        untouched = torch.ones(NUM_CLUSTERS, dtype=torch.bool)
        untouched[rows] = step == 3
        for name, x in after.items():
            assert torch.equal(x[untouched], before[name][untouched])
        if step != 3:
            assert not torch.equal(after["centres"][rows], before["centres"][rows])
            for n, weight in zip(rows.tolist(), weights, strict=True):
                twins[n].grad = weight.clone()
                theirs[n].step()
    torch.testing.assert_close(
        centres.state_dict()["centres"], torch.stack(twins).detach(), rtol=1e-5, atol=1e-6
    )


def test_constant_centres_are_the_teachers() -> None:
    teacher = F.normalize(torch.randn(NUM_CLUSTERS, 4), dim=1)
    centres = Centres(NUM_CLUSTERS, width=None, teacher=teacher, ratio=0.5)
    drawn = centres.draw(assigned(0), 0)
    assert not drawn.centres.requires_grad and centres.state_dict() == {}
    assert torch.equal(drawn.centres, drawn.teacher_centres)
    assert torch.equal(drawn.centres[drawn.assigned.label], teacher[assigned(0).label])
    centres.finish(0.1, applied=True)


def test_state_goes_on_where_it_was() -> None:
    whole, first = (Centres(NUM_CLUSTERS, width=WIDTH, ratio=0.3, **OPTIONS) for _ in range(2))
    train(whole, 4)
    train(first, 4)
    second = Centres(NUM_CLUSTERS, width=WIDTH, ratio=0.3, seed=1, **OPTIONS)
    second.load_state_dict({k: x.clone() for k, x in first.state_dict().items()})
    second.seed = 0
    for x, y in zip(train(whole, 2), train(second, 2), strict=True):
        assert torch.equal(x, y)


def drawn_of_rank(rank: int, world_size: int) -> list[int]:
    """Numbers of the clusters that a rank looks at, where the batch names the first two."""
    centres = Centres(12, width=2, ratio=0.0, group=dist.group.WORLD)
    centres.draw(Assigned(torch.tensor([0, 1])), 0)
    assert centres._drawn and centres._drawn[0] is not None
    return (centres._drawn[0] + centres.first).tolist()


def test_a_rank_without_a_named_cluster_looks_at_its_first(run_ranks) -> None:
    assert run_ranks(drawn_of_rank, 3) == [[0, 1], [4], [8]]


def test_refuses_fewer_clusters_than_ranks(run_ranks) -> None:
    told = "centres: expected at least one cluster a rank; 1 clusters came for 2 ranks"
    assert run_ranks(refused, 2) == [told] * 2


def refused(rank: int, world_size: int) -> str:
    with pytest.raises(ValueError) as error:
        Centres(1, width=2, group=dist.group.WORLD)
    return str(error.value)


def rank_train(rank: int, world_size: int) -> dict[float, list[Tensor]]:
    """Losses and centres of a rank, at every ratio."""
    found = {}
    for ratio in (1.0, 0.3, 0.0):
        centres = Centres(NUM_CLUSTERS, width=WIDTH, ratio=ratio, group=dist.group.WORLD, **OPTIONS)
        found[ratio] = train(centres, 4, rank, world_size)
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_train_what_one_process_does(run_ranks, world_size: int) -> None:
    results = run_ranks(rank_train, world_size)
    for ratio in (1.0, 0.3, 0.0):
        whole = train(Centres(NUM_CLUSTERS, width=WIDTH, ratio=ratio, **OPTIONS), 4)
        losses_, parts = zip(*(result[ratio] for result in results), strict=True)
        assert torch.stack(losses_).mean(0).tolist() == pytest.approx(whole[0].tolist(), rel=1e-5)
        torch.testing.assert_close(torch.cat(parts), whole[1], rtol=1e-4, atol=1e-5)
