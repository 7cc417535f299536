"""The demos: the text demo's captions, drawings, checker and text encoder; stages that run once."""

import math
import re
import sys
from random import Random

import demo_text
import numpy as np
import pytest
import torch
from captions import CaptionMaker, held_out_pairs, plain, words_of
from demo_text import WRITTEN, held_out_prompts, read_prompts, scores, unknown_words
from grammar import RULES, Writer, grammar_words, parse
from shapes import COLOURS, SHAPES, SIZES, Asked, check, describe, draw
from stages import Stages
from tiny_t5 import FACTS, IGNORED, WIDTHS, batches, token_batch, word_tokenizer, write_t5

from language.t5 import load_t5

RELATIONS = {None, "above", "below", "left", "right", "beside"}


def asked(caption) -> tuple[Asked, ...]:
    return tuple(Asked(t.size, t.colour, t.shape) for t in caption.things)


def frame(text: str) -> str:
    """A text without what varies from object to object: its template, if it has one."""
    words = [next((k for k, v in KIND.items() if word in v), word) for word in words_of(text)]
    return " ".join(words)


KIND = {
    "COLOUR": set(COLOURS),
    "SHAPE": {*SHAPES, "disc", "ball", "dot", "box", "plus"},
    "SIZE": {"small", "big", "large", "tiny", "little", "huge", "giant", "enormous"},
    "ARTICLE": {"a", "an", "the", "one"},
}


# The prompts written by hand


def test_there_are_200_prompts_and_each_says_what_it_asks_for():
    prompts = read_prompts(WRITTEN)
    assert len({prompt.text for prompt in prompts}) == len(prompts) == 200
    for prompt in prompts:
        assert prompt.relation in RELATIONS, prompt.text
        assert len(prompt.things) == (2 if prompt.relation else 1), prompt.text
        for thing in prompt.things:
            assert thing.size in (None, *SIZES), prompt.text
            assert thing.colour in COLOURS, prompt.text
            assert thing.shape in SHAPES, prompt.text


def test_the_grammar_makes_neither_the_prompts_nor_the_templates_of_most():
    written = read_prompts(WRITTEN)
    maker = CaptionMaker(seed=0, never=[prompt.text for prompt in written])
    made = [maker.caption().text for _ in range(10_000)]
    assert not {plain(text) for text in made} & {plain(prompt.text) for prompt in written}
    templates = {frame(text) for text in made}
    known = np.mean([frame(prompt.text) in templates for prompt in written])
    assert known < 0.5


def test_no_training_caption_repeats_a_prompt():
    caption = CaptionMaker(seed=0).caption()
    assert CaptionMaker(seed=0, never=[caption.text]).caption() != caption


# Captions


def test_captions_say_what_their_scene_shows():
    maker = CaptionMaker(seed=4)
    for _ in range(300):
        caption = maker.caption()
        scene = maker.scene(caption)
        assert [t[:2] for t in scene.things] == [t[:2] for t in caption.things]
        if caption.relation:
            first, second = (thing.centre for thing in scene.things)
            axis = {"left": 0, "above": 1}[caption.relation]
            assert first[axis] < second[axis]


def test_captions_are_of_one_object_and_of_two_in_equal_parts():
    maker = CaptionMaker(seed=5)
    two = np.mean([len(maker.caption().things) == 2 for _ in range(1000)])
    assert 0.4 < two < 0.6


def test_held_out_captions_show_pairs_that_training_does_not():
    unseen, maker = held_out_pairs(), CaptionMaker(seed=6)
    seen = [tuple(t[:2] for t in maker.caption().things) for _ in range(2000)]
    assert not unseen & set(seen)
    for prompt in held_out_prompts():
        assert tuple((t.colour, t.shape) for t in prompt.things) in unseen


# Drawing and checking


def test_the_checker_finds_almost_every_drawing_right():
    maker = CaptionMaker(seed=7)
    right = 0
    for _ in range(200):
        caption = maker.caption()
        image = draw(maker.scene(caption), np.random.default_rng(0))
        right += check(asked(caption), caption.relation, image).all
    assert right >= 190


def test_the_checker_sees_a_wrong_colour_shape_size_relation_and_number():
    maker = CaptionMaker(seed=8)
    caption = maker.caption()
    while caption.relation != "above" or None in [t.size for t in caption.things]:
        caption = maker.caption()
    image = draw(maker.scene(caption), np.random.default_rng(0))
    one, two = asked(caption)
    assert check((one, two), "above", image).all
    assert check((one, two), "below", image).relation is False
    assert check((one, two), "left", image).relation is False
    assert check((two, one), "below", image).relation is True
    other = Asked(one.size, "white" if one.colour != "white" else "red", one.shape)
    assert check((other, two), "above", image).right[0] is False
    other = Asked(one.size, one.colour, "cross" if one.shape != "cross" else "circle")
    assert check((other, two), "above", image).right[0] is False
    other = Asked("small" if one.size == "large" else "large", one.colour, one.shape)
    assert check((other, two), "above", image).sizes[0] is False
    assert check((one,), None, image).only is False
    assert describe(np.zeros_like(image)) == "nothing"


