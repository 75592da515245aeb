# SPDX-License-Identifier: Apache-2.0
"""What is said when DALI fails, and who was asked again; and how the data modules stand."""

import ast
import graphlib
from pathlib import Path

import pytest

from kdengine.data import diagnose
from kdengine.data.causes import Fault
from kdengine.data.dali import ReaderSpec

READER = ReaderSpec(("/d/0.tar",), ("/d/0.idx",), 0, 1, 2, 0, 7)
ERROR = RuntimeError("Error in decoder. encountered: nvImageCodec failure: '#4'")


class Index:
    """Names every sample alike."""

    def key(self, number: int) -> str:
        return f"key-{number}"


def told(monkeypatch: pytest.MonkeyPatch, fault: Fault | None, on_gpu: bool) -> str:
    failed = None if fault is None else ("/d/0.tar:512:3", fault)
    monkeypatch.setattr(diagnose, "read_sources", lambda *_: ["/d/0.tar:512:3"])
    monkeypatch.setattr(diagnose, "_failed_sample", lambda *_: failed)
    return diagnose.explain(ERROR, Index(), READER, None, lambda _: 3, on_gpu=on_gpu)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_decoder_that_judged_a_sample_is_named(monkeypatch, on_gpu: bool) -> None:
    said = told(monkeypatch, Fault("image-decode", "bad marker"), on_gpu)
    assert said.startswith("data (rank 0 of 1): DALI cannot decode sample 3 (key 'key-3'")
    assert "bad marker (says DALI's CPU decoder" in said
    assert ("in place of the GPU's" in said) == on_gpu


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_batch_that_only_the_gpu_refuses_is_told_as_such(monkeypatch, on_gpu: bool) -> None:
    said = told(monkeypatch, None, on_gpu)
    assert "not on a single sample" in said and "again, with DALI's CPU decoder" in said
    assert ("decodes on the GPU, which may refuse what the CPU takes" in said) == on_gpu


def test_no_data_module_imports_itself_by_a_detour(repository: Path) -> None:
    """Imports inside functions count; those for types only do not."""
    graph: dict[str, set[str]] = {}
    for path in (repository / "kdengine/data").glob("[a-z]*.py"):
        tree = ast.parse(path.read_text())
        typing = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE" in ast.dump(n.test)]
        ignored = {id(inner) for node in typing for inner in ast.walk(node)}
        found = [
            n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and id(n) not in ignored
        ]
        graph[path.stem] = set()
        for node in found:
            if node.module == "kdengine.data":
                graph[path.stem] |= {alias.name for alias in node.names}
            elif node.module and node.module.startswith("kdengine.data."):
                graph[path.stem].add(node.module.removeprefix("kdengine.data."))
    assert graph["loader"] >= {"batches", "shardloader"}
    list(graphlib.TopologicalSorter(graph).static_order())
