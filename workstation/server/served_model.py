"""A model folder → what the API needs of it: tokenizer, ids that end a sample, default sampling."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workstation.engine.request import Pooling
from workstation.generation_config import read_generation_defaults
from workstation.parsers.detect import Formats, find_formats
from workstation.pooling_config import read_pooling
from workstation.server.options import ServedModel
from workstation.text.tokenizer import Tokenizer


def load_served_model(folder: str | Path, names: tuple[str, ...], *, config_eos: tuple[int, ...] = (),
                      sampling: Mapping[str, Any] | None = None, use_generation_config: bool = True,
                      chat_template: str | None = None, window: int = 0, root: str = "", tool_parser: str = "auto",
                      reasoning_parser: str = "auto", pooling: Pooling | None = None, generates: bool = True) -> ServedModel:
    """Read a folder.

    Args:
        config_eos: eos ids of config.json, used when generation_config.json names none.
        sampling: default sampling that wins over generation_config.json (models.toml, command line).
        use_generation_config: False takes only eos ids from that file, no sampling defaults.
        chat_template: Jinja text that replaces the folder's.  window: 0 takes the engine's.
        tool_parser, reasoning_parser: names of formats; "auto" reads them off the chat template.
        pooling: of embeddings; None takes the folder's.  generates: the model has a head.

    Raises ModelFolderError, or ConfigError for a format that is not known.
    """
    tokenizer = Tokenizer.from_folder(folder, chat_template=chat_template)
    defaults = read_generation_defaults(folder, config_eos, sampling)
    own = tokenizer.eos_token_id
    eos = defaults.eos_token_ids or ((own,) if own is not None else ())
    chosen = defaults.sampling if use_generation_config else dict(sampling or {})
    return ServedModel(names, tokenizer, chosen, tuple(eos), window, root=root or names[0],
                       formats=model_formats(tokenizer, tool_parser, reasoning_parser), pooling=read_pooling(folder, pooling),
                       generates=generates, folder=str(folder))


def model_formats(tokenizer: Tokenizer, tools: str = "auto", think: str = "auto") -> Formats:
    """How a model writes calls and thoughts, by its chat template or by name. Raises ConfigError."""
    template = tokenizer.chat_template
    if template is None:
        return find_formats(None, tools=tools, think=think)

    def render(messages: list[dict[str, Any]]) -> str:
        return tokenizer.render_chat(messages, add_generation_prompt=False)

    return find_formats(template.source, render, tools=tools, think=think, takes_tools=template.takes_tools)
