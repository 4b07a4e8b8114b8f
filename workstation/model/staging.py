"""From a file's bytes into a tensor on the device, with bounded host memory.

Files are read with `pread`, not mapped: a file that shrinks while it is read is then an error, not a crash.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from workstation.errors import ModelFolderError
from workstation.safetensors_header import TensorEntry

CHUNK_BYTES = 64 << 20
READ_THREADS = 4


class Reader:
    """Reads tensors into the CPU: straight into the destination when dtypes agree, else through one staging buffer."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._fd = -1
        self._staging: torch.Tensor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, entry: TensorEntry, stored: torch.dtype, target: torch.Tensor) -> None:
        """Copy a stored tensor into `target` (contiguous, same shape), converting from dtype `stored`.

        Raises ModelFolderError when the file cannot be read to the tensor's end.
        """
        self._open(entry)
        flat = target.view(-1)
        if stored == target.dtype:
            self._pread(entry, 0, flat.view(torch.uint8))
            return
        if self._staging is None:
            self._staging = torch.empty(CHUNK_BYTES, dtype=torch.uint8)
        for start in range(0, entry.nbytes, CHUNK_BYTES):
            piece = self._staging[:min(CHUNK_BYTES, entry.nbytes - start)]
            self._pread(entry, start, piece)
            self._slice(flat, stored, start, piece).copy_(piece.view(stored))

    @staticmethod
    def _slice(flat: torch.Tensor, stored: torch.dtype, start: int, piece: torch.Tensor) -> torch.Tensor:
        """The elements of `flat` that the bytes `piece`, `start` bytes into the stored tensor, belong to."""
        return flat[start // stored.itemsize:(start + piece.numel()) // stored.itemsize]

    def _open(self, entry: TensorEntry) -> None:
        if entry.path == self._path:
            return
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        try:
            self._fd = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ModelFolderError(f"{entry.file} cannot be read: {error.strerror}") from error
        self._path = entry.path

    def _pread(self, entry: TensorEntry, start: int, target: torch.Tensor) -> None:
        """Fill a uint8 CPU tensor with the entry's bytes from `start` on."""
        view = target.numpy().data
        offset = entry.start + start
        while len(view):
            try:
                count = os.preadv(self._fd, [view[:CHUNK_BYTES]], offset)
            except OSError as error:
                raise ModelFolderError(f"{entry.file} cannot be read: {error.strerror}") from error
            if count == 0:
                raise ModelFolderError(f"{entry.file} ended inside tensor {entry.name}; "
                                       "it was changed while being read")
            view = view[count:]
            offset += count


class CudaReader(Reader):
    """Reads chunks into two pinned buffers in turn, so that reading one overlaps uploading the other."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._ring = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._uploaded = [torch.cuda.Event() for _ in self._ring]  # type: ignore[no-untyped-call]
        self._turn = 0
        self._threads = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="weights")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._threads.shutdown()
        torch.cuda.synchronize(self._device)  # the pinned buffers are freed now
        super().__exit__(kind, error, trace)

    def read(self, entry: TensorEntry, stored: torch.dtype, target: torch.Tensor) -> None:
        self._open(entry)
        flat = target.view(-1)
        for start in range(0, entry.nbytes, CHUNK_BYTES):
            buffer, uploaded = self._ring[self._turn], self._uploaded[self._turn]
            uploaded.synchronize()
            piece = buffer[:min(CHUNK_BYTES, entry.nbytes - start)]
            self._pread_parallel(entry, start, piece)
            # A conversion happens on the device: only stored bytes cross the bus.
            source = piece.view(stored)
            if stored != target.dtype:
                source = source.to(self._device, non_blocking=True)
            self._slice(flat, stored, start, piece).copy_(source, non_blocking=True)
            uploaded.record(torch.cuda.current_stream(self._device))
            self._turn = 1 - self._turn

    def _pread_parallel(self, entry: TensorEntry, start: int, target: torch.Tensor) -> None:
        """One thread cannot fill PCIe from the page cache; a few can."""
        part = -(-target.numel() // READ_THREADS)
        jobs = [self._threads.submit(self._pread, entry, start + begin, target[begin:begin + part])
                for begin in range(0, target.numel(), part)]
        for job in jobs:
            job.result()


def make_reader(device: torch.device) -> Reader:
    return CudaReader(device) if device.type == "cuda" else Reader()
