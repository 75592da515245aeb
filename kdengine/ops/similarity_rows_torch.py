# SPDX-License-Identifier: Apache-2.0
"""The ``torch`` backend of ``similarity_rows``: strips of rows, on any device.

A strip's exponentials serve its sums, and, weighted by what the loss wants of these, the gradients.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdengine.ops.similarity_product import cut, products
from kdengine.ops.similarity_torch import Side, reduce


def forward(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    labels: Tensor,
    teacher_query: Sequence[Tensor],
    teacher_key: Sequence[Tensor],
    teacher_scale: Tensor,
    weigh: Callable[[slice, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    need_query: bool,
    need_key: bool,
    budget: int,
) -> tuple[Tensor, Tensor]:
    """``G @ key`` and ``G.T @ query`` with G the gradient of the logits; empty if not needed.

    ``weigh`` takes some rows, their statistics (2, n) and the teacher's (4, n), or (4, 0) without
    one. It gives the weights of the student's softmax without its positive, of the positive, and of
    the teacher's softmax, which is subtracted; (n,) each, at most 1 in size but for a margin.
    """
    student, *teachers = products(
        query, key, scale, teacher_query, teacher_key, teacher_scale, budget
    )
    strips, z = cut(student, budget, 2 + 3 * len(teachers))
    e = torch.empty_like(z)
    t, q, temp = (torch.empty_like(z) if teachers else z for _ in range(3))
    left = z.new_empty(len(query) if need_query else 0, query.shape[1])
    right = z.new_zeros(len(key) if need_key else 0, key.shape[1])
    side = Side(1, labels)
    for rows in strips:
        here = slice(rows.stop - rows.start)
        logits, cells = student.strip(rows, z), side.cells(rows, z.shape[1])
        of_teacher = z.new_empty(4, 0)
        for teacher in teachers:
            targets = teacher.strip(rows, t)
            means = [torch.sub(targets, logits, out=e[here]), targets]
            soft = reduce(targets, cells, means, q[here], temp[here])
            of_teacher = soft.pack()
        sums = reduce(logits, cells, [], e[here], temp[here])
        others, positive, under_teacher = weigh(rows, sums.pack(), of_teacher)
        # the sum of exponentials is 0 only where there are none
        g = e[here].mul_(others[:, None] / sums.total.clamp(min=1))
        for _ in teachers:
            g.addcmul_(q[here], under_teacher[:, None] / soft.total.clamp(min=1), value=-1)
        cells.put(g, positive[:, None])
        if need_query:
            student.pull(g, left[rows])
        if need_key:
            right.addmm_(g.mT, query[rows].to(z.dtype))
    return left, right
