# SPDX-License-Identifier: Apache-2.0
"""What README and CONTRIBUTING name exists, and README's example runs."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from kdengine.arguments import option_types
from kdengine.cli import COMMANDS
from kdengine.config import recipe_names


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_every_named_file_exists(name: str, repository: Path) -> None:
    text = (repository / name).read_text()
    paths = re.findall(r"`((?:kdengine|kernels|benchmarks|tests|requirements)/[\w./]+)`", text)
    # X stands for a stem
    missing = [p for p in paths if "X" not in p and not (repository / p).exists()]
    assert paths and not missing


def test_the_tree_is_the_tree(repository: Path) -> None:
    block = (repository / "README.md").read_text().split("## Tree")[1].split("\n\n")[1]
    inside = [line for line in block.splitlines() if line.startswith("      ")]
    named = {n for line in inside for n in re.findall(r"(?:^|  )(\w+(?:\.py|/))(?= )", line)}
    folder = repository / "kdengine"
    found = {p.name for p in folder.glob("*.py") if p.name != "__init__.py"}
    found |= {f"{p.name}/" for p in folder.iterdir() if any(p.glob("*.py")) or p.name == "recipes"}
    assert named == found


def test_contributing_draws_the_enforced_lines(repository: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        "lines", repository / "tests/test_architecture.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (repository / "CONTRIBUTING.md").read_text()
    drawn = {}
    for number, names in re.findall(r"^    (-?\d+)  (.*)$", text, re.MULTILINE):
        for name in re.split(r"\s*\|\s*|\s{2,}", names.split("siblings")[0].strip()):
            drawn[name if name.startswith("kdengine") else f"kdengine.{name}"] = int(number)
    assert drawn == module.LINES


def test_every_named_recipe_command_and_option_exists(repository: Path) -> None:
    text = (repository / "README.md").read_text()
    table = text.split("| paper |")[1].split("\n\n")[0]
    rows = [row for row in table.splitlines()[2:] if "losses only" not in row]
    recipes = {r for row in rows for r in re.findall(r"`(\w+)`", row)}
    assert recipes and recipes <= set(recipe_names())
    commands = set(re.findall(r"kdengine (\w+)", " ".join(re.findall(r"`(kdengine \w+)", text))))
    assert commands and commands <= set(COMMANDS)
    options = {o for o in re.findall(r"(--[a-z]+(?:\.[a-z-]+)+)", text) if o != "--section.key"}
    assert options and options <= set(option_types())


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
