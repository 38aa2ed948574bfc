"""The contract of a target: everything that the project knows of one format to export to.

A target is one file in `exporters.targets` with one `TARGET`. The command line, the pipeline, the
checks of `verify` and `doctor`, and the report read it from there and know no target by its name.
What such a file imports at its top is imported by `--help`, so heavy libraries are imported inside
its functions.
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
        bundle: with the stage prune finished, claimed for writing.
        request: the target's own options, complete and checked.
        overwrite: redo what was made with other options.
        announce: told of every piece of work.

    Raises:
        DeployError: PlatformError for what the machine lacks, UsageError for what cannot be meant,
            GateError for a result that is not what it should be.
    """

    def __call__(
        self, bundle: Bundle, request: Asked, *, overwrite: bool, announce: Announce
    ) -> Exported[Said]:
        """Export."""


@dataclass(frozen=True, slots=True)
class Size:
    """The files of a target whose bytes a report compares with the dense model's.

    Attributes:
        title: of the row in the report.
        endings: of the files that hold the model.
        beside: what the dense model has of the kind: its checkpoint, or its exported graph.
        sentence: for the verdict, with {ratio}: bytes over the dense model's; empty for none.
    """

    title: str
    endings: tuple[str, ...]
    beside: Literal["checkpoint", "graph"]
    sentence: str = ""


@dataclass(frozen=True, slots=True)
class Missing:
    """What a report without this target's stage does not know.

    Attributes:
        what: was not measured.
        why: in a few words.
    """

    what: str
    why: str = "not measured"


@dataclass(frozen=True, slots=True)
class Table:
    """What the command line shows of a finished export; no columns for a list of names and values.

    Attributes:
        title: above it.
        columns: heads.
        rows: as many cells in each as there are columns, or two.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def takes_everything(patterns: Iterable[Pattern]) -> None:
    """Refuse nothing; see `Target.refuse`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target(Generic[Options, Result]):
    """One format to export to.

    Its stages are called by its name, or, where there can be several, by its name and a suffix:
    `tensorrt-sm90`.

    Attributes:
        name: of the target: lower-case words with hyphens; the file's name with underscores.
        summary: one line of --help, without a full stop.
        writes: where in the bundle, for --help, such as "onnx".
        options: the dataclass of what a user may ask; see `exporters.options`.
        result: the dataclass of what is said of a finished stage.
        packages: what has to be installed beside thanos-deploy itself.
        gpu: it works on the GPU that is to run the result, so that a bundle may be finished on
            another machine.
        export: writes the stage.
        verify: the checks of a finished stage, beside the hashes of its files, which are compared
            before. Called with the bundle and the name of the stage.
        size: what a report says of its bytes; None for nothing.
        missing: what a report says where the stage is not there; None for nothing.
        dtypes: the values of the option dtype that it takes, the default first; none if it has no
            such option.
        several: there can be a stage for each of several machines, each with a suffix.
        defaults: the options of a user who asks for nothing; None for the dataclass's own.
        refuse: raises UsageError for a model that it cannot take, by what the linear layers hold.
        show: what the command line prints of a stage's result; None for its names and values.
        proof: the verdict on every linear layer of a finished stage: does a sparse kernel run it?
            None for a target of which nobody says.
        convert: writes its empty folder from a checkpoint that is sparse already and has no bundle,
            and returns what a stage's result would be; None for a target that only takes bundles.
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
            TypeError: the message names everything that is wrong.
        """
        if problems := "; ".join(self._problems()):
            raise TypeError(f"target {self.name!r}: {problems}")

    def request(self, bundle: Bundle, given: Mapping[str, object]) -> Options:
        """The complete options for what a user gave.

        Args:
            bundle: on which defaults may depend.
            given: by name of a field of `options`; what is left out has its default.

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
        """Refuse options that are not of this target.

        Raises:
            UsageError: they are of another type, or a value is not one that the target takes.
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
        """The stage is called like this target, with or without a suffix."""
        return stage == self.name or stage.startswith(f"{self.name}-")

    def asked_for(self, stage: str) -> bool:
        """One of its stages that a user asked for, not one that was made for another target."""
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
    """A stage of a bundle that is one folder, written now unless it is there and intact.

    Args:
        bundle: claimed for writing.
        stage: its name.
        write: fills the empty folder that it is given and returns the result.
        result: the type of that, a dataclass.
        inputs: hashes of what it reads.
        bytes_needed: on the disk, at most; asked for only if there is something to write.
        options: a dataclass: what the stage is made with.
        folder: relative to the bundle; None for the stage's name.
        overwrite: redo what was made with other options.

    Raises:
        ResourceError: the disk has no room for it.
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
    """The bytes of the files of a finished stage."""
    return sum(file.bytes for file in bundle.stages[stage].files.values())


def no_checks(bundle: Bundle, stage: str) -> Iterator[Check]:
    """For a target of which nothing can be checked but the hashes of its files."""
    yield from ()
