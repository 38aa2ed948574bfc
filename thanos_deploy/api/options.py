"""The keyword arguments that several functions share, each called as the command's option is.

`--block-size 64` on the command line is `block_size=64` here, with the same meaning and the same
default. What may be given often there is a sequence here.
"""

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, TypedDict

from thanos_deploy.api._checks import Positive, Range
from thanos_deploy.pattern import Pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PatternLike = Pattern | str
ModelLike = str | PathLike[str] | tuple["PreTrainedModel", "PreTrainedTokenizerBase"]


class Progress(Protocol):
    """Told how far work is: called at the beginning of each piece of it, and after its steps.

    Example:
        def progress(title: str, done: int, total: int) -> None:
            print(f"{title}: {done} of {total}")
    """

    def __call__(self, title: str, done: int, total: int, /) -> object:
        """Take note; the first call for a title has 0 done."""


class PruneOptions(TypedDict, total=False):
    """How to prune, on which text, and what to leave; see the command `prune`.

    Attributes:
        method: "thanos", "sparsegpt", "wanda" or "magnitude". Default: "thanos".
        preset: "best", "fast", "max" or "paper", the method's settings, and what they cost; see
            the command. Default: "best".
        block_size: columns that are solved at once (thanos, sparsegpt).
        damp: damping of the Hessian, as a fraction (thanos, sparsegpt).
        damp_mode: of what `damp` is a fraction: "mean", "median" or "per-channel" (thanos,
            sparsegpt).
        score: what chooses the weights to remove, "wanda" or "obs" (thanos).
        refit_steps: steps of a last fit of all kept weights of a layer (thanos).
        mask_passes: how often the mask of every group of an n:m pattern is chosen again (thanos).
        outlier_rows: fraction of each layer's rows that stay dense (thanos).
        true_sequential: collect each layer's statistics after the layers before it in the block
            are pruned; False for all of a block's at once. Default: the preset's.
        dense_target: from 0 to 1, how far each layer aims at its output in the dense model.
            Default: the preset's.
        tune_steps: steps of all kept weights of a block together. Default: the preset's.
        tune_nsamples: segments that these look at, those of `nsamples` among them. Default: the
            preset's.
        shrink: what to cut out with a structured pattern: "heads", "ffn" or "both", the default;
            of a model with experts "experts", which is the default there, or "ffn".
        ffn_multiple: the number of feed-forward channels left is a multiple of this.
        keep_shape: with a structured pattern, set columns to zero and leave all shapes. Default:
            False.
        allocation: "uniform", "loss", "blocks" or "owl", how the sparsity is spread. Default:
            "uniform".
        owl_threshold: owl: an outlier's score is this many times the block's mean. Default: 5.
        owl_spread: owl: how far a block's sparsity may be from the pattern's. Default: 0.08.
        include: prune only these layers: full names, or "re:" and an expression.
        ignore: leave these layers dense, named likewise.
        sparsity_file: path of a JSON object of layers with patterns of their own.
        keep_dense: fraction of the weights that stays, in the layers whose pruning would change the
            model most for what it saves. Default: 0.
        budget: "speed=1.2x": how many times as fast as the dense model the pruned one has to be;
            other layers stay dense. Default: none.
        budget_gpu: the GPU that this is for, a name that `plan` knows.
        budget_step: what has to be that fast: "decode:BATCH" or "prefill:TOKENS". Default:
            "decode:1".
        budget_measured: path of a file of matrix products measured on that GPU. Default: the
            published ones, where that GPU was measured.
        recover: segments to train what is left on, with the dense model as teacher, and the scales
            of what was quantised. Default: the preset's, which is 0 but for "max".
        recover_text: what these are of: "calib", the calibration text; "own" or "chat", text that
            the dense model writes. Default: "calib".
        quantize: "int8" or "int4", with ":GROUP" or ":row", and ":asym": what to quantise the
            linear layers of the blocks to, with tune_steps of codes and scales. Default: "none".
        calib: calibration text: a path, a data set, several with weights, or "builtin", the
            default; see the command `prune`.
        text_field: field of a row with the text. Default: "text".
        calib_rows: rows of each data set, chosen by the seed. Default: all.
        calib_cut: "packed", rows are joined and cut, or "row", each segment begins a row. Default:
            "packed".
        nsamples: segments of calibration text. Default: 32.
        seqlen: tokens of each. Default: 512.
        seed: for choosing the segments. Default: 0.
        calib_forward: what blocks run in on calibration data: "auto", "fp32" or "bf16". Default:
            "auto".
        device: where PyTorch computes: "auto", "cpu" or "cuda[:N]". Default: "auto".
        activations: where the calibration data waits between two blocks: "auto", "device", "host"
            or "disk". Default: "auto".
        dtype: what to store the checkpoint in: "auto", "fp32", "fp16" or "bf16". Default: "auto",
            each tensor's own.
    """

    method: str
    preset: Literal["best", "fast", "max", "paper"]
    block_size: int
    damp: float
    damp_mode: Literal["mean", "median", "per-channel"]
    score: Literal["wanda", "obs"]
    refit_steps: int
    mask_passes: int
    outlier_rows: float
    true_sequential: bool
    dense_target: float
    tune_steps: int
    tune_nsamples: int
    shrink: Literal["heads", "ffn", "both", "experts"]
    ffn_multiple: int
    keep_shape: bool
    allocation: Literal["uniform", "loss", "blocks", "owl"]
    owl_threshold: float
    owl_spread: float
    include: Sequence[str]
    ignore: Sequence[str]
    sparsity_file: str | PathLike[str]
    keep_dense: float
    budget: str
    budget_gpu: str
    budget_step: str
    budget_measured: str | PathLike[str]
    recover: int
    recover_text: Literal["calib", "own", "chat"]
    quantize: str
    calib: str | PathLike[str]
    text_field: str
    calib_rows: int
    calib_cut: Literal["packed", "row"]
    nsamples: int
    seqlen: int
    seed: int
    calib_forward: Literal["auto", "fp32", "bf16"]
    device: str
    activations: Literal["auto", "device", "host", "disk"]
    dtype: Literal["auto", "fp32", "fp16", "bf16"]


