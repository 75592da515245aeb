# SPDX-License-Identifier: Apache-2.0
"""Section ``method`` of the configuration; see ``kdengine.config``."""

import math
from dataclasses import dataclass, field
from typing import Literal

from kdengine.promptconfig import CLASS_METHODS, ComKD, check


@dataclass(frozen=True, kw_only=True)
class ClipKD:
    """Weights of CLIP-KD, in the reductions of its released code."""

    task: float = 1.0
    """CLIP InfoNCE, mean of rows and columns."""
    crd: float = 1.0
    """Contrastive relational distillation, mean of the row and the column KL."""
    fd: float = 2000.0
    """Feature distillation; its weight belongs to fd_reduction."""
    fd_reduction: Literal["mean", "sum"] = "mean"
    """Squared error averaged over the width, as the paper's 2000, or summed over it, as its formula
    (2000 / width): the same for every width, and logged as fd_sum."""
    icl: float = 1.0
    """Interactive contrastive learning, mean of both directions."""
    gd: float = 0.0
    """Gradient distillation; the paper's weight is 1e8, at a batch of 1024 (it falls as 1/N^2)."""
    afd: float = 0.0
    """Augmented feature distillation: InfoNCE of student and teacher fused by a linear layer."""
    mask_ratio: float = 0.0
    """Share of the patches that fd hides from a ViT student: masked feature distillation."""
    mask_all: bool = False
    """All terms see the masked image: one pass of the student instead of two."""
    teacher_features: Literal["concat", "mean"] = "concat"
    """Of several teachers fd, icl, gd and afd see: features side by side, or their mean."""
    reference_quirks: bool = False
    """Reproduce the released code where it differs from the paper (raw scales, GD, MFD)."""

    def __post_init__(self) -> None:
        for name in ("task", "crd", "fd", "icl", "gd", "afd"):
            value = getattr(self, name)
            check("method.clip_kd", name, value, "a weight >= 0", value >= 0)
        ratio = self.mask_ratio
        check("method.clip_kd", "mask_ratio", ratio, "a share of 0 <= r < 1", 0 <= ratio < 1)


@dataclass(frozen=True, kw_only=True)
class TinyClip:
    """Affinity mimicking of TinyCLIP."""

    alpha: float = 1.0
    """Weight of affinity mimicking; the rest, 1 - alpha, is that of InfoNCE."""
    scale: float = 50.0
    """Multiplier of the cosines of student and teachers, a constant; with 0 each has its own, and
    the student learns its."""

    def __post_init__(self) -> None:
        check("method.tinyclip", "alpha", self.alpha, "a share 0..1", 0 <= self.alpha <= 1)
        good = self.scale == 0 or 1 <= self.scale <= 100
        check("method.tinyclip", "scale", self.scale, "a multiplier 1..100, or 0", good)


