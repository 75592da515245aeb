# SPDX-License-Identifier: Apache-2.0
"""From a student's image embedding into its teacher's space: projector and EduAttention.

    u   = P(f) / ||P(f)||                                   P: linear, batch norm, ReLU, linear
    f_e = u + gate * softmax(Q(u) K(W)^T / divisor) V(W)    EduAttention

W are the teacher's unit text embeddings of the classes that were trained on.

Attested (ComKD-CLIP, by a reading note; no code was released): u and W are the inputs; the layers
are fully connected, the attention a softmax with a divisor; ``gate`` is one learnable number that
starts at 0; the residual is added. Reconstructed: Q, K and V as three linear layers of the
teacher's width with biases, one head, no output layer, the divisor sqrt(E), that the residual is
the student's embedding (the note prints the teacher's once, which is not there at inference), and
that f_e is normalised again before the logits. The projector is PromptKD's.

The rule for keys: they are the texts of all classes of the training, in training and ever after,
whatever classes an image is told apart from; a classifier restricts the logits, never the keys. So
an image has one embedding. (With the candidate classes as keys, it would have another for each
list of candidates.)
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EduAttention(nn.Module):
    """``u + gate * softmax(Q(u) K(W)^T / divisor) V(W)``; see the head of the module.

    Args:
        width: E, of the teacher's embeddings.
        num_keys: rows of W, zero until they are set or loaded.
        divisor: of the logits of the attention; None is sqrt(E).

    Attributes:
        gate: [1], starts at 0: the other weights have no gradient until it has moved.
        texts: W [num_keys, E], a buffer.
    """

    texts: Tensor

    def __init__(self, width: int, num_keys: int, divisor: float | None = None) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.gate = nn.Parameter(torch.zeros(1))
        self.divisor = divisor or width**0.5
        self.register_buffer("texts", torch.zeros(num_keys, width))

    def forward(self, unit: Tensor) -> Tensor:
        """Shapes: unit embeddings [b, E] -> [b, E], not normalised."""
        logits = self.query(unit) @ self.key(self.texts).T / self.divisor
        found = logits.softmax(1) @ self.value(self.texts)
        return unit + self.gate * found


class Bridge(nn.Module):
    """The projector, and EduAttention where there is one.

    Args:
        width: of the student's embeddings.
        teacher_width: E.
        num_keys: classes whose texts EduAttention looks at; 0 leaves it out, which is PromptKD.
        divisor: see ``EduAttention``.
    """

    def __init__(
        self, width: int, teacher_width: int, num_keys: int, divisor: float | None = None
    ) -> None:
        super().__init__()
        self.projector = nn.Sequential(
            nn.Linear(width, teacher_width),
            nn.BatchNorm1d(teacher_width),
            nn.ReLU(),
            nn.Linear(teacher_width, teacher_width),
        )
        self.attention = EduAttention(teacher_width, num_keys, divisor) if num_keys else None

    def forward(self, features: Tensor) -> Tensor:
        """Shapes: raw embeddings [b, D] -> [b, E], not normalised where there is attention."""
        return self.attend(self.unit(features))

    def unit(self, features: Tensor) -> Tensor:
        """Projected unit embeddings [b, E], at least fp32."""
        found = self.projector(features)
        return F.normalize(found.to(torch.promote_types(found.dtype, torch.float32)), dim=-1)

    def attend(self, unit: Tensor) -> Tensor:
        """What EduAttention makes of unit embeddings; they themselves without it."""
        return unit if self.attention is None else self.attention(unit)


def build_bridge(teacher_width: int, settings: Mapping[str, Any]) -> Bridge:
    """The bridge that a model configuration describes under ``bridge``."""
    own = {name: settings[name] for name in ("width", "num_keys", "divisor")}
    return Bridge(teacher_width=teacher_width, **own)
