# SPDX-License-Identifier: Apache-2.0
"""What words of the command line mean that name models and sets, found out without torch."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdengine.evaluate.sets import EvalSet, parse_eval_sets


def run_settings(command: str, model: str) -> dict[str, Any] | None:
    """The section [data] of a run's configuration; None for a model that is no folder of a run.

    Raises:
        FileNotFoundError: there is no such folder, or it holds runs.
        ValueError: the configuration is no TOML.
    """
    path = Path(model)
    if model.startswith(("/", ".", "~")) and not path.exists():
        raise FileNotFoundError(
            f"{command}: {model} does not exist; expected the folder of a run or of an export, or "
            "'ARCHITECTURE@TAG'"
        )
    refuse_folder_of_runs(command, path)
    config = path / "config.toml"
    if not config.is_file():
        return {} if (path / "checkpoints").is_dir() else None
    try:
        # read loosely: another version of kdengine may have written settings that this one lacks
        return tomllib.loads(config.read_text(encoding="utf-8")).get("data", {})
    except ValueError as error:
        raise ValueError(f"{command}: {config} is not valid TOML: {error}") from None


def refuse_folder_of_runs(command: str, folder: Path) -> None:
    """Tell a folder of runs from a run.

    Raises:
        FileNotFoundError: the folder is no run, but holds some.
    """
    inside = sorted(str(path.parent) for path in folder.glob("*/checkpoints"))
    if inside and not (folder / "checkpoints").exists():
        raise FileNotFoundError(
            f"{command}: {folder} is not a run, it holds runs; did you mean "
            f"{' or '.join(inside[:5])}?"
        )


def read_sets(*words: Sequence[str]) -> list[EvalSet]:
    """The sets of all options, see ``parse_eval_sets``.

    Raises:
        ValueError, FileNotFoundError: see ``parse_eval_sets``, or there is no set.
    """
    sets = parse_eval_sets(*words)
    if not sets:
        raise ValueError(
            "eval: expected at least one set; give --retrieval NAME=SHARDS, --zeroshot "
            "NAME=SHARDS, --probe 'NAME=TRAIN;TEST' or --folder ROOT"
        )
    return sets
