"""`vllm serve` on shrunk and on 2:4 models, beside transformers: the same greedy tokens."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import PRUNED, VOCABULARY, MakeModel, stock_model
from tests.recipes import plain
from tests.vllm.conftest import exported, greedy, needs_vllm, refusal, serving
from thanos_deploy.bundle.codec import Json, encode
from thanos_deploy.bundle.files import write_record
from thanos_deploy.bundle.layout import LAYERS
from thanos_deploy.bundle.manifest import claim
from thanos_deploy.bundle.record import Source
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.loaders import LOADERS
from thanos_deploy.pattern import SemiStructured
from thanos_deploy.pruning.layers import prune
from thanos_deploy.shrink import sizing
from thanos_deploy.shrink.cut import shrink
from thanos_deploy.shrink.options import Fit, Sizing
from thanos_deploy.shrink.survey import survey

pytestmark = needs_vllm

PROMPTS = [[10, 60, 200, 4, 77], [5, 9, 31]]
(TESTED,) = (loader.tested for loader in LOADERS if loader.tested is not None)

# vLLM's attention on a CPU takes heads of 32; OPT has no size of a head beside the others.
SIZES = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
SIZES_OF_OPT = {
    **{"hidden_size": 128, "word_embed_proj_dim": 128, "num_attention_heads": 4},
    "ffn_dim": 512,
}


def model_of(make_model: MakeModel, model_type: str) -> Path:
    return make_model(model_type, **(SIZES_OF_OPT if model_type == "opt" else SIZES))


def segments() -> torch.Tensor:
    return torch.randint(VOCABULARY, (4, 60), generator=torch.Generator().manual_seed(0))


def expected(folder: Path) -> list[list[int]]:
    """The tokens of transformers, without a cache and in float32."""
    model = stock_model(folder, dtype=torch.float32)
    answers = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(16):
            with torch.inference_mode():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(ids[len(prompt) :])
    return answers


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(each, marks=[] if each == "llama" else pytest.mark.slow)
        for each in (*TESTED.model_types, "opt")
    ],
)
def test_vllm_answers_with_a_shrunk_model_as_transformers_does(
    make_model: MakeModel, model_type: str, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(model_of(make_model, model_type))
    part = Sizing("both" if checkpoint.family.heads.free_size else "ffn")
    model = tmp_path / "model"
    model.mkdir()
    plan = sizing.plan(checkpoint, survey(checkpoint, segments()), 0.3, part)
    shrink(checkpoint, segments(), model, plan, Fit())
    with serving(model, "--enforce-eager") as client:
        assert greedy(client, model, PROMPTS) == expected(model)


def two_four(make_model: MakeModel, model_type: str, out: Path, *, dense: str = "") -> Path:
    """A bundle at 2:4, but for the layers whose name has a part."""
    checkpoint = Checkpoint.open(model_of(make_model, model_type))
    patterns = {
        name: SemiStructured(2, 4) for name in checkpoint.linears if not dense or dense not in name
    }

    def produce(folder: Path) -> Json:
        (folder / "model").mkdir()
        recipe = plain(SemiStructured(2, 4))
        blocks = prune(checkpoint, segments(), folder / "model", recipe, patterns=patterns)
        write_record(folder / LAYERS, blocks)
        return encode(PRUNED)

    with claim(out, Source("folder", model_type, "", "")) as bundle:
        options = {"pattern": "2:4", "method": "magnitude"}
        bundle.run("prune", produce, options=options, inputs={})
    return out


# Compiled, unless it is said otherwise. OPT has biases; one fused layer of the LLaMA is dense.
@pytest.mark.parametrize(
    ("model_type", "dense", "options"),
    [
        ("llama", "layers.1.mlp.gate", ("--enforce-eager",)),
        ("opt", "", ()),
    ],
    ids=["a dense layer", "biases"],
)
def test_vllm_multiplies_with_packed_weights(
    make_model: MakeModel, tmp_path: Path, model_type: str, dense: str, options: tuple[str, ...]
) -> None:
    out = two_four(make_model, model_type, tmp_path / "out", dense=dense)
    folder = exported(out)
    with serving(folder, *options) as client:
        assert greedy(client, folder, PROMPTS) == expected(out / "model")


@pytest.fixture(scope="module")
def packed(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for vLLM. Not to be changed."""
    return exported(two_four(make_model, "llama", tmp_path_factory.mktemp("bad") / "out"))


def test_a_flipped_byte_is_refused_before_weights_are_used(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "vllm"))
    (weights,) = folder.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    said = refusal(folder)
    assert "SHA-256" in said
    assert "fetch the checkpoint again" in said


@pytest.mark.slow
def test_another_quantisation_is_refused(packed: Path) -> None:
    assert "does not match the quantization" in refusal(packed, "--quantization", "awq")
