"""What the server of `tests.commands` does beside importing: it gets the trace of the tiny LLaMA.

Processes that are forked from it export that model, dense or pruned, without tracing it again; and
they share all other traces.
"""

import gc
import os
import tempfile
from pathlib import Path

import torch

from exporters.onnx import trace
from tests import traced
from tests.conftest import write_model
from thanos_deploy.model.load import load_model

traced.share(Path(os.environ[traced.VARIABLE]))
_threads = torch.get_num_threads()
torch.set_num_threads(1)  # of several, none would live on in a process that is forked
with tempfile.TemporaryDirectory() as _folder:
    write_model(Path(_folder), "llama")
    trace.trace(load_model(Path(_folder)), logits="all")
torch.set_num_threads(_threads)
gc.freeze()  # or every process would look through all that was imported
gc.enable()
