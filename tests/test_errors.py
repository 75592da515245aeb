# SPDX-License-Identifier: Apache-2.0
"""What reaches the user as one line, and what as a traceback."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kdengine import config, errors
from kdengine.data.shards import expand


def caught(call: Callable[[], object]) -> BaseException:
    with pytest.raises(Exception) as raised:
        call()
    return raised.value


def test_what_kdengine_refuses_is_told() -> None:
    assert errors.is_refusal(caught(lambda: expand("http://example.org/a.tar")))


def test_a_file_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    assert errors.is_refusal(caught((tmp_path / "absent").read_text))


def test_a_failed_call_in_kdengine_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    # the same function, but its error comes out of a call and not out of a raise statement
    monkeypatch.setattr(config, "recipe_names", lambda: int("x"))
    error = caught(lambda: config.load_recipe("absent"))
    assert isinstance(error, ValueError)
    assert not errors.is_refusal(error)


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, KeyError])
def test_what_others_raise_is_a_bug(kind: type[Exception]) -> None:
    def fail() -> None:
        raise kind("from elsewhere")

    assert not errors.is_refusal(caught(fail))
