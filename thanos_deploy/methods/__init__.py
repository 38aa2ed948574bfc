"""Pruning methods, one per file.

Each file here defines one method completely: its options with their defaults and help texts, its
presets, and the functions `prune` and `check`. These are pure and deterministic, and know nothing
of models, files or the command line. The command line, the dry run and the manifest find a method
by its name. A file whose name begins with an underscore holds code that methods share.
docs/develop/add-a-method.md shows how to add a method.

Listing the methods and their options must not import PyTorch. So a method imports PyTorch, and the
modules of `thanos_deploy.solver` that need it, inside its functions.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from thanos_deploy.errors import ModelError, UsageError
from thanos_deploy.option import Option, Options, chosen, missing, option, options_of
from thanos_deploy.pattern import Pattern, SemiStructured

if TYPE_CHECKING:
    from thanos_deploy.solver.layer import LayerProblem, LayerResult

# "max" may need the whole model in memory; the others never do.
PRESET_NAMES = ("best", "fast", "max", "paper")


@dataclass(frozen=True, slots=True)
class Tuning(Options):
    """Steps that tune all linear layers of a block together, after each was pruned or quantised.

    Attributes:
        tune_steps: number of optimisation steps; see `tune.tune`.
        tune_nsamples: number of segments that the steps use in turn: the segments of the statistics
            and, if this number is larger, more segments of the same text, as far as it has them.

    Raises:
        UsageError: a value is out of range.
    """

    tune_steps: int = option(
        0,
        "--tune-steps",
        "Number of optimisation steps that tune all kept weights of a block together, "
        "towards the output of the dense block; with --quantize, as many more steps tune "
        "codes and scales. 0 tunes nothing, and is the default with --keep-shape.",
        least=0,
    )
    tune_nsamples: int = option(
        0,
        "--tune-nsamples",
        "Number of segments that the tuning steps use in turn: those of --nsamples and, "
        "if this number is larger, more segments of the same text, as far as the text has "
        "them.",
        metavar="SEGMENTS",
        least=0,
        later=True,
    )

    def further(self, nsamples: int) -> int:
        """Number of segments that only the tuning steps use.

        Args:
            nsamples: number of segments that the statistics are collected from.
        """
        return max(0, self.tune_nsamples - nsamples) if self.tune_steps else 0


NO_TUNING = Tuning()


@dataclass(frozen=True, slots=True)
class Walk(Tuning):
    """How to walk through a model, block by block.

    Attributes:
        true_sequential: collect the statistics of each group of layers after the groups before it
            in the block are pruned, instead of all from the dense block.
        dense_target: the output that each pruned layer is fitted to: 1 is the layer's output in the
            dense model, 0 the output of its dense weight on the pruned model's inputs, and numbers
            between mix the two; see `hessian.retarget`.

    Raises:
        UsageError: a value is out of range.
    """

    true_sequential: bool = option(
        False,
        "--true-sequential",
        "Collect each layer's statistics after the layers before it in the block are pruned, or "
        "the statistics of all layers of a block at once.",
        off="--block-statistics",
    )
    dense_target: float = option(
        0.0,
        "--dense-target",
        "The output that each pruned layer is fitted to: 1 is the layer's output in the "
        "dense model, 0 is the output of its dense weights on the pruned model's "
        "activations, and numbers between mix the two.",
        least=0.0,
        most=1.0,
    )

    @property
    def with_dense(self) -> bool:
        """Whether the calibration data also passes through the dense model."""
        return self.dense_target > 0.0 or self.tune_steps > 0


@dataclass(frozen=True, slots=True)
class Preset:
    """Settings for pruning a whole model with a method.

    Attributes:
        options: options of the method.
        walk: how to walk through the model.
        recover: number of segments to train the remaining weights on afterwards, 0 for no training;
            see `recover.recover`.
    """

    options: Options
    walk: Walk = Walk()
    recover: int = 0


@dataclass(frozen=True, slots=True)
class Method:
    """A pruning method, as its file defines it.

    Attributes:
        name: name of the file.
        options: the file's `Options`, the dataclass of all settings but the pattern.
        presets: the file's `PRESETS`. "paper" is the setting of the method's own paper. The others
            are given where a better setting is known. Each measured best on held-out text within a
            limit: "fast" needs no pass of the dense model, "best" takes at most 20 units of time
            (see docs/prune.md), and "max" has no limit.
        prune: prunes one linear layer.
        check: refuses a layer that `prune` cannot handle, from its name, its number of inputs, the
            pattern and the options.
        divisible: returns, for a pattern and options, whether `prune` supports
            `LayerProblem.divided`, so that several ranks can prune runs of the rows of one layer. A
            file without it is never divided.
    """

    name: str
    options: type[Options]
    presets: Mapping[str, Preset]
    prune: Callable[[LayerProblem, Pattern, Any], LayerResult]
    check: Callable[[str, int, Pattern, Any], None]
    divisible: Callable[[Pattern, Any], bool]

    def preset(self, which: str) -> Preset:
        """Return a preset; "max" falls back to "best", and every preset to "paper"."""
        others = ("best", "paper") if which == "max" else ("paper",)
        return next(self.presets[name] for name in (which, *others) if name in self.presets)

    def choose(self, which: str, given: Mapping[str, object]) -> Options:
        """Return the options of a preset, overridden by the options given by keyword.

        Raises:
            UsageError: a value is out of range.
        """
        taken = chosen(self.options, given)
        preset = self.preset(which).options
        fields = {one.name: getattr(preset, one.name) for one in options_of(self.options)}
        return self.options(**{**fields, **taken})


def names() -> list[str]:
    """Names of the methods, sorted."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in found if not name.startswith("_"))


