"""Compare `thanos-deploy serve` with `vllm serve` on a CPU, for dense, shrunk and 2:4 models.

Usage: python -m benchmarks.vllm OUT [--gguf FILE] [--aiperf DIR] [--vllm DIR]

Makes the bundles of both patterns in OUT, and the exports that the servers need; repeating the
command uses the existing ones. Pruning is done with fast settings, because the values of weights do
not change times. Our server runs the graph in float32 on ONNX Runtime. vLLM runs the checkpoint, or
the packed folder with this project's plugin, in each of DTYPES. The clients are AIPerf's; see
`benchmarks.aiperf` and `benchmarks.peers`. For a shorter run: `--dtypes float32`, `--clients 1 8`,
`--per-client 1`, `--patterns 2:4`.

Prints the table and writes it, with every sample, to benchmarks/results/vllm.json. A run is INVALID
for the same reasons as in `bench`, or if the servers generated different numbers of tokens.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import aiperf, peers
from benchmarks.peers import Load, Peer
from benchmarks.smollm2 import gguf_path
from exporters.options import ExportRequest
from thanos_deploy.bundle import files, layout
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.files import Json
from thanos_deploy.bundle.manifest import claim
from thanos_deploy.cli import _progress
from thanos_deploy.machine import environment, stillness
from thanos_deploy.pattern import Structured, parse
from thanos_deploy.progress import Announce
from thanos_deploy.stages.dense import Dense
from thanos_deploy.stages.export import export, export_dense
from thanos_deploy.stages.prune import prune
from thanos_deploy.stages.request import PruneRequest

OURS = "serve: {}"
DENSE = "dense"
PATTERNS = ("structured:0.3", "2:4")
DTYPES = ("float32", "bfloat16")


def main() -> None:
    """Make the models, measure the servers, write the results, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--gguf", type=Path, help="the model [default: SmolLM2-135M-Instruct]")
    parser.add_argument("--patterns", nargs="*", default=PATTERNS)
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="dtypes of vLLM"
    )
    parser.add_argument("--slots", type=int, default=8, help="slots of our server")
    aiperf.add_options(parser)
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results" / "vllm.json"
    )
    arguments = parser.parse_args()
    _progress.quiet_libraries()
    command, load = aiperf.installed(arguments.aiperf), aiperf.load_of(arguments)
    with _progress.announcer(quiet=False) as announce:
        dense = Dense(str(arguments.gguf or gguf_path()))
        models = made(dense, arguments.out.resolve(), arguments.patterns, announce)
    groups = groups_of(
        models,
        load,
        arguments.dtypes,
        slots=arguments.slots,
        environment=arguments.vllm.absolute(),
        threads=arguments.vllm_threads,
    )
    prompt = peers.texts(models[DENSE][0], count=1, tokens=load.prompt)[0]
    result = {
        "format": "thanos-deploy/vllm/1",
        "model": dense.source.name,
        "slots": arguments.slots,
        **measure(groups, load, prompt=prompt, command=command),
    }
    files.write_json(arguments.results, result)
    print(aiperf.table(result["closed_loop"], OURS.format(DENSE)))
    print(f"\n{aiperf.footnote(result)}")


def made(
    dense: Dense, out: Path, patterns: Sequence[str], announce: Announce
) -> dict[str, tuple[Path, Path]]:
    """Make the models; return for each name the bundle of the graph and the folder for vLLM."""
    export_dense(dense, ExportRequest(graph="ort"), announce)
    found = {DENSE: (dense.folder, dense.checkpoint(announce).folder)}
    for spelling in patterns:
        pattern = parse(spelling)
        method = "thanos" if isinstance(pattern, Structured) else "magnitude"
        request = PruneRequest.of(pattern, method=method, nsamples=8, seqlen=256)
        folder = out / spelling.replace(":", "-")
        with claim(folder, dense.source) as bundle:
            prune(bundle, dense, request, announce=announce)
            for target in (layout.ONNX, layout.VLLM):
                export(bundle, target=target, announce=announce)
        found[spelling] = (folder, folder / layout.VLLM)
    return found


def groups_of(
    models: dict[str, tuple[Path, Path]],
    load: Load,
    dtypes: Sequence[str],
    *,
    slots: int,
    environment: Path,
    threads: int | None,
) -> list[dict[str, Peer]]:
    """Return the servers of all models in one group per dtype of vLLM; ours are in the first.

    The servers of one group take turns. All servers at once would need more than 24 GiB.
    """
    groups: list[dict[str, Peer]] = [{} for _ in dtypes]
    for name, (bundle, folder) in models.items():
        ours = peers.thanos(bundle, slots=slots, queue=max(load.clients))
        groups[0][OURS.format(name)] = ours
        for group, dtype in zip(groups, dtypes, strict=True):
            served = peers.vllm(folder, environment, load, dtype=dtype, threads=threads)
            group[f"vllm serve, {dtype}: {name}"] = served
    return groups


def measure(groups: Sequence[dict[str, Peer]], load: Load, *, prompt: str, command: Path) -> Json:
    """Measure all servers; the servers of a group take turns.

    Args:
        groups: groups of servers, by name.
        load: requests of the closed loops.
        prompt: prompt of the first request to each server.
        command: command of AIPerf.
    """
    started = time.monotonic()
    closed: list[Json] = []
    stills = []
    for servers in groups:
        with (
            tempfile.TemporaryDirectory() as work,
            peers.started(servers, Path(work), load, prompt) as subjects,
        ):
            found, readings = aiperf.closed_loops(command, subjects, load, Path(work))
        closed += found
        stills.append(stillness.judge(readings))
    reasons = [reason for still in stills for reason in still.reasons]
    reasons += aiperf.differences(closed, load)
    return {
        "status": "INVALID" if reasons else "VALID",
        "reasons": reasons,
        "aiperf": aiperf.VERSION,
        "load": asdict(load),
        "seconds": time.monotonic() - started,
        "environment": encode(environment.describe()),
        "machine": [asdict(still) for still in stills],
        "closed_loop": closed,
    }


if __name__ == "__main__":
    main()
