# SPDX-License-Identifier: Apache-2.0
"""Class-parallel centres of clusters: a part on each rank, sampled, learned outside the engine.

Rank r of W has rows ``K r / W`` to ``K (r + 1) / W - 1`` of the K centres, with their optimiser's
state, so that a million of them fit. They are outside the training engine, which would average
their gradients over ranks and let momentum and weight decay move rows that no step looked at.

A step looks at all centres or at a sample of them: the clusters of the batch's images, the nearest
ones that are wanted of each, and of the others each with the probability ``ratio``. The sample
follows from seed, step and batch alone: it is the same whatever the number of ranks, but for the
first centre of a rank that would have none.

Only sampled rows move, by AdamW as if no other step had been: decay, moments and the number of
steps in their correction are a row's own.

Sampling: Partial FC (An et al. 2022) and UNICOM, whose released code decays all rows in every step;
there, full softmax over a million noisy clusters is worse than a tenth of them. There the named
count towards the share, here they come on top: a large batch names many (4096 images with 8 each
about 3 % of a million). That the teacher's nearest are always sampled is a reconstruction.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdengine import distributed
from kdengine.distributed import Group

# of fresh centres, as in Partial FC
START_DEVIATION = 0.01
# fresh rows are drawn in blocks, each from a seed of its own; a step is taken block by block
BLOCK = 4096
_BITS = 31


class Assigned(NamedTuple):
    """What is stored of n images: their clusters, [n] int64, and with targets the m nearest ones.

    Attributes:
        label: the cluster of each.
        nearest: [n, m] int64, nearest first.
        probabilities: [n, m], their shares under the teacher's softmax over all clusters.
    """

    label: Tensor
    nearest: Tensor | None = None
    probabilities: Tensor | None = None


class Targets(NamedTuple):
    """What is taken of the images' nearest clusters: the first ``num``, stored at ``scale``."""

    num: int
    scale: float


NO_TARGETS = Targets(0, 0.0)


def read_assigned(batches: Sequence[Mapping[str, Tensor]], targets: Targets) -> Assigned:
    """What is stored of the images of some batches, in order.

    Shapes: cluster [b]; with targets cluster_nearest [b, m], cluster_cosine [b, m], cluster_lse
    [b], the log-sum-exp of scale times the cosines with all clusters.
    """
    told = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    if "cluster_nearest" not in told:
        return Assigned(told["cluster"])
    cosines, nearest = (told[f"cluster_{name}"][:, : targets.num] for name in ("cosine", "nearest"))
    logits = targets.scale * cosines - told["cluster_lse"][:, None]
    return Assigned(told["cluster"], nearest, logits.exp())


class Drawn(NamedTuple):
    """The centres of a step: this rank's part; numbers are those of all ranks' parts in order.

    Attributes:
        centres: [n, D], a leaf that wants a gradient, or constants.
        teacher_centres: [n, E] of the same clusters, unit rows, where they are wanted.
        assigned: of the images.
    """

    centres: Tensor
    teacher_centres: Tensor | None
    assigned: Assigned


