"""Write a small model as a GGUF file."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from thanos_deploy.model.load import load_tokenizer


def write_gguf(folder: Path, path: Path, **claimed: int) -> None:
    """Write a Qwen2 model with a byte tokenizer as a GGUF file, in float32.

    Args:
        folder: folder of the model.
        path: the file to write.
        claimed: entries of config.json to replace in the file's metadata, not in its tensors.
    """
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    own = json.loads((folder / "config.json").read_text())
    config = {**own, **claimed}
    writer = gguf.GGUFWriter(path, config["model_type"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    tokenizer = load_tokenizer(folder)
    tokens = tokenizer.convert_ids_to_tokens(list(range(config["vocab_size"])))
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))  # transformers needs scores if there are no merges
    control = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.NORMAL}
    writer.add_token_types([control[token == tokenizer.eos_token] for token in tokens])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, own["num_hidden_layers"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
