# SPDX-License-Identifier: Apache-2.0
"""The kdengine command: help, refusals, and index to pack to eval on real shards."""

import dataclasses
import io
import json
import shutil
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from kdengine import MAX_PIXELS, cli
from kdengine.cli import COMMANDS, main
from kdengine.config import RunConfig, from_dict, to_toml
from kdengine.data import index
from kdengine.data.packing import pack
from kdengine.models import build_from_spec, build_student, export_student


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


@pytest.mark.parametrize("command", [name for name in COMMANDS])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "--help" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "kdengine: expected one of train, cache, index"),
        (["evaluate"], "kdengine: expected one of train, cache, index, pack, cluster, balance"),
        (["index"], "index: expected shards, got none"),
        (["index", "x.tar", "--workers", "two"], "--workers: expected a whole number, got 'two'"),
        (["index", "x.tar", "--max_pixels="], "--max_pixels: expected a value, got an empty text"),
        (["index", "x.tar", "--require", "x"], "--require: expected one of caption, label, got"),
        (["index", "x.tar", "--worker", "2"], "unknown option --worker; did you mean --workers?"),
        (["pack", "a.csv"], "pack: expected OUT before the options, got nothing"),
        (["pack"], "pack: expected CSV and OUT before the options, got nothing"),
        (["pack", "a", "b", "c"], "pack: the word 'c' belongs to no option"),
        (["eval", "--bad-option"], "unknown option --bad-option; see --help"),
        (["eval", "--retrieval", "a=b", "M"], "eval: expected MODEL before the options"),
        (["eval", "M", "--batch-size", "x"], "--batch-size: expected a whole number, got 'x'"),
        (["export", "run", "out", "--force=yes"], "--force: takes no value, got 'yes'"),
        (["demo", "--seed"], "--seed: expected a whole number, got nothing"),
        (["index", "/nowhere/{0..3}.tar"], "shards: none of the 4 shards exists"),
        (["index", "/nowhere/0.tar"], "shards: there is no file /nowhere/0.tar"),
        (["index", "s3://bucket/0.tar"], "shards: they must be local files; got 's3://bucket/0"),
        (["index", "x.tar", "--index-dir", ""], "--index-dir: expected a value, got an empty text"),
        (["index", "x.tar", "--index-dir="], "--index-dir: expected a value, got an empty text"),
        (["index", ""], "after 'index': expected a value, got an empty text"),
        (["index", "x.tar", "--tokenizers", "clip"], "shards: there is no file"),
        (["pack", "/nowhere/a.csv", "/nowhere/out"], "pack: /nowhere/a.csv does not exist"),
        (["report"], "report: expected folders of runs"),
        (["report", "/nowhere/run"], "report: /nowhere/run does not exist"),
        (["export", "/nowhere/run", "/nowhere/out"], "export: /nowhere/run does not exist"),
        (["eval", ""], "after 'eval': expected a value, got an empty text"),
        (
            ["eval", "/nowhere/model", "--retrieval", "a=b.tar"],
            "eval: /nowhere/model does not exist",
        ),
        (["eval", "ViT-T-16"], "eval: expected at least one set"),
        (["eval", "ViT-T-16", "--probe", "a=b"], "evaluation set a: expected 'NAME=TRAIN;TEST'"),
        (["eval", "ViT-T-16", "--retrieval", "b.tar"], "evaluation set: expected 'NAME=SHARDS'"),
        (["eval", "ViT-T-16", "--retrieval", "a=b.tar", "--batch-size", "0"], "eval: --batch-size"),
        (["eval", "ViT-T-16", "--retrieval", "a=b.tar", "--out", "/"], "eval: --out / is a folder"),
        (
            ["eval", "ViT-T-16", "--retrieval", "a=b.tar", "--out", "/nowhere/a/b.json"],
            "eval: --out /nowhere/a/b.json: the folder /nowhere/a does not exist",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_call_ends_with_its_mend_and_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "--bad-option"],
        ["eval", "/nowhere"],
        ["eval", "ViT-T-16"],
        ["eval", "ViT-T-16", "--folder", "/nowhere"],
        ["index"],
        ["index", "/nowhere.tar"],
        ["pack", "/nowhere.csv", "/nowhere"],
        ["export", "/nowhere", "/nowhere"],
        ["report", "/nowhere"],
        ["train", "--bad-option"],
    ],
    ids=" ".join,
)
def test_a_wrong_call_is_refused_before_anything_heavy_is_imported(
    words: list[str], repository: Path
) -> None:
    code = (
        "import sys\nfrom kdengine.cli import main\n"
        f"try:\n    code = main({words})\nexcept SystemExit as stop:\n    code = stop.code\n"
        "heavy = 'torch', 'open_clip', 'deepspeed', 'nvidia.dali', 'matplotlib', 'transformers'\n"
        "print(code, [name for name in heavy if name in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True
    )
    assert found.stdout.splitlines()[-1] == "2 []", found.stderr


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(words: tuple[str, ...]) -> int:
        raise RuntimeError("from elsewhere")

    monkeypatch.setattr(cli, "train", fails)
    with pytest.raises(RuntimeError, match="from elsewhere"):
        main(["train"])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What the evaluation was asked for; nothing is evaluated or exported."""
    seen: dict[str, object] = {}
    monkeypatch.setattr(
        "kdengine.evaluate.evaluate_command", lambda *_, **options: seen.update(options)
    )
    monkeypatch.setattr("kdengine.checkpoint.export_run", lambda *_, **__: None)
    return seen


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that was trained with its own index folder and limit."""
    config = from_dict(
        RunConfig, {"data": {"max_pixels": 1234, "index_dir": "/there/index"}}, "test"
    )
    (tmp_path / "run").mkdir()
    text = to_toml(config) + "\n[data_of_another_version]\nunknown = 1\n"
    (tmp_path / "run" / "config.toml").write_text(text)
    return tmp_path / "run"


