"""The judge openai, against a real HTTP server in a thread."""

import json
import logging
import socket
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path

import numpy as np
import pytest
import yaml

from stages.common import manifests
from stages.common.errors import UserError
from stages.judges import endpoint, judge_kind
from stages.judges.base import Item, Verdict
from stages.judges.endpoint import EndpointJudge, open_endpoint
from tests.chat_server import ChatServer, completion, failure
from tests.helpers import process_of, refused, stage, wait_until
from tests.test_judges import write_images

pytest.importorskip("openai")
KEY = "sk-a-key-that-nobody-may-see"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    monkeypatch.setattr(endpoint, "backoff", lambda attempt: 0.01)


@pytest.fixture
def serve():
    """Start servers that end with the test."""
    started = []

    def start(reply, port=0):
        started.append(ChatServer(reply, port))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def item(number: int) -> Item:
    image = np.full((8, 8, 3), number, np.uint8)
    return Item(f"c{number}", {"prompt": f"{number} red squares"}, image)


def settings(server: ChatServer | str, folder: Path, **changes) -> EndpointJudge:
    address = server if isinstance(server, str) else server.address
    fields = {"endpoint": address, "model": "tiny", "key_variable": "TEST_KEY", "answers": str(folder / "answers")}
    return EndpointJudge(kind="openai", **fields, **changes)


def yes_if_even(name: int, times: int):
    return completion("Yes." if name % 2 == 0 else "No, it does not.")


def ask(server: ChatServer | str, folder: Path, count: int = 6, **changes) -> list[Verdict]:
    return open_endpoint(settings(server, folder, **changes))([item(number) for number in range(count)])


def written(folder: Path) -> str:
    """Return everything that has been written below a folder, as text."""
    return "".join(path.read_bytes().decode("latin-1") for path in sorted(folder.rglob("*")) if path.is_file())


# Answers


def test_without_logprobs_the_text_is_read(serve, tmp_path):
    server = serve(yes_if_even)
    verdicts = ask(server, tmp_path)
    assert [verdict.matches for verdict in verdicts] == [True, False] * 3
    assert [verdict.score for verdict in verdicts] == [None] * 6
    assert json.loads(verdicts[1].answer) == {"text": "No, it does not.", "model": "tiny-2026-01-01"}
    assert server.keys == {f"Bearer {KEY}"}


