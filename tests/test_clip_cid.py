# SPDX-License-Identifier: Apache-2.0
"""Method ``clip_cid`` against the oracle's losses, and its configuration."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import config, reference, reference_clusters
from kdengine.centres import Assigned, Centres, Drawn, Targets, read_assigned
from kdengine.clustering import build_centres
from kdengine.methods import ClipCID, build_method, needs_teacher
from kdengine.models import Features
from kdengine.ranks import Ranks

NUM, WIDTH, WIDE, CLUSTERS, TOP = 8, 5, 7, 11, 3


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1)


@pytest.fixture
def student() -> Features:
    scale = torch.tensor([9.0], dtype=torch.float64)
    return Features(*(x.requires_grad_() for x in (rows(NUM, WIDTH), rows(NUM, WIDTH), scale)))


@pytest.fixture
def teacher() -> Features:
    return Features(rows(NUM, WIDE), rows(NUM, WIDE), torch.tensor(30.0, dtype=torch.float64))


@pytest.fixture
def assigned() -> Assigned:
    nearest = torch.rand(NUM, CLUSTERS).argsort(1)[:, :TOP]
    probabilities = torch.tensor([0.6, 0.2, 0.1], dtype=torch.float64).expand(NUM, TOP)
    return Assigned(nearest[:, 0].contiguous(), nearest, probabilities)


def drawn(assigned: Assigned, width: int) -> Drawn:
    return Drawn(rows(CLUSTERS, width).requires_grad_(), unit(rows(CLUSTERS, WIDE)), assigned)


def test_terms_are_the_oracles(student: Features, teacher: Features, assigned: Assigned) -> None:
    method = ClipCID(WIDTH, margin=0.2).double()
    given = drawn(assigned, WIDTH)
    found = method(student, [teacher], drawn=given)
    image, text, scale = unit(student.image), unit(student.text), student.scale
    guide = unit(teacher.image), unit(teacher.text), teacher.scale
    clusters = image, unit(given.centres), torch.tensor(1 / 0.07, dtype=torch.float64)
    expected = {
        "task": reference.info_nce(image, text, scale),
        "instance": reference.contrastive_relational(image, text, scale, *guide),
        "cluster": reference.cluster_cross_entropy(*clusters, assigned.label, 0.2),
        "cluster_kl": reference_clusters.sparse_cluster_kl(
            *clusters, assigned.nearest, assigned.probabilities
        ),
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)
    assert set(found) == {*expected, "cluster_scale"}
    assert found["cluster_scale"].item() == pytest.approx(1 / 0.07)
    wanted = [student.image, given.centres]
    ours = torch.autograd.grad(sum(found[n] for n in expected), [*wanted, method.log_scale])
    truth = torch.autograd.grad(sum(expected.values()), wanted)
    for x, true_x in zip(ours, truth, strict=False):
        torch.testing.assert_close(x, true_x, rtol=1e-5, atol=1e-7)
    assert ours[2].abs().item() > 1e-3
    assert method.log_scales() == [method.log_scale]


def test_a_head_leads_to_the_teachers_centroids(
    student: Features, teacher: Features, assigned: Assigned
) -> None:
    """Shared prototypes, and all of the teacher's softmax at a temperature."""
    options: dict[str, Any] = {"teacher_scale": 40.0, "temperature": 2.0, "scale": 20.0}
    method = ClipCID(WIDTH, WIDE, task=0, instance=0, **options).double()
    given = drawn(assigned, WIDE)._replace(assigned=Assigned(assigned.label))
    centres = given.teacher_centres
    found = method(student, [teacher], drawn=given._replace(centres=centres))
    image = unit(method.image_head(student.image))
    truth = reference.cluster_kl(
        image, centres, 20.0, unit(teacher.image), centres, 40.0, temperature=2.0
    )
    torch.testing.assert_close(found["cluster_kl"], truth, rtol=1e-10, atol=1e-10)
    truth = reference.cluster_cross_entropy(image, centres, 20.0, assigned.label)
    torch.testing.assert_close(found["cluster"], truth, rtol=1e-10, atol=1e-10)
    assert set(found) == {"cluster", "cluster_kl", "cluster_scale"} and not method.log_scales()
    (found["cluster"] + found["cluster_kl"]).backward()
    assert method.image_head.weight.grad.abs().max() > 1e-3


