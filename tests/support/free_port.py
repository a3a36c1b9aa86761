"""A port for processes that find each other."""

import itertools
import os
import socket

_TRIED = itertools.count(os.getpid() * 37)


def free_port() -> int:
    """A port that nothing listens on, outside the range from which the system hands out ports to others meanwhile."""
    while True:
        port = 10000 + next(_TRIED) % 20000
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
