# SPDX-License-Identifier: Apache-2.0
"""``kdengine doctor``: what it says of backends must be what the ops do."""

import re
import shutil
import subprocess
import sys

import pytest
import torch

from kdengine.ops import _backend, extension


@pytest.fixture(scope="module")
def lines() -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "kdengine.cli", "doctor"], capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_it_names_versions_device_and_extension(lines: list[str]) -> None:
    text = "\n".join(lines)
    assert f"torch {torch.__version__}" in lines[0]
    assert re.search(r"^deepspeed \d+\.\d+.* \(training\)$", text, re.MULTILINE)
    assert ("no NVIDIA GPU: " in text) != torch.cuda.is_available()
    assert ("extension kdengine._C: built" in text) != bool(extension.why_not("cpu"))
    assert ("nvcc (" in text or "nvcc)" in text) >= bool(shutil.which("nvcc"))


def test_every_op_and_backend_has_an_answer_that_holds(lines: list[str]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = [torch.empty(1, 1, device=device)]
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert {row[0] for row in rows} == {op for op, _ in _backend.MODULES}
    for op, _, *cells in rows:
        for backend, cell in zip(_backend.BACKENDS[1:], cells, strict=True):
            reason = _backend.why_not(op, backend, tensors)
            number = re.fullmatch(r"no \((\d+)\)", cell)
            assert (cell == "yes") == (reason is None)
            if reason:
                assert number
                (told,) = [x for x in lines if x.startswith(f"{number[1]}  ")]
                assert told.removeprefix(f"{number[1]}  ").split()[:4] == reason.split()[:4]
