"""The dense model that a bundle is made from.

It is itself a bundle, in a cache folder named after its hash, so several runs on one model convert,
export and evaluate it once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from thanos_deploy.bundle import files, layout, manifest
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.bundle.record import Nothing, Source, Stage
from thanos_deploy.forecast import enough
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
    """Where the bundle of the dense model with that hash is."""
    return environment.cache_folder() / sha256[:16]


class Dense:
    """The model that a bundle is made from, and its own bundle in the cache.

    Attributes:
        source: where it comes from.
        is_ordinary: see `LocatedModel.is_ordinary`.
        folder: its bundle in the cache.
    """

    def __init__(self, model: str | LocatedModel, *, revision: str | None = None) -> None:
        """Find a model; see `locate.locate` for what it may be and what is raised.

        Raises:
            ResourceError: there is hardly any memory left.
        """
        enough.require_to_begin()
        located = model if isinstance(model, LocatedModel) else locate(model, revision=revision)
        self.source, self.is_ordinary = located.source, located.is_ordinary
        self._path = located.path
        self.folder = dense_folder(self.source.sha256)
        self._checkpoint: Checkpoint | None = None

    def checkpoint(self, announce: Announce = quietly) -> Checkpoint:
        """The language model as a Hugging Face folder; anything else is converted once."""
        if self._checkpoint is None:
            if not self.is_ordinary:
                self._convert(announce)
                self._checkpoint = Checkpoint.open(self.folder / layout.MODEL)
            else:
                self._checkpoint = Checkpoint.open(self._path)
        return self._checkpoint

    @contextmanager
    def claim(self) -> Iterator[Bundle]:
        """Its bundle in the cache, for this process alone; another one's turn is waited for."""
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
    """Write a model that is in memory to the cache, into a folder that is named by its hash.

    The same model is there once, however often it is given.

    Raises:
        UsageError: see `convert.convert_memory`.
        ModelError: it is of a type that is not supported.
        ResourceError: the disk is too small.
    """
    cache = environment.cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=cache, prefix=files.PARTIAL) as partial:
        written = Path(partial) / layout.MODEL
        convert_memory(model, tokenizer, written)
        Checkpoint.open(written)  # or it is refused before it is kept
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
    """A bundle for further stages, and the dense model that it was made from; see `Dense`.

    Raises:
        InputError: there is no bundle.
        UsageError: it was made from another model.
        PlatformError: another process is writing there.
    """
    Bundle.open(out)  # claiming would create one
    dense = Dense(model, revision=revision)
    with manifest.claim(out, dense.source) as bundle:
        yield bundle, dense
