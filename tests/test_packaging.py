# SPDX-License-Identifier: Apache-2.0
"""What ships, and what a checkout offers."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """File names in the wheel, built from a copy of the tracked sources."""
    root = Path(__file__).resolve().parents[1]
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.split("\n"):
        if name and (root / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((root / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w"]
    # the extension's GPU part takes a minute, and tests/test_extension.py looks at it
    subprocess.run(
        [*command, str(out), str(source)],
        check=True,
        capture_output=True,
        env=os.environ | {"KDENGINE_BUILD_CUDA": "0"},
    )
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path).namelist()


def test_the_wheel_holds_both_packages_and_their_data(wheel: list[str]) -> None:
    for name in (
        "kdengine/config.py",
        "kdengine/recipes/clip_kd.toml",
        "kdengine/py.typed",
        "kdengine_kernels/__init__.py",
    ):
        assert name in wheel


def test_the_wheel_holds_every_recipe_and_model_config(wheel: list[str], repository: Path) -> None:
    data = [
        *repository.glob("kdengine/recipes/*.toml"),
        *repository.glob("kdengine/models/configs/*"),
    ]
    missing = [str(p) for p in data if str(p.relative_to(repository)) not in wheel]
    assert data and not missing


def test_the_wheel_holds_nothing_else(wheel: list[str]) -> None:
    tops = {name.split("/")[0] for name in wheel}
    assert {t for t in tops if not re.match(r"kdengine(_kernels|-.*\.dist-info)?$", t)} == set()


def test_make_help_lists_the_targets(repository: Path) -> None:
    found = subprocess.run(
        ["make", "help"], cwd=repository, capture_output=True, text=True, check=True
    )
    for target in ("demo", "test", "setup", "lint", "bench", "help"):
        assert re.search(rf"make {target} +\S", found.stdout)


def test_ci_runs_what_the_readme_says(repository: Path) -> None:
    assert "make test" in (repository / ".ci" / "run").read_text()
    assert re.search(r"^ +make test\b", (repository / "README.md").read_text(), re.MULTILINE)
