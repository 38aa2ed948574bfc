"""Measure the peak memory of pruning a model that is larger than that memory.

Usage: python -m benchmarks.streaming FOLDER [--blocks 22] [--preset fast] [--nsamples 4]

Makes a sharded float16 checkpoint with TinyLlama-1.1B's configuration and random weights in
FOLDER/model (2.2 GB), unless it exists. Prunes it to 2:4 into FOLDER/out in a fresh process as
`thanos-deploy prune` does, with a journal, and prints the peak resident memory of that process. An
older FOLDER/out is removed. The last line is JSON.

The values of weights do not affect memory. By default there are only 2048 calibration tokens, as
many as run through a block at once; more tokens add activations inside a block, up to
`sizes.WAITING_BYTES`. The preset "best" holds a block of the dense model in addition to the block
that is pruned; "fast" does not.
"""

import argparse
import json
import math
import multiprocessing
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from thanos_deploy import methods
from thanos_deploy.bundle import files, manifest
from thanos_deploy.bundle.codec import encode
from thanos_deploy.cli import _progress
from thanos_deploy.machine import environment
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.tensorfile import INDEX, TensorFile
from thanos_deploy.pattern import SemiStructured
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.prune import prune
from thanos_deploy.stages.request import PruneRequest

# Source: config.json of TinyLlama/TinyLlama-1.1B-Chat-v1.0.
SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
SHARD_BYTES = 500_000_000


def main() -> None:
    """Make the checkpoint, prune it in a child process, and print the child's peak memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=22)
    parser.add_argument("--preset", choices=methods.PRESET_NAMES, default="fast")
    parser.add_argument("--nsamples", type=int, default=4, help="segments of 512 tokens")
    arguments = parser.parse_args()
    model = arguments.folder / "model"
    if not (model / INDEX).exists():
        make_checkpoint(model, arguments.blocks)
    shutil.rmtree(arguments.folder / "out", ignore_errors=True)
    request = PruneRequest.of(
        SemiStructured(2, 4),
        preset=arguments.preset,
        nsamples=arguments.nsamples,
    )
    spawn = multiprocessing.get_context("spawn")
    results: multiprocessing.SimpleQueue[dict[str, Any]] = spawn.SimpleQueue()
    child = spawn.Process(target=measure, args=(model, arguments.folder / "out", request, results))
    child.start()
    child.join()
    if child.exitcode:
        raise SystemExit(child.exitcode)
    result = results.get()
    checkpoint = Checkpoint.open(model)
    print(
        f"{checkpoint.parameters / 1e9:.2f} billion parameters, "
        f"{result['dense_bytes'] / 1e9:.2f} GB in float16; 2:4, preset {arguments.preset}, "
        f"{arguments.nsamples} x 512 calibration tokens"
    )
    print(f"resident before pruning: {result['resident_before_bytes'] / 1e6:.0f} MB")
    print(f"peak resident memory: {result['peak_memory_bytes'] / 1e6:.0f} MB")
    print(f"{result['seconds']:.0f} s; the pattern holds: {result['pattern_holds']}")
    print(
        json.dumps({**request.to_json(), **result, "environment": encode(environment.describe())})
    )


def measure(
    model: Path, out: Path, request: PruneRequest, results: "multiprocessing.SimpleQueue[Any]"
) -> None:
    """Prune in this process, which must be fresh, because its peak memory is measured."""
    _progress.quiet_libraries()
    before = environment.resident_memory_bytes()
    started = time.perf_counter()
    dense = Dense(str(model))
    with manifest.claim(out, dense.source) as bundle:
        record = prune(bundle, dense, request, announce=announce)
    results.put(
        {
            "resident_before_bytes": before,
            "dense_bytes": record.result["dense_bytes"],
            "pattern_holds": record.result["pattern_holds"],
            "peak_memory_bytes": environment.peak_memory_bytes(),
            "seconds": time.perf_counter() - started,
        }
    )


def announce(title: str) -> Any:
    """Return a progress function that prints every block."""
    return lambda done, total: print(f"{title}: {done} of {total}", flush=True)


def make_checkpoint(folder: Path, blocks: int) -> None:
    """Write random weights shard by shard, and a tokenizer with one token per byte."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = AutoConfig.for_model(
        "llama",
        **SIZES,
        num_hidden_layers=blocks,
        architectures=["LlamaForCausalLM"],
        dtype="float16",
    )
    config.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)

    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    room = SHARD_BYTES
    for name, shape in shapes(blocks).items():
        room -= math.prod(shape) * torch.float16.itemsize
        if room < 0 and shards[-1]:
            shards.append({})
            room = SHARD_BYTES - math.prod(shape) * torch.float16.itemsize
        shards[-1][name] = (torch.float16, shape)
    weight_map = {}
    random = torch.Generator().manual_seed(0)
    for number, kinds in enumerate(shards, start=1):
        shard = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with TensorFile.create(folder / shard, kinds) as file:
            for name, (_, shape) in kinds.items():
                weight = torch.ones(shape)
                if len(shape) > 1:
                    weight.normal_(std=0.02, generator=random)
                file.write(name, weight.half())
                weight_map[name] = shard
    files.write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})


def shapes(blocks: int) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a LLaMA's parameters."""
    width, channels, vocabulary = (
        SIZES[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    keys = width * SIZES["num_key_value_heads"] // SIZES["num_attention_heads"]
    block = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (channels, width),
        "mlp.up_proj": (channels, width),
        "mlp.down_proj": (width, channels),
    }
    return {
        "model.embed_tokens.weight": (vocabulary, width),
        **{
            f"model.layers.{index}.{name}.weight": shape
            for index in range(blocks)
            for name, shape in block.items()
        },
        "model.norm.weight": (width,),
        "lm_head.weight": (vocabulary, width),
    }


if __name__ == "__main__":
    main()
