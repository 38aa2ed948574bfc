import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from tests.conftest import MakeModel, stock_model
from thanos_deploy.calibration.blocks import block_inputs, shared
from thanos_deploy.calibration.collect import Walk, advance, collect, collect_relative
from thanos_deploy.calibration.segments import segments
from thanos_deploy.calibration.statistics import Statistics
from thanos_deploy.calibration.texts import Text
from thanos_deploy.errors import CalibrationError
from thanos_deploy.model.families import family_of
from thanos_deploy.model.load import load_tokenizer
from thanos_deploy.model.structure import structures_of


def test_segments_do_not_overlap_and_the_seed_picks_them(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    text = Text("counting", "".join(chr(48 + i) for i in range(40)))
    first = segments(text, tokenizer, count=4, length=5, seed=None)
    ids = torch.tensor(tokenizer(text.content)["input_ids"])
    assert torch.equal(first, ids[:20].reshape(4, 5))
    every = segments(text, tokenizer, count=8, length=5, seed=0)
    assert torch.equal(every, ids.reshape(8, 5))
    one, same, other = (
        segments(text, tokenizer, count=3, length=5, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("seed", [None, 1])
def test_further_segments_are_others_and_change_none_of_the_first_ones(
    tiny_llama: Path, seed: int | None
) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    text = Text("counting", "".join(chr(48 + i) for i in range(40)))
    first = segments(text, tokenizer, count=3, length=5, seed=seed)
    more = segments(text, tokenizer, count=3, length=5, seed=seed, further=2)
    assert torch.equal(more[:3], first)
    assert len({tuple(row) for row in more.tolist()}) == 5
    every = segments(text, tokenizer, count=3, length=5, seed=seed, further=99)
    assert len(every) == 8  # as many as there are
    assert {tuple(row) for row in more.tolist()} <= {tuple(row) for row in every.tolist()}


def test_too_short_a_text_is_refused_with_tokens_found_and_needed(tiny_llama: Path) -> None:
    text = Text("short.txt", "x" * 99)
    with pytest.raises(CalibrationError, match=r"short.txt: 99 tokens found, and 100 needed"):
        segments(text, load_tokenizer(tiny_llama), count=10, length=10, seed=0)


def test_statistics_are_the_sum_of_outer_products(make_model: MakeModel) -> None:
    model = stock_model(make_model("llama"), dtype=torch.float32)
    family = family_of("llama")
    batches = torch.randint(257, (4, 9)).split(2)
    seen: list[torch.Tensor] = []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0].reshape(-1, 48).double())
    )
    with torch.no_grad():
        walk = Walk(0, model.model.layers[0], block_inputs(model, family, batches))
        names = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
        statistics = collect(walk, names)
        alone = collect(walk, ["mlp.down_proj"])
    x = torch.cat(seen[:2])  # two batches; then once more, alone
    assert list(statistics) == names
    hessian = statistics["mlp.down_proj"].hessian
    torch.testing.assert_close(hessian.double(), x.T @ x, rtol=1e-5, atol=1e-5)
    assert torch.equal(alone["mlp.down_proj"].hessian, hessian)
    assert statistics["mlp.down_proj"].cross is None


def test_layers_that_read_the_same_input_share_its_statistics(make_model: MakeModel) -> None:
    """One Hessian for each group is the one that each of its layers would have collected."""
    for model_type in ("llama", "opt"):
        family = family_of(model_type)
        model = stock_model(make_model(model_type), dtype=torch.float32)
        with torch.no_grad():
            batches = torch.randint(257, (4, 9)).split(2)
            block = model.get_submodule(family.blocks)[0]
            walk = Walk(0, block, block_inputs(model, family, batches))
            for first, *others in family.inputs:
                shared = collect(walk, [first])[first].hessian
                for name in others:
                    assert torch.equal(collect(walk, [name])[name].hessian, shared)


def test_cross_statistics_pair_the_tokens_of_both_models(make_model: MakeModel) -> None:
    model = stock_model(make_model("llama"), dtype=torch.float32)
    family, block = family_of("llama"), model.model.layers[0]
    changed = deepcopy(block)
    changed.self_attn.o_proj.weight.data *= 0.5
    batches = torch.randint(257, (4, 9)).split(2)
    seen: dict[str, list[torch.Tensor]] = {"pruned": [], "dense": []}
    with torch.no_grad():
        pruned = Walk(0, changed, block_inputs(model, family, batches))
        dense = Walk(0, block, block_inputs(model, family, batches))
        statistics = collect(pruned, ["mlp.down_proj"], dense)["mlp.down_proj"]
        for name, walk in (("pruned", pruned), ("dense", dense)):
            walk.block.get_submodule("mlp.down_proj").register_forward_pre_hook(
                lambda _, arguments, name=name: seen[name].append(arguments[0].reshape(-1, 48))
            )
            advance(walk)
    x, y = (torch.cat(seen[name]).double() for name in ("pruned", "dense"))
    assert not torch.allclose(x, y)
    assert statistics.cross is not None
    torch.testing.assert_close(statistics.cross.double(), y.T @ x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistics.hessian.double(), x.T @ x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "gpt_neox"])
