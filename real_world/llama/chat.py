"""Chat templates: a conversation as the text that an instruct model was trained on.

A template is a file of the model, in the language of Jinja. transformers renders it in Jinja's
sandbox: it cannot use files or Python's internals.
"""

from pathlib import Path

from lesson_code import CheckpointError


def apply_chat_template(folder: Path, messages: list[dict[str, str]]) -> str | None:
    """Return a conversation as the text that the model of a folder continues.

    Args:
        folder: with chat_template.jinja, or an older tokenizer_config.json that has the template.
        messages: with "role" ("system", "user" or "assistant") and "content".

    Returns:
        The text; None if the folder has no template: the model is not trained for chat.

    Raises:
        CheckpointError: the template fails, or tokenizer_config.json is not JSON.
    """
    names = ("chat_template.jinja", "tokenizer_config.json")
    if not any((folder / name).exists() for name in names):  # such as a model trained here
        return None
    from transformers import PreTrainedTokenizerFast  # imported only here: it takes seconds

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        if tokenizer.chat_template is None:
            return None
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template can raise any exception
        raise CheckpointError(f"the chat template of {folder} fails: {error}") from None
    return str(text)
