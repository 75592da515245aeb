# SPDX-License-Identifier: Apache-2.0
"""What the configuration of a run reaches, before its first step."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from kdengine import job
from kdengine.arguments import parse
from kdengine.config import Train
from kdengine.ranks import Ranks


class Tower(nn.Linear):
    """A student that learns a little."""

    def pin_scale(self, scale: float) -> None:
        self.scale = scale


ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def method_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``method_of(*words)``: the method that a command line trains with."""
    engine = SimpleNamespace(initialize=lambda model, **_: (model, None))
    monkeypatch.setitem(sys.modules, "deepspeed", engine)
    student = SimpleNamespace(tower=Tower(2, 2), spec=SimpleNamespace(embed_dim=8))
    teachers = SimpleNamespace(specs=[SimpleNamespace(embed_dim=5)])

    def build(*words: str) -> Any:
        return job.build_engine(parse(words), ALONE, student, teachers, {}).method

    return build


@pytest.mark.parametrize("name", ["clip", "clip_kd", "tinyclip"])
def test_how_features_travel_is_the_users_choice(method_of: Any, name: str) -> None:
    exchange = method_of("--method.name", name).exchange
    assert exchange.num_chunks is None and not exchange.regather
    words = "--train.num-chunks", "3", "--train.regather"
    exchange = method_of("--method.name", name, *words).exchange
    assert exchange.num_chunks == 3 and exchange.regather


def test_help_says_what_the_choice_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    for words in ("--train.num-chunks", "--train.regather", "travel again in the backward"):
        assert words in told


def test_no_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.num_chunks: expected a number >= 1, got 0"):
        Train(num_chunks=0)
