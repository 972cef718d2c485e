"""The tokenizer's own operations, and chat templates."""

import pytest

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


def test_saving_and_loading(tmp_path):
    samples.byte_level().save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(str(tmp_path))
    assert tokenizer.encode("relief") == Tokenizer(samples.byte_level()).encode("relief")


def test_a_conversation_through_the_template(chatty):
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    assert chatty.decode(chatty.encode_chat(messages)) == "[system]be kind[user]hi[assistant]"
    assert chatty.knows_role("assistant")
    assert not chatty.knows_role("developer")


def test_what_the_template_refuses_is_an_error_of_the_caller(chatty):
    with pytest.raises(ChatTemplateError, match="no critics"):
        chatty.encode_chat([{"role": "critic", "content": "hm"}])


def test_without_a_template_there_is_no_chat():
    with pytest.raises(ChatTemplateError, match="no chat template"):
        Tokenizer(samples.byte_level()).encode_chat([{"role": "user", "content": "hi"}])