def test_the_request_holds_the_question_the_image_and_nothing_random(serve, tmp_path):
    server = serve(yes_if_even)
    ask(server, tmp_path, 1, question="Is this {prompt} ?", extra={"max_tokens": None, "max_completion_tokens": 9, "seed": 1})
    picture, question = server.fields["messages"][0]["content"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,")
    assert question == {"type": "text", "text": "Is this 0 red squares ?"}
    rest = {name: value for name, value in server.fields.items() if name != "messages"}
    assert rest == {
        "model": "tiny",
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 20,
        "max_completion_tokens": 9,
        "seed": 1,
    }


def test_with_logprobs_the_spellings_are_summed(serve, tmp_path):
    chances = {"Yes": 0.4, " yes": 0.1, "No": 0.2, " NO": 0.05, "Maybe": 0.15, "yesterday": 0.05}
    server = serve(lambda name, times: completion("Yes", chances))
    loose, strict = (ask(server, tmp_path, 1, threshold=threshold)[0] for threshold in (0.5, 0.7))
    assert loose.score == pytest.approx(2 / 3)
    assert json.loads(loose.answer)["p_neither"] == pytest.approx(0.25)
    assert (loose.matches, strict.matches) == (True, False)
    assert server.asked == [0], "another threshold asks nothing again"


def test_where_the_first_token_is_another_word_the_text_is_read(serve, tmp_path):
    server = serve(lambda name, times: completion("The score is 1.", {"The": 0.9, "No": 0.1}))
    [verdict] = ask(server, tmp_path, 1)
    assert (verdict.matches, verdict.score) == (True, None)


def test_in_mode_answer_no_logprobs_are_asked_for(serve, tmp_path):
    server = serve(lambda name, times: completion("No.", {"Yes": 1.0}))
    [verdict] = ask(server, tmp_path, 1, mode="answer")
    assert verdict.matches is False
    assert "logprobs" not in server.fields


def test_a_model_that_refuses_logprobs_is_asked_without(serve, tmp_path):
    def reply(name, times):
        return failure(400, "logprobs are not supported with this model") if "logprobs" in server.fields else completion("Yes")

    server = serve(reply)
    assert [verdict.matches for verdict in ask(server, tmp_path, 3, concurrency=1)] == [True] * 3
    assert server.asked == [0, 0, 1, 2]


@pytest.mark.parametrize("text", ["I cannot tell.", "", "Yes and no.", "The score is 0 or 1."])
def test_an_answer_that_is_no_verdict_is_kept_and_empty(text, serve, tmp_path):
    [verdict] = ask(serve(lambda name, times: completion(text)), tmp_path, 1)
    assert (verdict.matches, verdict.score) == (None, None)
    assert json.loads(verdict.answer)["text"] == text


def test_an_image_that_the_endpoint_refuses_is_unreadable(serve, tmp_path):
    server = serve(lambda name, times: failure(400, "content filter") if name == 3 else completion("Yes"))
    for _ in range(2):
        verdicts = ask(server, tmp_path, concurrency=1)
        assert [verdict.matches for verdict in verdicts] == [True, True, True, None, True, True]
        assert json.loads(verdicts[3].answer) == {"refusal": "HTTP 400 (content filter)"}
    assert server.asked == [*range(6), 3], "a refusal is not kept, because it may be the settings' fault"


def test_settings_that_the_endpoint_refuses_end_the_judge_although_others_have_been_answered(serve, tmp_path):
    def reply(name, times):
        return completion("Yes") if server.fields["model"] == "tiny" else (400, {}, b'{"detail": "serves only tiny"}')

    server = serve(reply)
    ask(server, tmp_path)
    wrong = settings(server, tmp_path).model_copy(update={"model": "huge"})
    with pytest.raises(UserError, match=r"HTTP 400 \(serves only tiny\), for model huge; check model and extra"):
        open_endpoint(wrong)([item(0)])


def test_no_more_questions_are_asked_at_the_same_time_than_allowed(serve, tmp_path):
    def slowly(name, times):
        time.sleep(0.1)
        return completion("Yes")

    server = serve(slowly)
    ask(server, tmp_path, 9, concurrency=3)
    assert server.most == 3


# Failures that pass


def test_too_many_requests_waits_as_long_as_the_server_says(serve, tmp_path):
    server = serve(lambda name, times: failure(429, "slow down", retry_after="1") if times == 1 else completion("Yes"))
    [verdict] = ask(server, tmp_path, 1)
    assert verdict.matches is True
    assert server.times[1] - server.times[0] >= 1


def test_a_server_that_asks_to_wait_for_an_hour_ends_the_judge(serve, tmp_path):
    server = serve(lambda name, times: failure(429, "quota", retry_after="3600") if name == 5 else completion("Yes"))
    with pytest.raises(UserError, match=r"HTTP 429 .*it asks to wait 3600 seconds, so run again after that"):
        ask(server, tmp_path, concurrency=1)
    assert len(server.asked) == 6


@pytest.mark.parametrize(("value", "seconds"), [("2", 2), ("0.5", 0.5), ("-1", 0), ("soon", None), ("", None)])
def test_retry_after_is_read(value, seconds):
    assert endpoint.retry_after({"retry-after": value}) == seconds


def test_retry_after_may_be_a_date():
    assert endpoint.retry_after({"retry-after": formatdate(time.time() + 30, usegmt=True)}) == pytest.approx(30, abs=2)
    assert endpoint.retry_after({}) is None


def test_waits_double_up_to_a_minute(monkeypatch):
    monkeypatch.undo()
    for attempt, seconds in ((1, 1), (2, 2), (5, 16), (20, 60)):
        assert 0.75 * seconds <= endpoint.backoff(attempt) <= 1.25 * seconds


@pytest.mark.parametrize("status", [500, 502, 503, 529, 408])
def test_an_error_of_the_server_is_asked_again(status, serve, tmp_path):
    server = serve(lambda name, times: failure(status, "oops") if times < 3 else yes_if_even(name, times))
    assert [verdict.matches for verdict in ask(server, tmp_path, 2)] == [True, False]
    assert sorted(server.asked) == [0, 0, 0, 1, 1, 1]


def test_a_slow_answer_is_asked_again(serve, tmp_path):
    def reply(name, times):
        time.sleep(1 if times == 1 else 0)
        return completion("Yes")

    server = serve(reply)
    assert ask(server, tmp_path, 1, timeout=0.3)[0].matches is True
    assert server.asked == [0, 0]


@pytest.mark.parametrize(
    "broken",
    [
        (200, {}, completion("Yes")[2][:-40]),  # truncated JSON
        (200, {"Content-Length": "9999"}, completion("Yes")[2]),  # the connection ends too early
        (200, {"Content-Type": "text/html"}, b"<html>please wait</html>"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b"[]"),
        (200, {}, b""),
    ],
)
def test_a_broken_response_is_asked_again(broken, serve, tmp_path):
    def reply(name, times):
        return broken if times == 1 else completion("Yes")

    server = serve(reply)
    verdicts = ask(server, tmp_path, 2, timeout=2, concurrency=1)
    assert [verdict.matches for verdict in verdicts] == [True, True]
    assert server.asked == [0, 0, 1, 1]


def test_a_server_that_never_answers_well_ends_the_judge_with_one_line(serve, tmp_path):
    server = serve(lambda name, times: failure(503, "loading") if name == 4 else completion("Yes"))
    with pytest.raises(
        UserError, match=rf"{server.address}: HTTP 503 \(.*loading.*\), after 3 attempts; start the server"
    ) as caught:
        ask(server, tmp_path, retries=2, concurrency=1)
    assert "\n" not in str(caught.value)
    assert server.asked == [0, 1, 2, 3, 4, 4, 4]


# Failures that do not pass


def test_a_refused_connection_names_the_endpoint_at_once(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    started = time.monotonic()
    with pytest.raises(UserError, match=rf"{address}: cannot be reached \(.*refused.*\); start the server, or set endpoint"):
        ask(address, tmp_path)
    assert time.monotonic() - started < 5


def test_a_key_that_is_not_accepted_is_never_shown(serve, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    server = serve(lambda name, times: failure(401, f"Incorrect API key provided: {KEY}"))
    with pytest.raises(
        UserError, match=r"HTTP 401: the key in the environment variable TEST_KEY is not accepted; set it"
    ) as caught:
        ask(server, tmp_path)
    output = capfd.readouterr()
    for text in (str(caught.value), repr(caught.value), caplog.text, output.out, output.err, written(tmp_path)):
        assert KEY not in text


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"the package openai; run pip install --constraint constraints\.txt '\.\[endpoint\]'"):
        open_endpoint(settings("http://127.0.0.1:9/v1", tmp_path))


def test_a_missing_key_is_named(serve, tmp_path, monkeypatch):
    monkeypatch.delenv("TEST_KEY")
    server = serve(lambda name, times: failure(401, "no key"))
    with pytest.raises(UserError, match=r"the key in the environment variable TEST_KEY is not set; set it to a key"):
        ask(server, tmp_path)


@pytest.mark.parametrize("status", [200, 400, 500])
def test_a_server_that_quotes_the_key_does_not_bring_it_into_a_file(status, serve, tmp_path):
    def reply(name, times):
        if name == 0:
            return completion("Yes")
        return completion(f"Yes, {KEY}") if status == 200 else failure(status, f"what is {KEY}?")

    server = serve(reply)
    try:
        text = " ".join(verdict.answer for verdict in ask(server, tmp_path, 2, retries=1, concurrency=1))
    except UserError as error:
        text = str(error)
    assert "***" in text
    assert KEY not in text + written(tmp_path)


@pytest.mark.parametrize("value", ["sk two words", "sk-ключ", "sk-\x07"])
def test_a_key_that_cannot_be_sent_is_refused_without_being_shown(value, tmp_path, monkeypatch):
    monkeypatch.setenv("TEST_KEY", value)
    with pytest.raises(UserError, match=r"the environment variable TEST_KEY holds no key") as caught:
        ask("http://127.0.0.1:9/v1", tmp_path)
    assert value not in str(caught.value)


def test_a_model_that_is_not_there_is_named(serve, tmp_path):
    server = serve(lambda name, times: failure(404, "The model `tiny` does not exist"))
    with pytest.raises(
        UserError, match=rf"{server.address}: HTTP 404 .* for model tiny; set model to one that .*/v1/models lists"
    ):
        ask(server, tmp_path)
    assert len(server.asked) <= 6, "nothing is asked again"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:8000/v1", "begins with http"),
        ("file:///etc", "begins with http"),
        (f"https://user:{KEY}@example.org/v1", "must hold no key"),
        ("https://example.org/v1?key=x", "must hold no key"),
    ],
)
def test_an_odd_address_is_refused(address, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        settings(address, tmp_path)


# Nothing lost, nothing asked twice


def test_a_server_that_dies_and_comes_back_during_the_run(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "backoff", lambda attempt: 0.2)
    dead, back = threading.Event(), []

    def reply(name, times):
        if name == 3 and not dead.is_set():
            dead.set()
            threading.Thread(target=revive).start()
            return failure(503, "dying")
        return yes_if_even(name, times)

    def revive():
        first.stop()
        time.sleep(0.3)
        back.append(serve(yes_if_even, first.port))

    first = serve(reply)
    verdicts = ask(first, tmp_path, 8, concurrency=1, retries=20)
    assert [verdict.matches for verdict in verdicts] == [True, False] * 4
    assert first.asked == [0, 1, 2, 3]
    assert back[0].asked == [3, 4, 5, 6, 7]


def test_a_run_that_failed_with_the_server_continues_with_the_unanswered(serve, tmp_path):
    first = serve(lambda name, times: completion("Yes") if name < 4 else failure(503, "dying"))
    with pytest.raises(UserError, match=r"Answers that have come are kept"):
        ask(first, tmp_path, 8, retries=0, concurrency=1)
    first.stop()
    with pytest.raises(UserError, match=r"cannot be reached"):
        ask(first, tmp_path, 8, retries=1)
    second = serve(yes_if_even, first.port)
    verdicts = ask(second, tmp_path, 8)
    assert [verdict.matches for verdict in verdicts] == [True, True, True, True, True, False, True, False]
    assert sorted(second.asked) == [4, 5, 6, 7]
    ask(second, tmp_path, 8)
    assert len(second.asked) == 4


def test_what_is_under_way_when_another_question_fails_is_kept(serve, tmp_path):
    def reply(name, times):
        if name == 0:
            return failure(404, "gone")
        time.sleep(0.3)
        return completion("Yes")

    server = serve(reply)
    with pytest.raises(UserError, match="HTTP 404"):
        ask(server, tmp_path, 20, concurrency=4)
    rows = [json.loads(line) for path in (tmp_path / "answers").rglob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(rows) == len(server.asked) - 1 < 19


def test_a_cut_line_of_a_killed_process_is_skipped(serve, tmp_path):
    server = serve(yes_if_even)
    ask(server, tmp_path, 3, concurrency=1)
    [path] = (tmp_path / "answers").rglob("*.jsonl")
    path.write_text(path.read_text()[:-10] + "\n[1]\nnull\n")
    assert [verdict.matches for verdict in ask(server, tmp_path, 3)] == [True, False, True]
    assert server.asked == [0, 1, 2, 2]


def test_equal_images_with_equal_prompts_are_asked_once(serve, tmp_path):
    server = serve(yes_if_even)
    verdicts = open_endpoint(settings(server, tmp_path))([item(2), item(2), item(3)])
    assert [verdict.matches for verdict in verdicts] == [True, True, False]
    assert sorted(server.asked) == [2, 3]


@pytest.mark.parametrize(
    "change", [{"question": "is it {prompt}?"}, {"model": "other"}, {"mode": "answer"}, {"extra": {"seed": 1}}]
)
def test_another_question_is_asked_anew(change, serve, tmp_path):
    server = serve(yes_if_even)
    judge = settings(server, tmp_path)
    for one in (judge, judge.model_copy(update=change), judge):
        open_endpoint(one)([item(0)])
    assert server.asked == [0, 0]


# The stage


def arguments(folder: Path, server: ChatServer | str, count: int, **judge) -> tuple:
    """Write images, prompts and a configuration, and return the arguments of stages.judge."""
    if not (folder / "candidates.parquet").exists():
        row = {"prompt_id": "p0", "prompt": "a red square", "category": "color", "source": "text", "split": "text"}
        write_images(folder, [row | {"metadata": None}], np.stack([item(number).image for number in range(count)]))
    fields = settings(server, folder, **judge).model_dump()
    (folder / "config.yaml").write_text(yaml.safe_dump({"run": "judges", "judges": {"remote": fields}}))
    files = {
        "config": "config.yaml",
        "prompts": "prompts.parquet",
        "candidates": "candidates.parquet",
        "out": "verdicts.parquet",
    }
    return ("--judge", "remote", *(part for option, file in files.items() for part in (f"--{option}", folder / file)))


def test_a_killed_judge_asks_nothing_twice(serve, tmp_path):
    def slowly(name, times):
        time.sleep(0.02)
        return completion("I do not know" if name % 10 == 0 else "Yes" if name % 2 else "No")

    server = serve(slowly)
    out, errors = tmp_path / "stdout", tmp_path / "stderr"
    process = process_of("stages.judge", *arguments(tmp_path, server, 150, concurrency=2), out=out, errors=errors)
    assert wait_until(lambda: len(server.asked) > 90, process), errors.read_text()
    process.kill()
    process.join()
    assert not (tmp_path / "verdicts.parquet").exists()
    wait_until(lambda: server.running == 0, process, 5)
    before = len(server.asked)
    assert 90 < before < 150
    result = stage("judge", *arguments(tmp_path, server, 150, concurrency=2))
    assert result.returncode == 0, result.stderr
    assert len(server.asked) <= 150 + 2, "at most the two questions that were under way are asked again"
    assert set(server.asked) == {*range(150)}
    assert "remote: 150 of 150 images judged: 75 match, 60 do not, 15 without a verdict" in result.stdout
    facts = manifests.facts(tmp_path / "verdicts.parquet")
    assert facts["settings"]["settings"]["endpoint"] == server.address
    assert facts["settings"]["settings"]["model"] == "tiny"
    rows = manifests.read_rows(tmp_path / "verdicts.parquet", "verdicts")
    assert {json.loads(row["answer"])["model"] for row in rows} == {"tiny-2026-01-01"}
    assert KEY not in written(tmp_path) + result.stdout + result.stderr


def test_sigterm_keeps_what_is_under_way_and_begins_nothing_else(serve, tmp_path):
    def slowly(name, times):
        time.sleep(0.05)
        return completion("Yes")

    server = serve(slowly)
    out, errors = tmp_path / "stdout", tmp_path / "stderr"
    process = process_of("stages.judge", *arguments(tmp_path, server, 150, concurrency=2), out=out, errors=errors)
    assert wait_until(lambda: len(server.asked) > 20, process), errors.read_text()
    process.terminate()
    process.join()
    assert "ended by SIGTERM" in errors.read_text()
    kept = [line for path in (tmp_path / "answers").rglob("*.jsonl") for line in path.read_text().splitlines()]
    assert 20 < len(kept) == len(server.asked) < 150


def test_the_stage_ends_with_one_line_without_the_key(serve, tmp_path):
    server = serve(lambda name, times: failure(401, f"bad key {KEY}"))
    result = stage("judge", *arguments(tmp_path, server, 3))
    refused(result, server.address, "HTTP 401", "TEST_KEY")
    assert KEY not in result.stdout + result.stderr + written(tmp_path)


def test_what_the_verdicts_depend_on(tmp_path):
    judge = settings("https://example.org/v1/", tmp_path)
    other = judge.model_copy(
        update={"concurrency": 1, "answers": "elsewhere", "retries": 0, "timeout": 1.0, "key_variable": "X"}
    )
    assert judge.outcome() == other.outcome()
    assert judge.outcome()["endpoint"] == "https://example.org/v1"
    assert judge_kind("openai").runs_on is None