@dataclass(frozen=True, kw_only=True)
class ClipCID:
    """Cluster-instance discrimination: weights, and how clusters are told apart."""

    clusters: str = ""
    """Folder that 'kdengine cluster' made of a teacher's embeddings of this run's images, for
    cluster and cluster_kl."""
    task: float = 1.0
    """CLIP InfoNCE, mean of rows and columns."""
    instance: float = 1.0
    """KL to the teacher's similarities of images and texts, mean of rows and columns."""
    cluster: float = 1.0
    """Cross-entropy of an image's cluster."""
    cluster_kl: float = 1.0
    """KL to the teacher's softmax over clusters."""
    prototypes: Literal["own", "teacher"] = "own"
    """'own': centres in the student's width are learned. 'teacher': the teacher's centroids
    stay, and a linear head brings the student's images to their width."""
    targets: Literal["stored", "teacher"] = "stored"
    """Of cluster_kl. 'stored': what 'kdengine cluster --top' wrote for each image, all other
    clusters as one. 'teacher': all clusters of a step, from the teacher's embedding of each
    crop."""
    top: int = 0
    """How many of an image's stored nearest clusters count one by one, and are in every sample;
    0 takes all that are stored."""
    teacher_scale: float = 100.0
    """Multiplier of the teacher's cosines with targets 'teacher'; stored ones have theirs."""
    temperature: float = 1.0
    """Divides the student's and the teacher's logits in cluster_kl, but not stored ones,
    which are made at --scale / temperature; the KL is multiplied by its square."""
    scale: float = 0.0
    """Multiplier of the student's cosines with the clusters; with 0 it is learned from 1 / 0.07."""
    margin: float = 0.0
    """Angle in radians, below pi / 2, that an image has to be nearer to its cluster (ArcFace)."""
    positives: int = 1
    """Nearest clusters that an image belongs to; above 1 'cluster' is the loss of MLCD."""
    sample_ratio: float = 1.0
    """Share of the clusters that no image of the batch names, as its own or as one of its nearest,
    that a step looks at beside the named ones; 1 looks at all. Below it cluster_kl is biased."""
    centre_lr: float = 5.0
    """Learning rate of own prototypes, as a multiple of optim.lr: of an AdamW of their own, whose
    gradients are not clipped."""
    centre_wd: float = 0.0
    """Weight decay of the prototypes that a step looks at."""

    def __post_init__(self) -> None:
        owner = "method.clip_cid"
        for name in ("task", "instance", "cluster", "cluster_kl", "top", "centre_wd"):
            value = getattr(self, name)
            check(owner, name, value, "a number >= 0", value >= 0)
        for name in ("temperature", "teacher_scale", "centre_lr"):
            value = getattr(self, name)
            check(owner, name, value, "a number > 0", value > 0)
        good = self.scale == 0 or 1 <= self.scale <= 100
        check(owner, "scale", self.scale, "a multiplier 1..100, or 0", good)
        below = 0 <= self.margin < math.pi / 2
        check(owner, "margin", self.margin, "an angle 0 <= m < pi / 2, in radians", below)
        ratio, many = self.sample_ratio, self.positives
        check(owner, "sample_ratio", ratio, "a share 0 <= r <= 1", 0 <= ratio <= 1)
        check(owner, "positives", many, "a number >= 1", many >= 1)
        if many > 1 and self.margin:
            raise ValueError(
                f"{owner}.margin: a margin is for one positive, got {self.margin} with {many} "
                "positives; set one of them to its default"
            )
        for name, default, needed in (
            ("centre_lr", 5.0, self.prototypes == "own"),
            ("centre_wd", 0.0, self.prototypes == "own"),
            ("teacher_scale", 100.0, self.targets == "teacher"),
        ):
            if getattr(self, name) != default and not needed:
                what = "prototypes 'own'" if name != "teacher_scale" else "targets 'teacher'"
                raise ValueError(
                    f"{owner}.{name}: it is for {what} alone; got {getattr(self, name)}; leave it "
                    f"away, or set {what}"
                )
        if many > 1 and not self.cluster:
            raise ValueError(
                f"{owner}.positives: several are for the term cluster, whose weight is 0; got "
                f"{many}; leave them at 1, or give cluster a weight"
            )

    @property
    def on_clusters(self) -> bool:
        """Whether a term looks at clusters."""
        return self.cluster > 0 or self.cluster_kl > 0

    @property
    def asks_teacher(self) -> bool:
        """Whether a term wants what a teacher says of the batch."""
        return self.instance > 0 or (self.cluster_kl > 0 and self.targets == "teacher")

    def nearest(self, stored: int) -> int:
        """How many of an image's stored nearest clusters are taken."""
        limit = min(self.top or stored, stored)
        return max(self.positives, limit if self.cluster_kl > 0 else 1)

    @property
    def needs_targets(self) -> bool:
        """Whether it reads what is stored of the nearest clusters of each image."""
        soft = self.cluster_kl > 0
        return self.positives > 1 or (soft and (self.targets == "stored" or self.sample_ratio < 1))


@dataclass(frozen=True, kw_only=True)
class Method:
    """What is learned from whom."""

    name: Literal["clip", "clip_kd", "tinyclip", "clip_cid", "comkd_teacher", "comkd"] = "clip_kd"
    """'clip': no teacher. 'clip_kd': InfoNCE + CRD + FD + ICL. 'tinyclip': affinity mimicking.
    'clip_cid': clusters and similarities. With prompts, on images with classes: 'comkd_teacher':
    labels. 'comkd': a teacher's logits."""
    clip_kd: ClipKD = field(default_factory=ClipKD)
    """Settings of method clip_kd."""
    tinyclip: TinyClip = field(default_factory=TinyClip)
    """Settings of method tinyclip."""
    clip_cid: ClipCID = field(default_factory=ClipCID)
    """Settings of method clip_cid."""
    comkd: ComKD = field(default_factory=ComKD)
    """Settings of method comkd."""

    def __post_init__(self) -> None:
        own = self.clip_cid
        if self.name == "clip_cid" and own.on_clusters and not own.clusters:
            raise ValueError(
                "method.clip_cid.clusters: expected the folder that 'kdengine cluster' wrote, got "
                "none; make it of the embeddings of a cache ('kdengine cache'), or set the weights "
                "cluster and cluster_kl to 0"
            )

    @property
    def on_classes(self) -> bool:
        """Whether it learns prompts, from images with classes, and not from pairs."""
        return self.name in CLASS_METHODS
