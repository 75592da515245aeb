# SPDX-License-Identifier: Apache-2.0
"""The extension ``kdengine._C``: how it is built, what it refuses, its 16-bit numbers."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kdengine.ops import extension, feature

REASON = extension.why_not("cpu")
BUILT = pytest.mark.skipif(bool(REASON), reason=str(REASON))
COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")


def build(
    repository: Path, folder: Path, with_nvcc: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Build into a folder of its own; the sources stay as they are."""
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", str(folder / "temp")]
    parts = os.environ["PATH"].split(os.pathsep)
    if not with_nvcc:
        parts = [part for part in parts if not (Path(part) / "nvcc").exists()]
    env = {name: x for name, x in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH")}
    return subprocess.run(
        [*command, "--build-lib", str(folder / "lib")],
        cwd=repository,
        env=env | {"PATH": os.pathsep.join(parts)} | variables,
        capture_output=True,
        text=True,
    )


@COMPILER
def test_the_extension_is_built_wherever_a_compiler_is() -> None:
    assert not REASON, REASON
    assert bool(shutil.which("nvcc")) <= bool(importlib.import_module("kdengine._C").architectures)


@COMPILER
def test_without_nvcc_it_is_built_for_the_cpu_and_says_so(repository: Path, tmp_path: Path) -> None:
    found = build(repository, tmp_path, with_nvcc=False)
    assert found.returncode == 0, found.stderr
    assert "built for the CPU alone: no nvcc on PATH, no CUDA_HOME" in found.stderr
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import _C; "
        "print(repr(_C.architectures), hasattr(_C, 'Cuda'))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "lib" / "kdengine")]
    assert subprocess.check_output(command, text=True).split() == ["''", "False"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"KDENGINE_BUILD_CUDA": "1"}, "KDENGINE_BUILD_CUDA=1: no g++ or no nvcc on PATH"),
        ({"KDENGINE_BUILD_CUDA": "yes"}, "KDENGINE_BUILD_CUDA: expected auto, 0 or 1; 'yes' came"),
        (
            {"CUDA_HOME": "/nowhere", "TORCH_CUDA_ARCH_LIST": "9.0a;hopper"},
            "TORCH_CUDA_ARCH_LIST: expected names like '8.0+PTX;9.0a'; 'hopper' came",
        ),
    ],
)
def test_a_wrong_setting_of_the_build_is_refused(
    repository: Path, tmp_path: Path, variables: dict[str, str], message: str
) -> None:
    found = build(repository, tmp_path, with_nvcc=False, **variables)
    assert found.returncode != 0 and message in found.stderr


@BUILT
def test_a_wrong_shape_is_refused_by_the_extension() -> None:
    x, none = torch.zeros(3, 4), torch.empty(0)
    narrow = torch.zeros(3, 5)
    with pytest.raises(ValueError, match=r"one shape \(B, E\); \(3, 4\) float32 and \(3, 5\)"):
        extension.call("feature_forward", [x], [narrow], torch.zeros(1, 3), [none], False)
    with pytest.raises(ValueError, match=r"towers of one shape and type, \(3, 4\) float32 and"):
        towers = [x, narrow], [x, narrow]
        extension.call("feature_forward", *towers, torch.zeros(2, 3), [none, none], False)
    with pytest.raises(ValueError, match=r"lists of one length, 1 to 4; 5 students, 5 teachers"):
        extension.call("feature_forward", [x] * 5, [x] * 5, torch.zeros(5, 3), [none] * 5, False)
    with pytest.raises(ValueError, match=r"lists of one length, 1 to 4; 2 students, 1 teachers"):
        extension.call("feature_forward", [x] * 2, [x], torch.zeros(2, 3), [none], False)
    with pytest.raises(ValueError, match=r"expected \(1, 3\) float32 numbers.*; \(1, 2\)"):
        extension.call("feature_forward", [x], [x], torch.zeros(1, 2), [none], False)
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16; \(3, 4\) float64 came"):
        extension.call("feature_forward", [x.double()], [x], torch.zeros(1, 3), [none], False)
    with pytest.raises(ValueError, match=r"like the student, \(3, 4\) float32; \(3, 4\) float64"):
        extension.call("feature_forward", [x], [x], torch.zeros(1, 3), [x.double()], False)
    with pytest.raises(
        ValueError, match=r"a gradient like the student, \(3, 4\) float32; \(3, 2\)"
    ):
        per_row = torch.zeros(1, 3)
        extension.call("feature_backward", [x], [x], per_row, [none], [x[:, :2]], False)


@BUILT
def test_tensors_on_several_devices_are_refused() -> None:
    x, away = torch.zeros(3, 4), torch.zeros(3, 4, device="meta")
    message = r"feature_forward: expected tensors on one device, cpu; \(3, 4\) on meta came"
    with pytest.raises(ValueError, match=message):
        extension.call("feature_forward", [x], [away], torch.zeros(1, 3), [x], False)


@pytest.mark.skipif(
    bool(extension.why_not("cuda")) or torch.cuda.is_available(),
    reason="needs kdengine._C with GPU code, and no GPU",
)
def test_a_launch_that_fails_names_file_shape_and_reason() -> None:
    x = torch.zeros(3, 4)
    module = extension.load()
    place = module.Cuda(stream=0, device=0)

    def matrix(y: torch.Tensor) -> Any:
        return module.Matrix(y.data_ptr(), *y.shape, y.stride(0), module.Dtype.float32)

    one, none = [matrix(x)], [matrix(torch.empty(0, 0))]
    message = r"feature\.cu: a CUDA kernel over \(3, 4\) float32 could not be launched \(.*\)"
    with pytest.raises(RuntimeError, match=message):
        module.feature_forward(one, one, matrix(torch.zeros(1, 3)), none, False, place)


def test_a_missing_extension_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise ImportError("No module named 'kdengine._C'")

    monkeypatch.setattr(extension, "load", absent)
    extension.why_not.cache_clear()
    with pytest.raises(RuntimeError, match="kdengine._C cannot be imported .*g.. on PATH builds"):
        feature(torch.zeros(2, 2), torch.zeros(2, 2), backend="cuda")
    extension.why_not.cache_clear()


@BUILT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits_is_read_and_written_as_torch_does(dtype: torch.dtype) -> None:
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)[:, None].contiguous()
    apart = feature(x, torch.zeros_like(x), backend="cuda")
    torch.testing.assert_close(apart, x[:, 0].float().square(), rtol=0, atol=0, equal_nan=True)
    # the gradient is 2 g x, rounded once
    x = x.requires_grad_()
    grad = torch.rand(len(x)) * 1.5
    feature(x, torch.zeros_like(x), backend="cuda").backward(grad)
    truth = (2 * grad * x[:, 0].detach().float()).to(dtype)
    assert x.grad is not None
    torch.testing.assert_close(x.grad[:, 0], truth, rtol=0, atol=0, equal_nan=True)
