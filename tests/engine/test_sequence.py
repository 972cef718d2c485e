"""When a sequence ends, and what of it is still to be computed."""

import pytest

from tests.engine.fakes import sequence


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ((9,), None),
        ((9, 9, 9), "length"),
        ((9, 2), "stop"),
        ((9, 9, 2), "stop"),
        ((2,), "stop"),
        ((9, 3), "stop"),
    ],
)
def test_finish_reason(output, reason):
    """An end token at the very last place is a stop: the text is whole."""
    asked = sequence(output=output, max_tokens=3, stop_token_ids=frozenset({2, 3}))
    assert asked.finish_reason() == reason


def test_end_tokens_in_the_prompt_end_nothing():
    asked = sequence((2, 2), output=(5,), max_tokens=3, stop_token_ids=frozenset({2}))
    assert asked.finish_reason() is None


def test_what_is_missing():
    asked = sequence((5, 6, 7))
    assert (asked.missing, asked.output_length) == (3, 0)
    asked.computed = 3
    asked.tokens.append(9)
    assert (asked.missing, asked.output_length) == (1, 1)


def test_two_sequences_are_never_equal():
    assert sequence() != sequence()
