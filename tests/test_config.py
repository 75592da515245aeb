# SPDX-License-Identifier: Apache-2.0
"""Recipes, dotted overrides and what is refused."""

import dataclasses
import re
from pathlib import Path

import pytest

from kdengine.arguments import CacheLine, option_types, parse, parse_line, split
from kdengine.config import (
    Distill,
    Optim,
    RunConfig,
    Train,
    expand_variables,
    from_dict,
    load_recipe,
    recipe_names,
    to_dict,
    to_toml,
)


def write(folder: Path, text: str, name: str = "mine.toml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_is_short(name: str, repository: Path) -> None:
    config = load_recipe(name)
    assert config.train.steps is not None or config.train.epochs is not None
    lines = (repository / "kdengine" / "recipes" / f"{name}.toml").read_text().splitlines()
    assert len(lines) <= 40


def test_none_is_what_an_optional_field_is_without_a_word() -> None:
    """TOML has no word for none, so that a configuration could not be kept otherwise."""

    def visit(value: object) -> None:
        for field in dataclasses.fields(value):  # type: ignore[arg-type]
            inner = getattr(value, field.name)
            if dataclasses.is_dataclass(inner):
                visit(inner)
            assert "None" not in str(field.type) or inner is None, field.name

    visit(RunConfig())


def test_toml_round_trip_keeps_every_value(tmp_path: Path) -> None:
    config = RunConfig(
        optim=Optim(lr=3e-5, grad_clip_norm=1.0, eps=1e-8),
        train=Train(steps=7, precision="bf16"),
    )
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, train_data='a "b"\\c\n{0..1}.tar'),
        eval=dataclasses.replace(config.eval, retrieval=("x=y", "z=w")),
    )
    assert load_recipe(write(tmp_path, to_toml(config))) == config


def test_base_recipe_is_overridden_key_by_key(tmp_path: Path) -> None:
    base = write(tmp_path, "[optim]\nlr = 0.1\nwd = 0.2\n", "base.toml")
    config = load_recipe(write(tmp_path, f'base = "{base}"\n[optim]\nwd = 0.3\n'))
    assert (config.optim.lr, config.optim.wd) == (0.1, 0.3)


def test_base_in_a_circle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    with pytest.raises(ValueError, match="circle"):
        load_recipe(write(tmp_path, f'base = "{path}"\n'))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[optim]\nlearning_rat = 1", "unknown key 'learning_rat'"),
        ("[optim]\nbeta_1 = 0.9", "did you mean 'beta1'"),
        ("[optimizer]\nlr = 1", "did you mean 'optim'"),
        ("[optim]\nlr = 'fast'", "lr: expected float, got 'fast'"),
        ("[train]\nsteps = 1.5", "steps: expected int, got 1.5"),
        ("[train]\nbatch_size = true", "batch_size: expected int, got True"),
        ("[train]\nprecision = 'fp8'", r"expected one of \['fp32', 'bf16', 'amp_bf16'\]"),
        ("[train]\nbatch_size = 0", "train.batch_size: expected a size >= 1, got 0"),
        ("[train]\nsteps = 5\nepochs = 1", "expected epochs or steps, got both"),
        ("[method.clip_kd]\nfd = -1", "expected a weight >= 0"),
        ("train = 3", "train: expected a table"),
        ("[optim\n", "not valid TOML"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path, text))


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(FileNotFoundError, match="Did you mean 'clip_kd'"):
        load_recipe("clipkd")


def test_variables_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDENGINE_A", "/a")
    assert expand_variables("${KDENGINE_A}/{0..3}.tar", "x") == "/a/{0..3}.tar"
    assert expand_variables("${KDENGINE_B:-../b}/c", "x") == "../b/c"
    with pytest.raises(ValueError, match="KDENGINE_B is not set"):
        expand_variables("${KDENGINE_B}/c", "x")


def test_integers_are_good_floats_and_lists_good_tuples() -> None:
    config = from_dict(RunConfig, {"optim": {"lr": 1}, "eval": {"retrieval": ["a=b"]}}, "x")
    assert config.optim.lr == 1.0 and config.eval.retrieval == ("a=b",)


def test_a_text_is_a_tuple_of_one_as_old_runs_have_it(tmp_path: Path) -> None:
    old = '[distill]\ndistill_model = "ViT-B-16"\ndistill_pretrained = "laion400m_e32"\n'
    config = load_recipe(write(tmp_path, old))
    assert config.distill.teachers() == [("ViT-B-16", "laion400m_e32")]
    assert load_recipe(write(tmp_path, to_toml(config))) == config


