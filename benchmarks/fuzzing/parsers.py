"""The parsers that are fuzzed, each with well-formed inputs and the exceptions it may raise."""

import asyncio
import json
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save, save_file

from runtime.server import errors, tensors
from runtime.server.access import Access, Keys
from runtime.server.app import application
from runtime.server.main import open_service
from runtime.server.service import Limits
from tests.bundles import write_bundle
from tests.conftest import write_model
from thanos_deploy.errors import DeployError, IntegrityError

Check = Callable[[bytes], object]

# Statuses with which the server refuses on purpose: queue full, and deadline exceeded.
_ALLOWED = (503, 504)


@dataclass(frozen=True, slots=True)
class Parser:
    """One entry point to fuzz.

    Attributes:
        open: called once with a folder of its own; returns the function that checks one input, and
            well-formed inputs.
        refuses: exceptions with which the parser refuses an input.
        words: dictionary for Atheris: words that occur in inputs.
    """

    open: Callable[[Path], tuple[Check, list[bytes]]]
    refuses: tuple[type[Exception], ...] = (DeployError,)
    words: tuple[str, ...] = field(default=())


def _gguf(folder: Path) -> tuple[Check, list[bytes]]:
    """Read a whole GGUF file, up to its dequantised weights and tokenizer."""
    import gguf

    from thanos_deploy.model.convert import convert_gguf

    path = folder / "seed.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "ab", "<s>", "</s>", "Ġ"])
    writer.add_token_types([1, 1, 1, 3, 3, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(3)
    writer.add_eos_token_id(4)
    block = "blk.0."
    for name, shape in {
        "token_embd.weight": (6, 8), "output_norm.weight": (8,), f"{block}attn_norm.weight": (8,),
        f"{block}attn_q.weight": (8, 8), f"{block}attn_k.weight": (4, 8),
        f"{block}attn_v.weight": (4, 8), f"{block}attn_output.weight": (8, 8),
        f"{block}ffn_norm.weight": (8,), f"{block}ffn_gate.weight": (16, 8),
        f"{block}ffn_up.weight": (16, 8), f"{block}ffn_down.weight": (8, 16),
    }.items():  # fmt: skip
        writer.add_tensor(name, np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    def check(content: bytes) -> None:
        path.write_bytes(content)
        with tempfile.TemporaryDirectory(dir=folder) as made:
            convert_gguf(path, Path(made))

    return check, [path.read_bytes()]


def _safetensors(folder: Path) -> tuple[Check, list[bytes]]:
    """Read a safetensors file: its header, and the tensors that the header names."""
    from thanos_deploy.model.tensorfile import TensorFile, entries

    path = folder / "model.safetensors"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        entries(path)
        with TensorFile.open(path) as opened:
            for name in opened.kinds:
                opened.read(name)

    kinds = (torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool)
    seeds = [
        save({f"layers.{number}.weight": torch.ones(2, 3, dtype=kind)}, {"format": "pt"})
        for number, kind in enumerate(kinds)
    ]
    empty = b"{}"
    return check, [*seeds, struct.pack("<Q", len(empty)) + empty]


def _packed(folder: Path) -> tuple[Check, list[bytes]]:
    """Read the record of a packed folder whose tensors are intact."""
    import exporters.packed
    from thanos_deploy.model.checkpoint import Checkpoint
    from thanos_deploy.model.packed_folder import RECORD, patterns_of, unpack_folder
    from thanos_deploy.pattern import SemiStructured

    model, packed = folder / "model", folder / "packed"
    packed.mkdir()
    write_model(model, "llama")
    weights = load_file(model / "model.safetensors")
    for name, tensor in weights.items():
        if "proj" in name:
            tensor.view(-1, 2, 2)[:, 0] = 0
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    exporters.packed.export(Checkpoint.open(model), packed, pattern=SemiStructured(2, 4))
    record = packed / RECORD
    seed = record.read_bytes()

    def check(content: bytes) -> None:
        record.write_bytes(content)
        patterns_of(packed)
        with tempfile.TemporaryDirectory(dir=folder) as made:
            unpack_folder(packed, Path(made))

    return check, [seed]


def _manifest(folder: Path) -> tuple[Check, list[bytes]]:
    """Read the manifest of a bundle, and write its report."""
    from thanos_deploy.bundle.manifest import MANIFEST, Bundle
    from thanos_deploy.report import build, card, markdown, sources

    bundle = write_bundle(folder / "out")
    path = bundle / MANIFEST
    seed = path.read_bytes()

    def check(content: bytes) -> None:
        path.write_bytes(content)
        opened = Bundle.open(bundle)
        with suppress(IntegrityError):  # the files of these bundles are shorter than recorded
            opened.verify()
        report = build.build([sources.read(opened)])
        card.write(report)
        markdown.render(report)

    return check, [seed]


def _build_log(folder: Path) -> tuple[Check, list[bytes]]:
    """Read the log of a TensorRT build, and the JSON of TensorRT's engine inspector."""
    from exporters.tensorrt import log

    def check(content: bytes) -> None:
        text = content.decode("utf-8", errors="replace")
        read = text.splitlines()
        log.sparsity_lines(read)
        log.timings(read)
        log.listed_layers(read)
        if text.lstrip().startswith("{"):
            log.inspected_layers(text)

    return check, [b"\n".join(_LOG), json.dumps(_INSPECTED).encode()]


def _binary_tensors(folder: Path) -> tuple[Check, list[bytes]]:
    """Read the body of a request for logits, with tensors as bytes after the JSON.

    An input is the JSON length from the HTTP header, a line break, and the body.
    """
    ids = np.arange(6, dtype="<i8").reshape(2, 3)
    named = {"name": "input_ids", "datatype": "INT64", "shape": [2, 3]}
    binary = json.dumps(
        {"inputs": [{**named, "parameters": {"binary_data_size": ids.nbytes}}]}
    ).encode()
    plain = json.dumps({"inputs": [{**named, "data": ids.tolist()}]}).encode()
    mask = json.dumps(
        {
            "id": "a",
            "inputs": [
                {**named, "data": ids.ravel().tolist()},
                {**named, "name": "attention_mask", "data": [0, 1, 1, 1, 1, 1]},
            ],
            "outputs": [{"name": "logits", "parameters": {"binary_data": True}}],
        }
    ).encode()

    def check(content: bytes) -> None:
        length, _, body = content.partition(b"\n")
        tensors.read(body, length.decode("latin-1") or None)

    return check, [
        b"%d\n%s%s" % (len(binary), binary, ids.tobytes()), b"\n" + plain, b"\n" + mask
    ]  # fmt: skip


def _requests(folder: Path) -> tuple[Check, list[bytes]]:
    """Send request bodies to a server of a small model.

    An input is a byte that selects the route, a line break, and the body.
    """
    import thanos_deploy as td

    write_model(folder / "model", "llama")
    pruned = td.prune(
        folder / "model", pattern="2:4", method="magnitude", out=folder / "out", seqlen=64
    )
    pruned.export("onnx")
    limits = Limits(answers=8, new_tokens=4, body_bytes=1 << 16, deadline_seconds=20)
    service = _OPEN.enter_context(
        open_service(folder / "out", slots=2, queue=8, limits=limits, names=("tiny",), threads=1)
    )
    app = application(service, Access(Keys(()), None, ()))
    loop = asyncio.new_event_loop()

    async def answer(route: str, body: bytes) -> int:
        messages: list[Mapping[str, object]] = [{"type": "http.request", "body": body}]
        statuses: list[int] = []

        async def receive() -> Mapping[str, object]:
            if messages:
                return messages.pop()
            await asyncio.sleep(60)  # the client stays
            return {"type": "http.disconnect"}

        async def send(message: Mapping[str, object]) -> None:
            if message["type"] == "http.response.start":
                statuses.append(int(str(message["status"])))

        headers = {"host": "localhost", "content-type": "application/json"}
        scope = {
            **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http"},
            **{"method": "POST", "path": route, "raw_path": route.encode(), "query_string": b""},
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            **{"client": ("127.0.0.1", 1), "server": ("localhost", 80), "state": {}},
        }
        await app(scope, receive, send)  # type: ignore[arg-type]
        return statuses[0]

    def check(content: bytes) -> None:
        first, _, body = content.partition(b"\n")
        route = _ROUTES[first[0] % len(_ROUTES)] if first else _ROUTES[0]
        status = loop.run_until_complete(answer(route, body))
        if status >= 500 and status not in _ALLOWED:
            raise AssertionError(f"{route} was answered {status}")

    return check, list(_bodies())


# Keeps the service open until this process ends.
_OPEN = ExitStack()

_ROUTES = (
    "/v1/completions",
    "/v1/chat/completions",
    "/tokenize",
    "/detokenize",
    "/v2/models/tiny/infer",
)

# One log line of each kind that is parsed, as TensorRT 8 to 10 and TensorRT-RTX write them.
_LOG = (
    b"[I] [TRT] (Sparsity) Layers eligible for sparse math: a, b + c",
    b"[I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: b + c",
    b"(Sparsity) Found 2 layer(s) eligible to use sparse tactics: a, b",
    b"(Sparsity) Chose 1 layer(s) using sparse tactics: b",
    b"*************** Autotuning format combination: Half(1) -> Half(1) ***************",
    b"--------------- Timing Runner: a (CaskConvolution[0x80000009])",
    b"sm80_xmma_fprop_sparse_gemm_f16 Tactic: 0x1 Time: 0.01",
    b"Name: a, LayerType: gemm, Inputs: [], Outputs: [], TacticName: sm90_sparse, "
    b"StreamId: 0, Metadata: [ONNX Layer: a]",
)
_INSPECTED = {
    "Layers": [
        "only a name",
        {"Name": "a", "LayerType": "gemm", "TacticName": "k", "Metadata": "[ONNX Layer: a]"},
    ]
}


def _bodies() -> Iterator[bytes]:
    message = {"role": "user", "content": "a"}
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    ids = {"name": "input_ids", "datatype": "INT64", "shape": [1, 2], "data": [1, 2]}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    for route, body in (
        (0, {"prompt": "ab", "max_tokens": 2, "logprobs": 1, "echo": True, "stop": ["x"]}),
        (0, {"prompt": [1, 2], "n": 2, "temperature": 0.5, "top_p": 0.9, "stream": True}),
        (0, {"prompt": ["a", "b"], "logit_bias": {"5": 3}, "presence_penalty": 1, "min_tokens": 1}),
        (0, {"prompt": "a", "guided_regex": "[ab]+", "top_k": 3, "min_p": 0.1}),
        (1, {"messages": [message], "logprobs": True, "top_logprobs": 2}),
        (1, {"messages": [message], "tools": [tool], "tool_choice": "required"}),
        (1, {"messages": [message], "response_format": {"type": "json_object"}}),
        (1, {"messages": [message], "stream": True, "stream_options": {"include_usage": True}}),
        (2, {"prompt": "ab", "add_special_tokens": True, "return_token_strs": True}),
        (2, {"messages": [message]}),
        (3, {"tokens": [1, 2, 3]}),
        (4, {"inputs": [ids]}),
    ):  # fmt: skip
        yield bytes([route]) + b"\n" + json.dumps({"model": "tiny", **body}).encode()


PARSERS = {
    "gguf": Parser(_gguf, words=("GGUF", "general.architecture", "llama.block_count")),
    "safetensors": Parser(_safetensors, words=("dtype", "shape", "data_offsets", "__metadata__")),
    "packed": Parser(_packed, words=("weights", "files", "sha256", "2:4", "4:8")),
    "manifest": Parser(_manifest, words=("stages", "files", "options", "sha256", "state")),
    "build-log": Parser(_build_log, words=("(Sparsity)", "TacticName: ", "[ONNX Layer: ")),
    "binary-tensors": Parser(
        _binary_tensors, (errors.RefusedError,), words=("binary_data_size", "shape", "data")
    ),
    "requests": Parser(
        _requests,
        (),
        words=(
            "messages",
            "prompt",
            "max_tokens",
            "stream",
            "logprobs",
            "tools",
            "response_format",
        ),
    ),
}
