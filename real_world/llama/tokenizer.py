"""Text to tokens and back."""

from pathlib import Path

from lesson_code import CheckpointError


class ByteTokenizer:
    """A token is a byte of UTF-8: 256 tokens, no training needed."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the bytes of a text; there are no special tokens."""
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        """Return the text of bytes; U+FFFD stands for what is not UTF-8."""
        return bytes(tokens).decode(errors="replace")


class HuggingFaceTokenizer:
    """The tokenizer of a model from Hugging Face, from its tokenizer.json.

    transformers adds special tokens that only other files have, such as added_tokens.json.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        from transformers import PreTrainedTokenizerFast  # imported only here: it takes seconds

        try:
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent).backend_tokenizer
        except Exception as error:  # of any type
            raise CheckpointError(f"cannot load the tokenizer of {path.parent}: {error}") from None
        self.tokenizer.no_truncation()  # fine-tuning stores both in the file
        self.tokenizer.no_padding()
        self.vocab_size = vocab_size

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text, after the special tokens that the model expects.

        The text of a chat template has these already: add_special_tokens is False for it.

        Raises CheckpointError if a token is not in the model's vocabulary: the files do not match.
        """
        tokens = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        if max(tokens, default=0) >= self.vocab_size:
            message = f"token {max(tokens)}, but the model's vocab_size is {self.vocab_size}"
            raise CheckpointError(f"the text has {message}: tokenizer.json is of another model")
        return tokens

    def decode(self, tokens: list[int]) -> str:
        """Return the text of tokens, without special tokens."""
        return self.tokenizer.decode(tokens)


Tokenizer = ByteTokenizer | HuggingFaceTokenizer


def load_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a model's folder; without tokenizer.json, 256 tokens are bytes."""
    path = folder / "tokenizer.json"
    if path.exists():
        return HuggingFaceTokenizer(path, vocab_size)
    if vocab_size == 256:
        return ByteTokenizer()
    raise CheckpointError(f"{folder} has no tokenizer.json")