def test_several_teachers_on_the_command_line() -> None:
    words = "--distill.distill-model local-dir:a ViT-B-16 --distill.distill-pretrained"
    config = parse([*words.split(), "", "laion400m_e32", "--optim.lr", "1"])
    assert config.distill.teachers() == [("local-dir:a", None), ("ViT-B-16", "laion400m_e32")]
    config = parse(["--distill.distill-model", "local-dir:a", "local-dir:b"])
    assert config.distill.teachers() == [("local-dir:a", None), ("local-dir:b", None)]
    assert RunConfig().distill.teachers() == []


@pytest.mark.parametrize("tags", [("x",), ("", "x", "")])
def test_teachers_and_their_weights_are_of_one_number(tags: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"\['A', 'B'\]; give one for each") as error:
        Distill(distill_model=("A", "B"), distill_pretrained=tags)
    assert str(list(tags)) in str(error.value)


@pytest.mark.parametrize("words", [["--local_rank=1"], ["--local_rank", "1"], ["--local-rank=1"]])
def test_the_launchers_rank_is_dropped(words: list[str]) -> None:
    recipe, rest = split([*words, "--recipe", "clip_kd", "--optim.lr", "1", "--deepspeed"])
    assert (recipe, rest) == ("clip_kd", ["--optim.lr", "1"])


def test_overrides_replace_the_recipes_values() -> None:
    config = parse("--recipe=clip_kd --optim.lr 5e-4 --train.batch_size=32 --resume latest".split())
    assert (config.optim.lr, config.train.batch_size, config.run.resume) == (5e-4, 32, "latest")
    assert config.method.clip_kd.fd == load_recipe("clip_kd").method.clip_kd.fd


