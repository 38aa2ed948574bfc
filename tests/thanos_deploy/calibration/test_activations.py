from pathlib import Path

import pytest
import torch

from thanos_deploy.calibration.activations import Activations, StoredInputs
from thanos_deploy.calibration.blocks import BlockInputs, LoadedInputs
from thanos_deploy.errors import ModelError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_leaves_a_block_enters_the_next_one_as_the_file_has_it(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    names, random = ("pruned.0", "pruned.1", "dense.0"), torch.Generator().manual_seed(0)
    kinds = {name: (dtype, (2, 5, 8)) for name in names}
    activations = Activations(tmp_path, -1, kinds, torch.float32)
    before: dict[str, torch.Tensor] = {}
    for index in range(4):
        for name in names:
            hidden = torch.randn(2, 5, 8, generator=random)
            activations.write(name, hidden)
            if before:  # what enters a block stays while others leave it
                assert torch.equal(activations.read(name), before[name])
        (file,) = activations.advance()
        before = {name: activations.read(name) for name in names}
        assert file.path == tmp_path / f"inputs-{index:04d}-00.safetensors"
        again = Activations(tmp_path, index, kinds, torch.float32)
        assert all(torch.equal(again.read(name), before[name]) for name in names)
        again.close()
        assert torch.equal(before[names[-1]], hidden.to(dtype).float())
    assert len(list(tmp_path.iterdir())) <= 2
    activations.close()


def test_hidden_states_that_overflow_the_checkpoints_dtype_are_an_error(tmp_path: Path) -> None:
    kinds = {"pruned.0": (torch.float16, (1, 2, 2))}
    activations = Activations(tmp_path, -1, kinds, torch.float32)
    with pytest.raises(ModelError, match=r"up to 70000 enter block 0, more than .* torch.float16"):
        activations.write("pruned.0", torch.full((1, 2, 2), 7e4))
    activations.close()


def test_what_enters_a_block_cannot_be_assigned_and_what_left_it_is_read_by_its_own_name(
    tmp_path: Path,
) -> None:
    entering, leaving = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    activations = Activations(tmp_path, -1, {"pruned.0": (torch.float32, (1, 2, 3))}, torch.float32)
    stored = StoredInputs(activations, "pruned.0", [])
    stored.leave(entering)
    activations.advance()
    loaded = LoadedInputs(entering, [])
    batches: tuple[BlockInputs, ...] = (stored, loaded)
    for batch in batches:
        with pytest.raises(AttributeError):
            batch.hidden = leaving  # type: ignore[misc]
        assert torch.equal(batch.hidden, entering)
        batch.leave(leaving)
        assert torch.equal(batch.left, leaving)
    activations.advance()
    for batch in batches:
        assert torch.equal(batch.hidden, leaving)
        assert batch.shape == (1, 2, 3)
    activations.close()
