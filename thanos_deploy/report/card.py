"""The model card: quality, size and speed of the pruned model, and how to load it."""

from collections.abc import Iterator, Sequence

from thanos_deploy.bundle import layout
from thanos_deploy.bundle.codec import decode
from thanos_deploy.gpu.nvml import NOT_MEASURED
from thanos_deploy.measure.run import DENSE, PRUNED
from thanos_deploy.model.loaders import LoaderVerdict
from thanos_deploy.pruning.budget import ranges
from thanos_deploy.pruning.result import PruneOptions
from thanos_deploy.report.escape import code, literal, quote
from thanos_deploy.report.figures import figures, shown, shown_ratio
from thanos_deploy.report.model import ModelReport, Report, TaskScores
from thanos_deploy.report.runs import quoted, quoted_on_gpu


def write(report: Report) -> str:
    """Return the content of README.md of a bundle.

    Args:
        report: report on this bundle alone.
    """
    (model,) = report.models
    table = "\n".join(
        f"| {figure.title} | {shown(figure.dense, figure.unit)} | "
        f"{shown(figure.pruned, figure.unit)} | {shown_ratio(figure)} |"
        for figure in figures(model)
    )
    verdict = "\n".join(f"- {literal(said)}" for said in (*report.notices, *model.verdict))
    source, layers = model.source, model.linear_layers
    name = literal(source.name)
    return f"""# {name}, pruned to {model.pattern} with {model.method}

Made by thanos-deploy {report.made_with} from {name} (SHA-256 `{source.sha256}`
over its weights, configuration and tokenizer). The base model's licence and its limits apply.

| | dense | pruned | pruned / dense |
|---|---|---|---|
{table}

{" ".join(_how(model))} `report/index.html` has the whole of it.

{verdict}

## What was pruned

{_what(model)} On the calibration text a layer misses {layers.median_relative_error:.2%} of the
energy of the output that it aims at in the median and {layers.worst_relative_error:.2%} at worst
({code(layers.worst_layer)}).

## How to load it

{_loading(model)}
{_graph(model)}
## Limits

{_training(model)}; judge it on your own task before you use it.
{_sample(model)}"""


def _how(model: ModelReport) -> Iterator[str]:
    """Yield sentences that say how the figures were measured."""
    if quality := model.quality:
        yield (
            f"Perplexity: {quality.segments} segments of {quality.length} tokens of "
            f"{literal(quality.text)}, with {' '.join(map(code, quality.frame)) or 'nothing'} before each."
        )
    if tasks := model.tasks:
        yield (
            f"Tasks: lm-evaluation-harness, zero-shot, with {literal(', '.join(_examples(tasks)))} examples."
        )
    run = quoted(model)
    if run is None:
        yield "Latency and memory: not measured."
        return
    environment = run.environment
    yield (
        f"Latency (median, and ratio with its interval) and memory: {run.backend}, "
        f"{run.provider}, {literal(run.processor)}, {environment.cores} CPU cores."
    )
    if quoted_on_gpu(model) is None:
        yield f"This model on a GPU: {NOT_MEASURED}."


def _examples(tasks: Sequence[TaskScores]) -> list[str]:
    """Return the number of examples and the name of each task, once per task."""
    return list({score.task: f"{score.samples} {score.task}" for score in tasks}.values())


def _graph(model: ModelReport) -> str:
    if model.export is None:
        return ""
    parity = model.export.parity
    return f"""
`onnx/model.onnx` is one graph for prefill and decode with the KV cache as inputs and outputs;
its results differ from PyTorch's by at most {parity.worst:.1e} of their range
({parity.cases} cases, limit {parity.limit:g}).
"""


def _sample(model: ModelReport) -> str:
    sample = model.sample
    if sample is None or PRUNED not in sample.texts:
        return ""
    texts = {who: quote(text) for who, text in sample.texts.items()}
    said = f"""From the prompt "{literal(sample.prompt)}" it continues (greedily, the exported model):

{texts[PRUNED]}
"""
    if DENSE in texts:
        said += f"""
where the dense model continues:

{texts[DENSE]}
"""
    return said


def _training(model: ModelReport) -> str:
    if decode(PruneOptions, model.options[layout.PRUNE]).recover:
        return "Pruned in one shot, and trained for a while afterwards"
    return "Pruned in one shot, without any training afterwards"


