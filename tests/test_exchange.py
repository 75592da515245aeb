# SPDX-License-Identifier: Apache-2.0
"""Features in chunks over gloo ranks: float32, any dtypes, any group, refusals, lost ranks."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from kdengine import losses, reference
from kdengine.distributed import Exchange, waits
from kdengine.losses import streamed
from kdengine.ranks import Ranks

ROWS, WIDTH, TEACHER_WIDTH, SCALE, TEACHER_SCALE = 24, 16, 12, 14.3, 30.0
WORLDS = [1, 2, 4]
WAYS: list[dict] = [{}, {"num_chunks": 4}, {"num_chunks": 2, "regather": True, "per_node": 2}]
WEIGHTS = {"hard_rows": 0.5, "hard_cols": 0.5, "soft_rows": 0.7, "soft_cols": 0.3}


def whole(world_size: int, seed: int = 0) -> list[Tensor]:
    """Image, text, teacher's image and text of the global batch; the teacher's in bfloat16."""
    generator = torch.Generator().manual_seed(seed)

    def unit(width: int) -> Tensor:
        return F.normalize(torch.randn(world_size * ROWS, width, generator=generator), dim=1)

    teacher = [unit(TEACHER_WIDTH).bfloat16() for _ in range(2)]
    return [unit(WIDTH), unit(WIDTH), *teacher]


def own(features: list[Tensor], rank: int, world_size: int) -> list[Tensor]:
    return [x.tensor_split(world_size)[rank].clone() for x in features]


def truth(features: list[Tensor]) -> list[Tensor]:
    """Loss and gradients of image, text and scale in float64."""
    image, text, *teacher = (x.double() for x in features)
    leaves = [image.requires_grad_(), text.requires_grad_()]
    leaves.append(torch.tensor(SCALE, dtype=torch.float64, requires_grad=True))
    options = {"teacher_query": teacher[0], "teacher_key": teacher[1]}
    options |= {"teacher_scale": TEACHER_SCALE, **WEIGHTS}
    loss = reference.similarity_loss(*leaves, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def rank_loss(
    features: list[Tensor], group: Any, loss_of: Any = losses.similarity_loss
) -> list[Tensor]:
    image, text, *teacher = features
    leaves = [image.clone().requires_grad_(), text.clone().requires_grad_()]
    leaves.append(torch.tensor(SCALE, requires_grad=True))
    options: dict[str, Any] = {"teacher_query": teacher[0], "teacher_key": teacher[1]}
    options |= {"teacher_scale": TEACHER_SCALE, **WEIGHTS, "group": group}
    loss = loss_of(*leaves, **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def merged(found: list[list[Tensor]]) -> list[Tensor]:
    """What an averaging optimiser makes of the ranks' losses and gradients."""
    values, images, texts, scales = zip(*found, strict=True)
    count = len(found)
    return [
        torch.stack(values).mean(),
        torch.cat(images) / count,
        torch.cat(texts) / count,
        torch.stack(scales).mean(),
    ]


def near(found: list[Tensor], expected: list[Tensor], error: float) -> None:
    for x, y in zip(found, expected, strict=True):
        assert (x.double() - y).norm() <= error * y.norm()


