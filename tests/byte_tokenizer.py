"""A tokenizer that needs no training."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# llama.cpp loads no tokenizer of this kind without merges, so there is one merge. No text contains
# the bytes C0, C1 and FF: the merge joins C0 and C1, and the result has the place of FF in the
# vocabulary.
_PAIR = ("À", "Á")
_PLACE = "ÿ"


def save_byte_tokenizer(folder: Path) -> None:
    """Save a tokenizer with one token for each byte, and one token that ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet[alphabet.index(_PLACE)] = "".join(_PAIR)
    vocabulary = {symbol: number for number, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[_PAIR]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
