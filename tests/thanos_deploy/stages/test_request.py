"""The request of a stage prune: what a manifest says of it, and what has no meaning together."""

from typing import Any

import pytest

from tests.presets import SHIPPED, SHIPPED_CUTS
from thanos_deploy import methods
from thanos_deploy.bundle.codec import decode
from thanos_deploy.errors import UsageError
from thanos_deploy.methods import thanos
from thanos_deploy.pattern import parse
from thanos_deploy.pruning.recipe import Recipe
from thanos_deploy.pruning.result import PruneOptions
from thanos_deploy.shrink.options import Cut, Fit, Sizing
from thanos_deploy.stages.request import PruneRequest

DATA = {"calib": "builtin", "text_field": "text", "nsamples": 32, "seqlen": 512, "seed": 0}

# What manifests have said since format 1, and what was asked for.
RECORDED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "2:4": (
        {"calib_forward": "fp32", "mask_passes": 0, "tune_steps": 16, "tune_nsamples": 0},
        {
            **{"pattern": "2:4", "method": "thanos", "block_columns": 32, "damping": 0.01},
            **{"damping_mode": "mean", "score": "obs", "refit_steps": 8, "outlier_rows": 0.0},
            **{"true_sequential": True, "dense_target": 0.4, "tune_steps": 16},
            **{"calib_forward": "fp32", **DATA, "dtype": "auto"},
        },
    ),
    "unstructured:0.6": (
        {
            **{"method": "sparsegpt", "preset": "paper", "allocation": "owl", "owl_spread": 0.1},
            **{"ignore": ("a",), "include": ("re:b.*",), "calib": "/texts/wiki.txt", "seed": 3},
            **{"dtype": "fp16", "recover": 40, "calib_forward": "bf16"},
        },
        {
            **{"pattern": "unstructured:0.6", "method": "sparsegpt", "block_columns": 128},
            **{"damping": 0.01, "damping_mode": "mean", "true_sequential": False},
            **{"dense_target": 0.0, "tune_steps": 0, "calib_forward": "bf16"},
            **{"allocation": "owl", "owl_threshold": 5.0, "owl_spread": 0.1},
            **{"include": ["re:b.*"], "ignore": ["a"], **DATA, "calib": "wiki.txt", "seed": 3},
            **{"dtype": "fp16", "recover": 40},
        },
    ),
    "structured:0.2": (
        {
            **{"shrink": "ffn", "ffn_multiple": 32, "allocation": "loss", "damp": 0.1},
            "dense_target": 0.5,
        },
        {
            **{"pattern": "structured:0.2", "method": "thanos", "cut": True, "part": "ffn"},
            **{"multiple": 32, "allocation": "loss", "damping": 0.1, "damping_mode": "mean"},
            **{"dense_target": 0.5, **DATA, "dtype": "auto"},
        },
    ),
    "structured:0.4": (
        {"preset": "max", "tune_steps": 5, "tune_nsamples": 64, "recover": 3},
        {
            **{"pattern": "structured:0.4", "method": "thanos", "cut": True, "part": "both"},
            **{"multiple": None, "allocation": "uniform", "damping": 0.01, "damping_mode": "mean"},
            **{"dense_target": 0.0, "tune_steps": 5, "tune_nsamples": 64},
            **{**DATA, "dtype": "auto", "recover": 3},
        },
    ),
    "4:8": (
        {"calib_forward": "fp32", "mask_passes": 0, "tune_steps": 16, "tune_nsamples": 64},
        {
            **{"pattern": "4:8", "method": "thanos", "block_columns": 32, "damping": 0.01},
            **{"damping_mode": "mean", "score": "obs", "refit_steps": 8, "outlier_rows": 0.0},
            **{"true_sequential": True, "dense_target": 0.4, "tune_steps": 16},
            **{"tune_nsamples": 64, "calib_forward": "fp32", **DATA, "dtype": "auto"},
        },
    ),
    "structured:0.3": (
        {
            **{"method": "wanda", "keep_shape": True, "calib_forward": "fp32"},
            "sparsity_file": "/files/own.json",
        },
        {
            **{"pattern": "structured:0.3", "method": "wanda", "true_sequential": False},
            **{"dense_target": 0.0, "tune_steps": 0, "calib_forward": "fp32"},
            **{"sparsity_file": "own.json", **DATA, "dtype": "auto"},
        },
    ),
}


