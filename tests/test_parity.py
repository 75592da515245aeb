# SPDX-License-Identifier: Apache-2.0
"""Every loss that has a fast version equals the oracle's of the same name, with all gradients.

A new loss is found by its name; it needs one entry in ARGUMENTS.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdengine import losses, reference

NAMES = [name for name in reference.LOSSES if hasattr(losses, name)]
SIZES = {"one": (1, 1, 3, 2), "ragged": (63, 31, 37, 5), "wide": (7, 65, 127, 64)}


def unit(rows: int, width: int) -> Tensor:
    return F.normalize(torch.randn(rows, width, dtype=torch.float64), dim=1)


def scale(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def with_teacher(n: int, k: int, d: int, e: int) -> tuple:
    return (unit(n, d), unit(n, d), scale(9.0)), (unit(n, e), unit(n, e), 30.0), {}


def classes(n: int, k: int, d: int, e: int) -> tuple:
    learned = (unit(n, d), unit(k, d), scale(9.0))
    return learned, (unit(n, e), unit(k, e), 30.0), {"temperature": 2.5}


# sizes -> learned arguments, constant ones, keywords
class Fusion(torch.nn.Module):
    """A fixed linear map of the widths together to 3 numbers."""

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.linspace(-1, 2, 3 * x.shape[1], dtype=x.dtype).reshape(-1, 3).sin()
        return x @ weights


ARGUMENTS = {
    "augmented_feature": lambda n, k, d, e: (
        (unit(n, d), unit(n, d), scale(9.0)),
        (unit(n, e), unit(n, e), Fusion(), Fusion()),
        {},
    ),
    "info_nce": lambda n, k, d, e: ((unit(n, d), unit(n, d), scale(9.0)), (), {}),
    "contrastive_relational": with_teacher,
    "interactive_contrastive": lambda n, k, d, e: (
        (unit(n, d), unit(n, d), scale(9.0)),
        (unit(n, d), unit(n, d)),
        {},
    ),
    "gradient": lambda n, k, d, e: (
        (unit(n, d), unit(n, d), scale(9.0)),
        (unit(n, d), unit(n, d), 30.0),
        {},
    ),
    "feature": lambda n, k, d, e: (
        (torch.randn(n, d).double(),),
        (torch.randn(n, d).double(),),
        {"normalize": True, "reduction": "sum"},
    ),
    "cluster_cross_entropy": lambda n, k, d, e: (
        (unit(n, d), unit(k, d), scale(9.0)),
        (torch.randint(0, k, (n,)),),
        {"margin": 0.3},
    ),
    "cluster_kl": classes,
    "logit_kl": classes,
    "moment_alignment": lambda n, k, d, e: ((unit(n, d),), (unit(n, d),), {}),
}


def evaluate(module, name: str, learned: tuple, constant: tuple, keywords: dict) -> list[Tensor]:
    learned = tuple(x.clone().requires_grad_() for x in learned)
    loss = getattr(module, name)(*learned, *constant, **keywords)
    return [loss.detach(), *torch.autograd.grad(-1.7 * loss, learned)]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_equal_the_oracle(name: str, sizes: tuple) -> None:
    arguments = ARGUMENTS[name](*sizes)
    ours = evaluate(losses, name, *arguments)
    truth = evaluate(reference, name, *arguments)
    torch.testing.assert_close(ours[0], truth[0], rtol=1e-12, atol=1e-14)
    for x, true_x in zip(ours[1:], truth[1:], strict=True):
        torch.testing.assert_close(x, true_x, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_signature_is_the_oracles_plus_group_and_backend(name: str) -> None:
    ours = inspect.signature(getattr(losses, name)).parameters
    truth = inspect.signature(reference.LOSSES[name]).parameters
    added = {key: value for key, value in ours.items() if key not in truth}
    assert [(key, ours[key].kind, ours[key].default) for key in ours if key in truth] == [
        (key, value.kind, value.default) for key, value in truth.items()
    ]
    assert set(added) - {"keys", "normalize"} == {"group", "backend"}
    assert all(value.kind is inspect.Parameter.KEYWORD_ONLY for value in added.values())


def test_the_papers_relational_losses_all_have_a_fast_version() -> None:
    assert set(ARGUMENTS) <= set(NAMES)
