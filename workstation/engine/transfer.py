"""Between host and device without waiting."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def to_device(array: npt.NDArray[np.int64] | npt.NDArray[np.float32], device: torch.device) -> torch.Tensor:
    """A host array on the device. torch keeps the pinned copy until the device has read it."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A pinned copy that is complete once the stream has reached this point; record an event to know when."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def record_event() -> Any:
    """A CUDA event at this point of the current stream."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event
