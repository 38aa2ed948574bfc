"""The options of pruning, made from the dataclasses that declare them.

The options of a pruning method are declared in the method's file only; see `thanos_deploy.methods`.
"""

import click

from thanos_deploy import methods
from thanos_deploy.calibration.data import Data
from thanos_deploy.cli._options import device_option, text_field_option
from thanos_deploy.cli._types import PatternType, if_given, several, unset, with_default
from thanos_deploy.methods import Walk
from thanos_deploy.option import options_of
from thanos_deploy.pruning.budget import Budget
from thanos_deploy.pruning.recipe import METHOD, PRESET, Layers, Owl, Recipe
from thanos_deploy.shrink.options import Sizing
from thanos_deploy.stages.request import ALLOCATIONS, PruneRequest

_method_options = methods.method_options()
(_recover,) = (one for one in options_of(PruneRequest) if one.name == "recover")
(_rows,) = (one for one in options_of(Data) if one.name == "calib_rows")

pruning_options = several(
    click.option(
        "--pattern",
        type=PatternType(),
        required=True,
        help="Sparsity pattern: n:m keeps n of every m weights (2:4, 4:8, ...); "
        "unstructured:FRACTION removes that fraction of the weights; structured:FRACTION cuts out "
        "attention heads and feed-forward channels, at least that fraction of the blocks' "
        "parameters, and makes an ordinary smaller model.",
    ),
    if_given(Sizing),
    click.option(
        "--allocation",
        type=click.Choice(ALLOCATIONS),
        help="uniform: every layer or block loses the same fraction. loss (structured only): "
        "each block keeps its own number of heads and channels; stock loaders cannot load "
        "the pruned model, but its ONNX export runs. blocks (structured only): whole "
        "blocks are removed, those whose removal changes the model least. owl "
        "(unstructured only): blocks with more outliers keep more weights (arXiv "
        "2310.05175).  [default: uniform]",
    ),
    if_given(Owl),
    if_given(Layers),
    if_given(Budget),
    unset(_recover, _recover.declared.help, "the preset's"),
    with_default(PruneRequest, "recover_text"),
    with_default(PruneRequest, "recover_rank"),
    click.option(
        "--keep-shape",
        is_flag=True,
        help="structured: set FRACTION of each layer's input columns to zero instead of "
        "cutting anything out; all shapes stay the same.",
    ),
    click.option(
        "--method",
        type=click.Choice(methods.names()),
        default=METHOD,
        show_default=True,
        help="Pruning method.",
    ),
    click.option(
        "--preset",
        type=click.Choice(methods.PRESET_NAMES),
        default=PRESET,
        show_default=True,
        help="Defaults for the options below. Costs are in units: one unit is the time of two "
        "plain forward passes over 16384 tokens. fast: does not run the dense model "
        "beside the pruned one; 1.1 units. best: fits the pruned model to the dense one "
        "and tunes whole blocks; up to 20 units. max: also trains the remaining weights "
        "as --recover does, which takes memory for several whole models and has no limit "
        "of time. paper: the settings of the method's paper.",
    ),
    if_given(Walk, default="the preset's"),
    *(unset(one.option, one.help, one.default) for one in _method_options),
    with_default(Data, "calib"),
    text_field_option,
    unset(_rows, _rows.declared.help, None),
    with_default(Data, "calib_cut"),
    with_default(Data, "nsamples"),
    with_default(Data, "seqlen"),
    with_default(Data, "seed"),
    if_given(Recipe),
    device_option,
    with_default(PruneRequest, "activations"),
    with_default(PruneRequest, "quantize"),
    with_default(PruneRequest, "dtype"),
)
