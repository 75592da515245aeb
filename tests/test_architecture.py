# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: the lines of the architecture, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

# a module imports only from lower lines; siblings on one line do not import each other
LINES = {
    "kdengine.cli": 10,
    "kdengine.train": 9,
    "kdengine.loop": 8,
    "kdengine.precompute": 8,
    "kdengine.inherit": 7,
    "kdengine.job": 7,
    "kdengine.prompting": 6,
    "kdengine.accumulate": 6,
    "kdengine.assembly": 5,
    "kdengine.clustering": 5,
    "kdengine.evaluate": 5,
    "kdengine.checkpoint": 5,
    "kdengine.report": 5,
    "kdengine.demo": 5,
    "kdengine.cluster": 6,
    "kdengine.engineconfig": 4,
    "kdengine.optimizer": 4,
    "kdengine.methods": 4,
    "kdengine.teachers": 4,
    "kdengine.pruning": 4,
    "kdengine.cache": 4,
    "kdengine.centres": 3,
    "kdengine.losses": 3,
    "kdengine.models": 3,
    "kdengine.data": 3,
    "kdengine.diagnostics": 3,
    "kdengine.doctor": 2,
    "kdengine.distributed": 2,
    "kdengine.ranks": 2,
    "kdengine.ops": 1,
    "kdengine.arguments": 1,
    "kdengine.stages": 2,
    "kdengine.reference": 0,
    "kdengine.reference_assign": 0,
    "kdengine.reference_clusters": 0,
    "kdengine.config": 0,
    "kdengine.methodconfig": -1,
    "kdengine.promptconfig": -2,
    "kdengine.log": 0,
    "kdengine.options": 0,
    "kdengine.stop": 0,
    "kdengine.errors": 0,
    "kdengine.durable": 0,
    "kdengine._C": 0,
    "kdengine_kernels": 0,
}
# methods build on what models hand out; arguments stand on the configuration alone
SEES_CONFIG = 4
READ_CONFIG = ("kdengine.arguments", "kdengine.stages")
WALLS = {
    "triton": ("kdengine_kernels",),
    "nvidia": ("kdengine.data",),
    "deepspeed": ("kdengine.job", "kdengine.checkpoint"),
    "open_clip": ("kdengine.models", "kdengine.data.tokenize"),
    "sklearn": ("kdengine.evaluate.probe",),
    "onnxruntime": ("kdengine.models.onnx",),
    "scipy": ("kdengine.cluster",),
}
ONLY = {f"kdengine.{name}": {"torch"} for name in ("reference", "reference_assign")}
ONLY |= {"kdengine.reference_clusters": {"torch"}, "kdengine.config": set()}
HEAVY = ("triton", "deepspeed", "nvidia.dali", "open_clip")


def sources(root: Path) -> dict[str, Path]:
    """Every module of both source roots, by its dotted name."""
    found = {}
    for base in (root, root / "kernels"):
        for package in ("kdengine", "kdengine_kernels"):
            for path in sorted((base / package).rglob("*.py")):
                name = ".".join(path.relative_to(base).with_suffix("").parts)
                found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path, module: str) -> list[tuple[int, str]]:
    """Line and dotted name of each import, those inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if path.name == "__init__.py" else module.rpartition(".")[0]
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parts, base]).rstrip(".")
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return found


def room(name: str) -> str | None:
    """The entry of LINES that a dotted name belongs to."""
    fits = [key for key in LINES if name == key or name.startswith(key + ".")]
    return max(fits, key=len, default=None)


def complaints(module: str, found: list[tuple[int, str]]) -> list[str]:
    """What is wrong with the imports of one module, by line."""
    wrong = []
    own = room(module)
    assert own is not None, f"{module} stands on no line: add it to LINES in {__file__}"
    for line, name in found:
        top = name.split(".")[0]
        allowed = WALLS.get(top)
        if allowed and not any(module == a or module.startswith(a + ".") for a in allowed):
            wrong.append(f"{module}:{line} imports {name}; only {allowed} may import {top}")
        if own in ONLY and top not in ONLY[own] | set(sys.stdlib_module_names) | {"kdengine"}:
            wrong.append(f"{module}:{line} imports {name}; {own} may import {ONLY[own]} only")
        other = room(name)
        if other is None or other == own:
            continue
        if LINES[other] >= LINES[own]:
            wrong.append(
                f"{module}:{line} (line {LINES[own]}) imports {name} (line {LINES[other]}); "
                "a module imports from lower lines only"
            )
        if other == "kdengine.config" and LINES[own] < SEES_CONFIG and own not in READ_CONFIG:
            wrong.append(f"{module}:{line} imports {name}; config is for line {SEES_CONFIG} and up")
    return wrong


def test_imports_go_one_way_only(repository: Path) -> None:
    modules = {m: p for m, p in sources(repository).items() if m != "kdengine"}
    assert len(modules) >= 3
    wrong = [w for m, path in modules.items() for w in complaints(m, imports(path, m))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("kdengine.ops.similarity", "kdengine.losses.similarity_loss"),
        ("kdengine.models.towers", "kdengine.data.loader"),
        ("kdengine.losses", "kdengine.config.RunConfig"),
        ("kdengine.losses", "triton.language"),
        ("kdengine.methods.clip", "deepspeed"),
        ("kdengine.evaluate", "open_clip"),
        ("kdengine.reference", "numpy"),
        ("kdengine_kernels.similarity", "kdengine.ops"),
    ],
)
def test_a_forbidden_import_is_named(module: str, name: str) -> None:
    (message,) = complaints(module, [(7, name)])
    assert f"{module}:7" in message and name in message


def test_import_kdengine_loads_nothing_heavy(repository: Path) -> None:
    code = f"import sys, kdengine\nprint([m for m in {HEAVY} if m in sys.modules])\n"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_the_kernels_folder_is_no_package(repository: Path) -> None:
    assert not (repository / "kernels" / "__init__.py").exists(), (
        "kernels/__init__.py would shadow Hugging Face's package of that name"
    )


def test_every_source_file_names_its_licence(repository: Path) -> None:
    folders = ("kdengine", "kernels", "tests", "benchmarks", "csrc")
    files = [
        p
        for f in folders
        for p in (repository / f).rglob("*")
        if p.suffix in {".py", ".cu", ".cuh", ".cpp", ".h"}
    ]
    bare = [str(p) for p in files if "SPDX-License-Identifier: Apache-2.0" not in p.read_text()]
    assert files and not bare
