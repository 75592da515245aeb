# SPDX-License-Identifier: Apache-2.0
"""Write a student as a folder that open_clip loads by ``local-dir:``."""

import contextlib
import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import kdengine
from kdengine.durable import sync_tree
from kdengine.models.build import build_from_spec
from kdengine.models.source import CONFIG_FILE, WEIGHT_FILES
from kdengine.models.spec import TowerSpec
from kdengine.models.towers import LOG_SCALE_MAX

WEIGHTS_FILE = WEIGHT_FILES[0]


def export_student(
    state_dict: Mapping[str, Tensor],
    spec: TowerSpec,
    out_dir: str | Path,
    *,
    force: bool = False,
    notes: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
) -> Path:
    """Write ``open_clip_config.json`` and ``open_clip_model.safetensors`` into ``out_dir``.

    ``open_clip.create_model_and_transforms("local-dir:OUT")`` and ``open_clip.get_tokenizer`` load
    the folder; the embeddings are those of the student. The folder appears complete under its name
    or not at all; an earlier export by kdengine is replaced.

    Args:
        state_dict: of the open_clip model (``tower.clip``) or of the ``TwoTower``, whole: not the
            shards that ZeRO-3 leaves on a rank.
        spec: what the weights are.
        out_dir: the folder.
        force: write into a folder that holds other things as well; those stay.
        notes: further plain values for the config file, under ``kdengine`` (open_clip skips them).
        files: texts to write beside, by the name of the file.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder holds something that is not an export by kdengine.
        ValueError: the weights do not belong to ``spec``, or are not finite.
    """
    tensors = _student_tensors(state_dict, spec)
    with placed(out_dir, WEIGHTS_FILE, force=force) as folder:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        # safetensors keeps it to its owner
        (folder / WEIGHTS_FILE).chmod(0o666 & ~_umask())
        for name, text in (files or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        describe(spec, folder, notes or {})
    return Path(out_dir)


@contextlib.contextmanager
def placed(out_dir: str | Path, mark: str, *, force: bool) -> Iterator[Path]:
    """A folder to fill, which appears complete under its name or not at all.

    Args:
        out_dir: its name.
        mark: the file that tells an earlier export of the same kind, which is replaced.
        force: write into a folder that holds other things as well; those stay.

    Raises:
        FileExistsError: the folder holds something else; nothing is written.
    """
    out = Path(out_dir)
    found = _occupant(out, mark)
    if found == "foreign" and not force:
        raise FileExistsError(
            f"export: {out} holds {_few(_names(out))}, which is no export by kdengine of the same "
            f"kind (with {mark}); choose another folder, or write beside it with --force (in "
            "Python force=True)"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        staging.chmod(0o777 & ~_umask())
        yield staging
        sync_tree(staging)
        if found == "foreign":
            for file in staging.iterdir():
                os.replace(file, out / file.name)
        elif found == "export":
            retired = staging.with_suffix(".retired")
            os.rename(out, retired)
            os.rename(staging, out)
            shutil.rmtree(retired)
        else:
            os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def notes_of(folder: Path) -> dict[str, Any]:
    """What an export says of itself: ``student``, ``files``, ``run`` ..; {} of other folders."""
    try:
        return dict(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["kdengine"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def run_label(run: Path) -> str:
    """How an export names the run that it comes from, without the rest of the path."""
    return "/".join(run.resolve().parts[-2:])


def refuse_other_run(out: Path, run: Path) -> None:
    """Let the export of a run be replaced by the same run only.

    Args:
        out: where an export may stand; its note ``run`` is the ``run_label`` of its run.
        run: folder of the run to be exported, or of one of its checkpoints.

    Raises:
        FileExistsError: the export comes from another run.
    """
    label = notes_of(out).get("run")
    if label not in (None, run_label(run), run_label(run.resolve().parent.parent)):
        raise FileExistsError(
            f"export: {out} holds the export of another run, {label}; choose another folder, or "
            "replace it with --force"
        )


def _occupant(out: Path, mark: str) -> str:
    """What stands where the export shall go: "nothing", an "export", or something "foreign"."""
    if not out.exists():
        return "nothing"
    if not out.is_dir():
        raise FileExistsError(f"export: {out} is a file; name a folder, which need not exist")
    names = _names(out)
    if not names:
        return "nothing"
    return "export" if {mark, *names} <= set(notes_of(out).get("files", ())) else "foreign"


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _student_tensors(state_dict: Mapping[str, Tensor], spec: TowerSpec) -> dict[str, Tensor]:
    """The weights in fp32, checked against the architecture, as open_clip wants them."""
    if state_dict and all(name.startswith("clip.") for name in state_dict):
        state_dict = {name.removeprefix("clip."): value for name, value in state_dict.items()}
    given = dict(state_dict)
    with torch.random.fork_rng(devices=[]):
        wanted = build_from_spec(spec).clip.state_dict()
    for scalar in ("logit_scale", "logit_bias"):
        # shape [1] in training, 0-D in what the world publishes
        for tensors in (given, wanted):
            if scalar in tensors and tensors[scalar].numel() == 1:
                tensors[scalar] = tensors[scalar].detach().reshape(())
    missing, unknown = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    shapes = [
        f"{name}: {tuple(given[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    if missing or unknown or shapes:
        raise ValueError(
            f"export: the weights are not those of {spec.name}: missing {_few(missing)}, "
            f"unknown {_few(unknown)}, shapes {_few(shapes)}; give the state dict of the student "
            "alone, whole"
        )
    done = {}
    for name, value in given.items():
        # clones: two names must not share memory in a safetensors file
        value = value.detach().to("cpu", copy=True).contiguous()
        done[name] = value.float() if value.is_floating_point() else value
    broken = [name for name, value in done.items() if not torch.isfinite(value).all()]
    if broken:
        raise ValueError(
            f"export: weights are not finite: {_few(broken)}; export an earlier checkpoint"
        )
    # the student computes with a clamped scale, open_clip with the stored one
    done["logit_scale"] = done["logit_scale"].clamp(0, LOG_SCALE_MAX)
    return done


def _few(names: list[str]) -> str:
    return "none" if not names else ", ".join(names[:4]) + (" .." if len(names) > 4 else "")


def describe(spec: TowerSpec, folder: Path, notes: Mapping[str, Any]) -> None:
    """Write what the files of a folder are, and the tokenizer, for open_clip and for people.

    ``notes`` come under ``kdengine`` in the configuration.
    """
    if spec.tokenizer.startswith("hf:"):
        _save_tokenizer(spec, folder)
    model_cfg = copy.deepcopy(dict(spec.model_cfg))
    model_cfg.pop("nonscalar_logit_scale", None)
    files = sorted([*(path.name for path in folder.iterdir()), CONFIG_FILE])
    config = {
        "model_cfg": model_cfg,
        "preprocess_cfg": spec.preprocess.to_open_clip(),
        "kdengine": {
            **notes,
            "version": kdengine.__version__,
            "student": spec.name,
            "files": files,
        },
    }
    text = json.dumps(config, indent=4, allow_nan=False) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def _save_tokenizer(spec: TowerSpec, folder: Path) -> None:
    """open_clip reads the tokenizer of a ``local-dir:`` model from the folder itself."""
    source = spec.tokenizer.removeprefix("hf:").partition("?")[0].rpartition(":")[0]
    from transformers import AutoTokenizer  # type: ignore[import-not-found,unused-ignore]

    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
