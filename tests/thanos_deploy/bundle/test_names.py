"""Names that files give to files: what is refused, where, and that nothing is written before.

Every file that names others has a case here, so this file is longer than others.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from exporters.onnx.graph import judge_file
from exporters.tensorrt.engine import read_weights
from runtime.engine import open_engine
from tests.bundles import write_bundle
from tests.conftest import Invoke
from thanos_deploy.bundle import names, onnxfile
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.files import sha256, sha256_of
from thanos_deploy.bundle.manifest import Bundle, claim
from thanos_deploy.bundle.record import Source
from thanos_deploy.calibration.journal import Journal
from thanos_deploy.errors import DeployError, InputError, ModelError
from thanos_deploy.model import packed_folder
from thanos_deploy.model.checkpoint import Checkpoint
from thanos_deploy.model.load import load_model, load_tokenizer
from thanos_deploy.model.locate import locate
from thanos_deploy.pattern import SemiStructured
from thanos_deploy.report import sources
from thanos_deploy.shrink.sizing import Losses

INDEX = "model.safetensors.index.json"

# None of these may be the name of a shard. Those with a slash inside may be names in a manifest.
FOREIGN = [
    "../../../w.safetensors",
    "/tmp/w.safetensors",
    "a/../../w.safetensors",
    "./w.safetensors",
    "a//w.safetensors",
    "..\\w.safetensors",
    "C:\\w.safetensors",
    "C:w.safetensors",
    "w\0.safetensors",
    "w\n.safetensors",
    "\ud800.safetensors",
    ".safetensors",
    ".partial-w.safetensors",
    "NUL.safetensors",
    "con",
    "/dev/zero",
    "~/w.safetensors/",
    "w.safetensors ",
    "w.safetensors.",
    "x" * 300 + ".safetensors",
    "",
    ".",
    "..",
    None,
    7,
    ["w.safetensors"],
]
NOT_A_SHARD = ["sub/w.safetensors", "config.json", INDEX, "tokenizer.model"]


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, deep enough for names that climb out of it."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "a" / "b" / "c" / "model"))


def shard(model: Path, name: Any) -> None:
    """Let the index call the one file of a model by another name."""
    tensors = load_file(model / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (model / INDEX).write_text(json.dumps(index))


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


@pytest.mark.parametrize("name", FOREIGN, ids=ascii)
@pytest.mark.parametrize("nested", [False, True])
def test_a_foreign_name_is_refused(name: object, nested: bool) -> None:
    with pytest.raises(InputError, match="cannot be the name of one of its files"):
        names.plain(name, "x.json", nested=nested)


def test_an_ordinary_name_is_itself() -> None:
    for name in ("model-00001-of-00002.safetensors", "Modèle v1.2+fp16 (1).bin", "a.b", "x" * 255):
        assert names.plain(name, "x.json") == name
    assert names.plain("engines/tensorrt-sm90/build.json", "x.json", nested=True)
    with pytest.raises(InputError, match="names a folder"):
        names.plain("engines/build.json", "x.json")


@given(st.lists(st.text(), min_size=1, max_size=6).map("/".join))
def test_whatever_is_plain_stays_inside(name: str) -> None:
    try:
        names.plain(name, "x.json", nested=True)
    except InputError:
        return
    joined = os.path.normpath(os.path.join("/folder", name))
    assert joined == f"/folder/{name}"


def test_names_that_a_file_system_may_take_for_one_are_refused() -> None:
    names.distinct(["a", "b", "a"], "x.json")
    for one, other in (("Model", "model"), ("é", "e\u0301"), ("straße", "STRASSE")):
        with pytest.raises(InputError, match="capital letters"):
            names.distinct([one, "x", other], "x.json")


@pytest.mark.parametrize("name", [*FOREIGN, *NOT_A_SHARD], ids=ascii)
def test_no_command_reads_or_writes_a_foreign_shard(
    invoke: Invoke, model: Path, tmp_path: Path, name: object
) -> None:
    shard(model, name)
    shutil.copy(model / "model.safetensors", tmp_path / "w.safetensors")
    before = tree(tmp_path)
    out = tmp_path / "x" / "y" / "z" / "out"
    code, _, said = invoke("prune", model, "--pattern", "2:4", "-o", out)
    assert code == 3, said
    assert INDEX in said
    left = {name: data for name, data in tree(tmp_path).items() if not name.startswith("x/")}
    assert left == before
    assert not (out / "model").exists()
    with pytest.raises(ModelError):
        load_model(model)


def test_shards_that_differ_in_capitals_are_refused(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    half = len(tensors) // 2
    parts = {"a.safetensors": list(tensors)[:half], "A.safetensors": list(tensors)[half:]}
    for name, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, model / name)
    weight_map = {key: name for name, keys in parts.items() for key in keys}
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ModelError, match="capital letters"):
        Checkpoint.open(model)


def as_hub_cache(model: Path, root: Path) -> Path:
    """A model as the hub's cache keeps it: a snapshot of links to blobs."""
    blobs, snapshot = root / "blobs", root / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in model.iterdir():
        blob = sha256(path)
        shutil.copy(path, blobs / blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob}")
    return snapshot


