"""Small tokenizers of the kinds that models come with, made here so that nothing is downloaded."""

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = ["the patient has a fever", "the court grants relief", "naïve café €5 — 日本語 😀 👩‍👩‍👧 done"] * 3
SPECIAL = ["<s>", "</s>"]


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """As in GPT-2, Llama 3 and Qwen: an id may hold a part of a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """As in Llama 2 and Gemma: words with a leading mark, and an id for each byte of what is no word."""
    words = ["▁", "▁the", "▁a", "b", "a", "▁▁", "é", "日", "\ufffd"]
    tokens = ["<unk>", *SPECIAL, *[f"<0x{byte:02X}>" for byte in range(256)], *words]
    vocab = {token: id for id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ["<unk>", *SPECIAL]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """As in T5 and newer sentencepiece exports."""
    tokens = ["<unk>", *SPECIAL, "▁", "▁the", "▁▁", "a", "b▁", "▁c"]
    tokenizer = Tokenizer(
        models.BPE({token: id for id, token in enumerate(tokens)}, [], unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ["<unk>", *SPECIAL]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@cache
def word_pieces() -> PreTrainedTokenizerFast:
    """As in BERT: a space before every piece that does not say otherwise."""
    tokens = ["[UNK]", *SPECIAL, "the", "##re", "a", ".", ",", "n't", "'s", "##'"]
    tokenizer = Tokenizer(models.WordPiece({token: id for id, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@cache
def word_parts() -> PreTrainedTokenizerFast:
    """As in CTRL and other vocabularies of fastBPE: two parts of a word are joined by a mark that then goes."""
    tokens = ["<unk>", *SPECIAL, "a", "th@@", "e", "i@@", "x@@", "@@", "é"]
    tokenizer = Tokenizer(models.WordLevel({token: id for id, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    spaced = decoders.WordPiece(prefix="\0", cleanup=False)
    tokenizer.decoder = decoders.Sequence([spaced, decoders.Fuse(), decoders.Replace("@@ ", "")])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ["<unk>", *SPECIAL]])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
