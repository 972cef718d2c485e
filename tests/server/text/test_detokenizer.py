"""Pieces of text in sum are the text of all ids, and no piece is half a character."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.text.tokenizer import Tokenizer
from tests.server.text import samples

KINDS = {
    "byte_level": samples.byte_level,
    "byte_fallback": samples.byte_fallback,
    "metaspace": samples.metaspace,
    "word_pieces": samples.word_pieces,
    "word_parts": samples.word_parts,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return Tokenizer(KINDS[request.param]())


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_pieces_in_sum_are_the_decode_of_all_ids(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=24))
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.add(id) for id in ids]
    whole = tokenizer.decode(ids)
    assert whole.startswith("".join(pieces))
    assert "".join(pieces) + detokenizer.flush() == whole
    assert detokenizer.flush() == ""


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_so_are_those_of_broken_characters_and_of_ids_beyond_the_vocabulary(tokenizer, data):
    beyond = tokenizer.vocab_size + 1
    broken = [id for id in range(beyond) if tokenizer.decode([id]) in ("", "\ufffd", " \ufffd")]
    ids = data.draw(st.lists(st.sampled_from(broken) | st.integers(0, beyond), max_size=60))
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.add(id) for id in ids]
    assert tokenizer.decode(ids).startswith("".join(pieces))
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("repeated", ["half", "half behind a space", "replacement", "empty", "beyond"])
def test_no_text_is_decoded_from_its_beginning_for_each_id(tokenizer, repeated):
    ids = {
        "half": [id for id in range(tokenizer.vocab_size) if tokenizer.decode([id]) == "\ufffd"][-1:],
        "half behind a space": [
            id for id in range(tokenizer.vocab_size) if tokenizer.decode([id]) == " \ufffd"
        ],
        "replacement": tokenizer.encode("\ufffd", add_special_tokens=False),
        "empty": [id for id in range(tokenizer.vocab_size) if not tokenizer.decode([id])],
        "beyond": [tokenizer.vocab_size],
    }[repeated]
    decoded = []
    detokenizer = tokenizer.detokenizer()
    detokenizer._decode = lambda window: decoded.append(len(window)) or tokenizer.decode(window)
    for id in ids[:4] * 1000:
        detokenizer.add(id)
    assert sum(decoded) <= 20 * 1000 * len(ids[:4])


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_behind_a_prompt_they_are_what_the_prompts_text_lacks(tokenizer, data):
    """A text's first id may lose its space: `prompt` and `text` together would lose it."""
    prompt = tokenizer.encode(data.draw(st.sampled_from(["", "a", "a a", "</s>", "a</s>"])))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size), max_size=24))
    detokenizer = tokenizer.detokenizer(behind=prompt)
    text = "".join([*map(detokenizer.add, ids), detokenizer.flush()])
    assert tokenizer.decode(prompt) + text == tokenizer.decode([*prompt, *ids])


def test_half_a_character_of_the_prompt_is_none_of_the_text():
    for tokenizer in (Tokenizer(samples.byte_level()), Tokenizer(samples.byte_fallback())):
        *prompt, last = tokenizer.encode("a ᚠ", add_special_tokens=False)
        following = tokenizer.encode("b", add_special_tokens=False)[-1]
        detokenizer = tokenizer.detokenizer(behind=prompt)
        assert "".join([detokenizer.add(last), detokenizer.add(following)]) == "\ufffdb"


@given(text=st.text("aé€😀日\n the", max_size=20))
@settings(max_examples=200, deadline=None)
def test_whole_characters_that_are_held_back_are_counted(tokenizer, text):
    """Every id begins where the text so far and what is held back of it end."""
    ids = [id for id in tokenizer.encode(text) if id not in tokenizer.special_ids]
    whole, shown = tokenizer.decode(ids), 0
    detokenizer = tokenizer.detokenizer()
    for id in ids:
        start, piece = shown + detokenizer.held, tokenizer.piece(id).decode(errors="ignore")
        assert whole[start:].startswith(piece) or (start == 0 and whole.startswith(piece[1:]))
        shown += len(detokenizer.add(id))
    detokenizer.flush()
    assert detokenizer.held == 0


def test_a_run_of_bytes_counts_the_characters_that_are_whole():
    tokenizer = Tokenizer(samples.byte_fallback())
    detokenizer, held = tokenizer.detokenizer(), []
    for byte in "\n€\n".encode() + b"\xe2":
        held.append(detokenizer.held)
        detokenizer.add(samples.byte_fallback().get_vocab()[f"<0x{byte:02X}>"])
    assert held == [0, 1, 1, 1, 2, 3]
    detokenizer.flush()
    assert detokenizer.held == 0


@given(text=st.text(max_size=40))
@example("👩‍👩‍👧 zero-width joiners")
@example("é€日😀")
@settings(max_examples=200, deadline=None)
def test_text_comes_back_whole_and_without_replacement_characters(text):
    tokenizer = Tokenizer(samples.byte_level())
    ids = tokenizer.encode(text)
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.add(id) for id in ids]
    assert "".join(pieces) + detokenizer.flush() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_several_ids_comes_with_the_last_of_them():
    tokenizer = Tokenizer(samples.byte_level())
    ids = tokenizer.encode("ᚠ")
    assert len(ids) == 3
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.add(id) for id in ids] == ["", "", "ᚠ"]


def test_an_open_run_of_bytes_is_held_back_because_the_next_byte_may_break_it():
    tokenizer = Tokenizer(samples.byte_fallback())
    vocab = samples.byte_fallback().get_vocab()
    euro = [vocab["<0xE2>"], vocab["<0x82>"], vocab["<0xAC>"]]
    good, broken = [*euro, vocab["b"]], [*euro, vocab["<0xE2>"], vocab["b"]]
    for ids, expected in ((good, "€b"), (broken, "\ufffd" * 4 + "b")):
        detokenizer = tokenizer.detokenizer()
        assert [detokenizer.add(id) for id in ids] == [""] * (len(ids) - 1) + [expected]


def test_part_of_a_word_is_held_back_until_the_next_part():
    vocab = samples.word_parts().get_vocab()
    tokenizer = Tokenizer(samples.word_parts())
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.add(vocab[token]) for token in ("a", "th@@", "e", "i@@")] == ["a", "", " the", ""]
    assert detokenizer.flush() == " i@@", "as these ids decode"


def test_half_a_character_at_the_end_is_shown_as_such():
    tokenizer = Tokenizer(samples.byte_level())
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.add(tokenizer.encode("ᚠ")[0]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens_have_no_text():
    tokenizer = Tokenizer(samples.byte_level())
    detokenizer = tokenizer.detokenizer()
    end = samples.byte_level().eos_token_id
    ids = [*tokenizer.encode("a b"), end, *tokenizer.encode(" c")]
    assert "".join(detokenizer.add(id) for id in ids) + detokenizer.flush() == "a b c"
    assert tokenizer.decode(ids) == "a b c"


def test_a_copy_goes_on_by_itself():
    tokenizer = Tokenizer(samples.byte_level())
    first, second, third = tokenizer.encode("ᚠ")
    original = tokenizer.detokenizer()
    original.add(first)
    other = original.copy()
    assert (other.add(second), other.add(third), other.flush()) == ("", "ᚠ", "")
    assert original.flush() == "\ufffd"
