"""The stage bench: exported models measured in turns."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from exporters.options import exported_with
from runtime.engine import open_engine, stop_ids
from runtime.generate import generate
from runtime.text import TOKENIZER, open_tokenizer
from thanos_deploy.bundle import manifest, names
from thanos_deploy.bundle.codec import encode
from thanos_deploy.bundle.files import Json, write_json
from thanos_deploy.bundle.manifest import Bundle
from thanos_deploy.errors import InputError, UsageError
from thanos_deploy.measure import benchmark, traffic
from thanos_deploy.measure.options import BenchRequest
from thanos_deploy.model.load import load_tokenizer
from thanos_deploy.progress import Announce, quietly
from thanos_deploy.stages.dense import Dense, dense_folder
from thanos_deploy.stages.export import export_dense

# What a bundle and the model that it was made from are called where they are compared.
PRUNED = "pruned"
DENSE = "dense"


def compared(
    bundle: Bundle,
    against: Sequence[str],
    dense: Dense | None,
    *,
    different_models: bool = False,
    announce: Announce = quietly,
) -> dict[str, Bundle]:
    """A bundle, called pruned, and what it is compared with; the first of these is the baseline.

    Args:
        bundle: with the stage onnx finished.
        against: "dense" for the model that the bundle was made from, else folders of bundles.
        dense: that model; None for what the cache has of it.
        different_models: allow bundles of another base model or with another tokenizer.
        announce: told of every piece of work.

    Returns:
        bundles by label, the baseline first; a further bundle is called like its folder.

    Raises:
        InputError: a bundle is not there, or its graph, or the dense model's.
        UsageError: a bundle is compared with itself, two have one name, or their models differ.
    """
    others: dict[str, Bundle] = {}
    for name in against:
        other = bundle if name == DENSE else Bundle.open(Path(name))
        label = name if name == DENSE else other.path.resolve().name
        itself = name != DENSE and (label == DENSE or other.path.samefile(bundle.path))
        if itself or label in (PRUNED, *others):
            raise UsageError(
                f"--against {name}: two of the models would be the same, or be called {label!r}",
                fix="name each bundle once, in a folder of its own name; --aa compares a bundle "
                "with itself",
            )
        other.require("onnx", f"`thanos-deploy export {other.path} --target onnx`")
        if not different_models:
            _require_same_model(bundle, other)
        others[label] = other
    if DENSE in others:  # the last to be looked at, because its export takes minutes
        others[DENSE] = _dense_export(bundle, dense, announce)
    baseline, *further = others
    return {
        baseline: others[baseline],
        PRUNED: bundle,
        **{label: others[label] for label in further},
    }


def bench(
    bundle: Bundle,
    subjects: Mapping[str, Bundle],
    request: BenchRequest,
    *,
    overwrite: bool = False,
    announce: Announce = quietly,
) -> Json:
    """Measure exported models in turns and keep the run in a bundle, unless that is done.

    Args:
        bundle: keeps the run, beside its runs of other names.
        subjects: `compared`, or the bundle alone under several names.
        request: what to measure.
        overwrite: redo a run of that name that was made with other options.
        announce: told of every piece of work.

    Returns:
        the run without its raw samples; see `benchmark.measure`.

    Raises:
        UsageError: the models do not take the request, or a run of that name was made with other
            options, and not `overwrite`.
        PlatformError: the driver of the load is not installed.
        KeyboardInterrupt: the rounds that were complete are in `bench/RUN.interrupted.json`.
    """
    request.check(min(one.stages["onnx"].result["max_sequence"] for one in subjects.values()))
    if request.driver == "loadgen":
        traffic.loadgen_library()
    check_bench(bundle, request, list(subjects), overwrite=overwrite)
    others = _other_runs(bundle, request.run)
    graphs = {label: subject.graph_sha256 for label, subject in subjects.items()}
    options = {
        **{name: run.options for name, run in others.items()},
        request.run: _bench_options(request, list(subjects)),
    }

    def produce(folder: Path) -> Json:
        out = folder / "bench"
        out.mkdir()
        run = benchmark.measure(
            subjects,
            request,
            same=len({subject.path for subject in subjects.values()}) == 1,
            on_progress=announce("Measure latency and memory in turns"),
        )
        if run["status"] == "INTERRUPTED":
            (bundle.path / "bench").mkdir(exist_ok=True)
            write_json(bundle.path / "bench" / f"{request.run}.interrupted.json", run)
            raise KeyboardInterrupt
        write_json(out / f"{request.run}.json", run)
        for name in others:
            bundle.verify_file(f"bench/{name}.json")
            shutil.copy(bundle.path / "bench" / f"{name}.json", out)
        sample = _samples(bundle, subjects, request)
        write_json(out / "sample.json", sample)
        runs = {name: other.result for name, other in others.items()}
        return {
            "runs": {**runs, request.run: benchmark.without_samples(run)},
            "sample": sample,
        }

    before = bundle.stages.get("bench")
    record = bundle.run(
        "bench",
        produce,
        options=options,
        inputs={**{name: run.inputs for name, run in others.items()}, request.run: graphs},
        # A run more or less is no contradiction.
        overwrite=overwrite or (before is not None and before.options.keys() != options.keys()),
    )
    run: Json = record.result["runs"][request.run]
    return run


def check_bench(
    bundle: Bundle, request: BenchRequest, subjects: Sequence[str], *, overwrite: bool
) -> None:
    """Refuse options that differ from those of a finished run of the same name.

    Raises:
        UsageError: they differ and may not be overwritten.
    """
    before = _finished_runs(bundle).get(request.run)
    now = _bench_options(request, subjects)
    if before is not None and before.options != now and not overwrite:
        raise UsageError(
            f"{bundle.path}: run {request.run!r} was made with other options: "
            f"{manifest.differences(before.options, now)}",
            fix="give it another name with --run, or --overwrite to redo it",
        )


def _bench_options(request: BenchRequest, subjects: Sequence[str]) -> Json:
    return {**request.to_json(), "subjects": list(subjects)}


@dataclass(frozen=True, slots=True)
class _Run:
    """A finished run of the stage bench."""

    options: Json
    inputs: Json
    result: Json


def _finished_runs(bundle: Bundle) -> dict[str, _Run]:
    """The runs of the stage bench, in the order in which they were measured.

    There is none in a stage that is from before runs had names.
    """
    done = bundle.stages.get("bench")
    if done is None:
        return {}
    return {
        names.plain(name, bundle.path / manifest.MANIFEST): _Run(
            done.options[name], done.inputs[name], result
        )
        for name, result in done.result.get("runs", {}).items()
    }


def _other_runs(bundle: Bundle, name: str) -> dict[str, _Run]:
    """The runs of other names that are of the graph that the bundle has now."""
    return {
        other: run
        for other, run in _finished_runs(bundle).items()
        if other != name and run.inputs[PRUNED] == bundle.graph_sha256
    }


def _samples(bundle: Bundle, subjects: Mapping[str, Bundle], request: BenchRequest) -> Json:
    """What the subjects make of the sample prompt, beside what others made of it before."""
    done = bundle.stages.get("bench")
    before = done.result["sample"] if done else {}
    return {
        **(before if before.get("prompt") == request.sample_prompt else {}),
        "prompt": request.sample_prompt,
        **{
            label: _sample(
                subject.path,
                # The cache has the dense model's files only where it converted them.
                (subject if "prune" in subject.stages else bundle).path,
                request,
            )
            for label, subject in subjects.items()
        },
    }


def _sample(bundle: Path, tokenized_by: Path, request: BenchRequest) -> str:
    """What the exported model of a bundle makes of the sample prompt, read as `generate` reads it.

    Args:
        bundle: has the graph.
        tokenized_by: the bundle that has the tokenizer.
        request: the prompt, and how many tokens of answer.
    """
    model = tokenized_by / "model"
    tokenizer = load_tokenizer(model)
    # `generate` has no other way; a model without tokenizer.json is still to be measured.
    prompt = (
        open_tokenizer(tokenized_by, verify=False).encode(request.sample_prompt)
        if (tokenized_by / TOKENIZER).is_file()
        else tokenizer(request.sample_prompt)["input_ids"]
    )
    ids = generate(
        # The hashes have just been compared.
        open_engine(bundle, verify=False),
        prompt,
        new_tokens=request.sample_tokens,
        stop=stop_ids(model),
    )
    return str(tokenizer.decode(list(ids)))


def _require_same_model(bundle: Bundle, other: Bundle) -> None:
    def tokenizer(of: Bundle) -> str | None:
        files = of.stages["prune"].files if "prune" in of.stages else {}
        return files["model/tokenizer.json"].sha256 if "model/tokenizer.json" in files else None

    for what, own, theirs in (
        ("base model", bundle.source["sha256"], other.source["sha256"]),
        ("tokenizer", tokenizer(bundle), tokenizer(other)),
    ):
        if own != theirs:
            raise UsageError(
                f"{other.path}: made from {other.source['name']}, whose {what} is not that of "
                f"{bundle.path}, made from {bundle.source['name']}",
                fix="compare bundles of one model, or give --allow-different-models",
            )


def _dense_export(bundle: Bundle, dense: Dense | None, announce: Announce) -> Bundle:
    """The dense model's bundle, exported like a pruned one."""
    wanted = exported_with(bundle)
    if dense is not None:
        export_dense(dense, wanted, announce)
        return Bundle.open(dense.folder)
    folder = dense_folder(bundle.source["sha256"])
    if (folder / manifest.MANIFEST).exists():
        found = Bundle.open(folder)
        if "onnx" in found.stages and found.stages["onnx"].options == encode(wanted):
            return found
    raise InputError(
        f"{folder}: no export of {bundle.source['name']} there, the dense model of {bundle.path}, "
        f"in {wanted.dtype}",
        fix="name the model with --dense MODEL to export it now, or give another baseline with "
        "--against",
    )
