"""Undisturbed runs of the commands, with which disturbed runs are compared."""

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
    """A command, with the results of its undisturbed runs.

    Attributes:
        work: the command.
        model: folder of the model.
        prepared: bundle that the command begins with; missing if the command makes the bundle.
        seconds: duration of the command.
        files: maps the name of each file that is the same in every run to its SHA-256.
    """

    work: Work
    model: Path
    prepared: Path
    seconds: float
    files: dict[str, str]

    def copy(self, out: Path) -> Path:
        """Copy the bundle that the command begins with to a folder."""
        _copy(self.prepared, out)
        return out

    def fault_of_repeating(self, out: Path) -> str:
        """Repeat the command in a folder where it was disturbed; return what is wrong, or ""."""
        try:
            self.work.finish(self.model, out)
            Bundle.open(out).verify()
        except (RuntimeError, DeployError) as error:
            return str(error)
        return self.fault_in(out)

    def fault_in(self, out: Path) -> str:
        """Return which files of a finished command have wrong bytes, or ""."""
        found = _hashes(out)
        wrong = sorted(name for name, digest in self.files.items() if found.get(name) != digest)
        return f"other bytes in {', '.join(wrong)}" if wrong else ""


# Results in this process, by the command and the function that writes the model.
_known: dict[tuple[Work, Callable[[Path], Path]], Undisturbed] = {}


def undisturbed(
    works: Sequence[Work], setting: Setting, model: Callable[[Path], Path] = small_model
) -> Iterator[Undisturbed]:
    """Prepare commands, and run each twice, unless this process has done so.

    Args:
        works: the commands.
        setting: the setting, with the folder to work in.
        model: writes the model into a folder, unless it exists.

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