class ExportOptions(TypedDict, total=False):
    """What a target may be asked for; see the command `export`. Each target takes some of these.

    Attributes:
        dtype: what the graph holds its weights in. Default: what the graph that is there was made
            with, or "fp32"; for engines "fp16", for gguf "q8_0".
        max_seq: the most tokens, prompt and answer together. Default: what the graph that is there
            was made with, or all that the model takes.
        logits: "all", after every token, or "last". Default: what the graph that is there was made
            with, or "all"; for engines "last".
        graph: "ort", with ONNX Runtime's own attention where it fits the model, or "neutral".
            Default: what the graph that is there was made with, or "ort".
        batch: engines: sequences at once, the usual number and the largest. Default: (1, 8).
        seq: engines: tokens of a prompt, the usual number and the largest. Default: (128, 1024),
            or as far as the model goes.
        sm: engines: compute capabilities to build for, such as 89. Default: that of the GPU of this
            machine, or all that the library builds for ahead of time.
        sparse_form: engines: how linear layers are written; "auto" builds both forms on the GPU and
            keeps the faster. Default: "matmul".
        engine_compat: engines: where else one may run beside the GPU and the version that it is
            built for; costs speed. Default: "none".
    """

    dtype: Literal[
        "fp32", "fp16", "int8", "int4", "int8-qdq", "bf16", "q8_0", "q4_k_m", "q4_0", "q4_1"
    ]
    max_seq: int
    logits: Literal["all", "last"]
    graph: Literal["neutral", "ort"]
    batch: Sequence[Positive]
    seq: Sequence[Positive]
    sm: Sequence[Positive]
    sparse_form: Literal["matmul", "conv1x1", "auto"]
    engine_compat: Literal["none", "version", "same-sm", "ampere+"]


class PruneExportOptions(PruneOptions, total=False):
    """How to prune, export, judge and time; see the command `prune-export`.

    Attributes:
        target: what to export to beside ONNX; see `Bundle.export`. Default: "onnx".
        max_seq, logits, graph, seq, sm, sparse_form, engine_compat: of the target; see
            `ExportOptions`.
        eval_text, eval_segments, eval_seqlen, eval_questions: what to measure quality on; see
            `evaluate`.
        batch, prompt, past, new_tokens, rounds, sample_prompt: what to time; see `Bundle.bench`.
            Defaults here: a batch of 1, a prompt of 128 tokens, 20 rounds.
    """

    target: str
    max_seq: int
    logits: Literal["all", "last"]
    graph: Literal["neutral", "ort"]
    seq: Sequence[Positive]
    sm: Sequence[Positive]
    sparse_form: Literal["matmul", "conv1x1", "auto"]
    engine_compat: Literal["none", "version", "same-sm", "ampere+"]
    eval_text: str | PathLike[str]
    eval_segments: int
    eval_seqlen: int
    eval_questions: Annotated[int, Range(0)]
    batch: Sequence[Positive]
    prompt: Sequence[Positive]
    past: Sequence[Positive]
    new_tokens: Annotated[int, Range(2)]
    rounds: Annotated[int, Range(2)]
    sample_prompt: str
