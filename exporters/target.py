"""The contract of a target: everything that the project knows of one format to export to.

A target is one file in `exporters.targets` with one `TARGET`. The command line, the pipeline, the
checks of `verify` and `doctor`, and the report read it from there and know no target by its name.
`--help` imports these files, so they import heavy libraries inside their functions.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, Protocol, TypeVar

from exporters.packages import Package
from thanos_deploy.bundle import files
from thanos_deploy.bundle.codec import Json, decode, encode
from thanos_deploy.bundle.engine_record import LayerProof
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import Exported, Stage
from thanos_deploy.check import Check
from thanos_deploy.errors import UsageError
from thanos_deploy.option import options_by_name
from thanos_deploy.pattern import Pattern
from thanos_deploy.progress import Announce

if TYPE_CHECKING:
    from thanos_deploy.model.checkpoint import Checkpoint

Options = TypeVar("Options")
Result = TypeVar("Result")
Asked = TypeVar("Asked", contravariant=True)
Said = TypeVar("Said")

_NAME = re.compile("[a-z0-9]+(-[a-z0-9]+)*")
_DTYPE = "dtype"


class Export(Protocol[Asked, Said]):
    """Writes the stage of a target, unless it is there already.

    Args:
        bundle: a bundle whose stage prune is finished, claimed for writing.
        request: the target's own options, complete and checked.
        overwrite: redo a stage that was made with other options.
        announce: called with the title of every task that starts.

    Raises:
        DeployError: PlatformError if the machine lacks something, UsageError for options or models
            that the target does not take, GateError for a result that fails a check.
    """

    def __call__(
        self, bundle: Bundle, request: Asked, *, overwrite: bool, announce: Announce
    ) -> Exported[Said]:
        """Export."""


@dataclass(frozen=True, slots=True)
class Size:
    """The files of a target whose bytes a report compares with the dense model's.

    Attributes:
        title: title of the row in the report.
        endings: file name suffixes of the files that hold the model.
        beside: the files of the dense model to compare with: its checkpoint, or its exported graph.
        sentence: sentence for the report's verdict; {ratio} stands for the bytes over those of the
            dense model. Empty for none.
    """

    title: str
    endings: tuple[str, ...]
    beside: Literal["checkpoint", "graph"]
    sentence: str = ""


@dataclass(frozen=True, slots=True)
class Missing:
    """The entry of a report for a target whose stage is missing.

    Attributes:
        what: the property that was not measured.
        why: the reason, in a few words.
    """

    what: str
    why: str = "not measured"


@dataclass(frozen=True, slots=True)
class Table:
    """A table that the command line prints after a finished export.

    Attributes:
        title: title above the table.
        columns: column headings; empty for a list of names and values.
        rows: one cell for each column; without columns, a name and a value.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def takes_everything(patterns: Iterable[Pattern]) -> None:
    """Refuse nothing; see `Target.refuse`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target(Generic[Options, Result]):
    """One format to export to.

    The stage of a target has the target's name. A target with several stages adds a suffix to each:
    `tensorrt-sm90`.

    Attributes:
        name: lower-case words with hyphens; the name of the target's file has underscores instead.
        summary: one line of --help, without a full stop.
        writes: path in the bundle, for --help, such as "onnx".
        options: dataclass of the options that a user may set; see `exporters.options`.
        result: dataclass of the result of a finished stage.
        packages: packages that have to be installed beside thanos-deploy itself.
        gpu: whether the export needs the GPU that will run the result, so that a bundle may have to
            be finished on another machine.
        export: writes the stage.
        verify: runs the checks of a finished stage. Called with the bundle and the name of the
            stage, after the hashes of its files were compared.
        size: the files whose bytes a report compares; None for none.
        missing: the entry of a report for a missing stage; None for no entry.
        dtypes: accepted values of the option dtype, the default first; empty if the target has no
            such option.
        several: whether there can be several stages, one for each machine or GPU, told apart by a
            suffix.
        defaults: returns the default options for a bundle; None for the defaults of the dataclass.
        refuse: raises UsageError for a model that the target cannot take. Called with the patterns
            of its linear layers.
        show: returns the table that the command line prints of a result; None for a list of the
            result's fields.
        proof: returns for every linear layer of a finished stage whether a sparse kernel runs it;
            None for a target that does not report this.
        convert: writes a folder from a checkpoint that is sparse already and has no bundle, and
            returns the same result as a stage; None for a target that takes only bundles.
    """

    name: str
    summary: str
    writes: str
    options: type[Options]
    result: type[Result]
    packages: tuple[Package, ...]
    gpu: bool
    export: Export[Options, Result]
    verify: Callable[[Bundle, str], Iterator[Check]]
    size: Size | None
    missing: Missing | None
    dtypes: tuple[str, ...] = ()
    several: bool = False
    defaults: Callable[[Bundle], Options] | None = None
    refuse: Callable[[Iterable[Pattern]], None] = field(default=takes_everything)
    show: Callable[[Result], Table] | None = None
    proof: Callable[[Bundle, str], Sequence[LayerProof]] | None = None
    convert: "Callable[[Checkpoint, Path, Announce], Result] | None" = None

    def __post_init__(self) -> None:
        """Refuse a target that does not keep the contract.

        Raises:
            TypeError: the target breaks the contract; the message names every problem.
        """
        if problems := "; ".join(self._problems()):
            raise TypeError(f"target {self.name!r}: {problems}")

    def request(self, bundle: Bundle, given: Mapping[str, object]) -> Options:
        """Complete the options that a user gave with defaults, and check them.

        Args:
            bundle: the bundle to export, on which defaults may depend.
            given: values by name of a field of `options`; missing fields get their default.

        Raises:
            UsageError: the target has no such option, or does not take the value.
        """
        known = options_by_name(self.options)
        for name in given:
            if name not in known:
                takes = ", ".join(one.declared.flag for one in known.values()) or "no options"
                raise UsageError(
                    f"--target {self.name} has no option {name.replace('_', ' ')!r}",
                    fix=f"leave it out; {self.name} takes {takes}",
                )
        default = self.options() if self.defaults is None else self.defaults(bundle)
        asked: Options = replace(default, **given)  # type: ignore[type-var]  # _problems has looked
        self.check(asked)
        return asked

    def check(self, request: object) -> None:
        """Refuse options that this target does not take.

        Raises:
            UsageError: the options are of another type, or the target does not take a value.
        """
        if not isinstance(request, self.options):
            raise UsageError(
                f"--target {self.name} with {type(request).__name__}",
                fix=f"give {self.options.__name__}",
            )
        try:
            decode(self.options, encode(request))
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"--target {self.name}: {error}", fix="see `thanos-deploy export --help`"
            ) from error
        dtype = getattr(request, _DTYPE, None)
        if self.dtypes and dtype not in self.dtypes:
            raise UsageError(
                f"--dtype {dtype} with --target {self.name}",
                fix=f"{self.name} takes {', '.join(self.dtypes)}",
            )

    def owns(self, stage: str) -> bool:
        """Whether a stage has the name of this target, with or without a suffix."""
        return stage == self.name or stage.startswith(f"{self.name}-")

    def asked_for(self, stage: str) -> bool:
        """Whether a user asked for this stage of the target; False if another target needed it."""
        return self.owns(stage) and self.several == (stage != self.name)

    def _problems(self) -> Iterator[str]:
        if not _NAME.fullmatch(self.name):
            yield "name is not lower-case words with hyphens"
        for name in ("summary", "writes"):
            text = getattr(self, name)
            if not text or text != text.strip() or text.endswith("."):
                yield f"{name} is {text!r}, not a line without a full stop"
        for name in ("export", "verify", "refuse"):
            if not callable(getattr(self, name)):
                yield f"{name} is not a function"
        if not (is_dataclass(self.result) and isinstance(self.result, type)):
            yield "result is not a dataclass"
        if not (is_dataclass(self.options) and isinstance(self.options, type)):
            yield "options is not a dataclass"
            return
        known = options_by_name(self.options)
        for name in (each.name for each in fields(self.options)):
            if name not in known:
                yield f"its option {name} has no flag"
        if self.several and self.size is not None:
            yield "a target with several stages has no one size"
        if bool(self.dtypes) != (_DTYPE in known):
            yield "dtypes and the option dtype do not go together"


def write_stage(
    bundle: Bundle,
    stage: str,
    write: Callable[[Path], Result],
    *,
    result: type[Result],
    inputs: Json,
    bytes_needed: Callable[[], int],
    options: object,
    folder: str | None = None,
    overwrite: bool = False,
) -> Exported[Result]:
    """Write a stage of a bundle that is one folder, unless it is there and intact.

    Args:
        bundle: the bundle, claimed for writing.
        stage: name of the stage.
        write: fills the empty folder that it is given, and returns the result.
        result: type of the result, a dataclass.
        inputs: hashes of the files that the stage reads.
        bytes_needed: returns the most bytes that the stage takes on the disk; called only if there
            is something to write.
        options: the options that the stage is made with, a dataclass.
        folder: path of the folder in the bundle; None for the stage's name.
        overwrite: redo a stage that was made with other options.

    Raises:
        ResourceError: the disk has no room for the stage.
        UsageError, IntegrityError: see `Bundle.run`.
    """

    def produce(partial: Path) -> Result:
        files.require_disk(partial, bytes_needed())
        destination = partial / (folder or stage)
        destination.mkdir(parents=True)
        return write(destination)

    kind = Stage(stage, type(options), dict, result)
    record = bundle.run(kind, produce, options=options, inputs=inputs, overwrite=overwrite)
    return Exported(stage, bundle.result(kind), record.files, record.seconds)


def stage_bytes(bundle: Bundle, stage: str) -> int:
    """Return the total bytes of the files of a finished stage."""
    return sum(file.bytes for file in bundle.stages[stage].files.values())


def no_checks(bundle: Bundle, stage: str) -> Iterator[Check]:
    """Yield nothing: for a target with nothing to check but the hashes of its files."""
    yield from ()