@pytest.mark.parametrize("pattern", RECORDED)
def test_a_manifest_says_what_it_always_said_and_is_read_again(pattern: str) -> None:
    given, recorded = RECORDED[pattern]
    request = PruneRequest.of(parse(pattern), device="cpu", **given)
    assert request.to_json() == recorded
    again = PruneRequest.from_json(recorded)
    assert again.to_json() == recorded
    assert (again.how.pattern, again.how.walks_dense) == (
        request.how.pattern,
        request.how.walks_dense,
    )
    known = decode(PruneOptions, recorded)
    assert (known.pattern, known.method) == (str(request.how.pattern), request.how.method)
    assert (known.cut, known.recover) == (isinstance(request.how, Cut), request.recover)


@pytest.mark.parametrize("preset", methods.PRESET_NAMES)
@pytest.mark.parametrize("method", methods.names())
def test_what_is_given_comes_before_the_preset(method: str, preset: str) -> None:
    usual = methods.load(method).preset(preset)
    request = PruneRequest.of(parse("2:4"), method=method, preset=preset, tune_steps=3)
    recorded = request.to_json()
    assert recorded["tune_steps"] == 3
    assert recorded["dense_target"] == usual.walk.dense_target
    for name in thanos.Options.__dataclass_fields__:
        wanted = getattr(usual.options, name, None)
        # An option of later versions is recorded where it does something.
        assert recorded.get(name, 0 if name == "mask_passes" and wanted == 0 else None) == wanted


@pytest.mark.parametrize("pattern", ["2:4", "structured:0.2"])
def test_a_preset_says_how_to_train_what_is_left(pattern: str) -> None:
    assert PruneRequest.of(parse(pattern), preset="best").recover == 0
    assert PruneRequest.of(parse(pattern), preset="max").recover > 0
    assert PruneRequest.of(parse(pattern), preset="max", recover=0).recover == 0


def test_what_is_shipped_tunes_on_more_than_the_statistics() -> None:
    for preset in ("best", "max"):
        walk, cut = SHIPPED[preset].walk, SHIPPED_CUTS[preset].tuning
        for tuning in (walk, cut):
            assert tuning.tune_steps > 0
            assert tuning.further(32) == tuning.tune_nsamples - 32 > 0
            assert tuning.further(10000) == 0


def test_the_options_of_a_cut_are_typed() -> None:
    given = RECORDED["structured:0.2"][0]
    how = PruneRequest.of(parse("structured:0.2"), **given).how
    assert isinstance(how, Cut)
    assert how.sizing == Sizing("ffn", 32, "loss")
    assert how.fit == Fit(0.1, "mean", 0.5)


@pytest.mark.parametrize(
    ("pattern", "given", "message"),
    [
        ("2:4", {"blocksize": 3}, "method thanos has no option --blocksize"),
        ("2:4", {"method": "wanda", "block_size": 64}, "method wanda has no option --block-size"),
        ("2:4", {"method": "guess"}, "--method 'guess'"),
        ("2:4", {"allocation": "best"}, "--allocation 'best'"),
        ("2:4", {"dtype": "fp64"}, "--dtype 'fp64' is not one of the possible values"),
        ("2:4", {"dense_target": 2.0}, "--dense-target 2 is out of range"),
        ("2:4", {"recover": -1}, "--recover -1 is out of range"),
        ("2:4", {"shrink": "ffn"}, "--shrink with pattern 2:4"),
        (
            "structured:0.2",
            {"block_size": 64},
            "structured:0.2 with --block-size: not possible where",
        ),
        (
            "structured:0.2",
            {"outlier_rows": 0.1},
            "structured:0.2 with --outlier-rows: not possible where",
        ),
    ],
    ids=str,
)
def test_what_has_no_meaning_is_refused(pattern: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PruneRequest.of(parse(pattern), **given)


def test_options_of_another_method_are_no_options() -> None:
    with pytest.raises(TypeError, match="are not options of method wanda"):
        Recipe(parse("2:4"), "wanda", thanos.Options())