def _what(model: ModelReport) -> str:
    options = decode(PruneOptions, model.options[layout.PRUNE])
    text = (
        "the calibration text"
        if options.recover_text == "calib"
        else f"text that the dense model wrote (`{layout.OWN_TEXT}`)"
    )
    what = f"updates of rank {options.recover_rank} to " if options.recover_rank else ""
    trained = (
        f"""

Then {what}the weights of the linear layers were trained on {options.recover} segments of {text},
with the dense model as the teacher; zeros stayed zero. The errors in `layers.json` are those before."""
        if options.recover
        else ""
    )
    return _pruned(model) + trained


def _pruned(model: ModelReport) -> str:
    layers, widths = model.linear_layers, model.widths
    if widths is None:
        holds = (
            f"holds in every layer{' that was pruned' if layers.layers_left_dense else ''}"
            if layers.pattern_holds
            else f"does not hold in {len(layers.layers_off_pattern or ())} layers"
        )
        dense = layers.layers_left_dense or ()
        left = (
            f" Left dense, bit by bit as they were: {', '.join(map(code, dense))}." if dense else ""
        )
        return f"""{layers.layers} linear layers with {layers.weights:,} weights, {layers.sparsity:.2%} of them zero. The
pattern {holds}, read back from the files. `layers.json` has every
layer.{left} Embeddings, norms, biases and the output head are unchanged."""
    rows = "\n".join(
        f"| {title} | {_range(part.before)} | {_range(part.after)} |"
        for part, title in (
            (widths.heads, "attention heads"),
            (widths.kv_heads, "key-value heads"),
            (widths.channels, "feed-forward channels"),
            *([] if widths.experts is None else [(widths.experts, "experts")]),
        )
    )
    if widths.dropped:
        return f"""{widths.removed:.2%} of the blocks' parameters are gone ({widths.block_parameters_before:,} before,
{widths.block_parameters_after:,} after): the blocks with the numbers {ranges(widths.dropped)} were dropped, and the
others moved up. `layers.json` has every block of the dense model. Embeddings, norms and the output
head are unchanged."""
    fitted = (
        "the remaining experts are unchanged"
        if widths.drops_experts
        else "the layers that read the remaining heads and channels were refitted by least squares"
    )
    return f"""{widths.removed:.2%} of the blocks' parameters are gone ({widths.block_parameters_before:,} before,
{widths.block_parameters_after:,} after); {fitted}.

| in each block | dense | pruned |
|---|---|---|
{rows}

`layers.json` says which {"experts" if widths.drops_experts else "heads and channels"} stayed. Embeddings, norms and the output head are unchanged."""


def _range(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _loading(model: ModelReport) -> str:
    widths = model.widths
    if widths is not None and not widths.stock_config:
        return """No stock `config.json` can describe these widths, so `AutoModelForCausalLM` refuses the folder:
`config.json` is the dense model's and `model/widths.json` declares the widths. Use the ONNX graph, or

```python
import thanos_deploy as td

model = td.load_model("model")
```"""
    stock = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("model")
tokenizer = AutoTokenizer.from_pretrained("model")
```"""
    if widths is None:
        return stock + _others(model)
    return f"""{stock}

`model/` is an ordinary checkpoint of its architecture with a smaller `config.json`: no code comes with
it and no flag is needed.{_others(model)}"""


def _others(model: ModelReport) -> str:
    """Return a table of the other loaders and whether they take the checkpoint."""
    if not model.loaders:
        return ""
    rows = "\n".join(
        f"| {entry.loader}: `{entry.command}` | {_compatible(entry)} | "
        f"{'; '.join(entry.reasons) or entry.notes} |"
        for entry in model.loaders
    )
    return f"""

Other loaders, judged by `config.json` and the constraints in their source. Tested means that shrunk
models of this type were served by that version, with the tokens of transformers:

| loader | | |
|---|---|---|
{rows}"""


def _compatible(entry: LoaderVerdict) -> str:
    match entry.compatible:
        case None:
            return "not judged"
        case True:
            return f"tested with {entry.tested}" if entry.tested else "config-compatible"
        case _:
            return "does not take it"