def test_scores_are_shares_of_objects_sizes_relations_and_images():
    maker = CaptionMaker(seed=9)
    caption = maker.caption()
    image = draw(maker.scene(caption), np.random.default_rng(0))
    black = np.zeros_like(image)
    verdicts = [check(asked(caption), caption.relation, pixels) for pixels in (image, black)]
    found = scores(verdicts)
    assert found["objects right in colour and shape"] == 0.5
    assert found["images with nothing wrong"] == 0.5


# The grammar


def test_every_rule_that_a_rule_names_exists_and_every_word_is_known():
    maker = CaptionMaker(seed=12)
    words = {word for _ in range(3000) for word in maker.caption().words}
    assert words <= set(grammar_words())
    assert len(words) > 0.9 * len(grammar_words())


def test_a_rule_chooses_one_of_its_alternatives_by_weight():
    tree = parse("3* (a|b c|) d\ne")
    assert tree.weights == [3, 4]
    writer = Writer(Random(0))
    texts = [" ".join(w for w, _ in writer.write("rel left", {})) for _ in range(200)]
    assert all("left" in text and text.endswith("of") for text in texts)
    assert len(set(texts)) > 5
    assert all(rule.strip("\n") for rule in RULES.values())


# The text encoder


def test_words_that_training_never_saw_are_named(tmp_path, monkeypatch):
    for name, value in {"STEPS": 4, "BATCH": 8, "SORTED": 1}.items():
        monkeypatch.setattr(f"tiny_t5.{name}", value)
    write_t5(tmp_path / "t5", CaptionMaker(seed=3))
    text = "A wobbly red blob, please; wobbly"
    assert unknown_words(tmp_path / "t5", text) == ["wobbly", "blob"]
    assert words_of("Big, red-coloured!") == ["big", "red", "coloured"]
    # The commands read the folder as any T5.
    t5 = load_t5(tmp_path / "t5", torch.device("cpu"), torch.float32)
    one, two = t5.encode(["a red circle", "a wobbly circle"])
    assert one.shape == (4, 128)
    assert not torch.equal(one[-1], two[-1])


def test_each_token_has_the_facts_of_its_object_and_unknown_words_none():
    maker = CaptionMaker(seed=10)
    captions = [maker.caption() for _ in range(300)]
    vocabulary = word_tokenizer(grammar_words()).get_vocab()
    ids, facts = token_batch(captions, vocabulary, maker.random)
    assert facts.shape == (*ids.shape, len(FACTS))
    assert (facts.amax((0, 1)) < torch.tensor(WIDTHS)).all()
    assert (facts[ids == vocabulary["<unk>"]] == IGNORED).all()
    for colour, words in (("red", "red"), ("purple", "violet")):
        assert set(facts[ids == vocabulary[words]][:, 0].tolist()) == {[*COLOURS].index(colour)}


def test_a_caption_has_the_tokens_of_its_text():
    maker, tokenizer = CaptionMaker(seed=13), word_tokenizer(grammar_words())
    vocabulary = tokenizer.get_vocab()
    for _ in range(300):
        caption = maker.caption()
        ids = [vocabulary[word] for word in (*caption.words, "</s>")]
        assert tokenizer(caption.text)["input_ids"] == ids


def test_the_encoder_trains_on_captions_of_like_length():
    stream = batches(CaptionMaker(seed=14))
    lengths = [[len(caption.words) for caption in next(stream)] for _ in range(8)]
    assert np.mean([max(row) - min(row) for row in lengths]) < 6


def test_every_word_knows_the_object_that_it_speaks_of():
    maker = CaptionMaker(seed=11)
    for _ in range(300):
        caption = maker.caption()
        assert re.findall(r"\w+|[^\w\s]", caption.text) == list(caption.words)
        for word, owner in zip(caption.words, caption.owners, strict=True):
            if word in COLOURS:
                assert caption.things[owner - 1].colour == word


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
    ran = []

    def run(module: str, config: object, *flags: object) -> None:
        ran.append(module)
        flags[flags.index("--out") + 1].mkdir()  # pyright: ignore[reportAttributeAccessIssue]

    monkeypatch.setattr("stages.run_stage", run)
    monkeypatch.setattr(demo_text, "IMAGES", 20)
    monkeypatch.setattr(demo_text, "make_t5", lambda folder: folder.mkdir())
    for _ in range(2):
        demo_text.train(tmp_path, Stages(tmp_path, demo_text.CONFIGS))
    assert len(ran) == 4
    assert capsys.readouterr().out.count("already there") == 6
    files = {path.name: path.read_bytes() for path in (tmp_path / "train").iterdir()}
    assert len(files) == 40
    demo_text.write_images(tmp_path)
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "train").iterdir()}
    texts = [text.decode() for name, text in files.items() if name.endswith(".txt")]
    assert not {plain(text) for text in texts} & {plain(text) for text in demo_text.written_texts()}
