# SPDX-License-Identifier: Apache-2.0
"""Clusters of a run's images: opened, checked against its teacher, and given centres."""

from kdengine.cache import Store, TeacherEntry
from kdengine.centres import Centres, Targets
from kdengine.config import RunConfig
from kdengine.data import ClusterRows
from kdengine.models import TowerSpec
from kdengine.ranks import Ranks
from kdengine.teachers import Teachers


def open_clusters(
    config: RunConfig, ranks: Ranks, teachers: Teachers | None, store: Store | None
) -> ClusterRows | None:
    """The clusters of the training images; None for a method without.

    Raises:
        FileNotFoundError, ValueError: they cannot be used, or are of another teacher than the
            embeddings that are to be compared with them.
    """
    own = config.method.clip_cid
    if config.method.name != "clip_cid" or not own.on_clusters:
        return None
    clusters = ClusterRows(own.clusters, with_targets=own.needs_targets)
    for name, wanted in (("positives", own.positives), ("top", own.top)):
        if own.needs_targets and wanted > clusters.top:
            option = "--k" if clusters.top == clusters.num_clusters else "--top"
            raise ValueError(
                f"method.clip_cid.{name}: expected at most the {clusters.top} nearest clusters "
                f"that {own.clusters} stores of an image, of {clusters.num_clusters} in all; got "
                f"{wanted}; run 'kdengine cluster' into another folder with a larger {option}"
            )
    if own.targets == "teacher" and own.cluster_kl:
        # one rank is enough: this may read the whole file of the weights
        ranks.first_only(lambda: _check_teacher(config, clusters, teachers, store), "clusters")
    return clusters


def row(config: RunConfig, clusters: ClusterRows, store: Store | None) -> str:
    """What the clusters are, in the run's header."""
    own, told = config.method.clip_cid, [f"{clusters.num_clusters} of {clusters.folder}"]
    if clusters.teacher is not None:
        entry = TeacherEntry.from_dict(clusters.teacher)
        told.append(f"of teacher {entry.spec.label}")
        entries = store.manifest.teachers if store is not None else ()
        if entries and all(other.weights != entry.weights for other in entries):
            told[-1] += ", which is none of this run's"
    if clusters.is_kept:
        told.append("made of a keep list")
    told.append("own prototypes" if own.prototypes == "own" else "the teacher's centroids")
    if own.sample_ratio < 1:
        told.append(f"those a batch names and {own.sample_ratio:.1%} of the others in a step")
    return ", ".join(told)


def _check_teacher(
    config: RunConfig, clusters: ClusterRows, teachers: Teachers | None, store: Store | None
) -> None:
    """See that the run's one teacher is the one that was clustered, as far as that is known."""
    widths = [spec.embed_dim for spec in teachers.specs] if teachers else []
    found = []
    if widths != [clusters.width]:
        found = [f"{clusters.width} wide, and the run has teachers of the widths {widths}"]
    elif clusters.teacher is not None:
        entry = TeacherEntry.from_dict(clusters.teacher)
        if store is not None and not config.distill.cache_live:
            if store.manifest.teachers[0].weights != entry.weights:
                found = [f"of {entry.spec.label}, whose weights are not those of the run's cache"]
        else:
            found = entry.differences(*config.distill.teachers()[0])
    if found:
        raise ValueError(
            "method.clip_cid.targets: 'teacher' compares one teacher's embeddings with the "
            f"centroids of {clusters.folder}, which are of another: {'; '.join(found)}; name the "
            "teacher that was clustered, or take the stored targets"
        )


def build_centres(
    config: RunConfig, ranks: Ranks, student: TowerSpec, clusters: ClusterRows
) -> Centres:
    """This rank's part of the clusters' centres."""
    own = config.method.clip_cid
    learned = own.prototypes == "own"
    wanted = not learned or (own.cluster_kl > 0 and own.targets == "teacher")
    return Centres(
        clusters.num_clusters,
        width=student.embed_dim if learned else None,
        teacher=clusters.centroids() if wanted else None,
        targets=Targets(own.nearest(clusters.top), clusters.scale),
        ratio=own.sample_ratio,
        betas=(config.optim.beta1, config.optim.beta2),
        eps=config.optim.eps,
        wd=own.centre_wd,
        seed=config.train.seed,
        group=ranks.group,
        device=ranks.device,
    )
