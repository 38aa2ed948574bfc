from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

from tests.conftest import MODEL_TYPES, MakeModel
from thanos_deploy.errors import ModelError
from thanos_deploy.model import widths
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.families import family_of
from thanos_deploy.model.load import load_model
from thanos_deploy.model.widths import Widths, declare, declared, describe


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_stock_model_has_the_widths_of_its_weights(
    make_model: MakeModel, model_type: str
) -> None:
    checkpoint = Checkpoint.open(make_model(model_type))
    family, (width, *_) = checkpoint.family, checkpoint.widths
    model = checkpoint.skeleton()
    block = model.get_submodule(f"{family.blocks}.0")
    shapes = {name: tuple(p.shape) for name, p in block.named_parameters()}
    if family.transposed:
        shapes = {name: tuple(reversed(shape)) for name, shape in shapes.items()}
    assert shapes[f"{family.heads.consumer}.weight"][1] == width.heads * checkpoint.head_size
    assert shapes[f"{family.channels.consumer}.weight"][1] == width.channels
    rows = sum(shapes[f"{name}.weight"][0] for name in family.heads.producers)
    assert rows == (width.heads + 2 * width.kv_heads) * checkpoint.head_size


def test_gpt2_without_n_inner_has_the_usual_four_times() -> None:
    config = AutoConfig.for_model("gpt2", n_embd=32, n_head=4, n_inner=None)
    assert widths.of_config(config, family_of("gpt2")) == Widths(4, 4, 128)


def llama(**entries: int) -> PreTrainedConfig:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoConfig.for_model("llama", intermediate_size=48, **{**sizes, **entries})


def test_a_stock_configuration_describes_equal_blocks_with_an_explicit_head_size() -> None:
    config, family = llama(), family_of("llama")
    assert describe(config, family, [Widths(2, 1, 32)] * 3) == {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 32,
    }
    assert describe(config, family, [Widths(4, 2, 32)] * 3) == {"intermediate_size": 32}


def test_no_stock_configuration_describes_blocks_that_differ() -> None:
    assert describe(llama(), family_of("llama"), [Widths(4, 2, 32), Widths(4, 2, 48)]) is None


def test_a_number_of_heads_that_the_configuration_itself_refuses_is_not_described() -> None:
    config = llama(hidden_size=40, num_attention_heads=5, num_key_value_heads=5)
    assert describe(config, family_of("llama"), [Widths(3, 3, 48)]) is None
    assert describe(config, family_of("llama"), [Widths(4, 4, 48)]) is not None


@pytest.mark.parametrize("model_type", ["opt", "gpt2", "gpt_neox"])
def test_where_the_size_of_a_head_follows_from_their_number_only_channels_can_change(
    make_model: MakeModel, model_type: str
) -> None:
    checkpoint = Checkpoint.open(make_model(model_type))
    config, family = checkpoint.config, checkpoint.family
    assert describe(config, family, [Widths(3, 3, 48)]) is None
    assert describe(config, family, [Widths(4, 4, 32)]) == {family.channels.count: 32}


def test_what_was_declared_is_read_back(tmp_path: Path) -> None:
    blocks = (Widths(4, 2, 32), Widths(2, 1, 48))
    assert declared(tmp_path) is None
    declare(tmp_path, blocks)
    assert declared(tmp_path) == blocks


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable table"),
        ('{"format": 1}', "not a readable table"),
        ('{"format": 1, "blocks": [{"heads": 4}]}', "not a readable table"),
        ('{"format": 1, "blocks": [{"heads": 4, "kv_heads": 0, "channels": 8}]}', "not a positive"),
        (
            '{"format": 1, "blocks": [{"heads": 4, "kv_heads": "2", "channels": 8}]}',
            "kv_heads is '2'",
        ),
        ('{"format": 2, "blocks": []}', "format 2; this version reads 1"),
    ],
)
def test_a_damaged_table_is_an_error_that_names_the_file(
    tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "widths.json").write_text(content)
    with pytest.raises(ModelError, match=message) as caught:
        declared(tmp_path)
    assert "widths.json" in caught.value.message
    assert caught.value.exit_code == 3


def test_a_table_for_another_number_of_blocks_is_refused(make_model: MakeModel) -> None:
    folder = make_model("llama")
    declare(folder, [Widths(4, 2, 48)])
    with pytest.raises(ModelError, match=r"1 blocks are declared, and config.json declares 2"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_declared_model_is_built_with_its_widths_and_runs(
    make_model: MakeModel, model_type: str
) -> None:
    checkpoint = Checkpoint.open(make_model(model_type))
    width = checkpoint.widths[0]
    group = width.heads // width.kv_heads
    smaller = Widths(group, 1, 20) if width.kv_heads > 1 else Widths(2, 1, 20)
    model = checkpoint.skeleton([width, smaller])
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for buffer in model.buffers():  # of memory as it was found, like the parameters before
        buffer.fill_(1)
    ids = torch.zeros(2, 5, dtype=torch.long)
    output = model(input_ids=ids)
    assert bool(output.logits.isfinite().all())
    shapes = [tuple(keys.shape) for keys, *_ in output.past_key_values]
    assert shapes == [(2, w.kv_heads, 5, checkpoint.head_size) for w in (width, smaller)]


def test_stored_shapes_that_are_not_the_declared_ones_are_refused(make_model: MakeModel) -> None:
    folder = make_model("llama")
    declare(folder, [Widths(4, 2, 48), Widths(4, 2, 32)])
    with pytest.raises(ModelError, match=r"down_proj.weight has shape \(32, 48\), config.js"):
        load_model(folder)
