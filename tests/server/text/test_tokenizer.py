"""The tokenizer's own operations, and chat templates."""

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from server.text.tokenizer import ChatTemplateError, Tokenizer
from tests.server.text import samples

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'critic' %}{{ raise_exception('no critics') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def chatty():
    backend = samples.byte_level.__wrapped__()
    backend.chat_template = TEMPLATE
    return Tokenizer(backend)


def test_encode_and_decode():
    tokenizer = Tokenizer(samples.byte_level())
    assert tokenizer.decode(tokenizer.encode("the patient €5")) == "the patient €5"
    assert tokenizer.vocab_size == len(samples.byte_level())


def test_ids_may_have_gaps():
    """As in a vocabulary that was pruned: there is an id beyond the number of tokens."""
    words = WordLevel({"a": 0, "b": 1, "z": 10}, unk_token="a")
    backend = BackendTokenizer(words)
    backend.pre_tokenizer, backend.decoder = Whitespace(), Fuse()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    ids, shown = tokenizer.encode("a z b z"), tokenizer.detokenizer()
    assert "".join([*map(shown.add, ids), shown.flush()]) == tokenizer.decode(ids) == "azbz"
    assert [tokenizer.piece(id) for id in ids] == [b"a", b"z", b"b", b"z"]
    assert tokenizer.detokenizer().add(5) == ""


def test_saving_and_loading(tmp_path):
    samples.byte_level().save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(str(tmp_path))
    assert tokenizer.encode("relief") == Tokenizer(samples.byte_level()).encode("relief")


def test_a_conversation_through_the_template(chatty):
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    assert chatty.decode(chatty.encode_chat(messages)) == "[system]be kind[user]hi[assistant]"
    assert chatty.knows_role("assistant")
    assert not chatty.knows_role("developer")


PARTS = (
    "{% for m in messages %}{% if m.content[0].type == 'image' %}<image>{% endif %}[{{ m.role }}]"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }};{% endif %}{% endfor %}{% endfor %}"
)
EITHER = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{{ part.text }};{% endfor %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "content", "text"),
    [
        (PARTS, "hi", "[user]hi;"),
        (PARTS, ["a", "b"], "[user]a;b;"),
        (PARTS, "", "[user];"),
        (PARTS, [], "[user];"),
        (EITHER, "hi", "hi"),
        (EITHER, ["a", "b"], "a\nb"),
        (TEMPLATE, ["a", "b"], "[user]a\nb"),
        (TEMPLATE, [], "[user]"),
    ],
)
def test_a_template_that_reads_parts_alone_is_given_parts(template, content, text):
    """To LLaVA's and SmolVLM's a text is a list of characters, none of which is a part: nothing would be said."""
    backend = samples.byte_level.__wrapped__()
    backend.chat_template = template
    tokenizer = Tokenizer(backend)
    if not isinstance(content, str):
        content = [{"type": "text", "text": part} for part in content]
    ids = tokenizer.encode_chat([{"role": "user", "content": content}], add_generation_prompt=False)
    assert tokenizer.decode(ids) == text


def test_of_several_templates_the_default_is_asked_which_roles_it_knows():
    """That the one for tools knows the developer does not help where it is not used: the default would say nothing."""
    backend = samples.byte_level.__wrapped__()
    backend.chat_template = {
        "default": "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}",
        "tool_use": "{{ messages[0].role == 'developer' }}",
    }
    tokenizer = Tokenizer(backend)
    assert (
        tokenizer.decode(tokenizer.encode_chat([{"role": "developer", "content": "be brief"}])) == "be brief"
    )
    backend.chat_template = {"tool_use": "{{ messages[0].content }}"}
    with pytest.raises(ChatTemplateError, match="no default"):
        tokenizer.encode_chat([{"role": "developer", "content": "be brief"}])


def test_what_the_template_refuses_is_an_error_of_the_caller(chatty):
    with pytest.raises(ChatTemplateError, match="no critics"):
        chatty.encode_chat([{"role": "critic", "content": "hm"}])


