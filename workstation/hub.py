"""MODEL on the command line → a folder on this disk: a catalogue name, a folder, or a Hugging Face id to download.

Only what a server reads is downloaded: config, generation config, tokenizer, chat template and safetensors. Sizes are
compared with the free disk before the first byte, and a machine without a network serves what was downloaded earlier.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from workstation.catalog import ModelEntry, demo_folder, find
from workstation.errors import ConfigError, ModelFolderError, ModelNotFoundError, StartupError
from workstation.memory import gib
from workstation.model_folder import parse_json_object
from workstation.safetensors_header import TensorEntry

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
POOLING_FILE = "*_Pooling/config.json"  # of sentence-transformers
SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json", "tekken.json", "*.safetensors.index.json", "modules.json",
)  # fmt: skip
# Room that stays free on the disk beside the download.
DISK_MARGIN_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """Where a model lies and what it is called.

    Attributes:
        name: the catalogue name, hub id or folder name; the default served name.  folder: holds config.json.
        entry: from the catalogue, or None.
    """

    name: str
    folder: Path
    entry: ModelEntry | None = None

    @property
    def is_demo(self) -> bool:
        return self.entry is not None and self.entry.is_bundled


def resolve_model(
    model: str,
    entries: Mapping[str, ModelEntry],
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    token: str | None = None,
    weights: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> ResolvedModel:
    """Find or download a model.

    Args:
        model: catalogue name first, then an existing folder, then `owner/name` on the hub.
        download_dir: cache folder of downloads; None is Hugging Face's own.  token: for gated models; None reads HF_TOKEN.
        weights: False downloads configuration and tokenizer only (for load_format "dummy").
        say: told what is being downloaded, in sentences.
    Raises:
        ModelNotFoundError, ModelFolderError, ConfigError (an entry that cannot be served yet), StartupError (disk, network).
    """
    check_name(model, entries)
    entry = entries.get(model)
    if entry is None:
        folder = Path(model).expanduser()
        if folder.is_dir():
            return ResolvedModel(folder.resolve().name, checked_folder(folder.resolve()))
        return ResolvedModel(model, _download(model, revision, download_dir, token, weights, say))
    if entry.is_bundled:
        return ResolvedModel(entry.name, checked_folder(demo_folder()), entry)
    local = Path(entry.model)
    if local.is_absolute() or local.is_dir():
        return ResolvedModel(entry.name, checked_folder(local), entry)
    revision = revision or entry.revision
    return ResolvedModel(entry.name, _download(entry.model, revision, download_dir, token, weights, say), entry)


def check_name(model: str, entries: Mapping[str, ModelEntry]) -> None:
    """Refuse a name that is no catalogue entry, folder or hub id, and an entry that cannot be served, without any download.

    Raises ModelNotFoundError (naming the nearest entry), ConfigError.
    """
    entry = entries.get(model)
    if entry is not None:
        if entry.needs:
            raise ConfigError(f"{entry.name} cannot be served: it needs {entry.needs}", param="model")
        return
    if Path(model).expanduser().is_dir():
        return
    if model.startswith(("/", "./", "../", "~")) or not HUB_ID.fullmatch(model):
        if "/" in model:
            raise ModelNotFoundError(f"there is no folder {model!r}", param="model")
        find(model, entries)  # raises, naming the nearest


def checked_folder(folder: Path) -> Path:
    """The folder itself. Raises ModelNotFoundError, ModelFolderError when it is missing or holds no config.json."""
    if not folder.is_dir():
        raise ModelNotFoundError(f"there is no folder {str(folder)!r}", param="model")
    if not (folder / "config.json").is_file():
        raise ModelFolderError(f"{folder} has no config.json, so it is not a Hugging Face model folder", param="model")
    return folder


def wanted_files(names: list[str], *, weights: bool = True) -> list[str]:
    """Which files of a repository's root a server reads.

    Repositories may carry the same weights twice (`original/`, `consolidated.safetensors`): the Hugging Face layout
    `model*.safetensors` wins. Raises ModelFolderError when there are weights but none in safetensors.
    """
    root = [name for name in names if "/" not in name]
    chosen = [name for name in root if any(fnmatchcase(name, pattern) for pattern in SMALL_FILES)]
    if "config.json" not in root:
        raise ModelFolderError("the repository has no config.json, so it is not a Hugging Face model", param="model")
    chosen += [name for name in names if fnmatchcase(name, POOLING_FILE) and name.count("/") == 1]
    if not weights:
        return chosen
    tensors = [name for name in root if name.endswith(".safetensors")]
    preferred = [name for name in tensors if name.startswith("model")] or tensors
    if not preferred:
        others = sorted({Path(name).suffix for name in root if name.endswith((".bin", ".pt", ".pth", ".gguf"))})
        found = f" (it has {', '.join(others)})" if others else ""
        raise ModelFolderError(f"the repository has no safetensors weights{found}; ws reads no others", param="model")
    return chosen + preferred


def _download(
    repo: str, revision: str | None, cache: str | None, token: str | None, weights: bool, say: Callable[[str], None]
) -> Path:
    import huggingface_hub as hub

    try:
        info = hub.HfApi().model_info(repo, revision=revision, files_metadata=True, token=token, timeout=20)
    except Exception as error:
        return _cached_or_raise(repo, revision, cache, weights, say, error)
    sizes: dict[str, int] = {file.rfilename: file.size or 0 for file in info.siblings or []}
    files = wanted_files(list(sizes), weights=weights)
    missing = [name for name in files if not _in_cache(repo, name, cache, info.sha)]
    if missing:
        total = sum(sizes[name] for name in missing)
        target = Path(cache or hub.constants.HF_HUB_CACHE)
        check_disk(total, target)
        say(f"downloading {repo}: {gib(total)} in {len(missing)} files to {target}")
    try:
        return Path(hub.snapshot_download(repo, revision=info.sha, cache_dir=cache, token=token, allow_patterns=files))
    except Exception as error:
        raise StartupError(f"the download of {repo} failed: {_first_line(error)}; starting again resumes it") from error


def _in_cache(repo: str, name: str, cache: str | None, revision: str | None) -> bool:
    import huggingface_hub as hub

    return isinstance(hub.try_to_load_from_cache(repo, name, cache_dir=cache, revision=revision), str)


@dataclass(frozen=True, slots=True)
class RemoteModel:
    """What the hub says of a model without its weights: config.json, and the tensors when the headers could be read."""

    config: dict[str, Any]
    tensors: dict[str, TensorEntry] | None


def read_remote(repo: str, *, revision: str | None = None, token: str | None = None) -> RemoteModel:
    """config.json and the safetensors headers (range requests) of `owner/name`; no weights are downloaded.

    Raises ModelNotFoundError, ModelFolderError (no config.json), StartupError (gated, or the hub cannot be reached).
    """
    import huggingface_hub as hub

    try:
        path = Path(hub.hf_hub_download(repo, "config.json", revision=revision, token=token, etag_timeout=20))
    except Exception as error:
        if isinstance(error, hub.errors.EntryNotFoundError) and not isinstance(error, hub.errors.LocalEntryNotFoundError):
            raise ModelFolderError(f"{repo} has no config.json, so it is not a Hugging Face model", param="model") from error
        raise _hub_refusal(repo, revision, error) or StartupError(
            f"{repo} is not on this disk and the hub cannot be reached ({_first_line(error)}); connect, or name a "
            "catalogue entry, a folder or a config.json", param="model") from error
    config = parse_json_object(path.read_bytes(), "config.json")
    return RemoteModel(config, _remote_tensors(repo, revision, token))


def _remote_tensors(repo: str, revision: str | None, token: str | None) -> dict[str, TensorEntry] | None:
    """The headers' tensors, or None when the repository has no safetensors or they cannot be read: the shape decides then.

    Zero points are left out: telling that they are zero takes their data.
    """
    import huggingface_hub as hub

    try:
        files = hub.HfApi().get_safetensors_metadata(repo, revision=revision, token=token).files_metadata
    except Exception:
        return None
    found: dict[str, TensorEntry] = {}
    for file, metadata in files.items():
        for name, tensor in metadata.tensors.items():
            start, end = tensor.data_offsets
            if not name.endswith("zero_point"):
                found[name] = TensorEntry(name, tensor.dtype, tuple(tensor.shape), file, Path(file), start, end - start)
    return found


def hub_cache(environment: Mapping[str, str]) -> Path:
    """Where the hub's client keeps downloads."""
    home = Path(environment.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    return Path(environment.get("HF_HUB_CACHE") or home / "hub")


def cached_folder(repo: str, revision: str | None, environment: Mapping[str, str]) -> Path | None:
    """The newest snapshot of `owner/name` in the hub's cache with a config.json, or None; imports no client."""
    found = [path.parent for path in (cache_of(repo, environment) / "snapshots").glob(f"{revision or '*'}/config.json")]
    return max(found, key=lambda folder: folder.stat().st_mtime, default=None)


def cache_of(repo: str, environment: Mapping[str, str]) -> Path:
    """The folder of one repository in the hub's cache, there or not."""
    return hub_cache(environment) / f"models--{repo.replace('/', '--')}"


def check_disk(total_bytes: int, target: Path) -> None:
    """Refuse a download that does not fit. Raises StartupError naming what is needed and what is free, in GiB."""
    place = target
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if total_bytes + DISK_MARGIN_BYTES > free:
        raise StartupError(
            f"the download needs {gib(total_bytes)} and {gib(DISK_MARGIN_BYTES)} to spare, and {target} has "
            f"{gib(free)} free; free some, or choose another disk with --download-dir",
            param="download_dir",
        )


def _cached_or_raise(
    repo: str, revision: str | None, cache: str | None, weights: bool, say: Callable[[str], None], error: Exception
) -> Path:
    """The snapshot downloaded earlier when the hub cannot be asked; otherwise the error in our words."""
    refusal = _hub_refusal(repo, revision, error)
    if refusal is not None:
        raise refusal from error
    import huggingface_hub as hub

    try:
        folder = Path(hub.snapshot_download(repo, revision=revision, cache_dir=cache, local_files_only=True))
        names = [path.name for path in folder.iterdir()]
        wanted_files(names, weights=weights)
    except Exception:
        raise StartupError(
            f"{repo} is not on this disk and the hub cannot be reached ({_first_line(error)}); connect, or name a local "
            "folder",
            param="model",
        ) from error
    say(f"the hub cannot be reached; using the copy of {repo} on this disk")
    return folder


def _hub_refusal(repo: str, revision: str | None, error: Exception) -> StartupError | ModelNotFoundError | None:
    """What the hub answered, or None when it did not answer."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return StartupError(
            f"{repo} is gated: accept its licence on its hub page, then set HF_TOKEN or give --hf-token", param="model"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFoundError(f"{repo} has no revision {revision!r}", param="revision")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelNotFoundError(
            f"the hub has no model {repo!r}, or it is private and needs HF_TOKEN; `ws models` lists known names",
            param="model",
        )
    if isinstance(error, errors.HFValidationError):
        return ModelNotFoundError(f"{repo!r} is not a hub id", param="model")
    status: Any = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int) and 400 <= status < 500:
        return StartupError(f"the hub refused {repo}: {_first_line(error)}", param="model")
    return None


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
