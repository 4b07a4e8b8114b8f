"""Trains the demo model from nothing: `python -m workstation.demo.train --out FOLDER --minutes 8.4 --seed 0` on one large GPU.

Worker processes generate, encode and pack documents while the GPU trains. The learning rate follows the clock, so that training
ends inside its budget whatever the machine's speed. The result is a Hugging Face folder and the scores on held-out tasks.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workstation.demo import evaluate, packing
from workstation.demo.export import export, load
from workstation.demo.muon import Muon
from workstation.demo.network import Network, Size, packed_attention

PATTERN = (False, False, True)  # short, short, long: the packs of one step
WARMUP, DECAY_FROM = 0.02, 0.45  # shares of the budget
MUON_RATE, ADAM_RATE = 8e-3, 3e-3


@dataclass(frozen=True, slots=True)
class Batch:
    """A pack on the device: tokens, positions, inputs and targets as int64, starts as int32."""

    tokens: Tensor
    positions: Tensor
    starts: Tensor
    inputs: Tensor
    targets: Tensor
    longest: int


class Feed:
    """Packs from worker processes, in a fixed order (round-robin), moved to the device by a thread."""

    def __init__(self, tokenizer_file: Path, size: int, seed: int, workers: int, device: torch.device) -> None:
        context = multiprocessing.get_context("spawn")
        self._queues: list[Any] = [context.Queue(maxsize=6) for _ in range(workers)]
        self._device = device
        self._ready: queue.Queue[Batch] = queue.Queue(maxsize=12)
        self._processes = [
            context.Process(
                target=_work, args=(tokenizer_file, size, seed * 1000 + index, _turned(index), waiting), daemon=True
            )
            for index, waiting in enumerate(self._queues)
        ]
        for process in self._processes:
            process.start()
        threading.Thread(target=self._move, daemon=True).start()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self._ready.get()

    def waiting(self) -> int:
        """Batches on the device that training has not taken yet; 0 means that generation is too slow."""
        return self._ready.qsize()

    def close(self) -> None:
        for process in self._processes:
            process.terminate()

    def _move(self) -> None:
        while True:
            for waiting in self._queues:
                try:
                    pack: packing.Pack = waiting.get()
                except (EOFError, OSError):
                    return
                self._ready.put(to_device(pack, self._device))


def _work(tokenizer_file: Path, size: int, seed: int, pattern: tuple[bool, ...], waiting: Any) -> None:
    packing.produce(tokenizer_file, size, seed, pattern, waiting.put)


def _turned(index: int) -> tuple[bool, ...]:
    """The pattern from a worker's own place on, so that neighbouring workers deliver the packs of one step."""
    place = index % len(PATTERN)
    return PATTERN[place:] + PATTERN[:place]


def to_device(pack: packing.Pack, device: torch.device) -> Batch:
    def moved(values: Any, dtype: torch.dtype) -> Tensor:
        host = torch.from_numpy(values.astype("int32"))
        return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True).to(dtype)

    wide = (moved(values, torch.int64) for values in (pack.tokens, pack.positions, pack.inputs, pack.targets))
    tokens, positions, inputs, targets = wide
    return Batch(tokens, positions, moved(pack.starts, torch.int32), inputs, targets, pack.longest)


def rate(done: float) -> float:
    """The learning rate's share of its peak after `done` (0 … 1) of the budget: warm-up, plateau, linear decay to zero."""
    if done < WARMUP:
        return done / WARMUP
    return min(1.0, max(0.0, (1 - done) / (1 - DECAY_FROM)))


class Trainer:
    """The network with its optimisers: one `step` takes the packs of a step."""

    def __init__(self, size: Size, device: torch.device, seed: int, peak: float = 1.0) -> None:
        """`peak` scales the highest learning rates."""
        torch.manual_seed(seed)
        self._peak = peak
        self.network = Network(size).to(device)
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        if device.type == "cuda":
            self.network.compile_parts()
        self._muon = Muon(self.network.matrices(), lr=MUON_RATE)
        self._adam = torch.optim.AdamW(
            self.network.others(), lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda"
        )

    def step(self, batches: list[Batch], share: float) -> Tensor:
        """One update at `share` of the peak rates. Returns the mean loss of a trained token, on the device."""
        trained = sum(len(batch.targets) for batch in batches)
        total = torch.zeros((), device=batches[0].tokens.device)
        for batch in batches:
            x = self.network.hidden(batch.tokens, batch.positions, batch.starts, batch.longest, self.dtype)
            loss = self.network.loss(x, batch.inputs, batch.targets) / trained
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.network.others(), 1.0)
        for optimizer, peak in ((self._muon, MUON_RATE), (self._adam, ADAM_RATE)):
            for group in optimizer.param_groups:
                group["lr"] = peak * self._peak * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total


