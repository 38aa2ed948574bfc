"""Files with damaged bytes: every damage is detected or harmless, and nothing crashes.

A crash of native code or a hang would end the test run, or its time limit would.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

import exporters.packed
from runtime.engine import open_engine
from runtime.text import open_tokenizer
from tests.conftest import Exported
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.files import file_record
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.errors import DeployError, InputError, IntegrityError
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.convert import convert_packed
from thanos_deploy.pattern import SemiStructured
from thanos_deploy.pruning.layers import linear_shapes
from thanos_deploy.stages.verify import verify

MUTATIONS = 250  # of each of four kinds of file

Check = Callable[[], object]


def mutate(content: bytes, random: np.random.Generator) -> bytes:
    """Damage of the kinds that discs, transfers and editors do."""
    damaged = bytearray(content)
    # Half of the damage hits the beginning, where headers are.
    end = len(damaged) if random.random() < 0.5 else min(len(damaged), 2000)
    place, length = int(random.integers(end)), int(random.integers(1, 20))
    match random.integers(6):
        case 0:
            damaged[place] ^= 1 << int(random.integers(8))
        case 1:
            damaged[place : place + length] = random.bytes(len(damaged[place : place + length]))
        case 2:
            del damaged[place:]
        case 3:
            del damaged[place : place + length]
        case 4:
            damaged[place:place] = damaged[place : place + length]
        case 5:
            damaged[place : place + length] = bytes(len(damaged[place : place + length]))
    return bytes(damaged)


def fuzz(files: list[Path], seed: int, check: Check) -> list[DeployError | None]:
    """What the check says of each damaged file; None for harmless."""
    random = np.random.default_rng(seed)
    originals = [path.read_bytes() for path in files]
    outcomes: list[DeployError | None] = []
    while len(outcomes) < MUTATIONS:
        which = int(random.integers(len(files)))
        damaged = mutate(originals[which], random)
        if damaged == originals[which]:
            continue
        files[which].write_bytes(damaged)
        try:
            check()
            outcomes.append(None)
        except DeployError as error:
            outcomes.append(error)
        files[which].write_bytes(originals[which])
    return outcomes


@pytest.mark.slow
def test_a_damaged_manifest_is_detected_or_harmless(exported_llama: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(exported_llama, tmp_path / "bundle"))
    expected = open_engine(exported_llama).prefill(np.array([[1, 2, 3]]))

    def check() -> None:
        Bundle.open(bundle).verify()
        open_tokenizer(bundle)
        # What is loaded in spite of the damage is the model that was exported.
        np.testing.assert_array_equal(open_engine(bundle).prefill(np.array([[1, 2, 3]])), expected)

    outcomes = fuzz([bundle / "manifest.json"], 0, check)
    assert sum(outcome is not None for outcome in outcomes) > MUTATIONS / 2
    assert {type(error) for error in outcomes if error} <= {InputError, IntegrityError}


def test_every_damage_to_a_graph_is_detected_before_it_is_loaded(
    exported_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Path(shutil.copytree(exported_llama, tmp_path / "bundle"))
    monkeypatch.setattr(onnxruntime, "InferenceSession", None)
    files = [bundle / "onnx" / name for name in ("model.onnx", "model.onnx.data", "export.json")]
    outcomes = fuzz(files, 1, lambda: open_engine(bundle))
    assert {type(outcome) for outcome in outcomes} == {IntegrityError}


@pytest.mark.slow
def test_a_damaged_checkpoint_is_detected_or_harmless(
    exported_two_four: Exported, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exported_two_four("llama") / "model", tmp_path / "model"))

    def check() -> None:
        checkpoint = Checkpoint.open(folder)
        linear_shapes(checkpoint)
        checkpoint.weights.read(checkpoint.weights.shapes)

    outcomes = fuzz([folder / "model.safetensors"], 2, check)
    # A plain checkpoint has no hashes: other numbers in it are a valid model.
    assert sum(outcome is not None for outcome in outcomes) > MUTATIONS / 3
    assert {type(error).exit_code for error in outcomes if error} == {3}


def test_a_damaged_packed_checkpoint_is_detected_or_harmless(
    exported_two_four: Exported, tmp_path: Path
) -> None:
    original, packed = exported_two_four("llama") / "model", tmp_path / "packed"
    packed.mkdir()
    exporters.packed.export(Checkpoint.open(original), packed, pattern=SemiStructured(2, 4))
    before = load_file(original / "model.safetensors")

    def check() -> None:
        shutil.rmtree(tmp_path / "restored", ignore_errors=True)
        convert_packed(packed, tmp_path / "restored")
        after = load_file(tmp_path / "restored" / "model.safetensors")
        # What is restored in spite of the damage is the model that was packed.
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)

    outcomes = fuzz([packed / "packed.json", packed / "model.packed.safetensors"], 3, check)
    assert sum(outcome is not None for outcome in outcomes) > MUTATIONS / 2
    assert {type(error).exit_code for error in outcomes if error} <= {3, 7}


def test_a_graph_whose_forged_hashes_fit_is_bad_input(
    two_four_bundle: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(two_four_bundle, tmp_path / "bundle"))
    data = bundle / "onnx" / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:1000])
    manifest = json.loads((bundle / "manifest.json").read_text())
    recorded = manifest["stages"]["onnx"]["files"]
    recorded["onnx/model.onnx.data"] = encode(file_record(data))
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="the files of stage 'onnx' have the recorded hashes"):
        verify(Bundle.open(bundle))
