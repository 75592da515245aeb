# SPDX-License-Identifier: Apache-2.0
"""Package map, and the extension ``kdengine._C``: ``csrc`` by g++ and nvcc, driven by ninja.

KDENGINE_BUILD_CUDA=auto|1|0: what the compilers here allow, CUDA or an error, no CUDA.
TORCH_CUDA_ARCH_LIST: architectures, as torch's own extensions take them; no GPU is needed.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, find_namespace_packages, find_packages, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path(__file__).resolve().parent / "csrc"
ARCHITECTURES = "8.0+PTX;9.0a"
RULES = """
rule cxx
  command = $cxx -std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -Wall -Wextra -Werror $
    $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
rule nvcc
  command = $nvcc -std=c++17 -O3 -lineinfo -Xfatbin -compress-all -Werror all-warnings $
    -Xcompiler -fPIC,-fvisibility=hidden $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
rule link
  command = $cxx -shared -fopenmp -s $in $flags -o $out
"""


def toolkit() -> Path | None:
    """The folder of the CUDA toolkit; an ``nvcc`` on PATH may be a script, so it is asked."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return Path(home)
    if not (nvcc := shutil.which("nvcc")):
        return None
    plan = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    found = re.search(r"^#\$ TOP=(.*)$", plan, re.MULTILINE)
    return Path(found[1]).resolve() if found else None


def gencode(names: str) -> str:
    """Architectures as flags of nvcc."""
    flags = []
    for name in re.split(r"[;, ]+", names):
        if not (parts := re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)):
            sys.exit(f"TORCH_CUDA_ARCH_LIST: expected names like {ARCHITECTURES!r}; {name!r} came")
        number = parts[1] + parts[2]
        kinds = f"sm_{number}", *([f"compute_{number}"] if parts[3] else [])
        flags += [f"-gencode arch=compute_{number},code={kind}" for kind in kinds]
    return " ".join(flags)


class NinjaBuild(build_ext):
    """Writes a ninja file and runs it."""

    def build_extension(self, ext: Extension) -> None:
        """Build what the compilers found allow, and say what is left out."""
        wanted = os.environ.get("KDENGINE_BUILD_CUDA", "auto")
        if wanted not in ("auto", "0", "1"):
            sys.exit(f"KDENGINE_BUILD_CUDA: expected auto, 0 or 1; {wanted!r} came")
        cxx, cuda = shutil.which(os.environ.get("CXX", "g++")), toolkit()
        if wanted == "1" and not (cxx and cuda):
            sys.exit("KDENGINE_BUILD_CUDA=1: no g++ or no nvcc on PATH; add them or set CUDA_HOME")
        if not cxx:
            print("kdengine: no g++, so no extension; Triton and torch remain", file=sys.stderr)
            return
        if wanted == "0" or not cuda:
            reason = "KDENGINE_BUILD_CUDA=0" if wanted == "0" else "no nvcc on PATH, no CUDA_HOME"
            print(f"kdengine: the extension is built for the CPU alone: {reason}", file=sys.stderr)
            cuda = None
        names = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(self.plan(ext.name, cxx, cuda, names if cuda else ""))
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)

    def plan(self, name: str, cxx: str, cuda: Path | None, names: str) -> str:
        """The text of the ninja file."""
        includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
        flags = " ".join(f"-isystem {x}" for x in includes)
        flags += f" '-DKDENGINE_ARCHITECTURES=\"{names}\"'" + " -DKDENGINE_WITH_CUDA" * bool(cuda)
        lines = [f"cxx = {cxx}", f"nvcc = {cuda}/bin/nvcc", RULES]
        objects = []
        for source in sorted(SOURCES.glob("*.c*")):
            rule = {".cpp": "cxx", ".cu": "nvcc" if cuda else None}.get(source.suffix)
            if rule:
                objects.append(f"{source.name}.o")
                lines.append(f"build {objects[-1]}: {rule} {source}")
                lines.append(f"  flags = {flags if rule == 'cxx' else gencode(names)}")
        out = Path(self.get_ext_fullpath(name)).resolve()
        lines.append(f"build {out}: link {' '.join(objects)}")
        lines.append(f"  flags = -L{cuda}/lib64 -lcudart_static -ldl -lrt -lpthread" * bool(cuda))
        return "\n".join(lines) + "\n"


# the namespace finder takes folders of data (recipes, model configs) along
setup(
    packages=find_namespace_packages(include=["kdengine", "kdengine.*"]) + find_packages("kernels"),
    package_dir={"kdengine_kernels": "kernels/kdengine_kernels"},
    package_data={"": ["*.toml", "*.json", "*.css", "*.html", "py.typed"]},
    # optional: without a compiler there is no file to install
    ext_modules=[Extension("kdengine._C", [], optional=True)],
    cmdclass={"build_ext": NinjaBuild},
)
