"""Trace the tiny LLaMA in the fork server of `tests.commands`, which imports this module last.

Processes that are forked from the server export this model, dense or pruned, without tracing it
again. They share all other traces through a folder; see `tests.traced`.
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
torch.set_num_threads(1)  # worker threads would be missing in forked processes
with tempfile.TemporaryDirectory() as _folder:
    write_model(Path(_folder), "llama")
    trace.trace(load_model(Path(_folder)), logits="all")
torch.set_num_threads(_threads)
gc.freeze()  # or each forked process would scan all imported objects
gc.enable()
