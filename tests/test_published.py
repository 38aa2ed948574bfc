"""Repositories as they are published: their exact files and tensor names, with tiny random weights.

File lists, tensor names and the entries of config.json are those of the hub's repositories; OPT's
weights are those of its conversion to safetensors, as its own are pickled. Sizes are small, shards
hold what fits, and files that no language model reads are there and empty.

Most of the file is the list of these repositories, so it is longer than others.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import Invoke, stock_model
from tests.mxfp4 import packed
from thanos_deploy.model.load import load_tokenizer

BLOCKS, EXPERTS = 2, 4

_LLAMA = (
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
)
_QWEN = (*_LLAMA, "self_attn.q_norm.weight", "self_attn.k_norm.weight")
_DENSE = {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}
_JSON = ("config.json", "generation_config.json")
_TOKENS = ("tokenizer.json", "tokenizer_config.json")
_SINGLE = "model.safetensors"


def _pairs(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.{part}" for name in names for part in ("weight", "bias"))


@dataclass(frozen=True)
class Repository:
    """What is published.

    Attributes:
        config: entries of config.json; sizes are small.
        outside: names of the tensors outside the blocks.
        block: names of those of a block, without `prefix`.
        prefix: what stands before a block's number.
        files: all of the repository, but shards.
        shards: how many files the weights are in.
        tokenizer: the class that tokenizer_config.json names.
        buffers: tensors that are no parameters, by name in the block.
        base: what the library puts before the names, and the files do not.
        renamed: what the library calls a part of a name -> the files.
        first_shard: number of the first of the shards, as their names have it.
        mxfp4: the matrices of experts are stored in MXFP4.
    """

    config: dict[str, Any]
    outside: tuple[str, ...]
    block: tuple[str, ...]
    files: tuple[str, ...]
    prefix: str = "model.layers."
    shards: int = 1
    tokenizer: str = "PreTrainedTokenizerFast"
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    base: str = ""
    renamed: dict[str, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    first_shard: int = 1
    mxfp4: bool = False


MASK = torch.ones(1, 1, 128, 128).tril()
REPOSITORIES = {
    "openai-community/gpt2": Repository(
        config={"model_type": "gpt2", "n_inner": None, "architectures": ["GPT2LMHeadModel"]},
        outside=("wte.weight", "wpe.weight", *_pairs("ln_f")),
        block=_pairs("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"),
        prefix="h.",
        base="transformer.",
        buffers={"attn.bias": MASK},
        tokenizer="GPT2Tokenizer",
        dtype=torch.float32,
        files=(
            *(".gitattributes", "64-8bits.tflite", "64-fp16.tflite", "64.tflite", "README.md"),
            *(*_JSON, "flax_model.msgpack", "merges.txt", _SINGLE, "pytorch_model.bin"),
            *("onnx/config.json", "onnx/decoder_model.onnx", "onnx/tokenizer.json"),
            *("rust_model.ot", "tf_model.h5", *_TOKENS, "vocab.json"),
        ),
    ),
    "EleutherAI/pythia-70m": Repository(
        config={
            "model_type": "gpt_neox",
            "architectures": ["GPTNeoXForCausalLM"],
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000,
            "tie_word_embeddings": False,
            "use_parallel_residual": True,
        },
        outside=(
            "gpt_neox.embed_in.weight",
            *_pairs("gpt_neox.final_layer_norm"),
            "embed_out.weight",
        ),
        block=_pairs(
            *("input_layernorm", "post_attention_layernorm", "attention.query_key_value"),
            *("attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        ),
        prefix="gpt_neox.layers.",
        renamed={"lm_head.": "embed_out."},
        buffers={
            "attention.bias": MASK.bool(),
            "attention.masked_bias": torch.tensor(-1e9, dtype=torch.float16),
            "attention.rotary_emb.inv_freq": torch.ones(1, dtype=torch.float16),
        },
        dtype=torch.float16,
        files=(
            *(".gitattributes", "README.md", "config.json", _SINGLE, "pytorch_model.bin"),
            *("special_tokens_map.json", *_TOKENS),
        ),
    ),
    "facebook/opt-125m": Repository(
        config={
            "model_type": "opt",
            "architectures": ["OPTForCausalLM"],
            "ffn_dim": 48,
            "word_embed_proj_dim": 32,
            "do_layer_norm_before": True,
            "activation_function": "relu",
        },
        outside=(
            "model.decoder.embed_tokens.weight",
            "model.decoder.embed_positions.weight",
            *_pairs("model.decoder.final_layer_norm"),
        ),
        block=_pairs(
            *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
            *("self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"),
        ),
        prefix="model.decoder.layers.",
        tokenizer="GPT2Tokenizer",
        dtype=torch.float16,
        files=(
            *(".gitattributes", "LICENSE.md", "README.md", *_JSON, "flax_model.msgpack"),
            *("merges.txt", _SINGLE, "pytorch_model.bin", "special_tokens_map.json"),
            *("tf_model.h5", "tokenizer_config.json", "vocab.json"),
        ),
    ),
    "meta-llama/Llama-3.2-1B": Repository(
        config={
            **_DENSE,
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 64,
                "rope_type": "llama3",
            },
        },
        outside=("model.embed_tokens.weight", "model.norm.weight"),
        block=_LLAMA,
        files=(
            *(".gitattributes", "LICENSE.txt", "README.md", "USE_POLICY.md", *_JSON, _SINGLE),
            *("original/consolidated.00.pth", "original/params.json", "original/tokenizer.model"),
            *("special_tokens_map.json", *_TOKENS),
        ),
    ),
    "Qwen/Qwen3-0.6B": Repository(
        config={**_DENSE, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
        outside=("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
        block=_QWEN,
        files=(
            *(".gitattributes", "LICENSE", "README.md", *_JSON, "merges.txt", _SINGLE),
            *(*_TOKENS, "vocab.json"),
        ),
    ),
    "google/gemma-3-270m-it": Repository(
        config={
            **_DENSE,
            "model_type": "gemma3_text",
            "architectures": ["Gemma3ForCausalLM"],
            "sliding_window": 16,
            "_sliding_window_pattern": 6,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "query_pre_attn_scalar": 8,
            "use_bidirectional_attention": False,
        },
        outside=("model.embed_tokens.weight", "model.norm.weight"),
        block=(*_QWEN, "pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"),
        files=(
            *(".gitattributes", "README.md", "added_tokens.json", "chat_template.jinja", *_JSON),
            *(_SINGLE, "special_tokens_map.json", *_TOKENS, "tokenizer.model"),
        ),
    ),
    "HuggingFaceTB/SmolLM3-3B": Repository(
        config={
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "model_type": "smollm3",
            "architectures": ["SmolLM3ForCausalLM"],
            "pad_token_id": 0,
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 0],
            "layer_types": ["full_attention"] * BLOCKS,
            "use_sliding_window": False,
        },
        outside=("model.embed_tokens.weight", "model.norm.weight"),
        block=_LLAMA,
        shards=2,
        files=(
            *(".gitattributes", "README.md", "chat_template.jinja", *_JSON),
            *("model.safetensors.index.json", "special_tokens_map.json", *_TOKENS),
        ),
    ),
    "Qwen/Qwen3-30B-A3B": Repository(
        config={
            **_DENSE,
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "tie_word_embeddings": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.001,
        },
        outside=("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
        block=(
            *(name for name in _QWEN if not name.startswith("mlp.")),
            "mlp.gate.weight",
            *(
                f"mlp.experts.{number}.{name}_proj.weight"
                for number in range(EXPERTS)
                for name in ("gate", "up", "down")
            ),
        ),
        shards=16,
        files=(
            *(".gitattributes", "LICENSE", "README.md", *_JSON, "merges.txt"),
            *("model.safetensors.index.json", *_TOKENS, "vocab.json"),
        ),
    ),
    "openai/gpt-oss-20b": Repository(
        config={
            "model_type": "gpt_oss",
            "architectures": ["GptOssForCausalLM"],
            "attention_bias": True,
            "experts_per_token": 2,
            "head_dim": 8,
            "initial_context_length": 4,
            "intermediate_size": 64,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_experts_per_tok": 2,
            "num_key_value_heads": 2,
            "num_local_experts": EXPERTS,
            "pad_token_id": 0,
            "quantization_config": {
                "modules_to_not_convert": [
                    *("model.layers.*.self_attn", "model.layers.*.mlp.router"),
                    *("model.embed_tokens", "lm_head"),
                ],
                "quant_method": "mxfp4",
            },
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4,
                "rope_type": "yarn",
                "truncate": False,
            },
            "rope_theta": 150000,
            "router_aux_loss_coef": 0.9,
            "sliding_window": 16,
            "swiglu_limit": 7.0,
            "tie_word_embeddings": False,
            "torch_dtype": None,
        },
        outside=("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
        block=(
            *_pairs(*(f"self_attn.{name}_proj" for name in "qkvo"), "mlp.router"),
            *("self_attn.sinks", "input_layernorm.weight", "post_attention_layernorm.weight"),
            *(
                f"mlp.experts.{matrix}_{part}"
                for matrix in ("gate_up_proj", "down_proj")
                for part in ("blocks", "scales", "bias")
            ),
        ),
        shards=3,
        first_shard=0,
        mxfp4=True,
        files=(
            *(".gitattributes", "LICENSE", "README.md", "USAGE_POLICY", "chat_template.jinja"),
            *(*_JSON, "metal/model.bin", "model.safetensors.index.json", "original/config.json"),
            *("original/dtypes.json", "original/model.safetensors", "special_tokens_map.json"),
            *_TOKENS,
        ),
    ),
}


def names(its: Repository) -> Iterator[str]:
    """Of all tensors in the files."""
    yield from its.outside
    for block in range(BLOCKS):
        yield from (f"{its.prefix}{block}.{name}" for name in (*its.block, *its.buffers))


def publish(folder: Path, its: Repository) -> None:
    """Write the repository."""
    for name in its.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    write_tokenizer(folder, its)
    entries = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": str(its.dtype).removeprefix("torch."),
        **its.config,
    }
    own = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    if its.config["model_type"] == "gpt2":
        own |= {"max_position_embeddings": "n_positions"}
        entries = {own.get(name, name): value for name, value in entries.items()}
    write(folder / "config.json", entries)
    for name in ("generation_config.json",):
        if name in its.files:
            write(folder / name, {"eos_token_id": 0})
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    if its.mxfp4:
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "made")
    write_weights(folder, its, stock_tensors(folder / "made"))


def stock_tensors(made: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(made / _SINGLE)
    for path in made.iterdir():
        path.unlink()
    made.rmdir()
    return tensors


def write_weights(folder: Path, its: Repository, stock: dict[str, torch.Tensor]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in stock.items():
        for own, published in its.renamed.items():
            name = name.replace(own, published)
        if its.mxfp4 and name.endswith((".gate_up_proj", ".down_proj")):
            tensors |= packed(name, tensor)
        else:
            tensors[name.removeprefix(its.base)] = tensor.to(its.dtype)
    if "lm_head.weight" in its.outside and "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()  # stored twice
    for block in range(BLOCKS):
        tensors |= {f"{its.prefix}{block}.{name}": one.clone() for name, one in its.buffers.items()}
    assert sorted(tensors) == sorted(names(its))
    if its.shards == 1:
        save_file(tensors, folder / _SINGLE, metadata={"format": "pt"})
        return
    last = its.shards + its.first_shard - 1
    places = {
        name: f"model-{number % its.shards + its.first_shard:05}-of-{last:05}.safetensors"
        for number, name in enumerate(names(its))
    }
    for shard in sorted(set(places.values())):
        held = {name: tensors[name] for name, place in places.items() if place == shard}
        save_file(held, folder / shard, metadata={"format": "pt"})
    write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})


def write_tokenizer(folder: Path, its: Repository) -> None:
    """A token for every byte, one for two letters, and one that ends a text."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: id_ for id_, token in enumerate(["<|end|>", *symbols, "on"])}
    made = Tokenizer(models.BPE(vocabulary, [("o", "n")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|end|>"])
    named = {f"{name}_token": "<|end|>" for name in ("bos", "eos", "unk")}
    contents: dict[str, Any] = {
        "tokenizer.json": json.loads(made.to_str()),
        "tokenizer_config.json": {"tokenizer_class": its.tokenizer, **named},
        "special_tokens_map.json": named,
        "added_tokens.json": {},
        "vocab.json": vocabulary,
    }
    for name in its.files:
        if name in contents:
            write(folder / name, contents[name])
    if "merges.txt" in its.files:
        (folder / "merges.txt").write_text("#version: 0.2\no n\n")
    if "chat_template.jinja" in its.files:
        (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


@pytest.mark.slow
@pytest.mark.parametrize("name", REPOSITORIES)
def test_a_published_repository_is_pruned_exported_and_generates(
    name: str, tmp_path: Path, invoke: Invoke
) -> None:
    its, folder, out = REPOSITORIES[name], tmp_path / "repository", tmp_path / "out"
    publish(folder, its)
    read = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    options = ("--pattern", "2:4", "--method", "wanda", "--nsamples", 4, "--seqlen", 64, "-q")
    code, _, errors = invoke("prune", folder, *options, "-o", out)
    assert code == 0, errors
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == read
    loaded: Any = AutoModelForCausalLM.from_pretrained(out / "model", output_loading_info=True)
    assert not any(loaded[1].values()), loaded[1]
    code, _, errors = invoke("export", out, "-q")
    assert code == 0, errors
    model = stock_model(out / "model", dtype=torch.float32)
    code, printed, errors = invoke("generate", out, "on and on", "--new-tokens", 6, "--json")
    assert code == 0, errors
    ids, eos = encoded(out / "model", "on and on"), model.config.eos_token_id
    answer = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=eos)
    expected = decoded(out / "model", answer[0, ids.shape[1] :])
    assert json.loads(printed)["answer"] == expected


def encoded(folder: Path, text: str) -> torch.Tensor:
    ids: torch.Tensor = load_tokenizer(folder)(text, return_tensors="pt")["input_ids"]
    return ids


def decoded(folder: Path, ids: torch.Tensor) -> str:
    return str(load_tokenizer(folder).decode(ids, skip_special_tokens=True))
