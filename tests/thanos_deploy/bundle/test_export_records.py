"""Records of graphs and engines: as JSON and back, and those that were written earlier."""

import json
from pathlib import Path

import pytest

from exporters.options import GRAPHS, ExportRequest, exported_with
from tests.bundles import build_record, write_bundle
from thanos_deploy.bundle.codec import decode, encode
from thanos_deploy.bundle.engine_record import BuildRecord, EngineResult, read_build
from thanos_deploy.bundle.graph_record import GraphResult, read_graph_record
from thanos_deploy.bundle.layout import BUILD, GRAPH_RECORD, ONNX
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.errors import InputError

GRAPH = {
    "opset": 20,
    "dtype": "fp32",
    "pattern": "2:4",
    "max_sequence": 128,
    "cache": {"blocks": [{"heads": 2, "key_dim": 8, "value_dim": 8}], "bytes_per_token": 128},
    "parity_limit": 1e-4,
    "parity": [],
    "weights": [
        {"name": "up", "shape": [8, 16], "input_axis": 0, "sparsity": 0.5, "pattern_holds": True}
    ],
}


def test_a_graph_from_before_layers_had_patterns_of_their_own_is_read(tmp_path: Path) -> None:
    path = tmp_path / GRAPH_RECORD
    path.write_text(json.dumps(GRAPH))
    record = read_graph_record(path)
    assert record.weights[0].pattern == "2:4"
    assert (record.logits, record.rounding, record.quantised) == ("all", {}, None)
    again = GraphResult.of(record)
    assert decode(GraphResult, json.loads(json.dumps(encode(again)))) == again


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"weights": [1]}', json.dumps({**GRAPH, "opset": "20"})],
    ids=["nothing", "a list", "empty", "no weights", "another type"],
)
def test_what_is_no_record_of_a_graph_is_bad_input(tmp_path: Path, content: str) -> None:
    path = tmp_path / GRAPH_RECORD
    path.write_text(content)
    with pytest.raises(InputError, match=r"export\.json: not readable"):
        read_graph_record(path)


def test_a_build_is_what_was_written_and_its_result_has_all_but_the_long_parts(
    tmp_path: Path,
) -> None:
    build = build_record()
    (tmp_path / BUILD).write_text(json.dumps(encode(build)))
    assert read_build(tmp_path) == build
    result = build.result({"matmul": 0.1})
    assert encode(result).keys() - {"trial_seconds"} == encode(build).keys() - {
        "layers",
        "profiles",
    }
    assert decode(EngineResult, encode(result)) == result


def test_a_build_of_another_format_is_bad_input(tmp_path: Path) -> None:
    (tmp_path / BUILD).write_text(json.dumps({**encode(build_record()), "format": "x/2"}))
    with pytest.raises(InputError, match="format 'x/2'"):
        read_build(tmp_path)
    with pytest.raises(ValueError, match="summary is missing"):
        decode(BuildRecord, {k: v for k, v in encode(build_record()).items() if k != "summary"})


def test_a_manifest_with_another_record_is_bad_input_that_names_the_place(tmp_path: Path) -> None:
    bundle = Bundle.open(write_bundle(tmp_path / "out"))
    assert exported_with(bundle) == ExportRequest()
    assert bundle.result(GRAPHS).worst_logits_error == 1e-6
    bundle.stages[ONNX].options["dtype"] = "fp64"
    with pytest.raises(
        InputError, match=r"manifest\.json: options of stage 'onnx': dtype is 'fp64'"
    ):
        exported_with(bundle)
