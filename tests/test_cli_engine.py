"""Engines on the command line: export, verify, doctor, and what a machine without a GPU is told."""

import json
import shutil
from pathlib import Path

import pytest

from exporters import tensorrt
from tests.conftest import MakeModel
from tests.test_cli import Run, run  # noqa: F401 - a fixture
from thanos_deploy import gpu
from thanos_deploy.artifact import Bundle