def test_a_snapshot_of_the_hubs_cache_is_a_model(model: Path, tmp_path: Path) -> None:
    snapshot = as_hub_cache(model, tmp_path / "models--a--b")
    assert locate(str(snapshot)).source.sha256 == locate(str(model)).source.sha256
    assert Checkpoint.open(snapshot).parameters == Checkpoint.open(model).parameters
    load_model(snapshot)
    load_tokenizer(snapshot)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_dangling_link_of_a_snapshot_is_bad_input(
    invoke: Invoke, model: Path, tmp_path: Path, name: str
) -> None:
    snapshot = as_hub_cache(model, tmp_path / "models--a--b")
    (snapshot / name).resolve().unlink()
    code, _, said = invoke("prune", snapshot, "--pattern", "2:4", "-o", tmp_path / "out")
    assert code == 3
    assert f"{name}: a link to a file that is missing" in said
    assert not (tmp_path / "out").exists()


def link_out(folder: Path, name: str, outside: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *(
            "generation_config.json",
            "chat_template.jinja",
            "vocab.txt",
            "additional_chat_templates",
        ),
    ],
)
def test_a_link_out_of_a_model_is_bad_input(
    invoke: Invoke, model: Path, tmp_path: Path, name: str
) -> None:
    outside = tmp_path / "private.json"
    shutil.copy(model / name, outside) if (model / name).exists() else outside.write_text("{}")
    link_out(model, name, outside)
    code, _, said = invoke("prune", model, "--pattern", "2:4", "-o", tmp_path / "out")
    assert code == 3
    assert f"{name}: a link out of its folder" in said
    assert not (tmp_path / "out").exists()


