"""The judge openai against `transformers serve` with a small Qwen2.5-VL of random weights. `make serve-env` installs it."""

import os
import signal
import socket
import subprocess
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from stages.common.errors import UserError
from stages.judges.base import Item
from stages.judges.endpoint import EndpointJudge, open_endpoint
from tests.helpers import ROOT, wait_until
from tests.tiny_vlm import write_tiny_vlm

SERVE = ROOT / ".venv-serve/bin/transformers"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SERVE.exists(), reason="transformers serve is not installed: make serve-env"),
]


class Server:
    """`transformers serve` on a free port, with its log."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]
        self.checkpoint, self.folder, self.log = checkpoint, folder, folder / "server.log"

    def start(self) -> None:
        (self.folder / "hub").mkdir(exist_ok=True)  # without it, the server answers /v1/models with an error
        environment = os.environ | {"HF_HOME": str(self.folder), "HF_HUB_OFFLINE": "1"}
        command = [str(SERVE), "serve", str(self.checkpoint), "--port", str(self.port), "--device", "cpu"]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        assert wait_until(self.ready, self.process, seconds=180), self.log.read_text()

    def ready(self) -> bool:
        try:
            return urllib.request.urlopen(f"http://localhost:{self.port}/v1/models", timeout=5).status == 200
        except OSError:
            return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def answered(self) -> int:
        return self.log.read_text().count('POST /v1/chat/completions HTTP/1.1" 200')


@pytest.fixture
def server(tmp_path):
    started = Server(write_tiny_vlm(tmp_path / "qwen"), tmp_path)
    started.start()
    yield started
    started.kill()


def test_a_server_killed_in_the_middle_loses_no_answer_and_is_asked_nothing_twice(server, tmp_path):
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (120, 56, 56, 3), dtype=np.uint8)
    items = [Item(f"c{i}", {"prompt": f"{i} red squares"}, picture) for i, picture in enumerate(pictures)]
    settings = EndpointJudge(
        kind="openai",
        endpoint=f"http://localhost:{server.port}/v1",
        model=str(server.checkpoint),
        answers=str(tmp_path / "answers"),
        max_new_tokens=8,
        concurrency=1,
        retries=0,
    )
    first = open_endpoint(settings)(items[:40])
    assert server.answered() == 40

    server.kill()
    with pytest.raises(UserError, match="cannot be reached"):
        open_endpoint(settings)(items)
    server.start()
    verdicts = open_endpoint(settings)(items)
    assert server.answered() == 120
    assert verdicts[:40] == first
    assert all(verdict.answer and "qwen" in verdict.answer for verdict in verdicts)
    # Random weights hardly ever say yes or no, and what they say is counted as unreadable rather than as wrong.
    assert sum(verdict.matches is None for verdict in verdicts) > 100
