"""Codes in the blocks of GGUF, read back by the package gguf."""

import logging
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

import exporters.gguf
from exporters import gguf_blocks
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.pruning.codes import Codes
from thanos_deploy.solver.codes import round_to
from thanos_deploy.solver.grid import parse


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [
        ("int8", "q8_0"),
        ("int8:row", "q8_0"),
        ("int4:64", "q8_0"),
        ("int4", "q4_0"),
        ("int4:128", "q4_0"),
        ("int4:asym", "q4_1"),
        ("int4:row:asym", "q4_1"),
    ],
)
def test_blocks_have_the_values_of_the_codes(spelling: str, dtype: str) -> None:
    weight = torch.randn(6, 192, generator=torch.Generator().manual_seed(0))
    weight[:, ::2] = 0
    codes = round_to(weight, parse(spelling))
    assert gguf_blocks.holds(dtype, codes.grid)
    packed = gguf_blocks.blocks(codes, dtype)
    values = dequantize(packed, getattr(gguf.GGMLQuantizationType, dtype.upper()))
    np.testing.assert_array_equal(values, codes.weight.numpy())
    assert not values[:, ::2].any()


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [
        ("int8:64", "q8_0"),
        ("int4", "q4_0"),
        ("int4:128:asym", "q4_1"),
        ("int4:16", None),
        ("int8:asym", None),
    ],
)
def test_the_smallest_type_that_keeps_the_codes(spelling: str, dtype: str | None) -> None:
    assert gguf_blocks.smallest(parse(spelling)) == dtype


@pytest.mark.parametrize(
    ("spelling", "dtype", "said"),
    [
        ("int4", "q4_k_m", "rounds the weights again.*--dtype q4_0 keeps the codes"),
        ("int4:16", "q8_0", "no type of GGUF keeps the codes"),
        ("int4", "fp16", ""),
    ],
)
def test_a_type_that_does_not_keep_the_codes_says_so(
    tiny_llama: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    spelling: str,
    dtype: str,
    said: str,
) -> None:
    codes = Codes(tmp_path, parse(spelling), {})
    with caplog.at_level(logging.WARNING):
        kept = exporters.gguf._put(codes, tmp_path, tmp_path, Checkpoint.open(tiny_llama), dtype)
    assert kept == 0
    (message,) = caplog.messages or [""]
    assert re.search(said, message)
    assert bool(message) == bool(said)