def test_terms_of_weight_zero_are_left_out(student: Features, teacher: Features) -> None:
    method = ClipCID(WIDTH, cluster=0, cluster_kl=0).double()
    assert set(method(student, [teacher])) == {"task", "instance"}
    assert not list(method.parameters())
    with pytest.raises(ValueError, match="ClipCID: expected the clusters of the step"):
        ClipCID(WIDTH)(student, [teacher])


def test_stored_targets_are_the_teachers_softmax() -> None:
    cosines = torch.rand(NUM, CLUSTERS, dtype=torch.float64)
    near, nearest = cosines.topk(TOP)
    stored = {
        "cluster": nearest[:, 0],
        "cluster_nearest": nearest,
        "cluster_cosine": near,
        "cluster_lse": (30 * cosines).logsumexp(1),
    }
    parts = [{k: x[:3] for k, x in stored.items()}, {k: x[3:] for k, x in stored.items()}]
    found = read_assigned(parts, Targets(2, 30.0))
    nearest = nearest[:, :2]
    expected = (30 * cosines).softmax(1).gather(1, nearest)
    torch.testing.assert_close(found.probabilities, expected, rtol=1e-12, atol=0)
    assert torch.equal(found.label, nearest[:, 0]) and torch.equal(found.nearest, nearest)
    alone = read_assigned([{"cluster": x["cluster"]} for x in parts], Targets(0, 30.0))
    assert alone.nearest is None and torch.equal(alone.label, found.label)


