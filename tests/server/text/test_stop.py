"""The stop checker against an oracle that looks at every end of the whole text."""

from hypothesis import given, settings
from hypothesis import strategies as st

from server.text.tokenizer import StopChecker

LETTERS = "ab"
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=4)
PIECES = st.lists(st.text(LETTERS, max_size=5), max_size=12)


def oracle(text, stops):
    """The text before the stop string that is completed first, the longer of two completed together."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], max(found, key=len)
    return text, None


@given(pieces=PIECES, stops=STOPS)
@settings(max_examples=500, deadline=None)
def test_the_cut_is_the_oracles_however_the_text_is_divided(pieces, stops):
    checker = StopChecker(stops)
    shown = "".join(checker.feed(piece) for piece in pieces)
    expected, stop = oracle("".join(pieces), stops)
    assert checker.matched == stop
    assert shown + checker.flush() == expected


@given(pieces=PIECES, stops=STOPS)
@settings(max_examples=300, deadline=None)
def test_no_more_is_held_back_than_may_begin_a_stop_string(pieces, stops):
    checker = StopChecker(stops)
    text = shown = ""
    for piece in pieces:
        text += piece
        shown += checker.feed(piece)
        if checker.matched is not None:
            return
        held = text[len(shown) :]
        assert text.startswith(shown)
        assert held == "" or any(stop.startswith(held) for stop in stops)
        beginnings = [stop[:n] for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        assert len(held) == max(map(len, beginnings), default=0)


def test_nothing_is_shown_after_the_match():
    checker = StopChecker(["STOP"])
    assert [checker.feed(piece) for piece in ("one ST", "OP two", "three")] == ["one ", "", ""]
    assert checker.flush() == ""


def test_without_stop_strings_text_passes_through():
    checker = StopChecker([])
    assert checker.feed("anything") == "anything"
    assert checker.matched is None