class Towers(nn.Module):
    """One layer a modality and a learnable scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.image, self.text = (nn.Linear(WIDTH, 8, dtype=torch.float64) for _ in range(2))
        self.log_scale = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image, text = (
            F.normalize(f(x), dim=1) for f, x in ((self.image, image), (self.text, text))
        )
        return image, text, self.log_scale.exp()


def learned(features: list[Tensor], group: Any, module: nn.Module) -> list[Tensor]:
    """Gradients of the parameters: InfoNCE + CRD, ICL, FD and GD together."""
    x, y, *teacher = (z.double() for z in features)
    u, v = (F.normalize(z[:, :8], dim=1) for z in teacher)
    image, text, scale = module(x, y)
    home = losses if group else reference
    options: dict[str, Any] = {"group": group} if group else {}
    loss = home.similarity_loss(
        image,
        text,
        scale,
        teacher_query=u,
        teacher_key=v,
        teacher_scale=TEACHER_SCALE,
        **WEIGHTS,
        **options,
    )
    loss = loss + home.interactive_contrastive(image, text, scale, u, v, **options)
    loss = loss + home.feature(image, u, **options) + home.feature(text, v, **options)
    loss = loss + 1e4 * home.gradient(image, text, scale, u, v, TEACHER_SCALE, **options)
    module.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in module.parameters()]


def refused(loss: Any) -> str:
    try:
        loss()
    except ValueError as error:
        return str(error)
    return "accepted"


def rank_everything(rank: int, world_size: int) -> dict:
    """All that one process start can measure."""
    group, mine = dist.group.WORLD, own(whole(world_size), rank, world_size)
    found: dict = {}
    for number, way in enumerate(WAYS):
        exchange = Exchange(group, **way)
        found["loss", number] = [rank_loss(mine, exchange) for _ in range(2)]
    # no logits are kept, as where there are many
    streamed.keeps_logits = lambda *_: False
    found["not kept"] = rank_loss(mine, group)
    ddp = DistributedDataParallel(Towers())
    found["DDP"] = learned(mine, Exchange(group, num_chunks=3), ddp)
    image, text, *_ = mine
    found["evaluated"] = losses.info_nce(image, text, SCALE, group=group)
    if world_size == 1:
        return found

    uneven = image[: ROWS - rank % 2], text[: ROWS - rank % 2]
    found["refusals"] = [
        refused(lambda: losses.info_nce(*uneven, SCALE, group=group)),
        refused(
            lambda: losses.info_nce(
                image, text.to((torch.half, torch.float)[rank % 2]), 9.0, group=group
            )
        ),
        refused(
            lambda: losses.info_nce(image, text, 9.0, group=Exchange(group, num_chunks=1 + rank))
        ),
        refused(lambda: losses.gradient(*uneven, 9.0, *uneven, 9.0, group=group)),
    ]
    if world_size == 2:
        compiled = torch.compile(losses.similarity_loss, backend="eager")
        found["compiled"] = rank_loss(mine, group, compiled)
        with pytest.raises(RuntimeError, match="create_graph"):
            x, y = image.clone().requires_grad_(), text.clone().requires_grad_()
            torch.autograd.grad(
                losses.info_nce(x, y, SCALE, group=group), (x, y), create_graph=True
            )
    if world_size == 4:
        os.environ["LOCAL_SIZE"] = "2"
        numbers = rank % 2, rank // 2
        places = (Ranks(rank, world_size, n, image.device) for n in numbers)
        found["per node"] = [place.per_node() for place in places]
        # groups of two and three ranks, whose numbers differ from those of the world
        pairs = [dist.new_group([3, 1]), dist.new_group([0, 2])]
        pair, three = pairs[rank % 2 == 0], dist.new_group([0, 1, 3])
        features = own(whole(2, seed=1), dist.get_rank(pair), 2)
        found["pair"] = rank_loss(features, Exchange(pair, num_chunks=2))
        if rank == 2:
            found["outside"] = refused(lambda: losses.info_nce(image, text, SCALE, group=three))
        else:
            features = own(whole(3, seed=2), dist.get_rank(three), 3)
            found["three"] = rank_loss(features, three)
    return found


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


@pytest.mark.parametrize("world_size", WORLDS)
def test_float32_equals_the_oracle_whatever_the_chunks(ranks, world_size: int) -> None:
    expected = truth(whole(world_size))
    for number in range(len(WAYS)):
        near(merged([x["loss", number][0] for x in ranks(world_size)]), expected, 1e-6)
    near(merged([x["not kept"] for x in ranks(world_size)]), expected, 1e-6)


@pytest.mark.parametrize("world_size", WORLDS)
def test_another_run_gives_the_same_bits(ranks, world_size: int) -> None:
    for result in ranks(world_size):
        for number in range(len(WAYS)):
            first, second = result["loss", number]
            assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("world_size", WORLDS)
def test_data_parallel_training_gets_the_gradients_of_one_process(ranks, world_size: int) -> None:
    expected = learned(whole(world_size), None, Towers())
    for result in ranks(world_size):
        for x, y in zip(result["DDP"], expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("world_size", WORLDS)
def test_without_gradients_the_values_are_the_same(ranks, world_size: int) -> None:
    image, text, *_ = (x.double() for x in whole(world_size))
    values = torch.stack([result["evaluated"] for result in ranks(world_size)])
    assert values.mean().item() == pytest.approx(
        reference.info_nce(image, text, SCALE).item(), rel=1e-6
    )


@pytest.mark.parametrize("world_size", WORLDS[1:])
def test_what_would_hang_is_refused_on_every_rank(ranks, world_size: int) -> None:
    told = [result["refusals"] for result in ranks(world_size)]
    rows = ", ".join(f"rank {r}: {ROWS - r % 2}" for r in range(world_size))
    sizes = ", ".join(f"rank {r}: {WIDTH * (2, 4)[r % 2]}" for r in range(world_size))
    chunks = ", ".join(f"rank {r}: {1 + r}" for r in range(world_size))
    expected = (
        f"similarity_terms: query needs the same number of rows on every rank; {rows} came",
        f"bytes of a row that travels needs to be the same on every rank; {sizes} came",
        f"num_chunks needs to be the same on every rank; {chunks} came",
        f"gradient: image needs the same number of rows on every rank; {rows} came",
    )
    for messages in told:
        for message, words in zip(messages, expected, strict=True):
            assert words in message


def test_compiled_code_around_the_exchange_gives_the_same(ranks) -> None:
    near(merged([result["compiled"] for result in ranks(2)]), truth(whole(2)), 1e-6)


def test_a_group_need_not_be_the_world(ranks) -> None:
    results = ranks(4)
    for first, second in ((1, 3), (0, 2)):
        found = merged([results[first]["pair"], results[second]["pair"]])
        near(found, truth(whole(2, seed=1)), 1e-6)
    near(merged([results[r]["three"] for r in (0, 1, 3)]), truth(whole(3, seed=2)), 1e-6)
    assert "rank 2 of all came, which is not" in results[2]["outside"]


def test_nodes_are_known_where_ranks_are_numbered_node_by_node(ranks) -> None:
    assert [result["per node"] for result in ranks(4)] == [[2, 0]] * 4


def test_places_and_numbers_of_a_block_are_each_others_inverse() -> None:
    exchange = Exchange(None, num_chunks=3)
    exchange.world_size, exchange.rank = 4, 2
    everything = torch.arange(4 * 7)
    blocks = exchange.outlines([torch.zeros(7, 1)])
    assert [(b.part.start, b.part.stop) for b in blocks] == [(0, 7), (0, 2), (2, 4), (4, 7)]
    for block in blocks:
        numbers = block.numbers(7, everything.device)
        assert block.places(numbers, 7).tolist() == list(range(len(numbers)))
        assert (block.places(everything, 7) >= 0).sum() == len(numbers)
        assert block.columns(everything[None])[0].tolist() == numbers.tolist()
        assert block.places(torch.tensor([-1, 28, 2**40]), 7).tolist() == [-1, -1, -1]
    seen = torch.cat([block.numbers(7, everything.device) for block in blocks])
    assert sorted(seen.tolist()) == everything.tolist()


@pytest.mark.parametrize(
    ("rows", "row_bytes", "count"),
    [(1, 2048, 1), (1024, 2048, 1), (2048, 2048, 3), (4096, 2048, 4), (4096, 256, 2), (8192, 8, 1)],
)
def test_chunks_are_worth_their_price(rows: int, row_bytes: int, count: int) -> None:
    exchange = Exchange(None)
    tensors = [torch.empty(rows, row_bytes, dtype=torch.uint8)]
    assert len(exchange.outlines(tensors)) == 1
    exchange.world_size = 8
    assert len(exchange.outlines(tensors)) == 1 + count


def test_no_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match="num_chunks is 1 or more; 0 came"):
        Exchange(None, num_chunks=0)


def lose_rank_2(rank: int, store: str, out: str) -> None:
    """Rank 2 stays away from one collective, and dies before another."""
    torch.set_num_threads(1)
    waits.GRACE_SECONDS = 4.0
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    short, other = (dist.new_group(timeout=timedelta(seconds=s)) for s in (2, 40))
    told = []
    if rank == 2:
        time.sleep(4)
    else:
        told.append(failure(lambda: list(Exchange(short).blocks([torch.ones(4, 2)]))))
    dist.barrier()
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    x = torch.randn(4, 3)
    told.append(failure(lambda: losses.info_nce(x, x, 1.0, group=other)))
    torch.save(told, f"{out}.{rank}")
    os._exit(0)


def failure(work: Any) -> tuple[str, float]:
    start = time.monotonic()
    try:
        work()
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    return "nothing", time.monotonic() - start


def test_a_lost_rank_ends_the_wait_and_is_named(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    store, out = str(tmp_path / "store"), str(tmp_path / "told")
    processes = [context.Process(target=lose_rank_2, args=(r, store, out)) for r in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        process.kill()
    for rank in range(2):
        (stalled, waited), (dead, noticed) = torch.load(f"{out}.{rank}", weights_only=False)
        assert stalled.startswith(
            f"all-gather of rows 0..3 of each rank over 3 ranks failed on rank {rank}: "
            "no word from rank 2, dead or hanging"
        )
        assert 1.5 < waited < 60
        assert dead.startswith(f"all-gather of sizes over 3 ranks failed on rank {rank}: no word")
        assert "from rank 2, dead or hanging" in dead and noticed < 60
