"""A checkpoint as large models have them: hundreds of files with an index, in bfloat16."""

import json
import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import VOCABULARY, write_model
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.tensorfile import INDEX, TensorFile
from thanos_deploy.pattern import SemiStructured
from thanos_deploy.pruning.layers import prune
from thanos_deploy.pruning.recipe import Recipe

BLOCKS = 34
SEGMENTS = torch.randint(VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    """A model with a file for each of its 300 and more tensors."""
    folder = tmp_path / "dense"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": BLOCKS}
    tied = {"tie_word_embeddings": request.param}
    write_model(folder, "llama", dtype=torch.bfloat16, **sizes, **tied)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {}
    for number, (name, tensor) in enumerate(tensors.items(), start=1):
        files[name] = f"model-{number:05}-of-{len(tensors):05}.safetensors"
        save_file({name: tensor}, folder / files[name], {"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(index))
    assert len(files) == 9 * BLOCKS + 3 - request.param > 300
    return Checkpoint.open(folder)


@pytest.fixture
def few_files() -> Iterator[None]:
    """The process may hold fewer files open than the checkpoint has."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.slow
@pytest.mark.usefixtures("few_files")
def test_it_is_read_by_offset_and_written_file_by_file(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Counter[str] = Counter()
    largest = 0
    original = TensorFile.read

    def counted(file: TensorFile, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        nonlocal largest
        piece = original(file, name, start, stop)
        if file.path.parent == checkpoint.folder:
            read[name] += piece.nbytes
            largest = max(largest, piece.nbytes)
        return piece

    monkeypatch.setattr(TensorFile, "read", counted)
    out = tmp_path / "pruned"
    out.mkdir()
    recipe = Recipe.of(SemiStructured(2, 4), method="magnitude")
    prune(checkpoint, SEGMENTS, out, recipe)
    # Each block once, by its own bytes; what lies outside the blocks to run it and to copy it.
    for name, bytes_read in read.items():
        times = 1 if ".layers." in name else 2
        size = 2 * torch.Size(checkpoint.weights.shapes[name]).numel()
        assert size <= bytes_read <= times * size, name
    assert largest <= 2 * VOCABULARY * 16
    assert json.loads((out / INDEX).read_bytes()) == json.loads(
        (checkpoint.folder / INDEX).read_bytes()
    )
    pruned = Checkpoint.open(out)
    assert pruned.weights.dtypes == checkpoint.weights.dtypes
    for name in ("model.layers.0.mlp.up_proj", f"model.layers.{BLOCKS - 1}.self_attn.o_proj"):
        weight = pruned.weights.read([f"{name}.weight"])[f"{name}.weight"]
        assert (weight.reshape(16, -1, 4).count_nonzero(dim=-1) == 2).all()