EVAL = ["--retrieval", "a=b.tar"]


def test_eval_of_a_run_opens_its_indexes_as_training_did(asked: dict, run: Path) -> None:
    assert main(["eval", str(run), *EVAL]) == 0
    assert (asked["index_dir"], asked["max_pixels"]) == ("/there/index", 1234)


def test_options_of_eval_replace_those_of_the_run(asked: dict, run: Path) -> None:
    assert main(["eval", str(run), *EVAL, "--index-dir", "here", "--max-pixels", "7"]) == 0
    assert (asked["index_dir"], asked["max_pixels"]) == ("here", 7)


def test_eval_of_no_run_has_the_defaults(asked: dict) -> None:
    assert main(["eval", "ViT-T-16", *EVAL]) == 0
    assert (asked["index_dir"], asked["max_pixels"]) == (None, MAX_PIXELS)


def test_eval_of_a_run_whose_configuration_is_broken_says_so(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "config.toml").write_text("[data")
    assert main(["eval", str(run), *EVAL]) == 2
    assert "config.toml is not valid TOML" in capsys.readouterr().err


def test_the_limit_on_pixels_has_one_definition() -> None:
    limits = (RunConfig().data.max_pixels, index.MAX_PIXELS, MAX_PIXELS)
    assert limits == (MAX_PIXELS,) * 3
    defaults = [f.__kwdefaults__["max_pixels"] for f in (cli.index, index.ensure_index, pack)]
    assert defaults == [MAX_PIXELS] * 3


