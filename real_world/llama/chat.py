"""Chat templates: a conversation as the text that an instruct model was trained on.

A template is a file of the model, in the language of Jinja. It is rendered in Jinja's sandbox, as
in transformers, with the same functions: it cannot use files or Python's internals.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lesson_code import CheckpointError


def raise_exception(message: str) -> NoReturn:
    """Raise TemplateError. Templates call this for conversations that they do not support."""
    raise TemplateError(message)


def strftime_now(fmt: str) -> str:
    """Return the current time, formatted. Some system prompts contain the date."""
    return datetime.now().strftime(fmt)


def tojson(value: object, ensure_ascii: bool = False, **options: Any) -> str:  # noqa: ANN401
    """Return JSON, with the options of json.dumps() and without Jinja's own escapes of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


class GenerationTag(Extension):
    """{% generation %} marks answers for training; it does not change the text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        """Return what is between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(template: str, messages: list[dict[str, str]], special_tokens: dict[str, str]) -> str:
    """Return the text of a conversation, with the start of the assistant's answer."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, GenerationTag]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment.from_string(template).render(
        special_tokens, messages=messages, tools=None, documents=None, add_generation_prompt=True
    )


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
    path = folder / "chat_template.jinja"
    config_path = folder / "tokenizer_config.json"
    config = {}
    if config_path.exists():
        try:
            config = json.loads(config_path.read_text("utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{config_path} is not JSON: {error}") from None
    template = path.read_text("utf-8") if path.exists() else config.get("chat_template")
    if isinstance(template, list):  # several, with names
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    if template is None:
        return None
    special_tokens = {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in config.items()
        if name.endswith("_token") and isinstance(token, (str, dict))
    }
    try:
        return render(template, messages, special_tokens)
    except Exception as error:  # a template can raise any exception
        raise CheckpointError(f"the chat template of {folder} fails: {error}") from None