def test_without_a_template_there_is_no_chat():
    with pytest.raises(ChatTemplateError, match="no chat template"):
        Tokenizer(samples.byte_level()).encode_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("text", ["the patient has a fever", "naïve café €5 — 日本語 😀 👩‍👩‍👧", " a  b\n"])
@pytest.mark.parametrize("kind", [samples.byte_level, samples.byte_fallback])
def test_pieces_are_the_bytes_of_the_text(kind, text):
    tokenizer = Tokenizer(kind())
    ids = [id for id in tokenizer.encode(text) if id not in tokenizer.special_ids]
    pieces = b"".join(map(tokenizer.piece, ids)).decode()
    assert pieces == (" " if kind is samples.byte_fallback else "") + text


def test_a_piece_stands_as_it_would_inside_a_text():
    for kind, token, piece in (
        (samples.byte_fallback, "▁the", " the"),
        (samples.byte_fallback, "b", "b"),
        (samples.metaspace, "▁the", " the"),
        (samples.word_pieces, "the", " the"),
        (samples.word_pieces, "##re", "re"),
        (samples.byte_level, "</s>", "</s>"),
    ):
        assert Tokenizer(kind()).name(kind().get_vocab()[token]) == piece


@pytest.mark.parametrize(
    ("kind", "token", "piece"),
    [
        (samples.byte_fallback, "▁▁▁", b"   "),  # as in Gemma
        (samples.byte_level, "   ", b"   "),  # as in GPT-NeoX
        (samples.byte_level, "<tool_call>", b"<tool_call>"),
        (samples.byte_level, "é", b"\xe9"),  # to this decoder it spells the byte
        (samples.word_pieces, "<tool_call>", b" <tool_call>"),
    ],
)
def test_the_piece_of_an_added_token_is_its_part_of_the_text(kind, token, piece):
    backend = kind.__wrapped__()
    backend.add_tokens([AddedToken(token, normalized=False)])
    tokenizer, id = Tokenizer(backend), backend.convert_tokens_to_ids(token)
    assert tokenizer.piece(id) == piece
    behind = backend.encode("a", add_special_tokens=False)
    text = tokenizer.decode([*behind, id])[len(tokenizer.decode(behind)) :]
    assert text == piece.decode(errors="replace")


def test_what_the_decoder_takes_for_a_word_is_no_byte():
    """There are vocabularies with byte tokens whose decoder does not know of them."""
    tokens = ["<unk>", "<0x41>", "a"]
    backend = BackendTokenizer(WordLevel({token: id for id, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = Whitespace(), Fuse()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert tokenizer.piece(1) == b"<0x41>"
    assert tokenizer.detokenizer().add(1) == tokenizer.decode([1]) == "<0x41>"


def test_half_a_character_is_named_by_its_bytes():
    tokenizer = Tokenizer(samples.byte_level())
    first, *_ = tokenizer.encode("ᚠ")
    assert (tokenizer.piece(first), tokenizer.name(first)) == (b"\xe1", r"bytes:\xe1")
    byte = samples.byte_fallback().get_vocab()["<0xE2>"]
    assert Tokenizer(samples.byte_fallback()).name(byte) == r"bytes:\xe2"


def test_an_id_that_the_tokenizer_does_not_know_has_no_piece():
    """A model's vocabulary may be padded beyond its tokenizer's."""
    assert Tokenizer(samples.byte_level()).piece(10**6) == b""


def test_ids_that_the_tokenizer_does_not_know_are_left_out_of_a_text():
    """As the tokenizers library does; one in Python, as of GPT-SW3 or ByT5, raises at them."""
    for backend in (ByT5Tokenizer(), samples.byte_level()):
        tokenizer = Tokenizer(backend)
        (a,) = tokenizer.encode("a", add_special_tokens=False)
        assert tokenizer.decode_verbatim([a, tokenizer.vocab_size, 10**6, a]) == "aa"