@pytest.mark.parametrize("words", [["export", "{}", "out"], ["eval", "{}", *EVAL]], ids=" ".join)
def test_a_folder_of_runs_is_refused_with_the_runs(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("first", "second"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    assert main([word.format(tmp_path) for word in words]) == 2
    hint = f"did you mean {tmp_path}/first or {tmp_path}/second?"
    assert capsys.readouterr().err.endswith(f"{hint}\n")


def write_export(run: Path, out: Path, ragged: dict | None = None, **_: object) -> None:
    """What stands for the export of a run: a random student, of unequal layers if so told."""
    spec = build_student("ViT-Pico-32", seed=0).spec
    if ragged:
        spec = dataclasses.replace(spec, model_cfg={**spec.model_cfg, "ragged": ragged})
    export_student(build_from_spec(spec).state_dict(), spec, out, force=True)


UNEVEN = {"width": 16, "head_width": 16, "heads": [1, 0], "neurons": [0, 9]}


@pytest.mark.parametrize(
    ("ragged", "size", "how"),
    [
        ({}, "1.6", "load it with open_clip.create_model_and_transforms('local-dir:{}')"),
        (
            {"text": UNEVEN},
            "0.8",
            "(text): load it with kdengine.load_model('{}'), open_clip cannot",
        ),
    ],
    ids=["dense", "ragged"],
)
def test_export_tells_the_size_and_what_can_load_it(
    ragged: dict,
    size: str,
    how: str,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = run.parent / "out"
    monkeypatch.setattr("kdengine.checkpoint.export_run", partial(write_export, ragged=ragged))
    assert main(["export", str(run), str(out)]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"wrote {out}: {size} M parameters, 0.0 M without token embedding\n")
    assert how.format(out) in told


@pytest.mark.parametrize(
    ("label", "words", "code"),
    [("{}/run", [], 0), ("other/run", [], 2), ("other/run", ["--force"], 0)],
    ids=["same run", "other run", "forced"],
)
def test_the_export_of_another_run_is_replaced_by_force_only(
    run: Path,
    label: str,
    words: list[str],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("kdengine.checkpoint.export_run", write_export)
    out = run.parent / "out"
    out.mkdir()
    notes = {"kdengine": {"run": label.format(run.parent.name)}}
    (out / "open_clip_config.json").write_text(json.dumps(notes))
    assert main(["export", str(run), str(out), *words]) == code
    refused = f"{out} holds the export of another run, other/run" in capsys.readouterr().err
    assert refused == bool(code)


def label_shard(path: Path) -> str:
    """Two images with a class label each."""
    image = io.BytesIO()
    Image.new("RGB", (8, 8), 99).save(image, "JPEG")
    with tarfile.open(path, "w") as tar:
        for name in ("0.jpg", "0.cls", "1.jpg", "1.cls"):
            data = image.getvalue() if name.endswith("jpg") else b"1"
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_index_of_labels_without_captions_hints_at_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = label_shard(tmp_path / "0.tar")
    assert main(["index", shard, "--workers", "0"]) == 1
    error = capsys.readouterr().err
    assert "error: index: no good sample among 2" in error and "--require label" in error
    assert main(["index", shard, "--workers", "0", "--require", "label"]) == 0


def test_index_prints_the_path_of_the_quarantine_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / ("a-long-name-" * 12)
    folder.mkdir()
    main(["index", label_shard(folder / "0.tar"), "--workers", "0"])
    (listed,) = folder.rglob("caption/quarantine.jsonl")
    assert str(listed) in capsys.readouterr().out.splitlines()


def test_index_prints_what_was_kept_and_what_not(
    test_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("hostile-000.tar", "hostile-empty.tar", "cocomini-by-000.tar"):
        shutil.copy(test_data / name, tmp_path)
    shards = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    assert main(["index", *shards]) == 0
    printed = capsys.readouterr().out
    assert "126" in printed, "75 hostile and 51 good samples came"
    quarantined = list((tmp_path / ".kdengine").rglob("quarantine.jsonl"))
    assert quarantined and all(
        {"key", "shard", "cause"} <= json.loads(line).keys()
        for path in quarantined
        for line in path.read_text().splitlines()
    )


def test_pack_says_in_words_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.csv"
    table.write_text("filepath\ttitle\nnowhere.jpg\ta thing\n")
    assert main(["pack", str(table), str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().out
    assert "PackReport(" not in printed and "image-missing" in printed
