"""The demos: stages that run once, and the words of prompts."""

import math
import sys

import pytest
from demo_text import words_of
from stages import Stages

# Stages


def test_a_finished_stage_is_already_there_and_its_time_counts(tmp_path, capsys):
    calls = []

    def run(name: str) -> None:
        calls.append(name)
        (tmp_path / name).mkdir(exist_ok=True)

    def both(settings: str) -> Stages:
        stages = Stages(tmp_path, tmp_path)
        stages.step(tmp_path / "a", settings, lambda: run("a"))
        stages.step(tmp_path / "b", "1", lambda: run("b"))
        return stages

    both("1")
    assert calls == ["a", "b"]
    assert "already there" not in capsys.readouterr().out
    again = both("1")
    assert calls == ["a", "b"]
    assert capsys.readouterr().out.count("already there") == 2
    assert [name for name, _ in again.times()] == ["time of all stages", "time of this run"]
    both("2")  # what changed runs, and so does what follows it
    assert calls == ["a", "b", "a", "b"]
    (tmp_path / "b").rmdir()
    both("2")
    assert calls[4:] == ["b"]


def test_the_time_of_an_interrupted_stage_is_kept(tmp_path, monkeypatch):
    clock = iter([0.0, 10.0, 15.0, 20.0, 22.0, 30.0, 33.0, 40.0])
    monkeypatch.setattr("stages.time.monotonic", lambda: next(clock, math.inf))

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Stages(tmp_path, tmp_path).step(tmp_path / "a", "1", stop)
    stages = Stages(tmp_path, tmp_path)
    stages.step(tmp_path / "a", "1", (tmp_path / "a").mkdir)
    assert stages.record["a"]["seconds"] == 5 + 8


def test_a_stage_that_fails_ends_the_demo_with_its_code(tmp_path, monkeypatch):
    config = tmp_path / "config.yaml"
    config.write_text("num_steps: 1\n")
    monkeypatch.setattr("stages.ROOT", tmp_path)
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(SystemExit) as stopped:
        Stages(tmp_path, tmp_path).command("m", "config.yaml", tmp_path / "a")
    assert stopped.value.code == 1


def test_the_words_of_a_prompt_have_neither_case_nor_punctuation():
    assert words_of("Big, red-coloured!") == ["big", "red", "coloured"]
