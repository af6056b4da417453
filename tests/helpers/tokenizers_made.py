"""A tokenizer of bytes and of texts that a page could trip over."""

from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from cppo_verl.analysis.inspect import token_text

HOSTILE = [
    "<script>document.title='owned'</script>",
    "</script><script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "&lt;b&gt;{{ 7 * 7 }}",
    "שלום",
    "مرحبا",
    "\u202etfel",
    "\u0301",
    " \n",
]
BLANKLESS = [text.replace(" ", "·") for text in HOSTILE[:6]]


def save_tokenizer(folder):
    """Every byte, then `HOSTILE`, then what ends a response: ids 0-255, 256-264 and 265."""
    vocabulary = {character: byte for character, byte in token_text._BYTES.items()}
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    model.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=model)
    made.add_tokens(HOSTILE)
    made.add_special_tokens({"eos_token": "<eos>"})
    made.save_pretrained(folder)
    return folder
