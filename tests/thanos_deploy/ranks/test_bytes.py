"""The bytes of a pruned model do not depend on the number of ranks."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import thanos_deploy as td
from tests.conftest import write_model
from tests.model_types import MIXTURES
from tests.ranks import RunningRanks, make_small, write_text
from tests.thanos_deploy.model.test_experts import write_mixture
from thanos_deploy import methods
from thanos_deploy.model.families import family_of

RANKS = (1, 2, 4)

# Options of `prune`, by a name for the case.
ZEROS: dict[str, dict[str, Any]] = {
    f"{method} {pattern}": {
        "method": method,
        "pattern": pattern,
        "keep_shape": pattern.startswith("struct"),
    }
    for method in methods.names()
    for pattern in ("2:4", "4:8", "unstructured:0.5", "structured:0.3")
}
CASES: dict[str, dict[str, Any]] = {
    **ZEROS,
    "fast": {"pattern": "2:4", "preset": "fast"},
    "paper, statistics of a whole block": {
        "pattern": "2:4",
        "preset": "paper",
        "true_sequential": False,
    },
    "outlier rows": {"pattern": "2:4", "outlier_rows": 0.1},
    "bf16": {"pattern": "2:4", "calib_forward": "bf16", "dtype": "bf16"},
    "some layers": {"pattern": "2:4", "ignore": ["re:.*down_proj"]},
    "owl": {"pattern": "unstructured:0.5", "allocation": "owl", "preset": "fast"},
    "heads and channels": {"pattern": "structured:0.2"},
    "widths of each block's own": {"pattern": "structured:0.2", "allocation": "loss"},
    "whole blocks": {"pattern": "structured:0.3", "allocation": "blocks", "tune_steps": 2},
    "heads and channels, towards the dense model": {
        "pattern": "structured:0.2",
        "dense_target": 0.5,
    },
    "channels of experts": {"model": "mixtral", "pattern": "structured:0.2", "shrink": "ffn"},
    "unstructured, fast": {"pattern": "unstructured:0.6", "preset": "fast"},
    "transposed, unstructured": {"model": "gpt2", "pattern": "unstructured:0.5"},
    "transposed": {"model": "gpt2", "pattern": "2:4", "preset": "best"},
    "tuned on more": {"pattern": "2:4", "tune_steps": 5, "tune_nsamples": 22},
    "heads and channels, tuned on more": {
        "pattern": "structured:0.2",
        "tune_steps": 5,
        "tune_nsamples": 22,
    },
    "quantised": {"pattern": "2:4", "preset": "fast", "quantize": "int4:16:asym"},
    "quantised and tuned": {
        "pattern": "2:4",
        "preset": "fast",
        "quantize": "int4:16",
        "tune_steps": 5,
        "tune_nsamples": 22,
    },
    "trained": {"pattern": "2:4", "preset": "fast", "recover": 7},
    "trained by low-rank updates": {
        "pattern": "2:4",
        "preset": "fast",
        "recover": 7,
        "recover_rank": 3,
    },
    "trained on the dense model's own text": {
        "pattern": "2:4",
        "preset": "fast",
        "calib": "signs.txt",  # a random model writes nothing else
        "recover": 7,
        "recover_text": "own",
    },
    "heads and channels, trained and quantised": {
        "pattern": "structured:0.2",
        "recover": 40,
        "quantize": "int8",
    },
}


def prune_all(models: Path, out: Path) -> None:
    """Prune by every case, and write the hashes of the files."""
    make_small()
    hashes = {}
    for number, (name, options) in enumerate(CASES.items()):
        given = {"calib": "text.txt", "nsamples": 9, "seqlen": 64, "model": "llama", **options}
        given["calib"] = str(models / given["calib"])
        bundle = td.prune(
            str(models / given.pop("model")), out=out / str(number), device="cpu", **given
        )
        digest = hashlib.sha256((bundle.path / "model" / "model.safetensors").read_bytes())
        for other in sorted(bundle.path.glob("codes/*.safetensors")):
            digest.update(other.read_bytes())
        for own_text in bundle.path.glob("own-text.jsonl"):
            digest.update(own_text.read_bytes())
        hashes[name] = digest.hexdigest()
    (out / "hashes.json").write_text(json.dumps(hashes))


@pytest.fixture(scope="module")
def hashes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    """What every number of ranks makes of every case."""
    models = tmp_path_factory.mktemp("models")
    for model_type in ("llama", "gpt2"):
        write_model(models / model_type, model_type)
    write_mixture(models / "mixtral", family_of("mixtral"), MIXTURES["mixtral"])
    for path in (models / "llama").glob("token*"):
        shutil.copy(path, models / "mixtral")
    write_text(models / "text.txt")
    (models / "signs.txt").write_text("#$%&*+/<=>@" * 200)
    made = {}
    for count in RANKS:
        out = tmp_path_factory.mktemp(f"ranks-{count}")
        running = RunningRanks(count, prune_all, models, out, errors=out / "errors")
        assert running.wait(300) == [0] * count, (out / "errors" / "0").read_text()
        made[count] = json.loads((out / "hashes.json").read_text())
    return made


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_number_of_ranks_gives_the_same_bytes(
    hashes: dict[int, dict[str, str]], case: str
) -> None:
    assert len({hashes[count][case] for count in RANKS}) == 1


@pytest.mark.slow
def test_what_is_compared_differs_where_it_should(hashes: dict[int, dict[str, str]]) -> None:
    """Else the test above could not fail."""
    assert len(set(hashes[1].values())) > len(CASES) * 2 / 3