def check_attention(device: torch.device) -> None:
    """Compares the packed kernel, values and gradients, with plain attention. Raises RuntimeError when they differ."""
    torch.manual_seed(1)
    inputs = [torch.randn(300, heads, 64) for heads in (4, 2, 2)]
    starts, found = torch.tensor([0, 7, 140, 300], dtype=torch.int32), []
    for where, dtype in ((torch.device("cpu"), torch.float32), (device, torch.bfloat16)):
        q, k, v = (value.detach().to(where, dtype, copy=True).requires_grad_() for value in inputs)
        out = packed_attention(q, k, v, starts.to(where), 512)
        weighted = out.float() * torch.linspace(-1, 1, 256, device=where)
        found.append([out, *torch.autograd.grad(weighted.sum(), (q, k, v))])
    for plain, fast in zip(*found, strict=True):
        error = (plain - fast.float().cpu()).norm() / plain.norm()
        if not error < 0.02:
            raise RuntimeError(f"packed attention is off by {error:.3f}")


def train(options: argparse.Namespace) -> None:
    started = time.monotonic()
    device = torch.device(options.device)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(options.tokenizer / "tokenizer.json"))
    size = Size(vocab=-(-tokenizer.get_vocab_size() // 128) * 128)
    feed = Feed(options.tokenizer / "tokenizer.json", options.pack_tokens, options.seed, options.workers, device)
    if device.type == "cuda":
        check_attention(device)
    trainer = Trainer(size, device, options.seed, options.peak)
    if options.resume:
        load(trainer.network, options.resume)
    print(f"{sum(p.numel() for p in trainer.network.parameters()):,} parameters, {options.workers} workers", flush=True)
    log = Log(options, feed)
    budget, batches, step, saved = options.minutes * 60, iter(feed), 0, 0
    while (elapsed := time.monotonic() - started) < budget and step != options.steps:
        loss = trainer.step([next(batches) for _ in PATTERN], rate(elapsed / budget))
        step += 1
        if step % options.log_every == 0:
            log.line(step, float(loss), time.monotonic() - started)  # float() waits for the device, so the clock stays honest
        if options.safety and int(elapsed / budget * 4) > saved:
            saved = int(elapsed / budget * 4)
            export(trainer.network, tokenizer, options.tokenizer, options.safety)
    log.line(step, float(loss), time.monotonic() - started)
    feed.close()
    export(trainer.network, tokenizer, options.tokenizer, options.out)
    log.write()
    print(f"trained in {time.monotonic() - started:.0f} s", flush=True)
    if options.eval_items:
        scored(options, device)


class Log:
    """Progress on stdout, and all of it in training.json at the end."""

    def __init__(self, options: argparse.Namespace, feed: Feed) -> None:
        self._options, self._feed, self._lines = options, feed, list[dict[str, float]]()
        self._last = (0, 0.0)

    def line(self, step: int, loss: float, seconds: float) -> None:
        tokens = step * len(PATTERN) * self._options.pack_tokens
        speed = (step - self._last[0]) * len(PATTERN) * self._options.pack_tokens / max(seconds - self._last[1], 1e-9)
        self._last = (step, seconds)
        self._lines.append(
            {"step": step, "seconds": round(seconds, 1), "tokens": tokens, "loss": round(loss, 4), "tokens_per_s": round(speed)}
        )
        memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        print(
            f"{seconds:6.1f} s  step {step:6d}  {tokens / 1e6:8.1f} M tokens  loss {loss:.4f}  {speed / 1e6:5.2f} M tokens/s"
            f"  {memory:.1f} GiB  {self._feed.waiting()} waiting",
            flush=True,
        )

    def write(self) -> None:
        told = {"minutes": self._options.minutes, "seed": self._options.seed, "log": self._lines}
        (self._options.out / "training.json").write_text(json.dumps(told) + "\n", encoding="utf-8")


def scored(options: argparse.Namespace, device: torch.device) -> None:
    """Scores what was written, by transformers on the same device, and adds scores.json."""
    started = time.monotonic()
    scores = evaluate.evaluate(*evaluate.transformers_generator(options.out, str(device)), options.eval_items)
    print(evaluate.report(scores), flush=True)
    for result in scores.values():
        for miss in result.misses[:3] if result.share < 0.97 else ():
            print(f"{result.skill}: …{miss.prompt[-160:]!r}\n  want {miss.expected!r}\n  got  {miss.got!r}", flush=True)
    (options.out / "scores.json").write_text(json.dumps(evaluate.as_json(scores), indent=1) + "\n", encoding="utf-8")
    print(f"scored in {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--minutes", type=float, default=8.4, help="training's budget, compilation included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="a folder with weights to go on from, in place of random ones")
    parser.add_argument(
        "--peak", type=float, default=1.0, help="factor on the highest learning rates; below 1 to go on from good weights"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=15, help="generating processes")
    parser.add_argument("--pack-tokens", type=int, default=65536, help="tokens a micro-batch; three make a step")
    parser.add_argument("--steps", type=int, default=-1, help="stop after this many steps")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--eval-items", type=int, default=200, help="held-out tasks a skill afterwards; 0 skips")
    parser.add_argument("--tokenizer", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--safety", type=Path, help="a folder for checkpoints at each quarter")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