@cache
def load(name: str) -> Method:
    """Import a method by its name.

    Raises:
        UsageError: there is no method of that name.
        TypeError: its file does not define a complete method; the message says what is wrong.
    """
    if name not in names():
        raise UsageError(f"--method {name!r}", fix=f"use one of {', '.join(names())}")
    module = import_module(f"{__name__}.{name}")
    if faults := list(_faults(module)):
        raise TypeError(f"{module.__file__} is not a method: {'; '.join(faults)}")
    divisible = getattr(module, "divisible", _never)
    return Method(name, module.Options, module.PRESETS, module.prune, module.check, divisible)


def _never(pattern: Pattern, options: Any) -> bool:
    return False


def _faults(module: ModuleType) -> list[str]:
    """List what is missing or wrong in a module that should define a method."""
    options, presets = getattr(module, "Options", None), getattr(module, "PRESETS", None)
    if not (isinstance(options, type) and issubclass(options, Options) and is_dataclass(options)):
        return ["Options, a frozen dataclass based on thanos_deploy.option.Options, is missing"]
    faults = [f"Options.{name} is not made by option(...)" for name in missing(options)]
    if not options.__dataclass_params__.frozen:
        faults.append("Options is not frozen")
    if not isinstance(presets, Mapping) or "paper" not in presets:
        faults.append('PRESETS, with a preset "paper", is missing')
        presets = {}
    for name, preset in presets.items():
        if name not in PRESET_NAMES:
            faults.append(f"PRESETS has {name!r}, which is none of {', '.join(PRESET_NAMES)}")
        if not isinstance(preset, Preset) or type(preset.options) is not options:
            faults.append(f"PRESETS[{name!r}] is not a Preset of the module's Options")
    for name, arguments in (
        ("prune", ("problem", "pattern", "options")),
        ("check", ("name", "cols", "pattern", "options")),
    ):
        function = getattr(module, name, None)
        if not inspect.isfunction(function):
            faults.append(f"the function {name}({', '.join(arguments)}) is missing")
        elif tuple(inspect.signature(function).parameters) != arguments:
            faults.append(f"{name}{inspect.signature(function)} does not take {arguments}")
    return faults


@dataclass(frozen=True, slots=True)
class MethodOption:
    """An option of one or several methods.

    Attributes:
        option: the option as the methods declare it.
        methods: names of the methods that have it.
        default: its defaults in words, by method and preset.
    """

    option: Option
    methods: tuple[str, ...]
    default: str

    @property
    def help(self) -> str:
        """The help text, after the names of the methods that have the option."""
        said = self.option.declared.help
        return f"{', '.join(self.methods)}: {said[:1].lower()}{said[1:]}"


def method_options() -> list[MethodOption]:
    """List every option of the methods once, in the order of method names and fields.

    Raises:
        TypeError: two methods declare the same flag differently.
    """
    found: dict[str, dict[str, Option]] = {}
    for name in names():
        for one in options_of(load(name).options):
            others = found.setdefault(one.declared.flag, {})
            for other, known in others.items():
                if (known.name, known.kind, known.declared) != (one.name, one.kind, one.declared):
                    raise TypeError(
                        f"methods {other} and {name} declare {one.declared.flag} differently: "
                        f"{known} and {one}; share one definition, or give one of them another flag"
                    )
            others[name] = one
    return [
        MethodOption(next(iter(owners.values())), tuple(owners), _defaults(owners))
        for owners in found.values()
    ]


def _defaults(owners: Mapping[str, Option]) -> str:
    """The defaults of an option in words, such as "sparsegpt 128, thanos 32 (paper 512)"."""
    said = {}
    for name, one in owners.items():
        by_preset = {
            which: getattr(load(name).preset(which).options, one.name) for which in PRESET_NAMES
        }
        usual = by_preset[PRESET_NAMES[0]]
        others = [f"{which} {value}" for which, value in by_preset.items() if value != usual]
        said[name] = f"{usual} ({', '.join(others)})" if others else f"{usual}"
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return ", ".join(f"{name} {value}" for name, value in said.items())


def check_group(name: str, cols: int, pattern: Pattern) -> None:
    """Refuse a layer whose inputs do not divide into the groups of an n:m pattern.

    Raises:
        ModelError: the number of inputs is not a multiple of the pattern's group.
    """
    if isinstance(pattern, SemiStructured) and cols % pattern.group:
        raise ModelError(
            f"{name}: {cols} inputs do not divide into the groups of {pattern.group} of pattern "
            f"{pattern}",
            fix="use a pattern whose group divides the number of inputs",
        )
