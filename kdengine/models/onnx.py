# SPDX-License-Identifier: Apache-2.0
"""The towers of a model as ONNX graphs, checked against torch before they are handed out.

``visual.onnx`` takes ``image`` [batch, 3, S, S], float32, and gives ``image_features`` [batch, D];
``textual.onnx`` takes ``text`` [batch, context], int64 token ids, and gives ``text_features``
[batch, D]. Any batch size. The features have unit length, so that their products are cosines; what
else a user has to know, the scale of the logits and how an image and a caption are made ready,
stands in the metadata of both files.
"""

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdengine
from kdengine.models.export import describe, notes_of, placed
from kdengine.models.spec import TowerSpec
from kdengine.models.towers import Student, TwoTower

OPSET = 18
VISUAL_FILE, TEXTUAL_FILE = "visual.onnx", "textual.onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# of the features, relative to their length; batch sizes
TOLERANCE, CHECKED = 1e-4, (1, 3)


class Graph(NamedTuple):
    """What was written.

    Attributes:
        file: name in the folder.
        num_bytes: its size, weights beside it included.
        error: of its features under onnxruntime against torch's, relative, the largest.
    """

    file: str
    num_bytes: int
    error: float


class _Embed(nn.Module):
    """One tower, unit features out."""

    def __init__(self, tower: TwoTower, kind: str) -> None:
        super().__init__()
        self.tower, self.kind = tower, kind

    def forward(self, given: Tensor) -> Tensor:
        """Shapes: [b, 3, S, S] or [b, context] -> [b, D]."""
        encode = self.tower.encode_image if self.kind == "image" else self.tower.encode_text
        return F.normalize(encode(given), dim=-1)


def require_packages() -> None:
    """Refuse where a package is missing that only this needs.

    Raises:
        RuntimeError: naming them, and the command that installs them.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise RuntimeError(
            f"onnx: {' and '.join(missing)} cannot be imported; install what kdengine does not "
            f"need otherwise: pip install {' '.join(PACKAGES)}"
        )


def export_onnx(model: Student, out_dir: str | Path, *, force: bool = False) -> list[Graph]:
    """Write both towers as ONNX graphs of opset 18, float32, and run them once.

    Beside them stands an ``open_clip_config.json``, from which ``open_clip.get_tokenizer`` makes
    the tokenizer of the folder. Weights of 2 GB and more lie in a file of their own beside a graph.

    Args:
        model: on the CPU; see ``load_model``. It is left in float32 and evaluation mode.
        out_dir: folder, which appears complete or not at all; earlier graphs by kdengine in it are
            replaced.
        force: write into a folder that holds other things as well; those stay.

    Raises:
        FileExistsError: the folder holds something else than such graphs.
        RuntimeError: a package is missing, or a graph does not compute what torch does.
    """
    require_packages()
    spec, notes = _origin(model.spec)
    written = []
    tower = model.tower.float().eval()
    size, context = spec.preprocess.size, spec.context_length
    generator = torch.Generator().manual_seed(0)
    made = {
        "image": lambda n: torch.randn(n, 3, size, size, generator=generator),
        "text": lambda n: torch.randint(1, 1000, (n, context), generator=generator),
    }
    with placed(out_dir, VISUAL_FILE, force=force) as folder:
        for kind, file in (("image", VISUAL_FILE), ("text", TEXTUAL_FILE)):
            embed, path = _Embed(tower, kind).eval(), folder / file
            with _quiet(), torch.no_grad():
                program = torch.onnx.export(
                    embed,
                    # two: of one row a batch would be taken for a constant
                    (made[kind](2),),
                    dynamo=True,
                    opset_version=OPSET,
                    input_names=[kind],
                    output_names=[f"{kind}_features"],
                    dynamic_shapes=({0: torch.export.Dim("batch")},),
                    verbose=False,
                )
            assert program is not None
            _without_traces(program.model)
            program.model.metadata_props.update(metadata(spec, tower, notes))
            program.save(path)
            error = max(_error(embed, path, made[kind](n)) for n in CHECKED)
            if not error <= TOLERANCE:
                raise RuntimeError(
                    f"onnx: {file} of {spec.label} is {error:.1e} off torch's features, at most "
                    f"{TOLERANCE:.0e} was expected; nothing was written"
                )
            parts = [part.stat().st_size for part in folder.glob(f"{file}*")]
            written.append(Graph(file, sum(parts), error))
        describe(spec, folder, notes)
    return written


def _origin(spec: TowerSpec) -> tuple[TowerSpec, dict[str, Any]]:
    """A spec without paths of this machine, and the notes of the export that it was read from."""
    if not spec.name.startswith(kdengine.LOCAL_DIR):
        return spec, {}
    folder = Path(spec.name.removeprefix(kdengine.LOCAL_DIR))
    notes = notes_of(folder)
    name = notes.get("student", folder.resolve().name)
    return dataclasses.replace(spec, name=name), notes


def metadata(spec: TowerSpec, tower: TwoTower, notes: Mapping[str, Any]) -> dict[str, str]:
    """What a user of the graphs has to know, in words and numbers; plain notes come first."""
    clip: Any = tower.clip
    seen = spec.preprocess
    bias = getattr(clip, "logit_bias", None)
    found: dict[str, Any] = {
        name: value for name, value in notes.items() if isinstance(value, str | int)
    }
    found |= {
        "model": spec.label,
        "kdengine": kdengine.__version__,
        "features": "of unit length; logit = logit_scale * cosine"
        + ("" if bias is None else " + logit_bias"),
        "embed_dim": spec.embed_dim,
        "logit_scale": float(clip.logit_scale.detach().float().exp()),
        "image": "RGB in 0..1, less image_mean, over image_std",
        "image_size": seen.size,
        "image_mean": " ".join(map(str, seen.mean)),
        "image_std": " ".join(map(str, seen.std)),
        "interpolation": seen.interpolation,
        "resize_mode": seen.resize_mode,
        "tokenizer": spec.tokenizer,
        "context_length": spec.context_length,
    }
    if bias is not None:
        found["logit_bias"] = float(bias.detach())
    return {name: str(value) for name, value in found.items()}


def _without_traces(model: Any) -> None:
    """Drop what the exporter notes at each node: lines of source and paths of this machine."""
    for node in model.graph.all_nodes():
        for part in (node, *node.outputs):
            part.metadata_props.clear()
            part.doc_string = None


def _error(embed: nn.Module, path: Path, given: Tensor) -> float:
    """The largest distance of a row of features from torch's, which have length 1."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = [entry.name for entry in session.get_inputs()]
    found = torch.from_numpy(session.run(None, {name: given.numpy()})[0])
    with torch.no_grad():
        return float((found - embed(given)).norm(dim=-1).max())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own insides."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
