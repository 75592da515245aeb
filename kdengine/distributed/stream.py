# SPDX-License-Identifier: Apache-2.0
"""Features on their way between ranks, in chunks: each is used while the next travels.

Every rank needs the rows of every other rank. A chunk is a slice of everybody's rows:

    out     own rows, nothing to wait for | chunk 1 | chunk 2 | ...     asynchronous all-gathers
    home    chunk 1 | chunk 2 | ... | own rows                          asynchronous all-to-alls

While chunk k is used, k + 1 and k + 2 are under way; the rank's own rows are used while the first
chunk comes, and their gradient is made while the last one goes home. Student and teacher travel in
one buffer, a collective a chunk.

Bytes that a rank sends, n rows of d bytes on each of W ranks: (W - 1) n d out, and (W - 1) n d_k
home, d_k the bytes of a row that has a gradient; the way home is ``homeward.py``'s.
"""

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdengine.distributed import collectives
from kdengine.distributed.blocks import Block, pack, unpack
from kdengine.distributed.collectives import Group
from kdengine.distributed.homeward import Homeward, Nodes
from kdengine.distributed.waits import waiting

NAMES = {"all_gather_into_tensor": "all-gather", "all_to_all_single": "all-to-all"}
# chunks under way at a time
AHEAD = 2
MAX_CHUNKS, CHUNK_COLS, CHUNK_BYTES = 4, 4096, 512 << 10


