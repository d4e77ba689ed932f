"""A model behind an OpenAI-compatible endpoint as judge: a commercial one, or vLLM, SGLang, llama.cpp, `transformers serve`.

Each image is one request to `/chat/completions`, as a PNG in a data URI with the question. Where the server gives the
probabilities of the first answer token (`top_logprobs`), they are read; otherwise the text is.

Every answer is appended to a file as soon as it comes, so that a killed judge asks nothing twice, not even the questions of
the batch in which it was killed, and a changed threshold asks nothing at all. The setting `answers` names the folder. In it,
each model has a folder and each process a file, because appending to one file from several machines is not safe on NFS.

The key comes from an environment variable and goes nowhere but into the request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import random
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from stages.common import shards
from stages.common.errors import UserError
from stages.common.settings import Positive
from stages.judges.asking import AskedJudge, graded, read, words
from stages.judges.base import Item, Judge, JudgeKind, Verdict

LONGEST_WAIT = 60.0  # seconds between two attempts, unless the server asks for more
LONGEST_PAUSE = 600.0  # seconds; where the server asks for more, the stage ends rather than hold its machine
PASSING = (408, 409, 425, 429)  # HTTP statuses that another attempt may not meet, beside all from 500 on
REFUSED = (400, 413, 422)  # HTTP statuses that can be about one image, such as a content filter's
SHORTEST_KEY = 8  # characters; servers without keys are given such as "x", which is no secret and occurs in other words
TOP_LOGPROBS = 20  # the most that OpenAI and vLLM give
Answer = dict[str, Any]  # text, model and, where the server gives logprobs, yes and no; or refusal


class EndpointJudge(AskedJudge):
    kind: Literal["openai"]
    endpoint: str = Field(
        description="The address up to the version, such as https://api.openai.com/v1 or http://node7:8000/v1."
    )
    model: str = Field(description="The model's name on that server, one of those that `<endpoint>/models` lists.")
    key_variable: str = Field(
        default="OPENAI_API_KEY",
        description="The environment variable that holds the key. Where it is not set, none is sent. The key is never written.",
    )
    extra: dict[str, Any] = Field(
        default={},
        description="Further fields of the request. null takes one back: {max_tokens: null, max_completion_tokens: 64}.",
    )
    concurrency: Positive = Field(default=8, description="How many questions are asked at the same time.")
    timeout: Annotated[float, Field(gt=0)] = Field(default=120.0, description="Seconds after which an attempt is given up.")
    retries: Annotated[int, Field(ge=0)] = Field(
        default=6,
        description="How often a question is asked again after a passing failure, with waits of 1, 2, 4 ... 60 seconds, or as "
        "long as the server's Retry-After says.",
    )
    answers: str = Field(
        default="results/.answers",
        description="The folder in which answers are kept as they come. A question whose answer is there is not asked again.",
    )

    def outcome(self) -> dict[str, Any]:
        return self.model_dump(exclude={"key_variable", "concurrency", "timeout", "retries", "answers"})

    @field_validator("endpoint")
    @classmethod
    def _endpoint(cls, endpoint: str) -> str:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must be an address that begins with http:// or https://")
        if parts.username or parts.password or parts.query:
            raise ValueError("the address must hold no key; put the key into the environment variable of key_variable")
        return endpoint.rstrip("/")


class Kept:
    """The answers of earlier processes, and a file for those of this one.

    A line is JSON with `key` and `answer`. The last line of a killed process may be cut; such lines are skipped.
    """

    def __init__(self, folder: Path) -> None:
        self.found: dict[str, Answer] = {}
        self.lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    row = json.loads(line)
                    self.found[row["key"]] = row["answer"]
                except (ValueError, KeyError, TypeError):
                    continue
        self.path = folder / f"{uuid.uuid4()}.jsonl"

    def add(self, key: str, answer: Answer) -> None:
        with self.lock:
            self.found[key] = answer
            if "refusal" in answer:
                return  # it may be the settings' fault, so another run asks again
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "answer": answer}) + "\n")


def open_endpoint(settings: EndpointJudge) -> Judge:
    """Return the judge. Nothing is sent before the first image. Raises UserError where the package openai is missing."""
    try:
        import openai
    except ModuleNotFoundError as error:
        raise UserError(
            f"a judge of kind openai needs the package {error.name}; run pip install --constraint constraints.txt '.[endpoint]'"
        ) from None

    key = os.environ.get(settings.key_variable, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"the environment variable {settings.key_variable} holds no key: it has spaces or other odd characters")
    client = openai.OpenAI(base_url=settings.endpoint, api_key=key or "none", timeout=settings.timeout, max_retries=0)
    kept = Kept(Path(settings.answers) / digest(sent(settings)))
    asker = Asker(settings, client, key)

    def judge(items: Sequence[Item]) -> list[Verdict]:
        questions = [(settings.asked(item.prompt["prompt"]), shards.png(item.image)) for item in items]
        keys = [answer_key(*question) for question in questions]
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in kept.found}
        asker.ask(missing, kept)
        return [verdict(kept.found[key], settings) for key in keys]

    return judge


def sent(settings: EndpointJudge) -> dict[str, Any]:
    """Return the settings that answers depend on. Answers to others, such as another model's, are in another folder."""
    return settings.model_dump(include={"endpoint", "model", "mode", "max_new_tokens", "extra"})


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def answer_key(question: str, png: bytes) -> str:
    """Return the name under which an answer is kept."""
    return digest([question, hashlib.sha256(png).hexdigest()])


