"""The folder that a quantised checkpoint is written to: what may be there, what is done already, what makes it whole. No torch.

`ws_quantize.json` says what is being written, from which weights. config.json comes last, so that a half-written folder is no
model. A run that was killed is gone on with; shards appear whole or not at all.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from workstation import __version__
from workstation.errors import ConfigError, StartupError
from workstation.hub import DISK_MARGIN_BYTES, SMALL_FILES
from workstation.memory import gib
from workstation.model_folder import file_in_folder, read_json_object, shown
from workstation.quant.written import Tensors
from workstation.safetensors_header import INDEX_FILE, TensorEntry, read_header

RECORD = "ws_quantize.json"
CONFIG = "config.json"
PART = ".part"
_COPIED = (*(name for name in SMALL_FILES if name != CONFIG and "safetensors" not in name), "LICENSE*", "LICENCE*", "NOTICE*")


class Destination:
    """An open folder; only one process has it open. Entering makes it, or finds what an earlier run left.

    Args:
        folder: need not exist.  source: the folder that is read, resolved.
        work: what will be written, as JSON; an earlier run of other work is not gone on with.  force: start anew then.

    Raises ConfigError for a folder that is not ours to write to, StartupError when it is being written already.
    """

    def __init__(self, folder: Path, source: Path, work: Mapping[str, Any], *, force: bool = False) -> None:
        self.folder = folder.resolve()  # files are opened in real folders only
        self._source, self._work, self._force = source, dict(work), force
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Self:
        earlier = self._checked()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / RECORD).open("ab+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise StartupError(f"{self.folder} is being written by another process") from None
        if earlier is None or earlier["work"] != self._work:
            self._clear(earlier)
            self._note(finished=False)
        self._drop_parts()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._lock is not None:
            self._drop_parts()
            self._lock.close()

    def has_shard(self, file: str, tensors: Tensors) -> bool:
        """Whether an earlier run wrote these tensors."""
        path = self.folder / file
        if not path.is_file():
            return False
        return {entry.name: (entry.dtype, entry.shape) for entry in read_header(path, file)} == tensors

    def part(self, file: str) -> Path:
        """Where to write a file until `keep` puts it in its place."""
        return self.folder / f"{file}{PART}"

    def keep(self, file: str) -> None:
        path = self.part(file)
        path.chmod((self.folder / RECORD).stat().st_mode)  # shards come readable by their owner alone
        with path.open("rb+") as written:
            os.fsync(written.fileno())
        path.replace(self.folder / file)

    def check_disk(self, nbytes: int) -> None:
        """Raises StartupError when the disk has no room for what is still to be written, and some to spare."""
        free = shutil.disk_usage(self.folder).free
        if nbytes + DISK_MARGIN_BYTES > free:
            raise StartupError(f"{gib(nbytes)} are still to be written, with {gib(DISK_MARGIN_BYTES)} to spare, and the disk "
                               f"of {self.folder} has {gib(free)} free; free some, or choose another disk", param="dst")

    def finish(self, description: Mapping[str, Any], index: Mapping[str, Any] | None) -> None:
        """The small files: the tokenizer's and the template as they are, config.json with its `quantization_config` last."""
        for name in sorted(path.name for path in self._source.iterdir()):
            if any(fnmatchcase(name, pattern) for pattern in _COPIED):
                shutil.copyfile(file_in_folder(self._source, name), self.part(name))
                self.keep(name)
        config = read_json_object(self._source, CONFIG) | {"quantization_config": dict(description)}
        for file, value in ((INDEX_FILE, index), (CONFIG, config)):
            if value is not None:
                self.part(file).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
                self.keep(file)
        self._note(finished=True)

    def _checked(self) -> dict[str, Any] | None:
        """What an earlier run noted, None for a folder that is new or empty."""
        if self.folder == self._source or self._source in self.folder.parents:
            raise ConfigError(f"{self.folder} lies inside the folder that is read; write somewhere else", param="dst")
        if not self.folder.exists():
            return None
        if not self.folder.is_dir():
            raise ConfigError(f"{self.folder} is not a folder", param="dst")
        if not (self.folder / RECORD).is_file():
            if any(self.folder.iterdir()):
                raise ConfigError(f"{self.folder} is not empty and was not written by ws quantize; name a new folder",
                                  param="dst")
            return None
        return self._judged()

    def _judged(self) -> dict[str, Any] | None:
        if not (self.folder / RECORD).stat().st_size:  # killed before anything was noted
            return None
        found = read_json_object(self.folder, RECORD)
        work, finished = found.get("work"), found.get("finished")
        if not isinstance(work, dict) or not isinstance(finished, bool):
            raise ConfigError(f"{RECORD} in {self.folder} is not what ws quantize writes; name a new folder", param="dst")
        if not self._force and (finished or work != self._work):
            state = "is finished" if finished else "holds the beginning of something else"
            raise ConfigError(f"{self.folder} {state} ({shown(work.get('to'))}); --force writes it anew", param="dst")
        return {"work": None if self._force else work, "files": _names(work.get("shards"))}

    def _clear(self, earlier: Mapping[str, Any] | None) -> None:
        """Take away what an earlier run wrote, config.json first, and nothing else."""
        names = [CONFIG, INDEX_FILE, *earlier["files"]] if earlier else []
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def _drop_parts(self) -> None:
        for path in self.folder.glob(f"*{PART}"):
            path.unlink()

    def _note(self, *, finished: bool) -> None:
        assert self._lock is not None
        text = json.dumps({"made_by": f"ws {__version__}", "work": self._work, "finished": finished}, indent=2)
        self._lock.truncate(0)  # in place: the lock hangs on this file
        self._lock.write(text.encode() + b"\n")
        self._lock.flush()
        os.fsync(self._lock.fileno())


def _names(value: Any) -> list[str]:
    """File names in this folder, whatever the record says."""
    listed = value if isinstance(value, list) else []
    return [name for name in listed if isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name]


def fingerprint(entries: Iterable[TensorEntry], config: bytes) -> str:
    """Of the weights that are read: their headers, and the sizes and times of the files."""
    found = hashlib.sha256(config)
    for entry in entries:
        found.update(repr((entry.name, entry.dtype, entry.shape, entry.file, entry.start)).encode())
    for path in sorted({entry.path for entry in entries}):
        status = path.stat()
        found.update(repr((path.name, status.st_size, status.st_mtime_ns)).encode())
    return found.hexdigest()
