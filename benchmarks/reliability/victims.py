"""The files that are damaged, one function for each kind, and the code that reads them.

Each function makes well-formed files in a folder. Reading a damaged file has to refuse the damage
with an error of this project, or to return the original content. Where nothing records the original
content, another well-formed content is allowed too.

Every kind of file has its functions here, so this file is longer than others.
"""

import gzip
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import exporters.packed
from benchmarks.fuzzing.parsers import PARSERS
from benchmarks.gpu_campaign.onnxruntime import make
from benchmarks.reliability.damage import Form
from benchmarks.reliability.works import run, small_model
from runtime.engine import open_engine
from runtime.server.chat import open_chat_template
from runtime.server.templates import Conversation
from runtime.text import open_tokenizer
from tests.bundles import add_build, write_bundle
from tests.conftest import write_model
from thanos_deploy.api.functions import dry_run_prune
from thanos_deploy.bundle import layout, names
from thanos_deploy.bundle.engine_record import read_build
from thanos_deploy.bundle.files import Json, file_record
from thanos_deploy.bundle.manifest import MANIFEST, Bundle
from thanos_deploy.bundle.onnxfile import require_own_data
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.calibration.texts import read_text
from thanos_deploy.errors import DeployError
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.convert import convert_packed
from thanos_deploy.model.load import load_model, load_tokenizer
from thanos_deploy.model.tensorfile import TensorFile
from thanos_deploy.pattern import SemiStructured
from thanos_deploy.pruning.layers import linear_shapes
from thanos_deploy.pruning.result import PrunedBlock
from thanos_deploy.report import build, card, markdown, sources
from thanos_deploy.stages.verify import verification, verify