def test_walking_the_blocks_by_hand_is_the_forward_pass(
    make_model: MakeModel, model_type: str
) -> None:
    model = stock_model(make_model(model_type))
    family = family_of(model_type)
    blocks = model.get_submodule(family.blocks)
    ids = torch.randint(257, (3, 7))
    outputs: list[torch.Tensor] = []
    with torch.no_grad():
        (data,) = block_inputs(model, family, [ids])
        for index, block in enumerate(blocks):
            advance(Walk(index, block, [data]))
        blocks[-1].register_forward_hook(lambda _, __, output: outputs.append(output))
        model(ids)
    torch.testing.assert_close(data.hidden, outputs[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_passes_that_wait_compute_every_layer_once_and_the_same(
    make_model: MakeModel, model_type: str, dtype: torch.dtype
) -> None:
    model = stock_model(make_model(model_type), dtype=dtype)
    family = family_of(model_type)
    block = model.get_submodule(family.blocks)[0]
    linears = structures_of(model, family)[0].linears
    changed = deepcopy(block)
    changed.get_submodule(linears[0]).weight.data *= 0.5
    calls: dict[str, int] = dict.fromkeys(linears, 0)
    ids = torch.randint(257, (4, 9))
    with torch.no_grad():
        again, waiting, dense = (
            Walk(0, part, block_inputs(model, family, ids.split(2)))
            for part in (changed, changed, block)
        )
        separate = [collect(again, [group[0]], dense) for group in family.inputs]
        advance(again)
        for name in calls:
            changed.get_submodule(name).register_forward_hook(
                lambda _, __, ___, name=name: calls.update({name: calls[name] + 1})
            )
        continued = [collect(waiting, [group[0]], dense, pause=True) for group in family.inputs]
        advance(waiting)
    assert set(calls.values()) == {len(waiting.batches)}
    for one, other in zip(separate, continued, strict=True):
        assert one.keys() == other.keys()
        for statistics, same_statistics in zip(one.values(), other.values(), strict=True):
            assert torch.equal(statistics.hessian, same_statistics.hessian)
            assert statistics.cross is not None
            assert same_statistics.cross is not None
            assert torch.equal(statistics.cross, same_statistics.cross)
    for batch, same in zip(again.batches, waiting.batches, strict=True):
        assert torch.equal(batch.hidden, same.hidden)


def test_a_pass_that_is_not_to_wait_needs_no_greenlet(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "greenlet", None)
    model, family = stock_model(make_model("llama")), family_of("llama")
    block = model.get_submodule(family.blocks)[0]
    calls: list[nn.Module] = []
    block.mlp.down_proj.register_forward_hook(lambda layer, *_: calls.append(layer))
    with torch.no_grad():
        ids = torch.randint(257, (2, 9))
        walk, dense = (Walk(0, block, block_inputs(model, family, [ids])) for _ in range(2))
        for group in family.inputs:
            collect(walk, [group[0]], dense, last=group == family.inputs[-1])
    assert len(calls) == 1  # of the dense data, which leaves the block; the others were broken off
    assert dense.done


@pytest.mark.parametrize("pause", [True, False])
def test_with_the_last_statistics_the_dense_data_leaves_the_block(
    make_model: MakeModel, pause: bool
) -> None:
    model, family = stock_model(make_model("llama")), family_of("llama")
    block = model.get_submodule(family.blocks)[0]
    batches = torch.randint(257, (4, 9)).split(2)
    with torch.no_grad():
        pruned, dense, alone = (
            Walk(0, block, block_inputs(model, family, batches)) for _ in range(3)
        )
        *early, last = [group[0] for group in family.inputs]
        for name in early:
            collect(pruned, [name], dense, pause=pause)
            assert not dense.done
        collect(pruned, [last], dense, pause=pause, last=True)
        advance(alone)
        left = [batch.hidden.clone() for batch in dense.batches]
        advance(dense)  # has nothing more to do
    assert dense.done
    assert not pruned.done
    for batch, same, other in zip(dense.batches, left, alone.batches, strict=True):
        assert batch.paused is None
        assert torch.equal(batch.hidden, same)
        torch.testing.assert_close(batch.hidden, other.hidden)


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt_neox", "gemma3_text"])
def test_arguments_that_all_batches_have_are_kept_once(
    make_model: MakeModel, model_type: str
) -> None:
    model, family = stock_model(make_model(model_type)), family_of(model_type)
    with torch.no_grad():
        first, second = block_inputs(model, family, torch.randint(257, (4, 9)).split(2))
    kept = shared(second.arguments, first.arguments)
    for before, after, known in zip(second.arguments, kept, first.arguments, strict=True):
        leaves = [tree_leaves((one.positional, one.named)) for one in (before, after, known)]
        for own, shown, other in zip(*leaves, strict=True):
            if isinstance(own, torch.Tensor):
                assert torch.equal(own, shown)
                assert (shown is other) == torch.equal(own, other)
            else:
                assert shown is own


def test_bfloat16_statistics_lose_nothing(make_model: MakeModel) -> None:
    model = stock_model(make_model("llama"), dtype=torch.bfloat16)
    seen: list[torch.Tensor] = []
    block, name = model.model.layers[0], "self_attn.o_proj"
    block.get_submodule(name).register_forward_pre_hook(
        lambda _, arguments: seen.append(arguments[0].flatten(0, 1).double())
    )
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    with torch.no_grad():
        inputs = block_inputs(model, family_of("llama"), torch.randint(257, (4, 9)).split(2))
        statistics = collect(Walk(0, block, inputs), [name])[name]
    x = torch.cat(seen)
    torch.testing.assert_close(statistics.hessian.double(), x.T @ x, rtol=1e-5, atol=1e-7)
    assert statistics.hessian.dtype == torch.float32
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]


def test_relative_statistics_weigh_a_token_by_what_leaves_the_block(make_model: MakeModel) -> None:
    model = stock_model(make_model("llama"), dtype=torch.float32)
    ids = torch.randint(257, (4, 20), generator=torch.Generator().manual_seed(0))
    seen: dict[str, torch.Tensor] = {}
    block = model.model.layers[0]
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        block.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, name=name: seen.update({name: arguments[0].flatten(0, 1)})
        )
    with torch.no_grad():
        hidden = model.model(ids, output_hidden_states=True).hidden_states[1].flatten(0, 1)
        whole = dict(seen)
        expected = {name: x / hidden.norm(dim=1, keepdim=True) for name, x in whole.items()}
        walk = Walk(0, block, block_inputs(model, family_of("llama"), ids.split(2)))
        statistics = collect_relative(walk, list(expected))
    for name, x in expected.items():
        torch.testing.assert_close(statistics[name].hessian, x.T @ x, rtol=1e-4, atol=1e-6)
        mass = hidden.square().sum(dim=1).reciprocal()
        assert statistics[name].mass == pytest.approx(mass.sum().item(), rel=1e-5)
        total = (whole[name] * mass[:, None]).sum(dim=0)
        torch.testing.assert_close(statistics[name].total, total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("cols", "at_once"), [(7, 3), (8, 2), (5, 8), (1, 1)])