def test_the_configuration_reaches_the_method() -> None:
    own = config.ClipCID(
        clusters="x",
        task=2.0,
        instance=3.0,
        cluster=4.0,
        cluster_kl=5.0,
        targets="teacher",
        teacher_scale=60.0,
        temperature=2.0,
        scale=32.0,
        margin=0.3,
    )
    settings = config.Method(name="clip_cid", clip_cid=own)
    build: dict[str, Any] = {"student_width": WIDTH, "teacher_widths": [WIDE]}
    method = build_method(settings, **build)
    assert isinstance(method, ClipCID)
    assert method.weights == {"task": 2.0, "instance": 3.0, "cluster": 4.0, "cluster_kl": 5.0}
    assert (method.teacher_scale, method.fixed_scale, method.margin) == (60.0, 32.0, 0.3)
    assert method.temperature == 2.0 and isinstance(method.image_head, torch.nn.Identity)
    shared = replace(settings, clip_cid=config.ClipCID(clusters="x", prototypes="teacher"))
    head = build_method(shared, **build, centre_width=WIDE).image_head
    assert (head.in_features, head.out_features) == (WIDTH, WIDE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"clusters": ""},
            r"method.clip_cid.clusters: expected the folder that 'kdengine cluster'",
        ),
        ({"margin": -1.0}, "method.clip_cid.margin: expected an angle 0 <= m < pi / 2"),
        ({"margin": 30.0}, "in radians, got 30.0"),
        ({"prototypes": "teacher", "centre_lr": 3.0}, "it is for prototypes 'own' alone; got 3.0"),
        ({"teacher_scale": 50.0}, "it is for targets 'teacher' alone; got 50.0"),
        ({"positives": 2, "cluster": 0.0}, "several are for the term cluster, whose weight is 0"),
        ({"sample_ratio": 1.5}, "method.clip_cid.sample_ratio: expected a share 0 <= r <= 1"),
        ({"scale": 0.5}, "method.clip_cid.scale: expected a multiplier 1..100, or 0"),
        ({"positives": 2, "margin": 0.1}, "a margin is for one positive"),
    ],
)
def test_settings_are_refused_with_advice(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.Method(name="clip_cid", clip_cid=config.ClipCID(**{"clusters": "x"} | changes))


def test_a_teacher_is_needed_where_a_term_asks_it() -> None:
    def needs(**changes: Any) -> bool:
        own = config.ClipCID(clusters="x", **changes)
        return needs_teacher(config.Method(name="clip_cid", clip_cid=own))

    assert needs() and needs(instance=0.0, targets="teacher")
    assert not needs(instance=0.0)
    assert not needs(instance=0.0, targets="teacher", cluster_kl=0.0)
    settings = config.Method(name="clip_cid", clip_cid=config.ClipCID(clusters="x", instance=0.0))
    assert not build_method(settings, student_width=WIDTH, teacher_widths=()).needs_teacher


def test_what_is_taken_of_the_stored_nearest() -> None:
    def taken(**changes: Any) -> int:
        return config.ClipCID(clusters="x", **changes).nearest(64)

    assert (taken(), taken(top=8), taken(top=99)) == (64, 8, 64)
    assert (taken(cluster_kl=0.0), taken(cluster_kl=0.0, positives=4)) == (1, 4)
    assert taken(top=2, positives=4) == 4


def test_centres_are_built_of_the_configuration() -> None:
    alone = Ranks(0, 1, 0, torch.device("cpu"))

    class Clusters:
        num_clusters, top, scale, width = CLUSTERS, TOP, 30.0, WIDE

        def centroids(self) -> Tensor:
            return unit(rows(CLUSTERS, WIDE)).float()

    def build(**changes: Any) -> Centres:
        own = config.ClipCID(
            clusters="x", **{"top": 2, "centre_wd": 0.3, "sample_ratio": 0.5} | changes
        )
        method = config.Method(name="clip_cid", clip_cid=own)
        optim = config.Optim(beta1=0.8, beta2=0.7, eps=1e-5)
        run = config.RunConfig(method=method, optim=optim, train=config.Train(seed=5))
        student = SimpleNamespace(embed_dim=WIDTH)
        return build_centres(run, alone, student, Clusters())

    centres = build()
    assert (centres.num_clusters, centres.targets, centres.ratio) == (CLUSTERS, (2, 30.0), 0.5)
    assert (centres.betas, centres.eps, centres.wd, centres.seed) == ((0.8, 0.7), 1e-5, 0.3, 5)
    assert centres.state_dict()["centres"].shape == (CLUSTERS, WIDTH)
    assert centres.teacher is None and centres.constant_width is None
    assert build(targets="teacher").teacher is not None
    assert build(prototypes="teacher", centre_wd=0.0).constant_width == WIDE


def test_sgd_has_no_prototypes_of_its_own() -> None:
    own = config.ClipCID(clusters="x")
    with pytest.raises(ValueError, match=r"optim.name: expected adamw .* got sgd"):
        config.RunConfig(
            method=config.Method(name="clip_cid", clip_cid=own), optim=config.Optim(name="sgd")
        )


def test_without_terms_of_clusters_none_are_asked_for() -> None:
    own = config.ClipCID(cluster=0.0, cluster_kl=0.0)
    assert config.Method(name="clip_cid", clip_cid=own).clip_cid.clusters == ""


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, True),
        ({"targets": "teacher"}, False),
        ({"targets": "teacher", "sample_ratio": 0.1}, True),
        ({"cluster_kl": 0.0}, False),
        ({"cluster_kl": 0.0, "sample_ratio": 0.1}, False),
        ({"cluster_kl": 0.0, "positives": 4}, True),
    ],
)
def test_stored_targets_are_read_where_something_needs_them(
    changes: dict[str, Any], needed: bool
) -> None:
    assert config.ClipCID(clusters="x", **changes).needs_targets == needed