def request(settings: EndpointJudge, question: str, png: bytes, logprobs: bool) -> dict[str, Any]:
    """Return the fields of a request for a greedy answer."""
    picture = {"url": "data:image/png;base64," + base64.b64encode(png).decode()}
    content = [{"type": "image_url", "image_url": picture}, {"type": "text", "text": question}]
    fields = {
        "model": settings.model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": settings.max_new_tokens,
        "temperature": 0,
        **({"logprobs": True, "top_logprobs": TOP_LOGPROBS} if logprobs else {}),
        **settings.extra,
    }
    return {name: value for name, value in fields.items() if value is not None}


def parsed(completion: Any) -> Answer:
    """Return what is kept of a completion. Raises ValueError where it is none."""
    try:
        choice = completion.choices[0]
        answer = {"text": choice.message.content or "", "model": str(completion.model)}
    except (AttributeError, IndexError, TypeError):
        raise ValueError("the response is not a chat completion") from None
    tokens = getattr(getattr(choice, "logprobs", None), "content", None)
    top = (tokens[0].top_logprobs if tokens else None) or []
    if top:
        for name in ("yes", "no"):
            answer[name] = math.fsum(math.exp(token.logprob) for token in top if token.token.strip(" \n▁Ġ").lower() == name)
    return answer


def verdict(answer: Answer, settings: EndpointJudge) -> Verdict:
    """Return the verdict of a kept answer.

    The probabilities count where yes and no together are likelier than anything else. Otherwise the model began with another
    word, and its text is read.
    """
    if "refusal" in answer:
        return Verdict(None, answer=words(**answer))
    yes, no = answer.get("yes", 0.0), answer.get("no", 0.0)
    facts = {"text": answer["text"], "model": answer["model"]}
    if settings.mode == "p_yes" and yes + no > 0.5:
        return graded(yes, no, settings.threshold, **facts)
    return read(**facts)


