"""The language model of a model of texts and images computes, on text, what the whole does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.byte_tokenizer import save_byte_tokenizer
from tests.conftest import VOCABULARY, stock_model
from thanos_deploy.errors import ModelError
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.load import load_model
from thanos_deploy.model.locate import locate
from thanos_deploy.model.text_part import WRAPPERS, write_text_part
from thanos_deploy.stages.dense import Dense

IDS = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
SECTIONS = {**ROPE, "mrope_section": [2, 1, 1]}
VISION = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "depth": 1}
VISION |= {"num_attention_heads": 2, "num_heads": 2, "image_size": 28, "patch_size": 14}
KINDS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**TEXT, "model_type": "gemma3_text", "sliding_window": 16},
        "mm_tokens_per_image": 4,
    },
    "mistral3": {"text_config": {**TEXT, "model_type": "mistral", "rope_parameters": ROPE}},
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_parameters": SECTIONS},
        "vision_config": {"out_hidden_size": 32, "fullatt_block_indexes": [0]},
    },
    "qwen3_vl": {
        "text_config": {**TEXT, "rope_parameters": SECTIONS},
        "vision_config": {"out_hidden_size": 32, "deepstack_visual_indexes": [0]},
    },
}


def write(folder: Path, kind: str, *, tied: bool) -> Path:
    entries = dict(KINDS[kind])
    entries["vision_config"] = {**VISION, **entries.get("vision_config", {})}
    config = AutoConfig.for_model(kind, **entries, tie_word_embeddings=tied)
    config.get_text_config().tie_word_embeddings = tied
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    save_byte_tokenizer(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", WRAPPERS)
@torch.no_grad()
def test_the_language_model_computes_what_the_whole_computes_on_text(
    tmp_path: Path, kind: str, tied: bool
) -> None:
    folder = write(tmp_path / "whole", kind, tied=tied)
    whole = AutoModelForImageTextToText.from_pretrained(folder).eval()
    if not tied:
        rename(folder)
    expected = whole(input_ids=IDS).logits
    assert not locate(str(folder)).is_ordinary
    checkpoint = Dense(str(folder)).checkpoint()
    assert checkpoint.config.model_type == WRAPPERS[kind].text
    torch.testing.assert_close(
        load_model(checkpoint.folder)(IDS).logits, expected, atol=1e-5, rtol=1e-5
    )
    stock = stock_model(checkpoint.folder)
    torch.testing.assert_close(stock(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    assert not any("vis" in name for name in checkpoint.weights.shapes)


def test_weights_of_neither_part_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "whole", "qwen3_vl", tied=True)
    path = folder / "model.safetensors"
    save_file({**load_file(path), "audio.weight": torch.ones(2, 2)}, path)
    with pytest.raises(ModelError, match=r"audio\.weight"):
        write_text_part(folder, tmp_path / "text")


def test_a_flat_configuration_of_older_files_is_read(tmp_path: Path) -> None:
    """Qwen2.5-VL's official config.json has the entries of the language model at the top."""
    folder = write(tmp_path / "whole", "qwen2_5_vl", tied=False)
    path = folder / "config.json"
    content = json.loads(path.read_text())
    inner = content.pop("text_config")
    inner.pop("model_type")
    rope = inner.pop("rope_parameters")
    older = {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
    }
    path.write_text(json.dumps({**inner, **content, **older, "model_type": "qwen2_5_vl"}))
    write_text_part(folder, tmp_path / "text")
    config = Checkpoint.open(tmp_path / "text").config
    assert (config.model_type, config.hidden_size) == ("qwen2", 32)
    assert config.rope_parameters == ROPE


def rename(folder: Path) -> None:
    """Call everything as files of another age do."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    older = any(name.startswith("language_model.") for name in tensors)
    other = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
    if not older and any(name.startswith("model.language_model.") for name in tensors):
        other = {"model.language_model.": "model.", "model.visual.": "visual."}
    elif not older:
        other = {"visual.": "model.visual.", "model.": "model.language_model."}
    renamed = {}
    for name, tensor in tensors.items():
        for own, new in other.items():
            if name.startswith(own):
                name = new + name.removeprefix(own)
                break
        renamed[name] = tensor
    assert renamed.keys() != tensors.keys()
    save_file(renamed, path, metadata={"format": "pt"})