def test_links_within_a_model_and_to_a_model_are_fine(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(model / "weights.bin")
    (model / "model.safetensors").symlink_to("weights.bin")
    (tmp_path / "linked").symlink_to(model)
    assert Checkpoint.open(tmp_path / "linked").parameters


def test_loops_and_pipes_are_bad_input(model: Path) -> None:
    (model / "loop.json").symlink_to("loop.json")
    with pytest.raises(ModelError, match=r"loop\.json"):
        Checkpoint.open(model)
    (model / "loop.json").unlink()
    os.mkfifo(model / "pipe.json")
    with pytest.raises(ModelError, match=r"pipe\.json: neither a file nor a folder"):
        locate(str(model))


def change_manifest(bundle: Path, change: Callable[[Any], None]) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", [name for name in FOREIGN if isinstance(name, str)], ids=ascii)
def test_a_foreign_name_in_a_manifest_is_bad_input(
    invoke: Invoke, tmp_path: Path, name: str
) -> None:
    out = write_bundle(tmp_path / "out")

    def rename(manifest: Any) -> None:
        files = manifest["stages"]["prune"]["files"]
        files[name] = files.pop("layers.json")

    change_manifest(out, rename)
    for command in (["verify", out], ["report", out], ["eval", out], ["generate", out, "x"]):
        code, _, said = invoke(*command)
        assert code == 3, said
        assert "manifest.json" in said


def as_stage(manifest: Any) -> None:
    manifest["stages"]["../../x"] = manifest["stages"].pop("bench")


def as_source(manifest: Any) -> None:
    manifest["source"]["sha256"] = "../../../../x"


def as_hash(manifest: Any) -> None:
    manifest["stages"]["onnx"]["files"]["onnx/export.json"]["sha256"] = "../../x"


@pytest.mark.parametrize("change", [as_stage, as_source, as_hash])
def test_what_folders_are_called_after_is_no_path(
    tmp_path: Path, change: Callable[[Any], None]
) -> None:
    out = write_bundle(tmp_path / "out")
    change_manifest(out, change)
    with pytest.raises(InputError, match=r"manifest\.json"):
        Bundle.open(out)


def test_the_graph_of_an_engine_is_a_stage(tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "out")

    def build_from(manifest: Any) -> None:
        manifest["stages"]["onnx"]["inputs"] = {"model": "", "../../x": {}}

    change_manifest(out, build_from)
    with pytest.raises(InputError, match="cannot be the name of one of its files"):
        Bundle.open(out).source_of("onnx")


def test_runs_of_a_benchmark_are_files_of_the_bundle(tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "out")
    (tmp_path / "secret.json").write_text('{"format": "thanos-deploy/bench/1"}')

    def elsewhere(manifest: Any) -> None:
        runs = manifest["stages"]["bench"]["result"]["runs"]
        runs["../../secret"] = runs.pop("latency")

    change_manifest(out, elsewhere)
    with pytest.raises(InputError, match="begins with a dot"):
        sources.read(Bundle.open(out))


@pytest.mark.parametrize("entry", ["model", "eval", ".lock", ".partial-manifest.json", "extra"])
def test_a_bundle_is_not_written_through_a_link(tmp_path: Path, entry: str) -> None:
    out = write_bundle(tmp_path / "out")
    outside = tmp_path / "outside"
    outside.mkdir()
    path = out / entry
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(outside if "." not in entry else tmp_path / "new-file")
    for read in (
        lambda: Bundle.open(out),
        lambda: claim(out, Source("folder", "tiny", "", "b1" * 32)).__enter__(),
    ):
        with pytest.raises(InputError, match="a link"):
            read()
    assert list(outside.iterdir()) == []
    assert not (tmp_path / "new-file").exists()


def test_a_manifest_that_lies_elsewhere_is_not_read(tmp_path: Path) -> None:
    out = write_bundle(tmp_path / "out")
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text('{"format": 99}')  # which would be told
    (out / "manifest.json").unlink()
    (out / "manifest.json").symlink_to(elsewhere)
    with pytest.raises(InputError, match=r"manifest\.json: a link out of its folder"):
        Bundle.open(out)


@pytest.mark.parametrize(
    "name", ["../x.packed.safetensors", "/x.packed.safetensors", "x\0.packed.safetensors", "x.json"]
)
def test_a_foreign_name_in_a_packed_folder_is_bad_input(tmp_path: Path, name: str) -> None:
    folder, restored = tmp_path / "packed", tmp_path / "restored"
    folder.mkdir()
    restored.mkdir()
    (tmp_path / "dense").mkdir()
    save_file({"w": torch.zeros(2, 4)}, tmp_path / "dense" / "model.safetensors")
    packed_folder.pack_folder(tmp_path / "dense", folder, {"w": SemiStructured(2, 4)})
    record = json.loads((folder / packed_folder.RECORD).read_text())
    del record["sha256"]
    record["files"] = {name: next(iter(record["files"].values()))}
    record["sha256"] = sha256_of(record)
    (folder / packed_folder.RECORD).write_text(json.dumps(record))
    with pytest.raises(ModelError, match="cannot be the name of one of its files"):
        packed_folder.unpack_folder(folder, restored)
    assert list(restored.iterdir()) == []


def test_a_foreign_name_in_a_journal_is_bad_input(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    Journal(folder, {"model": "x"}, Losses)
    report = encode(Losses({}, {}, {}))
    entry = {"parameters": {"../../x": {"bytes": 1, "sha256": ""}}, "inputs": {}, "report": report}
    content = {"entry": entry, "sha256": sha256_of(entry)}
    (folder / "block-0000.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="cannot be the name of one of its files"):
        Journal(folder, {"model": "x"}, Losses)


def point_data_to(graph: Path, location: str) -> None:
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    onnx.save(model, graph)


@pytest.mark.parametrize("location", ["../w.data", "/tmp/w.data", "a/../../w.data", "..\\w.data"])
def test_data_outside_of_a_graphs_folder_are_bad_input(
    exported_llama: Path, tmp_path: Path, location: str
) -> None:
    bundle = Path(shutil.copytree(exported_llama, tmp_path / "bundle"))
    graph = bundle / "onnx" / "model.onnx"
    shutil.copy(bundle / "onnx" / "model.onnx.data", bundle / "w.data")
    point_data_to(graph, location)
    for read in (
        lambda: open_engine(bundle, verify=False),
        lambda: judge_file(graph, {}, {}),
        lambda: read_weights(graph, []),
    ):
        with pytest.raises(InputError, match="cannot be the name of one of its files"):
            read()


def test_data_behind_a_link_out_are_bad_input(exported_llama: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(exported_llama, tmp_path / "bundle"))
    data = bundle / "onnx" / "model.onnx.data"
    data.rename(tmp_path / "w.data")
    data.symlink_to(tmp_path / "w.data")
    with pytest.raises(InputError, match="a link out of its folder"):
        open_engine(bundle, verify=False)


def nested_tensors() -> onnx.ModelProto:
    """A tensor with data elsewhere in every place where a model can have tensors."""
    helper, graph = onnx.helper, onnx.helper.make_graph([], "g", [], [])

    def tensor(name: str) -> onnx.TensorProto:
        made = onnx.TensorProto(name=name, data_type=1, dims=[1])
        made.external_data.add(key="location", value=name)
        made.external_data.add(key="offset", value="0")
        return made

    def sparse(name: str) -> onnx.SparseTensorProto:
        return onnx.SparseTensorProto(values=tensor(f"{name}-v"), indices=tensor(f"{name}-i"))

    def node(name: str) -> onnx.NodeProto:
        made = helper.make_node("X", [], [])
        made.attribute.add(name="t", t=tensor(f"{name}-t"), sparse_tensor=sparse(f"{name}-s"))
        made.attribute.add(name="ts", tensors=[tensor(f"{name}-ts")])
        made.attribute.add(name="ss", sparse_tensors=[sparse(f"{name}-ss")])
        inner = helper.make_graph([], "inner", [], [], [tensor(f"{name}-g")])
        made.attribute.add(name="g", g=inner, graphs=[inner])
        return made

    graph.initializer.append(tensor("initializer"))
    graph.sparse_initializer.append(sparse("sparse"))
    graph.node.append(node("node"))
    model = helper.make_model(graph)
    model.functions.add(name="f", node=[node("function")])
    model.functions[0].attribute_proto.add(name="a", t=tensor("default"))
    model.training_info.add(initialization=graph, algorithm=graph)
    return model


def test_every_place_of_a_tensor_is_looked_at() -> None:
    model = nested_tensors()
    found = set(onnxfile.locations(model.SerializeToString()))

    def expected(message: Any) -> set[str]:
        if isinstance(message, onnx.StringStringEntryProto):
            return {message.value} if message.key == "location" else set()
        inside: set[str] = set()
        for field, value in message.ListFields():
            if field.message_type is not None and field.name != "metadata_props":
                repeated = hasattr(value, "__len__")
                inside.update(*map(expected, value)) if repeated else inside.update(expected(value))
        return inside

    assert found == expected(model)
    assert len(found) == 18


@given(st.binary(max_size=200))
def test_what_is_no_onnx_file_is_said_so(content: bytes) -> None:
    try:
        list(onnxfile.locations(content))
    except (ValueError, IndexError):
        return


def test_every_refusal_is_exit_code_3() -> None:
    assert {InputError.exit_code, ModelError.exit_code} == {3}
    assert issubclass(ModelError, InputError)
    assert issubclass(InputError, DeployError)


def test_companions_are_copied_by_plain_names_and_hidden_ones_are_not(
    invoke: Invoke, model: Path, tmp_path: Path
) -> None:
    (model / "._config.json").write_text("what a file system of another kind leaves")
    (model / "folder.json").mkdir()
    small = ("--pattern", "2:4", "--nsamples", "2", "--seqlen", "16", "--preset", "paper")
    code, _, said = invoke("prune", model, *small, "-o", tmp_path / "out")
    assert code == 0, said
    assert not (tmp_path / "out" / "model" / "._config.json").exists()
    Bundle.open(tmp_path / "out").verify()
    (model / "tokenizer_a:b.json").write_text("{}")
    code, _, said = invoke("prune", model, *small, "-o", tmp_path / "other")
    assert code == 3
    assert "a:b.json" in said