class Asker:
    """Asks questions, several at a time, and again after passing failures.

    A failure that no further attempt will mend stops all; answers that have come by then are kept.
    """

    def __init__(self, settings: EndpointJudge, client: Any, key: str) -> None:
        self.settings, self.client, self.key = settings, client, key
        self.logprobs = settings.mode == "p_yes"
        self.reached = False  # whether the endpoint has answered in this process
        self.stopped = threading.Event()

    def ask(self, questions: dict[str, tuple[str, bytes]], kept: Kept) -> None:
        """Ask all questions, by key, and keep their answers. Raises UserError."""
        self.reached = self.reached or bool(kept.found)

        def task(key: str, question: tuple[str, bytes]) -> None:
            try:
                if not self.stopped.is_set() and (answer := self.one(*question)):
                    kept.add(key, answer)
            except BaseException:
                self.stopped.set()
                raise

        pool = ThreadPoolExecutor(self.settings.concurrency)
        try:
            for future in [pool.submit(task, *named) for named in questions.items()]:
                future.result()
        finally:  # also when SIGTERM ends the stage: what is under way is still kept, nothing else is begun
            self.stopped.set()
            pool.shutdown(cancel_futures=True)
            self.stopped.clear()

    def one(self, question: str, png: bytes) -> Answer | None:
        """Return the answer to one question; None when another one has failed while this one waited for its next attempt."""
        import openai

        attempt = 0
        while True:
            with_logprobs = self.logprobs
            try:
                answer = parsed(self.client.chat.completions.create(**request(self.settings, question, png, with_logprobs)))
                self.reached = True
                return answer | {"text": self._hidden(answer["text"]), "model": self._hidden(answer["model"])}
            except openai.APIStatusError as error:
                if error.status_code == 400 and with_logprobs and "logprobs" in self._said(error):
                    self.logprobs = False  # a model that gives none: its text is read
                    continue
                if error.status_code in REFUSED and self.reached:
                    return {"refusal": self._said(error)}
                if error.status_code not in PASSING and error.status_code < 500:
                    raise self._final(error) from None
                problem, pause = self._said(error), retry_after(error.response.headers)
            except openai.APITimeoutError:
                problem, pause = f"no answer within {self.settings.timeout:g} seconds", None
            except openai.APIConnectionError as error:
                problem, pause = f"cannot be reached ({self._hidden(str(error.__cause__ or error))})", None
                if not self.reached and type(error.__cause__).__name__ == "ConnectError":  # no such machine, or refused
                    raise UserError(f"{self.settings.endpoint}: {problem}; {self._remedy()}") from None
            except (openai.APIResponseValidationError, ValueError) as error:
                problem, pause = f"the response could not be read ({self._hidden(str(error))})", None
            attempt += 1
            if attempt > self.settings.retries:
                tried = f"{problem}, after {attempt} attempt{'s' * (attempt > 1)}"
                raise UserError(f"{self.settings.endpoint}: {tried}; {self._remedy()}. Answers that have come are kept")
            if pause is not None and pause > LONGEST_PAUSE:
                raise UserError(
                    f"{self.settings.endpoint}: {problem}; it asks to wait {pause:.0f} seconds, so run again after that. "
                    "Answers that have come are kept"
                )
            if self.stopped.wait(pause if pause is not None else backoff(attempt)):
                return None

    def _remedy(self) -> str:
        return "start the server, or set endpoint of this judge to where it runs, and run again"

    def _final(self, error: Any) -> UserError:
        """Return the error for a status that no further attempt will mend."""
        where, name = self.settings.endpoint, self.settings.key_variable
        if error.status_code in (401, 403):  # the server's words may quote the key
            has = "is not accepted" if self.key else "is not set"
            remedy = f"set it to a key of this endpoint that may use {self.settings.model}"
            return UserError(f"{where}: HTTP {error.status_code}: the key in the environment variable {name} {has}; {remedy}")
        remedy = f"set model to one that {where}/models lists" if error.status_code == 404 else "check model and extra"
        return UserError(f"{where}: {self._said(error)}, for model {self.settings.model}; {remedy}, in the section judges")

    def _said(self, error: Any) -> str:
        body = error.body if isinstance(error.body, dict) else {}
        said = " ".join(str(body.get("message") or body.get("detail") or error.response.text).split())
        return f"HTTP {error.status_code} ({self._hidden(said)[:300]})"

    def _hidden(self, text: str) -> str:
        """Return a server's words without the key, in case it quotes it."""
        return text.replace(self.key, "***") if len(self.key) >= SHORTEST_KEY else text


def retry_after(headers: Any) -> float | None:
    """Return how many seconds the server asks to wait, from Retry-After in seconds or as a date. None where it does not say."""
    from email.utils import parsedate_to_datetime

    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def backoff(attempt: int) -> float:
    """Return the seconds to wait before the next attempt: 1, 2, 4 ... 60, a quarter more or less, so that threads spread."""
    return min(LONGEST_WAIT, 2.0 ** (attempt - 1)) * random.uniform(0.75, 1.25)


OPENAI = JudgeKind(EndpointJudge, open_endpoint, batch_size=64)
