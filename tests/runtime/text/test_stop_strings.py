import itertools

import pytest

from ortlm.runtime.text.stop_strings import StopTexts


def feed(stop, pieces):
    texts = StopTexts(stop)
    shown = [texts.push(piece) for piece in pieces]
    return shown, texts


def test_found_across_pieces_and_never_shown_in_part():
    shown, texts = feed(["<end>"], ["Hello <", "en", "d", ">", " more"])
    assert shown == ["Hello ", "", "", "", ""]
    assert texts.found == "<end>"
    assert texts.flush() == ""


def test_what_only_looked_like_a_stop_is_shown_later():
    shown, texts = feed(["<end>"], ["a<e", "x", "<"])
    assert shown == ["a", "<ex", ""]
    assert texts.flush() == "<"
    assert texts.found is None


@pytest.mark.parametrize("pieces", [["abcdef"], ["ab", "cdef"], list("abcdef")])
def test_the_one_that_ends_first_wins_however_the_text_comes(pieces):
    shown, texts = feed(["cd", "bcde", "d"], pieces)
    assert "".join(shown) == "ab"
    assert texts.found == "cd"


def test_none_holds_nothing_back():
    assert feed([], ["a", "b"])[0] == ["a", "b"]


@pytest.mark.parametrize("stop", [["aab"], ["ab", "ba"], ["aaa", "b"], ["abab"]])
def test_any_split_gives_what_the_whole_text_gives(stop):
    for letters in itertools.product("abc", repeat=6):
        text = "".join(letters)
        hits = [at for s in stop if (at := text.find(s)) >= 0]
        for cut in range(7):
            shown, texts = feed(stop, [text[:cut], text[cut:]])
            assert "".join(shown) + texts.flush() == (text[: min(hits)] if hits else text)
