# SPDX-License-Identifier: Apache-2.0
"""What README and CONTRIBUTING name exists, and README's example runs."""

import re
from pathlib import Path

import pytest
import torch

from kdengine.arguments import option_names
from kdengine.cli import COMMANDS
from kdengine.config import recipe_names


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_every_named_file_exists(name: str, repository: Path) -> None:
    text = (repository / name).read_text()
    paths = re.findall(r"`((?:kdengine|kernels|benchmarks|tests|requirements)/[\w./]+)`", text)
    # X stands for a stem
    missing = [p for p in paths if "X" not in p and not (repository / p).exists()]
    assert paths and not missing


def test_every_named_recipe_command_and_option_exists(repository: Path) -> None:
    text = (repository / "README.md").read_text()
    table = text.split("| paper |")[1].split("\n\n")[0]
    recipes = {r for row in table.splitlines()[2:] for r in re.findall(r"`(\w+)`", row)}
    assert recipes and recipes <= set(recipe_names())
    commands = set(re.findall(r"kdengine (\w+)", " ".join(re.findall(r"`(kdengine \w+)", text))))
    assert commands and commands <= set(COMMANDS)
    options = {o for o in re.findall(r"(--[a-z]+\.[a-z-]+)", text) if o != "--section.key"}
    assert options and options <= set(option_names())


def test_the_readmes_loss_runs_and_has_gradients(repository: Path) -> None:
    text = (repository / "README.md").read_text()
    (block,) = re.findall(
        r"    from kdengine\.losses import similarity_loss\n\n((?:    .*\n)+)", text
    )
    torch.manual_seed(0)
    names = {n: torch.randn(4, 8) for n in ("image", "text", "t_image", "t_text")}
    image = names["image"].requires_grad_()
    space = {**names, "scale": torch.tensor(14.3), "t_scale": torch.tensor(50.0)}
    code = "from kdengine.losses import similarity_loss\n" + re.sub("(?m)^    ", "", block)
    exec(code, space)
    space["loss"].backward()
    assert torch.isfinite(image.grad).all() and image.grad.abs().sum() > 0
