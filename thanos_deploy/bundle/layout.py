"""The names of what lies in a bundle, each once. Paths are relative to its folder.

Stages are here where something other than their own file speaks of them.
"""

MANIFEST = "manifest.json"
CARD = "README.md"

# The stage prune.
PRUNE = "prune"
MODEL = "model"
LAYERS = "layers.json"
CONFIG = f"{MODEL}/config.json"
TOKENIZER = f"{MODEL}/tokenizer.json"

# The stages eval, by what runs the model.
EVAL = "eval"
PERPLEXITY = {"torch": f"{EVAL}/perplexity.json", "onnx": f"{EVAL}/perplexity-onnx.json"}
TASKS = {"torch": f"{EVAL}/tasks.json", "onnx": f"{EVAL}/tasks-onnx.json"}

# The stage onnx.
ONNX = "onnx"
GRAPH = "model.onnx"

# The stage bench.
BENCH = "bench"
SAMPLE = f"{BENCH}/sample.json"

# The stage report.
REPORT = "report"
REPORT_PAGE = f"{REPORT}/index.html"
REPORT_TEXT = f"{REPORT}/report.md"
REPORT_RECORD = f"{REPORT}/report.json"


def run(name: str) -> str:
    """The file with a run of bench."""
    return f"{BENCH}/{name}.json"


def interrupted_run(name: str) -> str:
    """The file with the rounds of a run of bench that was interrupted."""
    return f"{BENCH}/{name}.interrupted.json"
