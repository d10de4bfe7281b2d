"""--help shows the usual flags and --help-all shows the others; every flag is accepted."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from bench.cli import parse
from bench.config import Flag, RunConfig, flags_of
from bench.help import WIDTH, entries
from bench.run.__main__ import ABOUT
from gnnmoe.config import Refused

FLAGS = {flag.field: flag for flag in flags_of(RunConfig).values()}
DEFAULTS = {entry.flag.field: entry.default for entry in entries(RunConfig)}
COMMANDS = ("run", "tune", "sweep", "speed", "check", "report")


def shown(command: str, word: str, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"bench.{command}.__main__").main([word])
    assert not stopped.value.code
    return capsys.readouterr().out


def options(text: str) -> list[str]:
    return [f"--{name}" for name in re.findall(r"^  --(?:\[no-\])?([\w-]+)", text, re.MULTILINE)]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_help_all_has_every_flag_once(command, capsys):
    short, everything = (shown(command, word, capsys) for word in ("--help", "--help-all"))
    assert len(short.splitlines()) <= 60
    for text in (short, everything):
        assert max(map(len, text.splitlines())) <= WIDTH
        assert len(set(options(text))) == len(options(text))
        assert "None}" not in text
        for block in re.split(r"\n(?=  --)", text):
            assert block.count("default:") <= 1, block
    usual = [name for name in options(short) if name != "--help-all"]
    assert [name for name in options(everything) if name != "--help-all"][: len(usual)] == usual


def test_the_flags_of_run_are_all_in_its_help_and_each_has_a_description(capsys):
    known = {flag.option() for flag in flags_of(RunConfig).values()} | {"--preset", "--config", "--help-all"}
    assert set(options(shown("run", "--help-all", capsys))) == known
    short = [name for name in options(shown("run", "--help", capsys)) if name != "--help-all"]
    assert len(short) == len(ABOUT.usual) == 12
    assert all(entry.about for entry in entries(RunConfig))


def other_value(flag: Flag, default: Any) -> str:
    """Return a word for another value than the default."""
    if flag.kinds and get_origin(flag.kinds[0]) is Literal:
        return next(choice for choice in get_args(flag.kinds[0]) if choice not in (None, default))
    words = {"hgnn_conv_type": "HNHN", "batch_schedule": "0:8", "coupler_option": "backend=loop",
             "num_heads": "4", "embed_dim": "8", "compile_mode": "reduce-overhead"}  # fmt: skip
    number = "0.5" if float in flag.kinds and int not in flag.kinds else "3"
    return words.get(flag.field, number if {int, float} & set(flag.kinds) else "other")


@pytest.mark.parametrize("name", sorted(FLAGS))
def test_every_flag_is_accepted_whether_help_shows_it_or_not(name, capsys):
    flag, default = FLAGS[name], DEFAULTS[name]
    words = [f"--no-{flag.names[0]}" if default else flag.option()]
    if flag.kinds != (bool,):
        words = [flag.option(), *[other_value(flag, default)] * (2 if name == "adam_betas" else 1)]
    if name == "adam_betas":
        words[1:] = ["0.5", "0.5"]
    if name == "compile_mode":
        words += ["--compile"]
    config = parse(RunConfig, words, presets=True)
    groups = [getattr(config, group.name) for group in dataclasses.fields(config)]
    (group,) = (group for group in groups if hasattr(group, name))
    assert getattr(group, name) != default


OTHER_NAMES = {"--lr": "--learning-rate", "--bs": "--batch-size", "--d_model=3": "--embed-dim"}


@pytest.mark.parametrize(("word", "meant"), OTHER_NAMES.items())
def test_the_usual_names_of_other_tools_suggest_the_flag(word, meant, capsys):
    with pytest.raises(SystemExit):
        parse(RunConfig, [word, "1"])
    assert f"Did you mean '{meant}'?" in capsys.readouterr().err


def test_the_command_may_stand_as_a_word_of_its_own(monkeypatch):
    from bench.__main__ import main

    seen: list[list[str]] = []
    monkeypatch.setattr("bench.run.__main__.main", lambda arguments: seen.append(arguments) or 7)
    assert main(["run", "--coupler", "mean"]) == 7
    assert seen == [["--coupler", "mean"]]
    with pytest.raises(SystemExit) as stopped:
        main(["runn"])
    assert stopped.value.code == 2


def test_the_help_of_run_has_the_exit_statuses_of_the_page():
    page = (Path(__file__).parents[2] / "docs/reading-a-run.md").read_text().partition("## Exit status")[2]
    statuses = re.findall(r"^\| (\d+) \|", page.partition("\n## ")[0], re.MULTILINE)
    told = str(RunConfig.__doc__).partition("Exit status:")[2]
    assert sorted(re.findall(r"\d+", told)) == sorted(statuses)


def test_no_speed_pass_and_its_parts_exclude_each_other():
    with pytest.raises(Refused, match="--no-speed leaves out"):
        dataclasses.replace(RunConfig().measure, speed=False, marginal=True)
