# SPDX-License-Identifier: Apache-2.0
"""Drop-ins for ``open_clip.loss``: the same constructor, call and numbers, less memory and time.

Over W ranks open_clip has three correct settings, all computed here from one block of rows a rank
(open_clip computes the whole matrix on every rank unless ``local_loss``):

    local_loss  gather_with_grad   value on a rank            feature gradient, times the global one
    False       False              the global loss            1
    False       True               the global loss            W
    True        True               own rows and own columns   W

As there, the scale's gradient is that of the value on the rank. ``local_loss`` without
``gather_with_grad`` loses the gradients of the gathered features and is refused. All ranks give
the losses the same upstream gradient, as every data parallel trainer does.
"""

from torch import Tensor, nn
from torch import distributed as dist

from kdengine import distributed
from kdengine.distributed import Group
from kdengine.losses.similarity import SimilarityTerms, similarity_terms


class ClipLoss(nn.Module):
    """CLIP's contrastive loss, as ``open_clip.loss.ClipLoss``.

    ``forward(image_features, text_features, logit_scale, logit_bias=None, output_dict=False)``
    with L2-normalised features (b, D) of this rank and an exponentiated scale.

    Returns: 0-D float32 (float64 for float64 features), nats, or ``{"contrastive_loss": loss}``.
    Gradients: features and scale; a bias shifts all logits alike, so its gradient is 0.
    Raises: ValueError for settings that are biased and for unequal numbers of rows, RuntimeError
    without a process group.
    Source: open_clip 3.3.0 ``loss.py``.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        if use_horovod:
            raise ValueError(
                f"{who}: use_horovod needs to be False; True came; start the ranks with torchrun "
                "or deepspeed, i.e. over torch.distributed"
            )
        if world_size > 1 and local_loss and not gather_with_grad:
            raise ValueError(
                f"{who}: local_loss=True needs gather_with_grad=True; False came; without it the "
                "gradients of the gathered features are lost; set gather_with_grad=True"
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The contrastive loss."""
        terms = self._sweep(image_features, text_features, logit_scale)
        loss = self._finish((terms.hard_rows + terms.hard_cols) / 2)
        if isinstance(logit_bias, Tensor):
            # no influence, but a place in the graph: DDP waits for every parameter's gradient
            loss = loss + 0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss

    def _sweep(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor | float,
        teacher: tuple[Tensor, Tensor, Tensor | float] | None = None,
    ) -> SimilarityTerms:
        who, group = type(self).__name__, self._group()
        if len(image) != len(text):
            raise ValueError(
                f"{who}: image and text features come in pairs; {len(image)} and {len(text)} rows "
                "came"
            )
        if teacher is not None and any(x is None for x in teacher):
            raise TypeError(
                f"{who}: dist_image_features, dist_text_features and dist_logit_scale are the "
                "teacher's; None came; use ClipLoss to train without one"
            )
        if group is not None and not self.local_loss:
            if isinstance(scale, Tensor):
                scale = distributed.average_gradient(scale, group)
            if not self.gather_with_grad:
                image, text = (
                    distributed.scale_gradient(x, 1 / self.world_size) for x in (image, text)
                )
        teacher_query, teacher_key, teacher_scale = teacher or (None, None, None)
        return similarity_terms(
            image,
            text,
            scale,
            teacher_query=teacher_query,
            teacher_key=teacher_key,
            teacher_scale=teacher_scale,
            group=group,
        )

    def _finish(self, loss: Tensor) -> Tensor:
        return loss if self.local_loss else distributed.average(loss, self._group())

    def _group(self) -> Group:
        if self.world_size == 1:
            return None
        who = type(self).__name__
        if not dist.is_initialized():
            raise RuntimeError(
                f"{who}: world_size={self.world_size} needs torch.distributed; no process group "
                "is there; call torch.distributed.init_process_group first"
            )
        if dist.get_world_size() != self.world_size or dist.get_rank() != self.rank:
            raise ValueError(
                f"{who}: rank={self.rank} and world_size={self.world_size} need to be those of the "
                f"process group; it has rank {dist.get_rank()} of {dist.get_world_size()}"
            )
        return dist.group.WORLD


class DistillClipLoss(ClipLoss):
    """Contrastive loss and soft cross-entropy to a teacher, as open_clip's ``DistillClipLoss``.

    ``forward(image_features, text_features, logit_scale, dist_image_features,
    dist_text_features, dist_logit_scale, output_dict=False)``

    Returns: ``(contrastive_loss, distill_loss)``, or a dict with these names. The distillation
    loss is ``1/2 [mean_i H(q_i, p_i) + mean_j H(q_j, p_j)]``, H(q, p) = KL(q || p) + entropy of q.
    Gradients: student features and scale. A teacher that requires a gradient is refused.
    Source: open_clip 3.3.0 ``loss.py``; the widths of student and teacher may differ.
    """

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Both losses, from one sweep."""
        teacher = (dist_image_features, dist_text_features, dist_logit_scale)
        terms = self._sweep(image_features, text_features, logit_scale, teacher)
        contrastive = self._finish((terms.hard_rows + terms.hard_cols) / 2)
        entropy = terms.teacher_entropy_rows + terms.teacher_entropy_cols
        distill = self._finish((terms.soft_rows + terms.soft_cols + entropy) / 2)
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distill}
        return contrastive, distill