def test_a_hessian_of_parts_is_the_whole_one_and_symmetric(
    cols: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thanos_deploy.calibration.statistics._COLUMNS", at_once)
    x = torch.randn(40, cols, generator=torch.Generator().manual_seed(cols))
    statistics = Statistics.empty(cols)
    for part in x.split(15):
        statistics.add(part, None)
    statistics.complete()
    torch.testing.assert_close(statistics.hessian, x.T @ x)
    assert torch.equal(statistics.hessian, statistics.hessian.T)


def test_centred_statistics_are_those_of_inputs_around_their_means() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, 6, generator=generator) + 3.0 for _ in range(2))
    statistics = Statistics.empty(6, 6)
    for part in range(0, 50, 10):
        statistics.add(x[part : part + 10], y[part : part + 10])
    statistics.complete()
    x0, y0 = x - x.mean(dim=0), y - y.mean(dim=0)
    centred = statistics.centred()
    torch.testing.assert_close(centred.hessian, x0.T @ x0, rtol=1e-4, atol=1e-3)
    assert centred.cross is not None
    torch.testing.assert_close(centred.cross, y0.T @ x0, rtol=1e-4, atol=1e-3)
    weighted = Statistics.empty(6)
    weight = torch.rand(50, 1, generator=generator)
    weighted.add_weighted(x, weight)
    weighted.complete()
    x1 = x - (weight * x).sum(dim=0) / weight.sum()
    torch.testing.assert_close(
        weighted.centred().hessian, (weight * x1).T @ x1, rtol=1e-4, atol=1e-3
    )
