"""What a command makes when it is left alone, which the disturbed ones are compared with."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from benchmarks.reliability.part import Setting
from benchmarks.reliability.works import Work, small_model
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.errors import DeployError


@dataclass(frozen=True, slots=True)
class Undisturbed:
    """A command that is ready to be disturbed.

    Attributes:
        work: the command.
        model: its model.
        prepared: the bundle that it begins with; there is none if it makes one.
        seconds: that it takes.
        files: SHA-256 by name, of what it makes the same each time.
    """

    work: Work
    model: Path
    prepared: Path
    seconds: float
    files: dict[str, str]

    def copy(self, out: Path) -> Path:
        """Put what the command begins with into a folder."""
        _copy(self.prepared, out)
        return out

    def fault_of_repeating(self, out: Path) -> str:
        """Do the command in a folder where it was disturbed; what is wrong then, or nothing."""
        try:
            self.work.finish(self.model, out)
            Bundle.open(out).verify()
        except (RuntimeError, DeployError) as error:
            return str(error)
        return self.fault_in(out)

    def fault_in(self, out: Path) -> str:
        """Which files of a finished command have other bytes, or nothing."""
        found = _hashes(out)
        wrong = sorted(name for name, digest in self.files.items() if found.get(name) != digest)
        return f"other bytes in {', '.join(wrong)}" if wrong else ""


# Those that this process has run alone, by command and by what wrote the model.
_known: dict[tuple[Work, Callable[[Path], Path]], Undisturbed] = {}


def undisturbed(
    works: Sequence[Work], setting: Setting, model: Callable[[Path], Path] = small_model
) -> Iterator[Undisturbed]:
    """Prepare commands, and run each twice, unless this process has done so.

    Args:
        works: the commands.
        setting: with the folder to work in.
        model: writes the model, unless it is there.

    Raises:
        RuntimeError: a command failed, or two runs do not agree on the weights or the graph.
    """
    folder = setting.folder
    dense = model(folder / "model")
    for work in works:
        if (known := _known.get((work, model))) is not None and known.model.exists():
            yield known
            continue
        prepared = folder / f"prepared-{work.name}"
        work.prepare(dense, prepared)
        took, found = [], []
        for number in range(2):
            out = folder / f"alone-{number}"
            _copy(prepared, out)
            begin = time.monotonic()
            work.finish(dense, out)
            took.append(time.monotonic() - begin)
            found.append(_hashes(out))
            shutil.rmtree(out)
        one, other = found
        same = {name: digest for name, digest in one.items() if other.get(name) == digest}
        weights = [name for name in one if name.endswith((".safetensors", ".onnx", ".onnx.data"))]
        if strange := sorted(set(weights) - set(same)):
            raise RuntimeError(f"{work.name}: two runs alone differ in {', '.join(strange)}")
        _known[work, model] = Undisturbed(work, dense, prepared, min(took), same)
        yield _known[work, model]


def _copy(prepared: Path, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    if prepared.exists():
        shutil.copytree(prepared, out)


def _hashes(out: Path) -> dict[str, str]:
    return {
        str(path.relative_to(out)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    }
