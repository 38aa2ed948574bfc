"""The layout of a bundle: the names of its folders and files, each defined only here.

    model/, layers.json, README.md                     the checkpoint, its layers, the model card
    own-text.jsonl                                     text that the dense model generated to train
                                                       the pruned model
    codes/                                             the codes of a quantised checkpoint
    eval/perplexity.json, tasks.json, ...              quality of the model
    eval/outputs.safetensors                           outputs of a dense model, for comparisons
    bench/RUN.json, sample.json                        speed of the model, and its sample text
    report/                                            the report on all of this
    onnx/model.onnx, model.onnx.data, export.json      the graph, its weights, how it was exported
    onnx-DTYPE..., the same                            a graph of another kind, for engines
    genai/                                             a folder that ORT-GenAI loads
    gguf/model.gguf                                    one file for llama.cpp
    packed/                                            the checkpoint without the zeros of n:m
    triton/                                            a model repository
    vllm/                                              a folder that vLLM serves
    engines/STAGE/model.engine, build.json, ...        an engine and the record of its build

A stage that exports is named after the folder that it writes to; the stage of an engine is named
after its folder in `engines/`.
"""

MANIFEST = "manifest.json"
CARD = "README.md"

# The stage prune.
PRUNE = "prune"
MODEL = "model"
LAYERS = "layers.json"
OWN_TEXT = "own-text.jsonl"  # training text that the dense model generated
CODES = "codes"  # the codes of a quantised model, one file for each block
CONFIG = f"{MODEL}/config.json"
TOKENIZER = f"{MODEL}/tokenizer.json"

# The eval stages; the keys of the dictionaries are runtimes.
EVAL = "eval"
PERPLEXITY = {"torch": f"{EVAL}/perplexity.json", "onnx": f"{EVAL}/perplexity-onnx.json"}
OUTPUTS = f"{EVAL}/outputs.safetensors"  # outputs of a dense model
TASKS = {"torch": f"{EVAL}/tasks.json", "onnx": f"{EVAL}/tasks-onnx.json"}

# The folder that vLLM serves.
VLLM = "vllm"

# The stage onnx: the name of the stage and of its folder, and the files there.
ONNX = "onnx"
GRAPH = "model.onnx"
GRAPH_DATA = "model.onnx.data"
GRAPH_RECORD = "export.json"

# The folder that contains one folder for each engine, and the files in each of them.
ENGINES = "engines"
ENGINE = "model.engine"
BUILD = "build.json"
BUILD_LOG = "build.log"
BUILD_FORMAT = "thanos-deploy/build/1"
ENGINE_LAYERS = "layers.json"  # as TensorRT's inspector lists them
TIMING_CACHE = "timing.cache"

# The stage bench.
BENCH = "bench"
SAMPLE = f"{BENCH}/sample.json"

# The stage report.
REPORT = "report"
REPORT_PAGE = f"{REPORT}/index.html"
REPORT_TEXT = f"{REPORT}/report.md"
REPORT_RECORD = f"{REPORT}/report.json"


def run(name: str) -> str:
    """Return the path of the file with a run of the stage bench."""
    return f"{BENCH}/{name}.json"


def interrupted_run(name: str) -> str:
    """Return the path of the file with the complete rounds of an interrupted run."""
    return f"{BENCH}/{name}.interrupted.json"


def engine_folder(stage: str) -> str:
    """Return the folder of the engine that a stage built."""
    return f"{ENGINES}/{stage}"


def read_as_a_whole(name: str) -> str | None:
    """Return the folder that is loaded as a whole and contains a file; None if there is none.

    Such a folder holds a model, a graph, an engine or a repository. Files of the top folder and
    records are read one by one, by their names.
    """
    folder, *inner = name.split("/")
    if not inner or folder in (EVAL, BENCH, REPORT):
        return None
    return f"{folder}/{inner[0]}" if folder == ENGINES and inner[1:] else folder
