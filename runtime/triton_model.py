"""Text generation as a model of Triton's Python backend; `exporters.triton` writes its folder.

A request asks for one text. Requests share the decode steps of a batch, and each text is streamed
as it is generated: the model is decoupled. With `decoupled: false` in its configuration, a request
gets its whole text in one response, which is all that Triton's plain inference over HTTP can do.

A request that fails is answered with an error; the others continue.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from runtime.batching import Batcher, End, Finish, Request, Token
from runtime.engine import open_slots
from runtime.sampling import Sampling
from runtime.text import Tokenizer, open_tokenizer, pieces, require_text, until
from thanos_deploy.bundle.codec import loads
from thanos_deploy.errors import DeployError, InputError, ResourceError, UsageError


class TritonPythonModel:
    """The class that Triton's Python backend creates and calls."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the part of a bundle that is in the model's own folder."""
        config = loads(args["model_config"])
        parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        bundle = Path(args["model_repository"]) / args["model_version"] / "bundle"
        self._decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        try:
            self._tokenizer = open_tokenizer(bundle)
            engine = open_slots(
                bundle, slots=int(parameters["slots"]), provider=parameters["provider"]
            )
        except DeployError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        self._batcher = Batcher(engine, queue=int(parameters["queue"]))

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """Answer requests: each streamed by a thread of its own, or all together as whole texts."""
        if not self._decoupled:
            # All of them are begun before the first one is waited for, so that they share steps.
            begun = [self._try_to_begin(request) for request in requests]
            return [_whole(answer) for answer in begun]
        for request in requests:
            sender = request.get_response_sender()
            try:
                # On this thread, because a request cannot be read after this method has returned.
                answer = self._begin(request, sender.is_cancelled)
            except Exception as error:
                _finish(sender, pb_utils.InferenceResponse(error=_error(error)))
            else:
                Thread(target=_stream, args=(answer, sender), daemon=True).start()
        return None

    def finalize(self) -> None:
        """Finish the requests in flight, and close the batcher."""
        self._batcher.close()

    def _begin(self, request: Any, given_up: Callable[[], bool]) -> "_Answer":
        values = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        options = [option.name for option in fields(Sampling) if option.name in values]
        wanted = Request(
            tuple(self._tokenizer.encode(_text(values["prompt"][0]))),
            int(values["new_tokens"][0]),
            Sampling(**{name: values[name][0].item() for name in options}),
            stop=self._tokenizer.stop,
            # Triton's own timeout, in microseconds; 0 for no timeout.
            deadline=time.monotonic() + request.timeout() / 1e6 if request.timeout() else None,
        )
        stop = [_text(string) for string in values.get("stop", ())]
        return _Answer(self._batcher, self._tokenizer, wanted, stop, given_up)

    def _try_to_begin(self, request: Any) -> "_Answer | Exception":
        try:
            return self._begin(request, request.is_cancelled)
        except Exception as error:
            return error


class _Answer:
    """The text of one request, as its tokens come from the batcher."""

    def __init__(
        self,
        batcher: Batcher,
        tokenizer: Tokenizer,
        request: Request,
        stop: Sequence[str],
        given_up: Callable[[], bool],
    ) -> None:
        self._news: SimpleQueue[Token | End] = SimpleQueue()
        self._ticket = batcher.submit(request, self._news.put)
        self._given_up = given_up
        self._pieces = until(pieces(tokenizer, self._ids(), request.prompt), stop)
        self._end = End(Finish.STOP)  # also if a stop string ends the text before the batcher does

    def pieces(self) -> Iterator[str]:
        try:
            yield from self._pieces
        finally:
            self._ticket.cancel()  # for a stop string; no effect on a request that has ended

    def finish_reason(self) -> str:
        """Return why the text ended, in the words of OpenAI's API.

        Raises:
            ResourceError: the text was not finished in time, or before the model was unloaded.
            RuntimeError: the engine failed.
        """
        match self._end.reason:
            case Finish.STOP:
                return "stop"
            case Finish.LENGTH:
                return "length"
            case Finish.FAILED:
                raise RuntimeError(self._end.error)
            case reason:
                raise ResourceError(f"not finished: {reason.value}", fix="ask for fewer new tokens")

    def _ids(self) -> Iterator[int]:
        while isinstance(news := self._news.get(), Token):
            if self._given_up():
                self._ticket.cancel()
            yield news.id
        self._end = news


def _whole(answer: "_Answer | Exception") -> Any:
    """Wait for an answer; or return the error for which it could not be begun."""
    if isinstance(answer, Exception):
        return pb_utils.InferenceResponse(error=_error(answer))
    try:
        return _response("".join(answer.pieces()), answer.finish_reason())
    except Exception as error:
        return pb_utils.InferenceResponse(error=_error(error))


def _stream(answer: _Answer, sender: Any) -> None:
    try:
        for piece in answer.pieces():
            sender.send(_response(piece, ""))
        last = _response("", answer.finish_reason())
    except Exception as error:
        last = pb_utils.InferenceResponse(error=_error(error))
    _finish(sender, last)


def _finish(sender: Any, response: Any) -> None:
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _response(text: str, finish_reason: str) -> Any:
    return pb_utils.InferenceResponse(
        [
            pb_utils.Tensor(name, np.array([value.encode()], dtype=object))
            for name, value in (("text", text), ("finish_reason", finish_reason))
        ]
    )


def _error(error: Exception) -> Any:
    match error:
        case UsageError() | InputError():
            code = pb_utils.TritonError.INVALID_ARG
        case ResourceError():
            code = pb_utils.TritonError.UNAVAILABLE
        case _:
            code = pb_utils.TritonError.INTERNAL
    return pb_utils.TritonError(str(error) or type(error).__name__, code)


def _text(content: bytes) -> str:
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"invalid UTF-8 at byte {error.start}", fix="give the text in UTF-8"
        ) from error
    require_text(text)
    return text
