"""Configurations that the tuners of matrix products try: those that fit, with the splits that occupy a GPU. Pure Python."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from workstation.kernels import tuning
from workstation.kernels.gemm_launch import split_count
from workstation.kernels.tuning import (
    CODE_SCHEMES,
    INTEGER_BITS,
    LEAST_STEP,
    LIBRARY,
    MOST_STEP,
    Device,
    GemmConfig,
    Problem,
    choose,
    default_config,
    shared_bytes,
)

KINDS = ["dot", "gemv", "hopper"]  # of our own kernels


def candidates(problem: Problem, device: Device, kinds: Sequence[str] = KINDS) -> list[GemmConfig]:
    """Tiles that fit, each with the splits that give every multiprocessor one to four programs; what runs today first. None
    where the device has no kernel for the scheme."""
    least = min(256, max(16, 1 << (problem.m - 1).bit_length()))
    row_tiles = {least, least // 2} if least >= 128 else {least}
    today = choose(problem, device)
    found = [today if today != LIBRARY else default_config(problem, device)]
    if problem.scheme == "int4_halves":
        return list(dict.fromkeys(found + _few(problem))) if device.capability == 90 else []
    widest = int(max(problem.weight_bytes, problem.row_bytes))
    coded = problem.scheme in CODE_SCHEMES
    steps, depths = ((256, 512), (2, 3, 4, 5, 6)) if coded else ((128, 256), (3, 4, 5, 6))
    for block_m, block_n, step, stages in itertools.product(row_tiles, (64, 128), steps, depths):
        for warps in (4, 8) if "dot" in kinds else ():
            accumulators = block_n * block_m // (warps * 32)
            if not LEAST_STEP.get(problem.scheme, 1) <= step // widest <= MOST_STEP.get(problem.scheme, step):
                continue
            if accumulators > 64 if warps == 4 else block_n < 128 and accumulators < 16:
                continue
            tile = GemmConfig("dot", block_n, block_m, step // widest, 1, warps, stages)
            found += _with_splits(problem, tile, device)
    if "hopper" in kinds and device.capability == 90 and problem.scheme != "fp8_weight":
        found += _hopper(problem, row_tiles)
    if problem.m == 1 and "gemv" in kinds and problem.scheme not in (*INTEGER_BITS, *CODE_SCHEMES):
        for block_n, block_k, stages in itertools.product((4, 8, 16), (512, 1024), (2, 4)):
            found += _with_splits(problem, GemmConfig("gemv", block_n, 1, block_k, 1, 4, stages), device)
    unique: dict[tuple[GemmConfig, int], GemmConfig] = {}
    for config in found:
        if _fits(problem, config, device):
            unique.setdefault((replace(config, splits=1), split_count(problem.k, config)), config)
    return list(unique.values())


def _hopper(problem: Problem, row_tiles: set[int]) -> list[GemmConfig]:
    """Rings for one to four programs a multiprocessor; splits that give it one to three programs."""
    coded = problem.scheme in tuning.CODED_ROWS
    if coded:
        row_tiles = {8} if problem.m <= 8 else {min(rows, tuning.CODED_ROWS[problem.scheme]) for rows in row_tiles}
    elif problem.m <= 8:
        row_tiles = row_tiles | {8}
    if problem.scheme in tuning.GROUPED:
        shapes = [(tiles, teams) for tiles, teams in ((1, 1), (2, 1), (1, 2), (2, 2))]
        # Beside a table a ring has at least 48 KiB, and two programs a multiprocessor have 76 each.
        rings: tuple[int, ...] = (76, 170) if problem.scheme == "nf4" else (50, 66, 100, 205)
        least, most = 2, 32 if problem.scheme == "nf4" else 64
    else:
        shapes, rings, least, most = [(1, 1), (2, 1)], (66, 100, 205), 3, 128
    found = _few(problem) if problem.m <= tuning.FEW_OF.get(problem.scheme, 0) else []
    crowd = 8 if coded else 32  # rows from which two warpgroups share a program
    width = int(tuning.PANEL_BYTES // problem.weight_bytes)
    silu = problem.output == "silu_mul"
    for block_m, (tiles, teams), panels, ring in itertools.product(row_tiles, shapes, (1, 2), rings):
        # First, which leaves room for a second tile.
        scaled = block_m == 128 if problem.scheme in INTEGER_BITS else block_m >= 32 and problem.scheme in tuning.BYTE_SCALES
        paired = (coded or scaled) and teams == 2  # a warpgroup for gate, one for up
        crowded = tiles == 2 and block_m > most and not (scaled and teams == 2)
        if (tiles == 1 and silu and not paired) or crowded or (teams == 2 and block_m < crowd):
            continue
        if coded and panels == 2 and tiles * block_m > (64 if scaled else 16):
            continue  # no registers
        block_n = teams * tiles * tuning.CHANNELS // (2 if silu else 1)
        config = GemmConfig("hopper", block_n, block_m, panels * width, 1, 4 * teams, 1, True)
        stages = ring * tuning.KIB // tuning.stage_bytes(problem, config)
        programs = -(-problem.n // (teams * tiles * tuning.CHANNELS)) * -(-problem.m // block_m)
        for splits in (1, 2, 3, 4, 6, 8):
            # Several rounds of programs even out what a multiprocessor has to do, if each is short to begin.
            room = 132 * max(1, 200 // ring) * (4 if coded else 1)
            fills = splits == 1 or (programs * splits <= room and problem.k >= 4 * splits * panels * width)
            if stages >= least and fills:
                found.append(replace(config, splits=splits, stages=stages))
    return found


def _few(problem: Problem) -> list[GemmConfig]:
    """Rings of `gemm_few_hopper.py` beside x, one to four programs a multiprocessor."""
    found = []
    silu = problem.output == "silu_mul"
    tiles_of, rooms = (2,) if silu else (1, 2), (52, 70, 108, 220)
    for tiles, step, splits, room in itertools.product(tiles_of, (256, 512), (1, 2, 3, 4, 6, 8), rooms):
        config = GemmConfig("hopper", tuning.CHANNELS * (1 if silu else tiles), tuning.FEW_ROWS, step, splits, 4, 1, True)
        x = tuning.shared_bytes(problem, config, 90) - tuning.stage_bytes(problem, config)
        stages = (room * tuning.KIB - x) // tuning.stage_bytes(problem, config)
        programs = problem.n // (tiles * tuning.CHANNELS) * splits
        if 2 <= stages <= 10 and problem.k >= 4 * splits * step and programs <= 1056:
            found.append(replace(config, stages=stages))
    return found


def _with_splits(problem: Problem, tile: GemmConfig, device: Device) -> list[GemmConfig]:
    tiles = -(-problem.n // tile.block_n) * -(-problem.m // tile.block_m)
    wanted = {1} | {max(1, min(16, round(share * device.processors / tiles))) for share in (1, 2, 3, 4)}
    steps = problem.k // tile.block_k
    return [replace(tile, splits=splits) for splits in sorted(wanted) if splits == 1 or steps >= 2 * splits]


def _fits(problem: Problem, config: GemmConfig, device: Device) -> bool:
    fused = 2 if tuning.fuses_silu(problem, config) else 1
    if config.kind == "hopper":
        return shared_bytes(problem, config, device.capability) <= device.shared_bytes
    accumulators = fused * config.block_n * config.block_m // (config.warps * 32)
    if config.kind == "gemv":
        accumulators = fused * config.block_n * config.block_k // (config.warps * 32)
    return shared_bytes(problem, config, device.capability) <= device.shared_bytes and accumulators <= 128
