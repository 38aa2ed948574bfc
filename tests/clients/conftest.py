"""The server that the libraries call, with a tiny model."""

from tests.runtime.server.conftest import bundle as bundle
from tests.runtime.server.conftest import server as server
