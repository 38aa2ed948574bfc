"""The dense model that a bundle is made from.

The dense model has a bundle of its own, in a cache folder named after its hash. So several runs on
one model convert, export and evaluate it only once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from thanos_deploy.bundle import files, layout, manifest
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import Nothing, Source, Stage
from thanos_deploy.forecast import memory_check
from thanos_deploy.machine import environment
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.convert import convert_gguf, convert_memory, convert_packed
from thanos_deploy.model.locate import LocatedModel, hash_folder, locate
from thanos_deploy.model.mxfp4 import is_mxfp4, write_bfloat16
from thanos_deploy.model.packed_folder import is_packed
from thanos_deploy.model.text_part import write_text_part
from thanos_deploy.progress import Announce, quietly

_IMPORT: Stage[Nothing, Nothing, Nothing] = Stage("import", Nothing, Nothing, Nothing)


def dense_folder(sha256: str) -> Path:
    """Return the cache folder for the bundle of the dense model with this hash."""
    return environment.cache_folder() / sha256[:16]


class Dense:
    """The dense model that a bundle is made from, and the dense model's own bundle in the cache.

    Attributes:
        source: kind, name and hash of the model.
        is_ordinary: see `LocatedModel.is_ordinary`.
        folder: the folder of the model's bundle in the cache.
    """

    def __init__(self, model: str | LocatedModel, *, revision: str | None = None) -> None:
        """Find a model.

        Args:
            model: a model that was located already, or what `locate.locate` takes.
            revision: branch, tag or commit of a hub model.

        Raises:
            ResourceError: there is hardly any memory left.
            DeployError: see `locate.locate`.
        """
        memory_check.require_to_begin()
        located = model if isinstance(model, LocatedModel) else locate(model, revision=revision)
        self.source, self.is_ordinary = located.source, located.is_ordinary
        self._path = located.path
        self.folder = dense_folder(self.source.sha256)
        self._checkpoint: Checkpoint | None = None

    def checkpoint(self, announce: Announce = quietly) -> Checkpoint:
        """Return the language model as a Hugging Face checkpoint, converted once if it is none."""
        if self._checkpoint is None:
            if not self.is_ordinary:
                self._convert(announce)
                self._checkpoint = Checkpoint.open(self.folder / layout.MODEL)
            else:
                self._checkpoint = Checkpoint.open(self._path)
        return self._checkpoint

    @contextmanager
    def claim(self) -> Iterator[Bundle]:
        """Claim the model's bundle in the cache; wait while another process has it."""
        with manifest.claim(self.folder, self.source, wait=True) as bundle:
            yield bundle

    def _convert(self, announce: Announce) -> None:
        def produce(folder: Path) -> Nothing:
            progress = announce(f"Convert {self.source.name}")
            progress(0, 1)
            convert: Callable[[Path, Path], None] = write_text_part
            if self.source.kind == "gguf":
                convert = convert_gguf
            elif is_packed(self._path):
                convert = convert_packed
            elif is_mxfp4(self._path):
                convert = write_bfloat16
            convert(self._path, folder / layout.MODEL)
            progress(1, 1)
            return Nothing()

        with self.claim() as bundle:
            bundle.run(_IMPORT, produce, options=Nothing(), inputs=Nothing(), overwrite=True)


def hold(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> LocatedModel:
    """Write a model that is in memory to the cache, into a folder named after its hash.

    The same model is stored only once, however often it is given.

    Raises:
        UsageError: see `convert.convert_memory`.
        ModelError: the type of the model is not supported.
        ResourceError: there is not enough disk space.
    """
    cache = environment.cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache, prefix=files.PARTIAL) as partial:
        written = Path(partial) / layout.MODEL
        convert_memory(model, tokenizer, written)
        Checkpoint.open(written)  # refuse an unsupported model before it enters the cache
        sha256 = hash_folder(written)
        folder = dense_folder(sha256)
        name = Path(model.name_or_path or "").name or type(model).__name__
        source = Source("memory", name, "", sha256)

        def produce(destination: Path) -> Nothing:
            written.rename(destination / layout.MODEL)
            return Nothing()

        with manifest.claim(folder, source, wait=True) as bundle:
            bundle.run(_IMPORT, produce, options=Nothing(), inputs=Nothing(), overwrite=True)
    return LocatedModel(source, folder / layout.MODEL)


@contextmanager
def reopen(
    out: Path, model: str | LocatedModel, *, revision: str | None = None
) -> Iterator[tuple[Bundle, Dense]]:
    """Claim an existing bundle for further stages, and find the dense model that it was made from.

    Raises:
        InputError: there is no bundle at `out`.
        UsageError: the bundle was made from another model.
        PlatformError: another process is writing to the bundle.
    """
    Bundle.open(out)  # because `claim` would create a missing bundle
    dense = Dense(model, revision=revision)
    with manifest.claim(out, dense.source) as bundle:
        yield bundle, dense