class Centres:
    """This rank's part of the centres.

    Args:
        num_clusters: K, at least one a rank.
        width: of centres that are learned; None to have the teacher's as constants.
        teacher: the teacher's unit centroids [K, E] on the CPU, of which a part is taken to the
            device; None where nothing looks at them.
        targets: what is taken of the images' nearest clusters.
        ratio: share of the other centres that a step looks at; 1 looks at all.
        betas: of AdamW.
        eps: of AdamW.
        wd: of AdamW, on the rows that a step looked at.
        seed: of fresh rows and of samples.
        group: the ranks; None for one process.
        device: of all tensors.

    Memory: 12 D + 4 bytes a row of a rank's part where they are learned, 4 E for a teacher's; in a
    step 4 D for the gradient of each row looked at, and where there is a sample 16 D for copies of
    these rows, and 33 K bytes for numbers on every rank.
    """

    def __init__(
        self,
        num_clusters: int,
        *,
        width: int | None,
        teacher: Tensor | None = None,
        targets: Targets = NO_TARGETS,
        ratio: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        wd: float = 0.0,
        seed: int = 0,
        group: Group = None,
        device: torch.device | str = "cpu",
    ) -> None:
        world_size, rank = distributed.world_size(group), distributed.rank(group)
        if num_clusters < world_size:
            raise ValueError(
                f"centres: expected at least one cluster a rank; {num_clusters} clusters came for "
                f"{world_size} ranks"
            )
        self.num_clusters, self.ratio, self.seed, self.group = num_clusters, ratio, seed, group
        self.targets = targets
        self.betas, self.eps, self.wd = betas, eps, wd
        edges = [num_clusters * r // world_size for r in range(world_size + 1)]
        self._edges, self.first, self.last = edges, edges[rank], edges[rank + 1]
        self.teacher: Tensor | None = None
        if teacher is not None:
            self.teacher = teacher[self.first : self.last].to(device)
        self._state: dict[str, Tensor] = {}
        if width is not None:
            fresh = fresh_rows(self.first, self.last, width, seed).to(device)
            self._state = {
                "centres": fresh,
                "mean": torch.zeros_like(fresh),
                "square": torch.zeros_like(fresh),
                "steps": fresh.new_zeros(len(fresh), dtype=torch.int32),
            }
        elif self.teacher is None:
            raise ValueError("centres: expected a width to learn or a teacher's centroids")
        self._drawn: tuple[Tensor | None, Tensor] | None = None

    @property
    def constant_width(self) -> int | None:
        """Width of the teacher's centroids where these are the centres; None where they learn."""
        return None if self._state or self.teacher is None else self.teacher.shape[1]

    def draw(self, assigned: Assigned, step: int) -> Drawn:
        """The centres of a step, and its images' clusters by their numbers among these.

        Shapes: ``assigned`` of this rank's images, as many on every rank, by cluster numbers.

        Communication: with a sample over ranks, one all-gather of labels and one of nearest.
        """
        rows = None
        if self.ratio < 1:
            chosen = self._sample(assigned, step)
            numbers = chosen.cumsum(0) - 1
            # of clusters that are not in it, numbers mean nothing
            nearest = None if assigned.nearest is None else numbers[assigned.nearest]
            assigned = assigned._replace(label=numbers[assigned.label], nearest=nearest)
            rows = chosen[self.first : self.last].nonzero()[:, 0]
        whole = self._state.get("centres", self.teacher)
        assert whole is not None
        centres = whole if rows is None else whole[rows]
        if self._state:
            centres = centres.detach().requires_grad_()
            self._drawn = rows, centres
        teacher = self.teacher
        if teacher is not None and rows is not None:
            teacher = teacher[rows]
        return Drawn(centres, teacher, assigned)

    def _sample(self, assigned: Assigned, step: int) -> Tensor:
        """Which clusters a step looks at, the same on every rank: bool [K]."""
        named = [assigned.label]
        if assigned.nearest is not None:
            named.append(assigned.nearest.flatten())
        device = assigned.label.device
        chosen = uniform(self.num_clusters, self.seed, step, device) < self.ratio * 2**_BITS
        for own in named:
            # a number fits into four bytes, the half of what it has here
            everyone = distributed.gather_constant(own.int(), self.group, "numbers of clusters")
            chosen[everyone.long()] = True
        for first, last in zip(self._edges, self._edges[1:], strict=False):
            # no rank without any
            chosen[first] |= ~chosen[first:last].any()
        return chosen

    @torch.no_grad()
    def finish(self, lr: float, applied: bool) -> None:
        """Move the rows that were drawn by their gradient, unless the step was skipped.

        The gradient is that of the loss; no norm clips it.
        """
        if self._drawn is None:
            return
        (rows, drawn), self._drawn = self._drawn, None
        if not applied or drawn.grad is None:
            return
        own = {name: x if rows is None else x[rows] for name, x in self._state.items()}
        for first in range(0, len(drawn), BLOCK):
            part = slice(first, first + BLOCK)
            block = {name: x[part] for name, x in own.items()}
            row_adamw(block, drawn.grad[part], lr, betas=self.betas, eps=self.eps, wd=self.wd)
        if rows is not None:
            for name, x in own.items():
                self._state[name][rows] = x

    def state_dict(self) -> dict[str, Any]:
        """Rows of this rank and their optimiser's state; empty where nothing is learned."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """What ``state_dict`` gave on this rank."""
        for name, x in self._state.items():
            x.copy_(state[name])


def row_adamw(
    state: Mapping[str, Tensor],
    grad: Tensor,
    lr: float,
    *,
    betas: tuple[float, float],
    eps: float,
    wd: float,
) -> None:
    """One step of AdamW, in place, each row with a number of steps of its own.

    Source: Loshchilov and Hutter 2019; a row's steps are those of ``torch.optim.AdamW`` over the
    steps that drew it.
    """
    steps = state["steps"].add_(1)[:, None]
    mean = state["mean"].lerp_(grad, 1 - betas[0])
    square = state["square"].mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    by_mean, by_square = (1 - beta ** steps.to(grad.dtype) for beta in betas)
    root = (square / by_square).sqrt_().add_(eps)
    state["centres"].mul_(1 - lr * wd).sub_(lr * (mean / by_mean) / root)


def fresh_rows(first: int, last: int, width: int, seed: int) -> Tensor:
    """Rows first to last - 1 of normal numbers, the same whoever draws them."""
    parts = []
    for block in range(first // BLOCK, -(-last // BLOCK)):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + block)
        rows = torch.randn(BLOCK, width, generator=generator).mul_(START_DEVIATION)
        begin = max(first - block * BLOCK, 0)
        parts.append(rows[begin : last - block * BLOCK])
    return torch.cat(parts)


def uniform(count: int, seed: int, step: int, device: torch.device) -> Tensor:
    """int64 [count], each uniform below 2^31, the same on every device.

    Source: splitmix64 (Steele et al. 2014) of a counter.
    """
    # of an affine counter, so that two steps never share their numbers in a row
    x = torch.arange(count, device=device)
    x = x * _signed(0x9E3779B97F4A7C15) + _signed(_mixed(seed * 0x100000001B3 + step))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        # a logical shift: the sign is not carried on
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * _signed(factor)
    return x >> 64 - _BITS & (1 << _BITS) - 1


def _mixed(number: int) -> int:
    for shift, factor in ((33, 0xFF51AFD7ED558CCD), (33, 0xC4CEB9FE1A85EC53), (33, 1)):
        number &= (1 << 64) - 1
        number = (number ^ number >> shift) * factor
    return number


def _signed(number: int) -> int:
    """The low 64 bits, as int64 has them."""
    return (number & (1 << 64) - 1) - (number >> 63 & 1) * (1 << 64)
