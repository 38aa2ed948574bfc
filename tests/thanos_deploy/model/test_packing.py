import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.kernels.packed import PackedWeight
from tests.bitmask import bitmask_folder
from tests.conftest import Exported
from thanos_deploy.bundle.files import sha256_of
from thanos_deploy.errors import IntegrityError, ModelError
from thanos_deploy.model import packing
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.convert import convert_packed
from thanos_deploy.model.locate import locate
from thanos_deploy.model.packed_folder import is_packed, pack_folder, unpack_folder
from thanos_deploy.model.packing import from_cutlass, pack, to_cutlass, unpack
from thanos_deploy.pattern import SemiStructured

TWO_FOUR = SemiStructured(2, 4)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


def sparse(rows: int, cols: int, pattern: SemiStructured, dtype: torch.dtype, seed: int) -> Tensor:
    """A weight that holds the pattern, with some groups emptier than it allows."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(
        -100, 100, (rows * cols // pattern.group, pattern.group), generator=generator
    )
    order = torch.rand(groups.shape, generator=generator).argsort(dim=1)
    groups.scatter_(1, order[:, pattern.kept :], 0)
    return groups.reshape(rows, cols).to(dtype)


@given(
    rows=st.integers(1, 7),
    groups=st.integers(1, 9),
    pattern=st.sampled_from(
        [TWO_FOUR, SemiStructured(1, 4), SemiStructured(4, 8), SemiStructured(2, 3)]
    ),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_what_is_packed_is_unpacked_bit_by_bit(
    rows: int, groups: int, pattern: SemiStructured, dtype: torch.dtype, seed: int
) -> None:
    weight = sparse(rows, groups * pattern.group, pattern, dtype, seed)
    values, mask = pack(weight, pattern)
    assert values.shape == (rows, groups * pattern.kept)
    assert values.dtype == dtype
    restored = unpack(values, mask, weight.shape[1])
    assert restored.dtype == dtype
    assert restored.view(torch.uint8).equal(weight.view(torch.uint8))


def test_the_layout_is_the_one_that_is_documented() -> None:
    weight = torch.tensor([[0, 5, 0, 7, 1, 0, 0, 2, 0, 0, 0, 9]], dtype=torch.float16)
    values, mask = pack(weight, TWO_FOUR)
    # The third group has one value only; the first zero fills up.
    assert values.tolist() == [[5, 7, 1, 2, 0, 9]]
    assert mask.tolist() == [[0b10011010, 0b1001]]


@given(pattern=st.sampled_from([TWO_FOUR, SemiStructured(2, 3)]), seed=st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_a_weight_in_parts_is_packed_as_numpy_packs_it(pattern: SemiStructured, seed: int) -> None:
    weight = sparse(5, 6 * pattern.group, pattern, torch.float16, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_ENTRIES_AT_ONCE", 2 * weight.shape[1])
        values, mask = pack(weight, pattern)
    for row, kept, bits in zip(weight.numpy(), values.numpy(), mask.numpy(), strict=True):
        where = np.unpackbits(bits, bitorder="little")[: len(row)].astype(bool)
        assert (where.reshape(-1, pattern.group).sum(axis=1) == pattern.kept).all()
        assert (row[where] == kept).all()
        assert not row[~where].any()


def test_a_negative_zero_is_kept() -> None:
    weight = torch.tensor([[-0.0, 0, 0, 1]], dtype=torch.float16)
    values, mask = pack(weight, TWO_FOUR)
    assert str(values.tolist()) == "[[-0.0, 1.0]]"
    assert mask.tolist() == [[0b1001]]


def test_packing_stays_on_the_device_of_the_weight() -> None:
    # Tensors without values: reading one is an error, and so is meeting one of another device.
    weight = torch.empty(8, 36, dtype=torch.bfloat16, device="meta")
    values, mask = packing._packed_part(weight, TWO_FOUR)
    assert (values.device.type, values.shape, values.dtype) == ("meta", (8, 18), torch.bfloat16)
    assert (mask.device.type, mask.shape, mask.dtype) == ("meta", (8, 5), torch.uint8)


def test_the_verdict_is_the_only_number_that_the_host_reads() -> None:
    weight = sparse(8, 36, TWO_FOUR, torch.float16, 0)
    read: list[str] = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            # What makes the host wait for a device, and shapes that depend on values.
            if func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::_to_copy"):
                target = (kwargs or {}).get("device")
                if func.name() != "aten::_to_copy" or target is not None:
                    read.append(func.name())
            return func(*args, **(kwargs or {}))

    with Reads():
        PackedWeight.of(weight)
    assert read == ["aten::_local_scalar_dense"]


@pytest.mark.parametrize(
    ("dtype", "ratio"), [(torch.float16, 9 / 16), (torch.bfloat16, 9 / 16), (torch.int8, 5 / 8)]
)
def test_two_four_takes_the_promised_part(dtype: torch.dtype, ratio: float) -> None:
    weight = sparse(64, 128, TWO_FOUR, dtype, 0)
    values, mask = pack(weight, TWO_FOUR)
    packed = values.numel() * values.element_size() + mask.numel()
    assert packed == ratio * weight.numel() * weight.element_size()


def test_negative_zero_and_nan_are_kept_as_they_are() -> None:
    weight = torch.tensor([[-0.0, float("nan"), 0, 0]])
    restored = unpack(*pack(weight, TWO_FOUR), 4)
    assert restored.view(torch.int32).equal(weight.view(torch.int32))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([[1.0, 2, 3, 0], [0, 0, 1, 0]]), "1 groups of 4 have more than 2"),
        (torch.tensor([[1.0, 2, -0.0, 0]]), "1 groups of 4 have more than 2"),
        (torch.zeros(2, 6), "6 columns are not a multiple of 4"),
    ],
)
def test_a_weight_off_the_pattern_is_refused(weight: Tensor, message: str) -> None:
    with pytest.raises(ModelError, match=f"up_proj: {message}"):
        pack(weight, TWO_FOUR, "up_proj")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
def test_the_layout_of_cutlass_goes_there_and_back(dtype: torch.dtype) -> None:
    weight = sparse(64, 256, TWO_FOUR, dtype, 1)
    values, metadata = to_cutlass(weight)
    assert values.shape == (64, 128)
    assert from_cutlass(values, metadata).equal(weight)
    # torch's converter takes a dense weight without a word and loses half of it.
    with pytest.raises(ModelError, match="does not hold 2:4"):
        to_cutlass(torch.ones(64, 256, dtype=dtype))


@pytest.mark.parametrize(
    "weight", [torch.zeros(32, 64), torch.zeros(31, 64).half(), torch.zeros(32, 32).half()]
)
def test_cutlass_is_not_given_what_it_does_not_take(weight: Tensor) -> None:
    with pytest.raises(ModelError, match="cutlass does not support a 2:4 weight of"):
        to_cutlass(weight)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder of two files, one of two weights in each being 2:4."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(
        {"a.weight": sparse(8, 16, TWO_FOUR, torch.float16, 0), "norm": torch.ones(5)},
        folder / "model-00001-of-00002.safetensors",
    )
    save_file(
        {"b.weight": sparse(4, 24, TWO_FOUR, torch.bfloat16, 1), "e.weight": torch.rand(3, 8)},
        folder / "model-00002-of-00002.safetensors",
    )
    return folder


PATTERNS = {"a.weight": TWO_FOUR, "b.weight": TWO_FOUR}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def test_a_folder_is_restored_with_its_files(model: Path, tmp_path: Path) -> None:
    packed, restored = tmp_path / "packed", tmp_path / "restored"
    packed.mkdir()
    restored.mkdir()
    sizes = pack_folder(model, packed, PATTERNS)
    assert sizes.packed == ("a.weight", "b.weight")
    assert sizes.bytes_after == sum(path.stat().st_size for path in packed.glob("*.safetensors"))
    assert is_packed(packed)
    assert not is_packed(model)
    unpack_folder(packed, restored)
    for path in model.glob("*.safetensors"):
        before, after = load_file(path), load_file(restored / path.name)
        assert before.keys() == after.keys()
        assert all(before[n].dtype == after[n].dtype and before[n].equal(after[n]) for n in before)
    index = json.loads((restored / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["b.weight"] == "model-00002-of-00002.safetensors"


def test_weights_that_are_stored_transposed_are_restored_so(tmp_path: Path) -> None:
    for name in ("model", "packed", "restored"):
        (tmp_path / name).mkdir()
    weight = sparse(8, 16, TWO_FOUR, torch.float32, 2).T.contiguous()
    save_file({"a.weight": weight}, tmp_path / "model" / "model.safetensors")
    pack_folder(tmp_path / "model", tmp_path / "packed", {"a.weight": TWO_FOUR}, transposed=True)
    unpack_folder(tmp_path / "packed", tmp_path / "restored")
    assert load_file(tmp_path / "restored" / "model.safetensors")["a.weight"].equal(weight)


def test_stock_loaders_find_no_weights_in_a_packed_folder(model: Path, tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    pack_folder(model, tmp_path / "packed", PATTERNS)
    assert not list((tmp_path / "packed").glob("model*0000?.safetensors"))


def test_a_changed_file_is_refused(model: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    pack_folder(model, packed, PATTERNS)
    shard = packed / "model-00002-of-00002.packed.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(IntegrityError, match="00002-of-00002"):
        unpack_folder(packed, tmp_path)
    shard.unlink()
    with pytest.raises(IntegrityError, match="missing"):
        unpack_folder(packed, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "packed format 2"),
        ({"files": {}}, "no files"),
        ({"files": {"../x.packed.safetensors": {"bytes": 1, "sha256": ""}}}, "names a folder"),
        ({"weights": []}, "weights is"),
    ],
)
def test_an_unusable_record_is_bad_input(
    model: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    pack_folder(model, packed, PATTERNS)
    record = json.loads((packed / "packed.json").read_text())
    (packed / "packed.json").write_text(json.dumps({**record, "transposed": True}))
    with pytest.raises(IntegrityError, match=r"packed\.json"):
        unpack_folder(packed, tmp_path)
    del record["sha256"]
    record |= change
    (packed / "packed.json").write_text(json.dumps({**record, "sha256": sha256_of(record)}))
    with pytest.raises(ModelError, match=message):
        unpack_folder(packed, tmp_path)


def test_a_mask_that_does_not_fit_is_bad_input() -> None:
    values, mask = pack(sparse(4, 16, TWO_FOUR, torch.float16, 0), TWO_FOUR)
    broken = mask.clone()
    broken[2, 0] ^= 1
    for wrong in (broken, mask[:3], mask.to(torch.int8)):
        with pytest.raises(ModelError):
            unpack(values, wrong, 16)
    with pytest.raises(ModelError):
        unpack(values, mask, 12)


@pytest.mark.slow
@pytest.mark.parametrize("keep_weight", [True, False])
def test_the_abandoned_bitmask_checkpoints_are_read(
    exported_two_four: Exported, tmp_path: Path, keep_weight: bool
) -> None:
    model = exported_two_four("qwen2") / "model"
    bitmask_folder(model, tmp_path / "bitmask", keep_weight=keep_weight)
    assert not locate(str(tmp_path / "bitmask")).is_ordinary
    convert_packed(tmp_path / "bitmask", tmp_path / "restored")
    before, after = (load_file(f / "model.safetensors") for f in (model, tmp_path / "restored"))
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    assert "quantization_config" not in json.loads(
        (tmp_path / "restored" / "config.json").read_text()
    )
    assert Checkpoint.open(tmp_path / "restored").config.model_type == "qwen2"


@pytest.mark.parametrize("part", ["bitmask", "shape"])
def test_a_bitmask_checkpoint_with_a_part_missing_is_bad_input(
    exported_two_four: Exported, tmp_path: Path, part: str
) -> None:
    model = exported_two_four("qwen2") / "model"
    bitmask_folder(model, tmp_path / "bitmask", keep_weight=False)
    path = tmp_path / "bitmask" / "model.safetensors"
    tensors = load_file(path)
    del tensors[f"model.layers.0.mlp.up_proj.{part}"]
    save_file(tensors, path)
    with pytest.raises(ModelError, match=f"without model.layers.0.mlp.up_proj.{part}"):
        convert_packed(tmp_path / "bitmask", tmp_path / "restored")


@pytest.mark.slow
def test_packing_needs_memory_for_one_tensor_and_not_for_the_model(tmp_path: Path) -> None:
    for name in ("model", "packed", "restored"):
        (tmp_path / name).mkdir()
    names = [f"{number}.weight" for number in range(24)]
    weight = sparse(2048, 2048, TWO_FOUR, torch.float16, 0)  # 8.4 MB, 201 MB together
    save_file({name: weight.clone() for name in names}, tmp_path / "model" / "model.safetensors")
    code = (
        "import sys, torch; from pathlib import Path\n"
        "from thanos_deploy.machine.environment import peak_memory_bytes as peak\n"
        "from thanos_deploy.model.packed_folder import pack_folder, unpack_folder\n"
        "from thanos_deploy.model.packing import pack\n"
        "from thanos_deploy.pattern import SemiStructured\n"
        "pattern, root = SemiStructured(2, 4), Path(sys.argv[1])\n"
        "pack(torch.zeros(2048, 2048, dtype=torch.float16), pattern)\n"
        "before = peak()\n"
        "names = [f'{number}.weight' for number in range(24)]\n"
        "pack_folder(root / 'model', root / 'packed', dict.fromkeys(names, pattern))\n"
        "unpack_folder(root / 'packed', root / 'restored')\n"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        # glibc keeps freed tensors of up to 32 MB in its heap; how many differs from run to run.
        # With a fixed threshold it gives them back at once, and the peak is what is held at a time.
        env={**os.environ, "PYTHONPATH": os.getcwd(), "MALLOC_MMAP_THRESHOLD_": str(1 << 17)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert load_file(tmp_path / "restored" / "model.safetensors")[names[7]].equal(weight)
    # What one call of `pack` needs is in `before` already.
    assert int(done.stdout) < 2 * weight.nbytes