def default_chunks(world_size: int, num_rows: int, num_bytes: int) -> int:
    """How many chunks ``num_rows`` rows of ``num_bytes`` a rank travel in, unless told otherwise.

    Of the communication one chunk is exposed, so four leave a quarter of it. A chunk has a price: a
    block of columns costs some ten launches and a merge of row statistics, and below 4096 columns
    (16 tiles of the widest kernel) its products no longer fill a GPU; and a collective passes every
    rank in turn, so below half a MiB a rank its latency outweighs its bytes (1.5 us at 350 GB/s).
    """
    by_cols = (world_size - 1) * num_rows // CHUNK_COLS
    return max(1, min(MAX_CHUNKS, by_cols, num_bytes // CHUNK_BYTES))


class Exchange:
    """A process group, and how features travel in it; a loss takes one in place of a group.

    Args:
        group: the ranks; None for this process alone, which moves nothing.
        num_chunks: by default see ``default_chunks``.
        regather: let features travel again in the backward instead of keeping those of all ranks:
            2 chunks of memory instead of all rows, for as many bytes again.
        per_node: ranks of a node, numbered node by node, that add up gradients before one of them
            sends the sum to another node; 0 where that is not known.

    All ranks choose the same.

    Raises: ValueError for fewer than one chunk and for a process that is not in the group.
    """

    def __init__(
        self,
        group: Group,
        *,
        num_chunks: int | None = None,
        regather: bool = False,
        per_node: int = 0,
    ) -> None:
        if num_chunks is not None and num_chunks < 1:
            raise ValueError(f"Exchange: num_chunks is 1 or more; {num_chunks} came")
        self.group, self.num_chunks, self.regather = group, num_chunks, regather
        self.per_node = per_node
        self.world_size, self.rank = collectives.world_size(group), collectives.rank(group)
        if self.rank < 0:
            raise ValueError(
                f"Exchange: the process is one of the group's ranks; rank {dist.get_rank()} of all "
                "came, which is not; call the loss on the group's ranks only"
            )
        # by where a constant lies: all ranks' rows of it, (W, n, ...), once they have come
        self._once: dict[tuple, Tensor | None] = {}

    @classmethod
    def over(cls, group: "Group | Exchange") -> "Exchange":
        """The exchange itself, or one with the defaults."""
        return group if isinstance(group, Exchange) else cls(group)

    @contextlib.contextmanager
    def once(self, *constants: Tensor) -> Iterator[None]:
        """Inside, these travel once: for the first loss that needs them; others find them here.

        They stay in memory, (W n, ...) each, until the end. Not with ``regather``, which is to
        keep none.

        Raises: ValueError for one that expects a gradient.
        """
        if any(x.requires_grad for x in constants):
            raise ValueError("Exchange.once: expected constants; a tensor with a gradient came")
        if self.world_size > 1 and not self.regather:
            self._once = {_place(x): None for x in constants}
        try:
            # the tensors live as long as this frame, and nothing else can lie where they do
            yield
        finally:
            self._once = {}

    def _here(self, x: Tensor) -> Tensor | None:
        """All ranks' rows of a constant that has travelled, (W, n, ...)."""
        return self._once.get(_place(x))

    def gather_numbers(
        self, numbers: Mapping[str, int], device: torch.device
    ) -> dict[str, list[int]]:
        """By name, every rank's number; see ``collectives.gather_numbers``."""
        return collectives.gather_numbers(numbers, self.group, device)

    def outlines(self, tensors: Sequence[Tensor]) -> list[Block]:
        """The blocks of rows of the given sizes, not yet filled."""
        num_rows = len(tensors[0])
        own = Block(self.rank, False, self.world_size, slice(0, num_rows), [])
        if self.world_size == 1:
            return [own]
        num_bytes = sum(x.nbytes for x in tensors if self._here(x) is None)
        default = default_chunks(self.world_size, num_rows, num_bytes)
        count = min(num_rows, self.num_chunks or default)
        edges = [num_rows * i // count for i in range(count + 1)]
        parts = (slice(a, b) for a, b in zip(edges, edges[1:], strict=False))
        return [own, *(own._replace(others=True, part=part) for part in parts)]

    def blocks(self, tensors: Sequence[Tensor], *, own_last: bool = False) -> Iterator[Block]:
        """All ranks' rows of some tensors: the own ones, and chunk by chunk those of the others.

        Shapes: (n, ...) each, the same on every rank. No gradient.
        """
        own, *others = self.outlines(tensors)
        own = own._replace(tensors=[x.detach() for x in tensors])
        here = [self._here(x) for x in own.tensors]
        moving = [x for x, rows in zip(own.tensors, here, strict=True) if rows is None]
        # what other losses will find here
        kept = {
            n: x.new_empty(self.world_size, *x.shape)
            for n, x in enumerate(own.tensors)
            if here[n] is None and _place(x) in self._once
        }
        under_way = deque(self._gather(block, moving) for block in others[:AHEAD])
        if not own_last:
            yield own
        for block in [*others[AHEAD:], *[None] * min(AHEAD, len(others))]:
            arrived = under_way.popleft()()
            if block is not None:
                under_way.append(self._gather(block, moving))
            moved = iter(arrived.tensors)
            every = [next(moved) if rows is None else arrived.rows(rows) for rows in here]
            for n, rows in kept.items():
                arrived.put_rows(rows, every[n])
            yield arrived._replace(tensors=every)
        if own_last:
            yield own
        for n, rows in kept.items():
            own.put_rows(rows, own.tensors[n])
            self._once[_place(own.tensors[n])] = rows

    def _gather(self, block: Block, tensors: list[Tensor]) -> Callable[[], Block]:
        """Start the all-gather of a chunk; the call that waits for it and unpacks it."""
        part = block.part
        own = [x[part] for x in tensors]
        if not own:
            return lambda: block
        sent = pack(own)
        received = sent.new_empty(self.world_size * len(sent))
        what = f"rows {part.start}..{part.stop - 1} of each rank"
        arrived = self._begin(what, dist.all_gather_into_tensor, received, sent)

        def arrive() -> Block:
            arrived()
            # the own rows among them are not needed
            by_rank = received.view(self.world_size, -1)
            rest = torch.cat([by_rank[: self.rank], by_rank[self.rank + 1 :]])
            return block._replace(tensors=unpack(rest, own))

        return arrive

    def start_home(self, gradient: Tensor, part: slice) -> Homeward:
        """Send the gradient of a chunk's rows to their owners; in its dtype.

        Shapes: gradient ((W - 1) len(part), D), as the rows of a chunk lie. What comes in the end:
        (len(part), D), float64 or float32, what the others say about this rank's rows, added up.
        """
        what = f"the gradient of rows {part.start}..{part.stop - 1} of each rank"
        size, nodes = part.stop - part.start, Nodes.of(self.rank, self.world_size, self.per_node)
        return Homeward(nodes, functools.partial(self._begin, what), gradient, size)

    def gather(self, x: Tensor) -> Tensor:
        """This rank's rows with those of the others: (n, ...) -> (W n, ...). No gradient."""
        if self.world_size == 1:
            return x
        rows = self._here(x)
        if rows is None:
            rows = x.new_empty(self.world_size, *x.shape)
            what = str(tuple(x.shape))
            sent = x.contiguous()
            self._begin(what, dist.all_gather_into_tensor, rows.flatten(0, 1), sent)()
        if _place(x) in self._once:
            self._once[_place(x)] = rows
        return rows.flatten(0, 1)

    def to_owners(self, x: Tensor) -> Tensor:
        """Numbers of everybody's rows to their owners: (F, W n) -> (W, F, n). No gradient."""
        sent = x.unflatten(1, (self.world_size, -1)).transpose(0, 1).contiguous()
        if self.world_size == 1:
            return sent
        received = torch.empty_like(sent)
        what = str(tuple(sent.shape))
        self._begin(what, dist.all_to_all_single, received, sent)()
        return received

    def sum_home(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What all ranks say about this rank's rows, added up; it travels in ``dtype``.

        Shapes: (W n, D) -> (n, D), float64 or float32.
        """
        if self.world_size == 1:
            return x
        size = len(x) // self.world_size
        before, own, after = x.tensor_split([self.rank * size, (self.rank + 1) * size])
        others = self.start_home(torch.cat([before, after]).to(dtype), slice(0, size)).arrive()
        return others + own.to(others.dtype)

    def _begin(
        self, what: str, collective: Callable, received: Tensor, sent: Tensor, **options: Any
    ) -> Callable[[], None]:
        """Start a collective; the call that waits for it."""
        group, what = self.group, f"{NAMES[collective.__name__]} of {what}"
        assert group is not None
        with waiting(what, group):
            work = collective(received, sent, group=group, async_op=True, **options)

        def arrived() -> None:
            with waiting(what, group):
                work.wait()

        # until then the buffer must live
        arrived.sent = sent  # type: ignore[attr-defined]
        return arrived


def _place(x: Tensor) -> tuple:
    """Where a tensor lies, which a view of all of it shares."""
    return x.data_ptr(), x.shape, x.stride(), x.dtype
