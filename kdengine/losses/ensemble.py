# SPDX-License-Identifier: Apache-2.0
"""Several teachers as one, for losses that compare with a teacher's features."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine.losses import inputs


def ensemble(teachers: Sequence[Tensor], how: str = "concat") -> Tensor:
    """One teacher's features of one modality in the place of several's.

    With u_k the unit rows of teacher k, of K:

    * ``"concat"``: ``[u_1 || ... || u_K] / sqrt(K)``: a cosine is the mean of the teachers' cosines
    * ``"mean"``: ``normalize(u_1 + ... + u_K)``

    Shapes: teachers (N, E_k) -> (N, E_1 + ... + E_K), or (N, E) for ``"mean"``.
    Returns: rows of length 1 in the teachers' dtype, rounded to it once; a single teacher's rows
    as they came.
    Gradients: none; teachers are constants.
    Raises: ValueError for no teacher, another word, unequal numbers of rows, unequal widths with
    ``"mean"``, and a teacher that requires a gradient.
    """
    inputs.check_constant("ensemble", **{f"teachers[{k}]": x for k, x in enumerate(teachers)})
    ensemble_width([x.shape[1] for x in teachers], how)
    if len({len(x) for x in teachers}) > 1:
        raise ValueError(
            f"ensemble: teachers are of the same rows; {[len(x) for x in teachers]} came; give "
            "every teacher the same batch"
        )
    if len(teachers) == 1:
        return teachers[0]
    dtypes = [x.dtype for x in teachers]
    exact = torch.float64 if torch.float64 in dtypes else torch.float32
    units = [F.normalize(x.to(exact), dim=1) for x in teachers]
    if how == "mean":
        together = F.normalize(torch.stack(units).sum(0), dim=1)
    else:
        together = torch.cat(units, 1) / len(units) ** 0.5
    # the narrowest that holds all of them
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    return together.to(dtype)


def ensemble_width(widths: Sequence[int], how: str = "concat") -> int:
    """The width of ``ensemble`` for teachers of these widths; raises as it does."""
    if how not in ("concat", "mean"):
        raise ValueError(f'ensemble: expected "concat" or "mean"; {how!r} came')
    if not widths:
        raise ValueError("ensemble: expected at least one teacher; none came; give their features")
    if how == "concat":
        return sum(widths)
    if len(set(widths)) > 1:
        raise ValueError(
            f'ensemble: "mean" needs teachers of one width; {list(widths)} came; use "concat" '
            "(--method.clip-kd.teacher-features concat), or teachers of one width"
        )
    return widths[0]
