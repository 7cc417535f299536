import pytest

from language.captions import clean_caption, first_sentence


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A Red Car", "a red car"),
        ("a cat https://example.com/x/y sleeping", "a cat sleeping"),
        ("<b>bold</b> <person> smiles", "bold person smiles"),
        ("photo by @someone of a dog", "photo by of a dog"),
        ("it\u2019s a \u201cquoted\u201d word", 'it\'s a "quoted" word'),
        ("a\u2014b", "a-b"),
        ("dress #12345678 free shipping", "dress"),
        ("IMG_001.jpg of a tree", "of a tree"),
        ("wallpaper 1920x1080 of hills", "wallpaper of hills"),
        ("red-dress-for-women-summer", "red dress for women summer"),
        ("schÃ¶n", "schön"),
        ("  ", ""),
    ],
)
def test_what_does_not_describe_a_image_goes(caption, cleaned):
    assert clean_caption(caption) == cleaned


@pytest.mark.parametrize("caption", ["一只红色的猫", "赤い猫がいる", "빨간 고양이"])
def test_other_scripts_stay_unless_the_reference_is_followed(caption):
    assert clean_caption(caption) == caption
    assert clean_caption("一只 red cat", reference=True) == "red cat"


def test_only_the_reference_rules_strip_spaces_before_the_last_rules():
    """The published code gives ".net logo"; ours gives what it gave before."""
    assert clean_caption("[.NET] logo", reference=True) == ".net logo"
    assert clean_caption("[.NET] logo") == ". net logo"


def test_the_first_sentence_ends_at_a_full_stop_of_any_script():
    assert first_sentence("A cat. It sleeps.") == "A cat."
    assert first_sentence("version 1.5 of it") == "version 1.5 of it"
    assert first_sentence("U.S. 101 at dusk") == "U.S."  # the published code: up to the U
    assert first_sentence("一只猫。它在睡觉。") == "一只猫。"
