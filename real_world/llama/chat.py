"""Chat templates: a conversation as the text that an instruct model was trained on.

A template is a file of the model, in the language of Jinja. It is rendered in a sandbox, as in
transformers, with the same names: it can format text, and do nothing else.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import NoReturn

from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lesson_code import CheckpointError


def raise_exception(message: str) -> NoReturn:
    """Refuse a conversation: templates call it."""
    raise TemplateError(message)


def strftime_now(fmt: str) -> str:
    """Return the time: some system prompts contain the date."""
    return datetime.now().strftime(fmt)


def tojson(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """Return JSON, without Jinja's own escapes of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def render(template: str, messages: list[dict[str, str]], special_tokens: dict[str, str]) -> str:
    """Return the text of a conversation, with the start of the assistant's answer."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
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
        CheckpointError: the template cannot be rendered.
    """
    path, config_path = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    try:
        config = json.loads(config_path.read_text("utf-8")) if config_path.exists() else {}
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
        return render(template, messages, special_tokens)
    except Exception as error:  # a template can raise any
        raise CheckpointError(f"the chat template of {folder} fails: {error}") from None