_IDS = np.array([[1, 2, 3]])
_MESSAGES = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"})
_TEMPLATE = (
    "{%- for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}<{{ m['role'] }}>"
    "{{ m.content | trim }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Victim:
    """A file, and the function that reads it.

    Attributes:
        content: content of the intact file.
        form: format of the content.
        open: reads the damaged content, which it gets as an argument; if there is a file, the
            content is in the file as well.
        path: path of the file; None if there is none.
        always: whether every damage has to be detected.
        names: whether the texts in the file are file names, none of which may lead out of its
            folder.
        refuses: errors by which damage is detected.
    """

    content: bytes
    form: Form
    open: Callable[[bytes], object]
    path: Path | None = None
    always: bool = False
    names: bool = False
    refuses: tuple[type[Exception], ...] = (DeployError,)


def _file(path: Path, form: Form, open_: Callable[[], object], *, always: bool = False) -> Victim:
    return Victim(path.read_bytes(), form, lambda _: open_(), path, always)


def _form(path: Path) -> Form:
    forms: dict[str, Form] = {
        ".json": "json",
        ".safetensors": "safetensors",
        ".jinja": "template",
    }
    return forms.get(path.suffix, "bytes")


def bundle(folder: Path) -> Iterator[Victim]:
    """Yield every file of a complete bundle, whose manifest has all hashes: any damage shows."""
    out = _whole_bundle(folder)
    opened = Bundle.open(out)

    def check() -> None:
        verification(verify(Bundle.open(out)), opened).require()

    for record in opened.stages.values():
        for name in record.files:
            yield _file(out / name, _form(out / name), check, always=True)


def forged_bundle(folder: Path) -> Iterator[Victim]:
    """Yield these files again, with the hash of the damaged file forged into the manifest."""
    out = _whole_bundle(folder)
    original = (out / MANIFEST).read_bytes()

    def check(name: str) -> None:
        manifest = json.loads(original)
        for record in manifest["stages"].values():
            if name in record["files"] and not (out / name).is_symlink():
                file = file_record(out / name)
                record["files"][name] = {"bytes": file.bytes, "sha256": file.sha256}
        (out / MANIFEST).write_text(json.dumps(manifest))
        try:
            _use(out, Path(name).parts[0])
        finally:
            (out / MANIFEST).write_bytes(original)

    for record in Bundle.open(out).stages.values():
        for name in record.files:
            path = out / name

            def opened(name: str = name) -> None:
                check(name)

            yield _file(path, _form(path), opened)


def _use(out: Path, part: str) -> None:
    """Do everything that commands do with a part of a bundle."""
    opened = Bundle.open(out)
    verify(opened)
    if part == "model":
        open_tokenizer(out).encode("a text")
        open_chat_template(out)
    if part == "onnx":
        open_engine(out, threads=1).prefill(_IDS)
    if part in ("eval", "bench", "report", layout.LAYERS):
        report = build.build([sources.read(opened)])
        card.write(report)
        markdown.render(report)


def manifest(folder: Path) -> Iterator[Victim]:
    """Yield manifests; a bundle that opens in spite of the damage has to be the original one."""
    out = _whole_bundle(folder)
    expected = open_engine(out, threads=1).prefill(_IDS)

    def check() -> None:
        opened = Bundle.open(out)
        opened.verify()
        report = build.build([sources.read(opened)])
        card.write(report)
        open_tokenizer(out)
        np.testing.assert_array_equal(open_engine(out, threads=1).prefill(_IDS), expected)

    yield _file(out / MANIFEST, "json", check)
    records = write_bundle(folder / "records")
    add_build(records)

    def show() -> None:
        report = build.build([sources.read(Bundle.open(records))])
        card.write(report)
        markdown.render(report)

    yield _file(records / MANIFEST, "json", show)


def engine_record(folder: Path) -> Iterator[Victim]:
    """Yield the record and the log of the build of an engine."""
    records = write_bundle(folder / "records")
    add_build(records)
    (path,) = records.rglob(layout.BUILD)

    def check() -> None:
        Bundle.open(records)
        read_build(path.parent)

    yield _file(path, "json", check)
    yield from _fuzzed("build-log", folder / "log", "bytes")


def safetensors(folder: Path) -> Iterator[Victim]:
    """Yield the weights of a checkpoint. They have no hash: other values are another model."""
    write_model(folder / "model", "llama")

    def check() -> None:
        checkpoint = Checkpoint.open(folder / "model")
        linear_shapes(checkpoint)
        checkpoint.weights.read(checkpoint.weights.shapes)

    yield _file(folder / "model" / "model.safetensors", "safetensors", check)
    yield from _fuzzed("safetensors", folder / "alone", "safetensors")


def index(folder: Path) -> Iterator[Victim]:
    """Yield the index of a sharded checkpoint; it has to lead to the original weights."""
    write_model(folder / "whole", "llama")
    before = load_file(folder / "whole" / "model.safetensors")
    model = folder / "model"
    shutil.copytree(folder / "whole", model)
    (model / "model.safetensors").unlink()
    tensors = sorted(before)
    where: dict[str, str] = {}
    for number, part in enumerate((tensors[::2], tensors[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: before[name] for name in part}, model / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    path = model / "model.safetensors.index.json"
    size = sum(tensor.nbytes for tensor in before.values())
    path.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": where}))

    def check() -> None:
        checkpoint = Checkpoint.open(model)
        linear_shapes(checkpoint)
        found = checkpoint.weights.read(checkpoint.weights.shapes)
        load_model(model)  # detects missing weights
        assert all(torch.equal(found[name], before[name]) for name in found)

    yield Victim(path.read_bytes(), "json", lambda _: check(), path, names=True)


def gguf(folder: Path) -> Iterator[Victim]:
    """Yield a GGUF file, which is read up to its weights and tokenizer."""
    yield from _fuzzed("gguf", folder, "bytes")


def config(folder: Path) -> Iterator[Victim]:
    """Yield configurations, which are read up to the plan for pruning the model."""
    model = folder / "model"
    write_model(model, "llama")
    text = folder / "text.txt"
    text.write_text("Some words to calibrate on. " * 20)

    def check() -> None:
        dry_run_prune(
            model,
            pattern="2:4",
            out=folder / "out",
            method="magnitude",
            calib=text,
            nsamples=1,
            seqlen=8,
        )

    yield _file(model / "config.json", "json", check)
    yield _file(model / "generation_config.json", "json", check)


def tokenizer(folder: Path) -> Iterator[Victim]:
    """Yield the files of a tokenizer, which transformers and the runtime read."""
    out = _exported(folder)

    def check() -> None:
        load_tokenizer(out / "model")("A text, with words.")
        found = open_tokenizer(out, verify=False)
        found.decode(found.encode("A text, with words."))

    for name in ("tokenizer.json", "tokenizer_config.json"):
        yield _file(out / "model" / name, "json", check)


def chat_template(folder: Path) -> Iterator[Victim]:
    """Yield a chat template; `runtime.server.rendering` limits the time of rendering."""
    out = _exported(folder)
    path = out / "model" / "chat_template.jinja"
    path.write_text(_TEMPLATE)

    def check() -> None:
        found = open_chat_template(out, verify=False)
        assert found is not None
        found.render(Conversation(_MESSAGES), most=1 << 20)

    yield _file(path, "template", check)


def onnx(folder: Path) -> Iterator[Victim]:
    """Yield the files of a graph: its data must be its own, and hashes reveal all other damage."""
    out = _exported(folder)
    path = out / "onnx" / "model.onnx"
    yield _file(path, "bytes", lambda: require_own_data(path))
    for name in ("model.onnx", "model.onnx.data", "export.json"):
        file = out / "onnx" / name
        yield _file(file, _form(file), lambda: open_engine(out, threads=1), always=True)


def packed(folder: Path) -> Iterator[Victim]:
    """Yield the files of a packed checkpoint; unpacking has to return the model that was packed."""
    model, out = folder / "model", folder / "packed"
    out.mkdir(parents=True)
    write_model(model, "llama")
    before = load_file(model / "model.safetensors")
    for name, tensor in before.items():
        if "proj" in name:
            tensor.view(-1, 2, 2)[:, 0] = 0
    save_file(before, model / "model.safetensors", {"format": "pt"})
    exporters.packed.export(Checkpoint.open(model), out, pattern=SemiStructured(2, 4))

    def check() -> None:
        restored = folder / "restored"
        shutil.rmtree(restored, ignore_errors=True)
        convert_packed(out, restored)
        after = load_file(restored / "model.safetensors")
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)

    yield _file(out / "packed.json", "json", check)
    yield _file(out / "model.packed.safetensors", "safetensors", check)


def journal(folder: Path) -> Iterator[Victim]:
    """Yield the files of a journal; blocks that are continued from have to be those written."""
    whole, used = folder / "whole", folder / "used"
    owner: Json = {"seed": 0, "options": {"pattern": "2:4"}}
    made = Journal(whole, owner, PrunedBlock)
    for block in range(3):
        values = torch.full((2, 3), float(block))
        entering = whole / f"inputs-{block + 1:04d}-00.safetensors"
        with TensorFile.create(entering, {"hidden": (values.dtype, (2, 3))}) as file:
            file.write("hidden", values)
            made.add(PrunedBlock((), {"solve": 1.0 + block}), {"a.weight": values}, [file])
            made.finish()
    made.close()

    def check() -> None:
        names.require_own(used)  # as a writer of the bundle does first
        found = Journal(used, owner, PrunedBlock)
        assert list(found.reports) == list(made.reports)[: len(found.reports)]
        for block in range(len(found.reports)):
            ((name, values),) = found.parameters(block)
            assert name == "a.weight"
            assert torch.equal(values, torch.full((2, 3), float(block)))

    for name in sorted(path.name for path in whole.iterdir()):
        path = used / name

        def opened(content: bytes, path: Path = path) -> None:
            link = path.readlink() if path.is_symlink() else None
            shutil.rmtree(used)
            shutil.copytree(whole, used)
            if link is None:
                path.write_bytes(content)
            else:
                path.unlink()
                path.symlink_to(link)
            check()

        shutil.copytree(whole, used, dirs_exist_ok=True)
        yield Victim((whole / name).read_bytes(), _form(path), opened, path)


def texts(folder: Path) -> Iterator[Victim]:
    """Yield calibration texts. They have no hash: other words are another text."""
    rows = [
        {"text": "Some words. " * 5, "n": 1},
        {"messages": list(_MESSAGES)},
        {"prompt": "a", "completion": "b", "meta": {"source": ["x", None]}},
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
    ]
    lines = "\n".join(map(json.dumps, rows)).encode()
    contents: Mapping[str, tuple[bytes, Form]] = {
        "a.txt": (b"Some words to read, line by line.\n" * 20, "text"),
        "a.jsonl": (lines, "lines"),
        "a.json": (json.dumps(rows).encode(), "json"),
        "a.jsonl.gz": (gzip.compress(lines), "gzip"),
    }

    def template(messages: Sequence[Mapping[str, str]]) -> str:
        return "".join(f"{one['role']}:{one['content']}" for one in messages)

    for name, (content, form) in contents.items():
        path = folder / name
        path.write_bytes(content)

        def opened(content: bytes, path: Path = path) -> None:
            path.write_bytes(content)
            read_text(path, template=template)

        yield Victim(content, form, opened)


def requests(folder: Path) -> Iterator[Victim]:
    """Yield request bodies with binary tensors."""
    yield from _fuzzed("binary-tensors", folder, "bytes")


def _fuzzed(name: str, folder: Path, form: Form) -> Iterator[Victim]:
    """Yield the well-formed inputs of a parser that is fuzzed as well."""
    folder.mkdir(parents=True, exist_ok=True)
    parser = PARSERS[name]
    check, seeds = parser.open(folder)
    for seed in seeds:
        yield Victim(seed, form, check, refuses=parser.refuses)


def _whole_bundle(folder: Path) -> Path:
    """Copy a bundle that `prune-export` made with the target packed; it is made only once."""
    made, model = folder.parents[1] / "whole", folder.parents[1] / "dense"
    if not made.exists():
        text = ("--nsamples", "4", "--seqlen", "32", "--eval-segments", "2", "--eval-seqlen", "32")
        bench = ("--prompt", "8", "--past", "8", "--new-tokens", "2", "--rounds", "2")
        how = ("--pattern", "2:4", "--method", "magnitude", "--target", "packed")
        arguments = ("prune-export", "{model}", *how, *text, *bench, "-o", "{out}")
        run(arguments, small_model(model), made)
    return Path(shutil.copytree(made, folder / "out"))


def _exported(folder: Path) -> Path:
    """Make a bundle with a model and its graph only."""
    folder.mkdir(parents=True, exist_ok=True)
    return make(folder)


KINDS: Mapping[str, Callable[[Path], Iterator[Victim]]] = {
    "safetensors": safetensors,
    "shards' index": index,
    "GGUF": gguf,
    "config": config,
    "tokenizer": tokenizer,
    "chat template": chat_template,
    "ONNX": onnx,
    "engine record": engine_record,
    "packed": packed,
    "manifest": manifest,
    "journal": journal,
    "texts": texts,
    "binary tensors": requests,
    "bundle": bundle,
    "forged bundle": forged_bundle,
}
