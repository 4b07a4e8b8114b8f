"""What `ws quantize --rounding gptq` calibrates on: a file's text, the demo's own tasks, or what the model itself writes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from workstation.cli.plan import note, plan_launch
from workstation.errors import ConfigError

MAX_CHARACTERS = 1 << 20  # of a file: more than all windows hold in any language

Windows = list[list[int]]


def calibration_text(file: Path | None, model: str, folder: Path, flags: dict[str, Any], *, is_demo: bool) -> Any:
    """A `CalibrationText`. Raises ConfigError when the file cannot be read.

    Args:
        file: a text, or None.  model, flags: as for `plan_launch`.  folder: the model's.
    """
    from workstation.model.calibration import CalibrationText

    make: Callable[[], Windows]
    if file is not None:
        text = _read(file)
        origin, make = hashlib.sha256(text.encode()).hexdigest(), partial(of_text, text, folder)
    elif is_demo:
        origin, make = "the demo's tasks", partial(of_demo, folder)
    else:
        origin, make = "written by the model", partial(of_model, model, flags)
    return CalibrationText(origin, make)


def of_text(text: str, folder: Path) -> Windows:
    """A text's first tokens, cut into windows. Raises ConfigError when it is too short."""
    from workstation.model.calibration import MAX_WINDOWS, WINDOW_TOKENS
    from workstation.text.tokenizer import Tokenizer

    tokens = Tokenizer.from_folder(folder).encode(text, add_special_tokens=False)[:MAX_WINDOWS * WINDOW_TOKENS]
    if len(tokens) < WINDOW_TOKENS:
        raise ConfigError(f"the text of --calibration has {len(tokens)} tokens; at least {WINDOW_TOKENS} are needed",
                          param="calibration")  # fmt: skip
    return [tokens[start:start + WINDOW_TOKENS] for start in range(0, len(tokens), WINDOW_TOKENS)]


def of_demo(folder: Path) -> Windows:
    """Tasks the demo was trained on, with their answers, the same number of each skill."""
    from workstation.cli.evaluate import encoder
    from workstation.demo.tasks import SKILLS, generate
    from workstation.demo.template import document
    from workstation.model.calibration import MAX_WINDOWS, WINDOW_TOKENS

    encode, windows = encoder(folder), []
    for skill in SKILLS:
        random = Random(f"calibration:{skill}")
        documents = [document(generate(skill, random, "train")) for _ in range(MAX_WINDOWS // len(SKILLS))]
        windows += [encode(text)[:WINDOW_TOKENS] for text in documents]
    return windows


def of_model(model: str, flags: dict[str, Any]) -> Windows:
    """What the 16-bit model itself writes after one random token, at temperature 1 (LLM-QAT, arXiv:2305.17888).

    Raises WorkstationError, also where the whole model does not fit the device.
    """
    from workstation import SamplingParams
    from workstation.cli.compare import free
    from workstation.cli.offline import start
    from workstation.model.calibration import MAX_WINDOWS, WINDOW_TOKENS

    note("the model writes its calibration text; --calibration FILE spares that, and memory for the whole model")
    llm = start(plan_launch(model, flags, os.environ))
    tokenizer, window = llm.get_tokenizer(), min(WINDOW_TOKENS, llm.engine.info.max_model_len)
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ordinary = [token for token in range(tokenizer.vocab_size) if token not in tokenizer.special_ids]
    prompts = [[*before, first] for first in Random("calibration").sample(ordinary, min(MAX_WINDOWS, len(ordinary)))]
    sampling = [SamplingParams(temperature=1.0, seed=seed, max_tokens=window - len(prompt), ignore_eos=True)
                for seed, prompt in enumerate(prompts)]  # fmt: skip
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    windows = [[*prompt, *output.outputs[0].token_ids] for prompt, output in zip(prompts, outputs, strict=True)]
    del llm
    free()
    return windows


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MAX_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--calibration {path} cannot be read as UTF-8: {error}", param="calibration") from error
