# SPDX-License-Identifier: Apache-2.0
"""open_clip's own training loop (``open_clip_train``, which its wheel brings), on our batches."""

import argparse
import types
from collections.abc import Iterator
from typing import Any

import open_clip
import torch
from torch import Tensor

from benchmarks.timeline import END, OTHER, Timeline, Watched
from kdengine.config import RunConfig


class Batches:
    """So many (images, tokens) of our loader, as open_clip's loop wants a data loader to be."""

    def __init__(self, loader: Any, batch_size: int) -> None:
        self.loader, self.num_batches, self.batch_size = loader, 0, batch_size

    @property
    def num_samples(self) -> int:
        """Samples of the pass that is going on."""
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.num_batches):
            batch = next(self.loader)
            yield batch["image"], batch["tokens"]


class Loop:
    """Model, optimiser and schedule as ``open_clip_train.main`` makes them, without DDP.

    With a teacher, its loss is InfoNCE and the cross-entropy with the teacher's softmaxes
    (``DistillClipLoss``), which has CRD's gradient.

    Args:
        config: batch, precision, optimiser of the run to compare with.
        student: folder of an export, the weights to start from.
        teachers: folders of exports, one at most.
        loader: our loader.
        device: where it runs.
        timeline: gets the phases.

    Raises:
        ImportError: ``open_clip_train`` or something that it needs is missing.
    """

    def __init__(
        self,
        config: RunConfig,
        student: str,
        teachers: list[str],
        loader: Any,
        device: torch.device,
        timeline: Timeline,
    ) -> None:
        from open_clip_train import scheduler, train

        self._train_one_epoch, self._timeline = train.train_one_epoch, timeline
        optim, precision = config.optim, config.train.precision
        options: dict[str, Any] = {"precision": precision, "device": device, "output_dict": True}
        self.model = open_clip.create_model(f"local-dir:{student}", **options)
        models = [open_clip.create_model(f"local-dir:{folder}", **options) for folder in teachers]
        self.dist_model = models[0] if models else None
        losses = open_clip.DistillClipLoss if models else open_clip.ClipLoss
        self.loss = losses(cache_labels=True)
        named = list(self.model.named_parameters())
        plain = [p for n, p in named if _is_plain(n, p)]
        rest = [p for n, p in named if not _is_plain(n, p)]
        self.optimizer = torch.optim.AdamW(
            [{"params": plain, "weight_decay": 0.0}, {"params": rest, "weight_decay": optim.wd}],
            lr=optim.lr,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
        )
        total = config.train.steps
        self.schedule = scheduler.cosine_lr(self.optimizer, optim.lr, optim.warmup, total)
        self.batches = Batches(Watched(loader, timeline), config.train.batch_size)
        self.data = {"train": types.SimpleNamespace(dataloader=self.batches, set_epoch=id)}
        self.arguments = argparse.Namespace(
            precision=precision,
            device=str(device),
            distill=bool(models),
            batch_size=config.train.batch_size,
            grad_clip_norm=optim.grad_clip_norm,
            log_every_n_steps=100,
            accum_freq=1,
            skip_scheduler=False,
            horovod=False,
            wandb=False,
            rank=0,
            local_rank=0,
            world_size=1,
        )
        self.epoch = 0
        self._watch()

    def _watch(self) -> None:
        timeline = self._timeline
        timeline.watch_towers(self.model)
        if self.dist_model:
            timeline.watch_module("teacher", self.dist_model)
        timeline.watch_module("loss", self.loss)
        # nothing but a sum lies between the loss and its backward pass, nothing between that and
        # the optimiser, unless gradients are clipped
        self.loss.register_forward_hook(lambda *_: timeline.mark("backward"))
        self.optimizer.register_step_pre_hook(lambda *_: timeline.mark("update"))
        self.optimizer.register_step_post_hook(lambda *_: timeline.mark(OTHER))

    def run(self, num_steps: int) -> None:
        """Take steps: one call of ``train_one_epoch``."""
        self.batches.num_batches = num_steps
        self._train_one_epoch(
            self.model,
            self.data,
            self.loss,
            self.epoch,
            self.optimizer,
            None,
            self.schedule,
            self.dist_model,
            self.arguments,
        )
        self._timeline.mark(END)
        self.epoch += 1

    def close(self) -> None:
        """Free what decodes."""
        self.batches.loader.close()


def _is_plain(name: str, parameter: Tensor) -> bool:
    """Whether open_clip gives a parameter no weight decay."""
    words = ("bn", "ln", "bias", "logit_scale")
    return parameter.ndim < 2 or any(word in name for word in words)
