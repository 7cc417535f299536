"""The demos: stages that run once, and the words of prompts."""

import math
import sys

import demo_text
import numpy as np
import pytest
from demo_text import words_of
from shapes import all_scenes, draw
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


def test_the_text_demo_trains_once_and_draws_the_same_images_again(tmp_path, monkeypatch, capsys):
    scenes, ran = all_scenes()[::60], []

    def run(module: str, config: object, *flags: object) -> None:
        ran.append(module)
        flags[flags.index("--out") + 1].mkdir()  # pyright: ignore[reportAttributeAccessIssue]

    monkeypatch.setattr("stages.run_stage", run)
    monkeypatch.setattr(demo_text, "all_scenes", lambda: scenes)
    monkeypatch.setattr(demo_text, "HELD_OUT", (2, 1))
    monkeypatch.setattr(demo_text, "write_t5", lambda folder, captions: folder.mkdir())
    held_out = [demo_text.train(tmp_path, Stages(tmp_path, demo_text.CONFIGS)) for _ in range(2)]
    assert held_out[0] == held_out[1]
    assert len(ran) == 4
    assert capsys.readouterr().out.count("already there") == 6
    captions = demo_text.training_captions(tmp_path)
    assert len(captions) == len(scenes) - 3
    assert not captions & {scene.caption for scene in held_out[0]}
    random, (_, training) = np.random.default_rng(0), demo_text.split(scenes)
    random.permutation(len(scenes))
    first = draw(training[0], random)
    with demo_text.Image.open(tmp_path / "train" / "00000.png") as image:
        assert np.array_equal(np.asarray(image), first)


def test_the_words_of_a_prompt_have_neither_case_nor_punctuation():
    assert words_of("Big, red-coloured!") == ["big", "red", "coloured"]
