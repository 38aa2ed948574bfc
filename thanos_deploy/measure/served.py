"""Read the log-probability of each token of a text from a running vLLM server."""

import json
from contextlib import closing
from dataclasses import dataclass
from http import client
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import Tensor

from thanos_deploy.bundle.codec import loads
from thanos_deploy.bundle.files import Json
from thanos_deploy.errors import InputError, PlatformError, UsageError

# Timeout of a request: longer than one segment takes on a CPU.
_SECONDS = 600.0

_SCHEMES = {"http": client.HTTPConnection, "https": client.HTTPSConnection}

_START = "start it with `vllm serve FOLDER`, and give its address, such as http://127.0.0.1:8000"


@dataclass(frozen=True, slots=True)
class Served:
    """A model on a vLLM server.

    Attributes:
        url: address of the server, without a path.
        model: the server's name of the model.
        root: the model that the server was started with: a folder on its machine, or a name.
        longest: the most tokens of a prompt and its answer together.
    """

    url: str
    model: str
    root: str
    longest: int

    @classmethod
    def at(cls, url: str) -> "Served":
        """Find the model of a server that has exactly one.

        Args:
            url: address of the server, such as http://127.0.0.1:8000.

        Raises:
            UsageError: the address is not valid, or the server does not have exactly one model.
            PlatformError: nothing answers at the address.
            InputError: the server reports an error, or does not answer as vLLM does.
        """
        models = _asked(url, "/v1/models", None).get("data")
        if not isinstance(models, list) or len(models) != 1:
            raise UsageError(
                f"{url}: the server has "
                f"{len(models) if isinstance(models, list) else 'no'} models, and exactly "
                "one is needed",
                fix="start a server for this model alone, without LoRA adapters",
            )
        name, root, longest = (models[0].get(key) for key in ("id", "root", "max_model_len"))
        if not (isinstance(name, str) and isinstance(root, str) and isinstance(longest, int)):
            raise InputError(f"{url}: the server answers, but not as vLLM does", fix=_START)
        return cls(url, name, root, longest)

    def require(self, *folders: Path) -> None:
        """Refuse a server that runs another model, as far as this machine can tell.

        A server on another machine may have the model at a different path, so only a folder that
        exists on this machine is compared.

        Args:
            folders: folders of the model that is to be measured.

        Raises:
            UsageError: the server runs another folder of this machine.
        """
        root = Path(self.root)
        if root.is_dir() and root.resolve() not in {folder.resolve() for folder in folders}:
            raise UsageError(
                f"{self.url}: the server runs {root}, which is not the model that is to be "
                "measured",
                fix=f"serve {' or '.join(map(str, folders))}, or give the model that the "
                "server runs",
            )

    def losses(self, ids: Tensor) -> Tensor:
        """Request the negative log-probability of every token but the first.

        Args:
            ids: int64[tokens].

        Returns:
            float64[tokens - 1].

        Raises:
            UsageError: the server does not take a prompt of this length.
            PlatformError: the server does not answer any more.
            InputError: the server refuses the tokens, or does not answer as vLLM does.
        """
        if len(ids) >= self.longest:
            raise UsageError(
                f"{self.url}: the server takes {self.longest} tokens, including one token "
                f"of the answer, and a segment has {len(ids)}",
                fix="use a shorter --seqlen, or start the server with a larger --max-model-len",
            )
        prompt: list[int] = ids.tolist()
        asked = {"model": self.model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        answer = _asked(self.url, "/v1/completions", {**asked, "prompt_logprobs": 0})
        try:
            # With `prompt_logprobs` 0, there is one dictionary for each token of the prompt, which
            # contains the log-probability of that token; it is None for the first token.
            told = answer["choices"][0]["prompt_logprobs"]
            pairs = list(zip(told, prompt, strict=True))
            found = [of[str(token)]["logprob"] for of, token in pairs[1:]]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise InputError(
                f"{self.url}: the answer has no log-probabilities of the tokens of the "
                f"prompt ({error!r})",
                fix="use a server of vLLM, which supports `prompt_logprobs`",
            ) from error
        return -torch.tensor(found, dtype=torch.float64)


def _asked(url: str, path: str, body: Json | None) -> Json:
    """Request a path of a server (by POST if there is a body), and return the JSON object.

    Raises:
        UsageError, PlatformError, InputError: see `Served.at`.
    """
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES or not parts.netloc or parts.path.strip("/"):
        raise UsageError(f"--url {url}: not the address of a server", fix=_START)
    try:
        with closing(_SCHEMES[parts.scheme](parts.netloc, timeout=_SECONDS)) as connection:
            content = None if body is None else json.dumps(body)
            headers = {"Content-Type": "application/json"}
            connection.request("GET" if body is None else "POST", path, content, headers)
            response = connection.getresponse()
            status, said = response.status, response.read()
    except (OSError, client.HTTPException) as error:
        raise PlatformError(f"{url}: no answer ({error})", fix=_START) from error
    if status != client.OK:
        raise InputError(
            f"{url}{path}: answered with {status}: {said[:300].decode(errors='replace')}",
            fix="read the log of the server",
        )
    try:
        answer = loads(said)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise InputError(f"{url}{path}: the answer is not a JSON object", fix=_START)
    return answer
