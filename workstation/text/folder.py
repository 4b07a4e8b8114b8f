"""The tokenizer files of a model folder: tokenizer.json, its config, special_tokens_map.json, chat_template.jinja."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from workstation.errors import ModelFolderError
from workstation.model_folder import file_in_folder, has_file, model_folder, read_json_object

MAX_TOKENIZER_BYTES = 256 * 1024 * 1024
MAX_CONFIG_BYTES = 16 * 1024 * 1024
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(slots=True)
class TokenizerFiles:
    """What a folder says about its tokenizer.

    Attributes:
        backend: a tokenizers.Tokenizer.  named_tokens: "bos_token" and the like → string.  chat_template: Jinja text or None.
    """

    backend: Any
    named_tokens: dict[str, str] = field(default_factory=dict)
    chat_template: str | None = None


def read_folder(path: Path) -> TokenizerFiles:
    """Read a model folder. Raises ModelFolderError naming the file that is missing, broken or unsafe.

    bos and eos are added to a text where tokenizer.json's post-processor says so; add_bos_token and add_eos_token in
    tokenizer_config.json count for nothing beside that file, as in transformers 5.
    """
    root = model_folder(path)
    config = _read_json(root, "tokenizer_config.json")
    named = _named_tokens(root, config)
    if has_file(root, "tokenizer.json"):
        backend = _read_backend(root)
        _add_missing_tokens(backend, config, named)
    else:
        backend = _backend_from_transformers(root)
    backend.no_truncation()
    backend.no_padding()
    return TokenizerFiles(backend, named, _chat_template(root, config))


def _read_json(root: Path, name: str) -> dict[str, Any]:
    return read_json_object(root, name, max_bytes=MAX_CONFIG_BYTES) if has_file(root, name) else {}


def _read_backend(root: Path) -> Any:
    path = file_in_folder(root, "tokenizer.json")
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise ModelFolderError(f"tokenizer.json is larger than {MAX_TOKENIZER_BYTES} bytes")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every fault of the file
        raise ModelFolderError(f"tokenizer.json cannot be read: {error}") from error


def _token_text(value: Any) -> str | None:
    """Tokens are written as a string or as an AddedToken object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _named_tokens(path: Path, config: dict[str, Any]) -> dict[str, str]:
    listed = {**_read_json(path, "special_tokens_map.json"), **config}
    found = {name: _token_text(listed.get(name)) for name in NAMED_TOKENS}
    return {name: text for name, text in found.items() if text is not None}


def _add_missing_tokens(backend: Any, config: dict[str, Any], named: dict[str, str]) -> None:
    """tokenizer_config.json may list tokens that tokenizer.json lacks; transformers adds them, in order of their ids."""
    listed = config.get("added_tokens_decoder")
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    if isinstance(listed, dict):
        for key in sorted((key for key in listed if key.isdigit()), key=int):
            item = listed[key]
            text = _token_text(item)
            if text is not None and text not in known:
                flags = {name: bool(item.get(name, False)) for name in ("lstrip", "rstrip", "normalized", "single_word")}
                backend.add_tokens([AddedToken(text, special=bool(item.get("special", False)), **flags)])
                known.add(text)
    missing = [text for text in dict.fromkeys(named.values()) if text not in known]
    backend.add_tokens([AddedToken(text, special=True, normalized=False) for text in missing])


def _chat_template(path: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja wins; tokenizer_config.json holds one text, or a list of named ones of which "default" counts."""
    if has_file(path, "chat_template.jinja"):
        try:
            return file_in_folder(path, "chat_template.jinja").read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ModelFolderError(f"chat_template.jinja is not UTF-8: {error}") from error
    value = config.get("chat_template")
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise ModelFolderError("chat_template in tokenizer_config.json must be a string")
    return value


def _backend_from_transformers(path: Path) -> Any:
    """For folders with only tokenizer.model or vocab files: transformers converts them."""
    try:
        from transformers import AutoTokenizer  # costs seconds, so only where nothing else can read the folder
    except ImportError as error:
        raise ModelFolderError(f"{path} has no tokenizer.json, and transformers is not installed to convert one") from error
    try:
        converted = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many kinds, and all mean the same here
        raise ModelFolderError(f"{path} has no tokenizer.json, and transformers cannot read its tokenizer: {error}") from error
    backend = getattr(converted, "backend_tokenizer", None)
    if backend is None:
        raise ModelFolderError(f"{path} has no tokenizer.json and its tokenizer cannot be converted to one")
    return tokenizers.Tokenizer.from_str(backend.to_str())