def test_a_length_on_the_command_line_replaces_the_recipes() -> None:
    config = parse("--recipe clip_kd --train.steps 5".split())
    assert (config.train.steps, config.train.epochs) == (5, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--optim.lrr 3", "unknown option --optim.lrr; did you mean --optim.lr?"),
        ("--lr 3", "unknown option --lr; did you mean --optim.lr?"),
        ("--batch_size 3", "did you mean --train.batch-size or --eval.batch-size?"),
        ("--train.foo 3", "unknown option --train.foo; see --help"),
        ("--optim.nesterov 3", "unknown option --optim.nesterov; see --help"),
        ("--recipe nothing_like_it", "recipe 'nothing_like_it': no file"),
        ("--recipe", "--recipe: expected a name"),
        ("--optim.lr -3", "optim.lr: expected a learning rate > 0, got -3.0"),
        ("--method.clip-kd.fd -1", "method.clip_kd.fd: expected a weight >= 0, got -1.0"),
        ("--train.zero-stage 5", "--train.zero-stage: expected one of 0, 1, 2, 3, got '5'"),
        ("--train.steps abc", "--train.steps: expected a whole number, got 'abc'"),
        ("--train.steps 1.5", "--train.steps: expected a whole number, got '1.5'"),
        ("--train.steps=abc", "--train.steps: expected a whole number, got 'abc'"),
        ("--optim.lr fast", "--optim.lr: expected a number, got 'fast'"),
        ("--optim.lr --train.steps 3", "--optim.lr: expected a number, got nothing"),
        ("--data.train-data -x", "--data.train-data: expected a text, got nothing"),
        ("-x 3", "unknown option -x; see --help"),
        ("--data.workers", "--data.workers: expected a whole number, got nothing"),
        ("--train.torchcompile=yes", "--train.torchcompile: takes no value, got 'yes'"),
        ("--train.torchcompile True", "train.py: the word 'True' belongs to no option"),
        ("--data.train-data a.tar b.tar", "the word 'b.tar' belongs to no option; quote"),
        ("--train.torchcompile --train.zero-stage 3", "torchcompile cannot go with zero_stage 3"),
        ("--train.steps 3 --train.epochs 3", "expected epochs or steps"),
    ],
)
def test_a_wrong_command_line_ends_with_its_mend(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(words.split())
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_good_values_of_every_kind_are_taken(tmp_path: Path) -> None:
    recipe = write(tmp_path, "[train]\ntorchcompile = true\nepochs = 2\n")
    words = "--train.no-torchcompile --train.zero-stage 3 --train.epochs None --train.steps 1_000"
    words += " --optim.lr=1e-3 --optim.grad-clip-norm None --data.train_data -3"
    words += " --eval.retrieval a=b c=d --eval.zeroshot --data.index-dir None"
    config = parse(["--recipe", recipe, *words.split()])
    train = config.train
    assert (train.torchcompile, train.zero_stage, train.epochs) == (False, 3, None)
    assert (train.steps, config.optim.lr, config.optim.grad_clip_norm) == (1000, 1e-3, None)
    assert (config.data.train_data, config.data.index_dir) == ("-3", None)
    assert (config.eval.retrieval, config.eval.zeroshot) == (("a=b", "c=d"), ())


CACHE = "out --data.train-data x.tar --distill.distill-model A"


def parse_cache(words: str) -> CacheLine:
    return parse_line(CacheLine, words.split(), "Cache.", "kdengine cache")


def test_what_a_cache_takes_is_parsed() -> None:
    words = "--train.seed 3 --train.precision amp_bf16 --data.workers 2 --run.timeout-minutes 1"
    line = parse_cache(f"{CACHE} {words} --views 2 --storage int8 --batch-size 9")
    assert (line.out, line.views, line.storage, line.batch_size) == ("out", 2, "int8", 9)
    assert (line.config.train.seed, line.config.train.precision) == (3, "amp_bf16")
    assert parse_cache("--recipe clip_kd out").config == load_recipe("clip_kd")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--views many", "--views: expected a whole number, got 'many'"),
        ("--storage fp8", "--storage: expected one of fp32, bf16, int8, got 'fp8'"),
        ("--views 2 more", "cache: the word 'more' belongs to no option"),
        ("--view 3", "unknown option --view; did you mean --views?"),
    ],
)
def test_a_wrong_line_of_a_cache_ends_with_its_mend(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_cache(f"{CACHE} {words}")
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_what_means_nothing_to_a_cache_is_told_once(
    rank: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    words = "--train.batch-size 3 --name x --model.no-grad-checkpointing --train.seed 1 --views 2"
    line = parse_cache(f"{CACHE} {words} --optim.lr 0.5")
    assert (line.config.train.batch_size, line.config.optim.lr) == (3, 0.5)
    idle = "--train.batch-size, --run.name, --model.grad-checkpointing, --optim.lr"
    told = f"note: nothing that 'kdengine cache' does depends on {idle}\n"
    assert capsys.readouterr().err == ("" if rank == "1" else told)
    parse_cache(f"{CACHE} --train.seed 1 --distill.cache x --data.dataset-type webdataset")
    assert capsys.readouterr().err == ""


def test_a_cache_without_its_folder_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_cache("--recipe clip_kd --distill.distill-model A out")
    assert capsys.readouterr().err == "error: cache: expected OUT before the options, got nothing\n"


def test_help_of_a_cache_lists_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        parse_cache("--recipe clip_kd --help")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    listed = set(re.findall(r"--[a-z][a-z.-]*", printed.split("positional", 1)[1]))
    assert listed == {
        "--recipe",
        "--help",
        "--views",
        "--storage",
        "--batch-size",
        *CacheLine.matter,
    }
    assert "Decoding threads of a rank." in printed, "the help of an option was lost"
    assert "laion400m" in printed, "the values of the recipe were lost"


def test_every_field_is_an_option_and_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for option in option_types():
        assert option in printed


@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_the_terminal_and_begins_with_the_short_options(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = "Train.\n\n    train --recipe NAME " + 30 * "x" + "   in a line\n\n" + 60 * "word "
    with pytest.raises(SystemExit):
        parse(["--help"], description=text)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    first = "\n".join(lines).split("data options")[0]
    for option in ("--recipe", "--resume", "--name", "--deepspeed_config"):
        assert option in first
    assert all(name in " ".join(first.replace("│", " ").split()) for name in recipe_names())


def test_a_long_help_of_an_option_is_one_paragraph(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse(["--help"])
    said = capsys.readouterr().out.split("--eval.zeroshot")[1].split("--eval.val-frequency")[0]
    lines = [line.strip(" │") for line in said.splitlines()[1:-1]]
    assert len(lines) > 1 and all(lines)
    # only the last line is short
    assert min(map(len, lines[:-1])) > 70


@pytest.mark.parametrize(
    "words",
    [
        ["--run.name", ""],
        ["--run.name="],
        ["--name", " "],
        ["--distill.distill-pretrained", "", "--run.name", ""],
    ],
)
def test_an_empty_value_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(words)
    assert stop.value.code == 2
    assert "name: expected a value, got an empty text" in capsys.readouterr().err


def test_to_dict_leaves_out_what_is_none() -> None:
    assert "grad_clip_norm" not in to_dict(Optim())
