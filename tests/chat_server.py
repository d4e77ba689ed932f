"""A server that speaks the chat-completions format, in a thread, whose behaviour a test decides answer by answer."""

import base64
import io
import json
import math
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

Reply = tuple[int, dict[str, str], bytes]  # status, headers, body


def completion(text: str, chances: dict[str, float] | None = None) -> Reply:
    """Return a reply with this text and, where chances of the first token are given, their logprobs."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    if chances is not None:
        top = [{"token": token, "logprob": math.log(chance), "bytes": None} for token, chance in chances.items()]
        choice["logprobs"] = {"content": [top[0] | {"top_logprobs": top}]}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "tiny-2026-01-01", "choices": [choice]}
    return 200, {}, json.dumps(body).encode()


def failure(status: int, message: str, **headers: str) -> Reply:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, names, json.dumps({"error": {"message": message, "type": "x", "code": None}}).encode()


class ChatServer:
    """asked: the images' top left red values in the order of the requests. fields, keys: the last request's, and all keys sent.

    reply: from a request's red value and how often it has been asked to the reply. port: 0 takes a free one.
    """

    def __init__(self, reply: Callable[[int, int], Reply], port: int = 0) -> None:
        self.asked: list[int] = []
        self.times: list[float] = []
        self.fields: dict[str, Any] = {}
        self.keys: set[str] = set()
        self.running = self.most = 0  # requests at the same time, now and at most
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                fields = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                address = fields["messages"][0]["content"][0]["image_url"]["url"]
                pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.removeprefix("data:image/png;base64,")))))
                name = int(pixels[0, 0, 0])
                with outer.lock:
                    outer.asked.append(name)
                    outer.times.append(time.monotonic())
                    outer.fields, times = fields, outer.asked.count(name)
                    outer.keys.add(self.headers["Authorization"])
                    outer.running += 1
                    outer.most = max(outer.most, outer.running)
                try:
                    status, headers, body = reply(name, times)
                    self.send_response(status)
                    for header, value in {
                        "Content-Type": "application/json",
                        "Content-Length": str(len(body)),
                        **headers,
                    }.items():
                        self.send_header(header, value)
                    self.end_headers()
                    self.wfile.write(body)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the judge has given up waiting
                finally:
                    with outer.lock:
                        outer.running -= 1

            def log_message(self, *_: Any) -> None:
                pass

        ThreadingHTTPServer.allow_reuse_address = True
        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self.server.server_address[1]
        self.address = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
