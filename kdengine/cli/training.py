# SPDX-License-Identifier: Apache-2.0
"""Commands that train; ``kdengine.arguments`` reads the options of most."""

from pathlib import Path

from tyro.conf import Positional


def train(words: Positional[tuple[str, ...]], /) -> int:
    """Train a student in one process; for several ranks use 'deepspeed kdengine/train.py'.

    Args:
        words: What kdengine/train.py takes; 'kdengine train --help' lists it.
    """
    from kdengine.train import command

    return command(list(words))


def cache(words: Positional[tuple[str, ...]], /) -> int:
    """Run teachers once over the data of a recipe, for trainings that then load no teacher.

    Args:
        words: Folder of the cache, --recipe and options; 'kdengine cache --help' lists them.
    """
    from kdengine.precompute import command

    return command(list(words))


def demo(*, out: Path = Path("runs/demo"), seed: int = 0) -> int:
    """Render data, train a teacher, train a student with and without it, compare them.

    Args:
        out: Folder for everything the demo writes.
        seed: Seed of the data and of all trainings.
    """
    from kdengine.demo import main as run_demo

    return run_demo(out=out, seed=seed)
