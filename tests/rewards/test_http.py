"""The http reward against servers on loopback that go wrong in every way; nobody waits for real."""

import contextlib
import http.server
import json
import sys
import threading
import time
import types

import msgpack
import numpy as np
import pytest

from greedy_distill_jax import rewards
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.rewards import HostView, RewardTerm
from greedy_distill_jax.rewards.http import Server, judge

VIDEOS = 5
VIEW = HostView(
    (np.arange(VIDEOS, dtype=np.uint8) * 40)[:, None, None, None, None] + np.zeros((1, 6, 8, 8, 3), np.uint8),
    np.zeros((VIDEOS, 1, 8, 8, 3), np.uint8),
    [f"prompt {i}" for i in range(VIDEOS)],
    12.0,
)


@contextlib.contextmanager
def serving(answer, health=None):
    """(url, requests): ``answer(request, number)`` gives (status, bytes), or None, which hangs up."""
    requests, lock = [], threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def _send(self, status, body):
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self):
            self._send(*(health or (200, json.dumps({"version": 1, "model": "m"}).encode())))

        def do_POST(self):
            request = msgpack.unpackb(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                requests.append((self.path, request))
                number = len(requests)
            with contextlib.suppress(OSError):  # whoever asked may be gone
                given = answer(request, number)
                if given is not None:
                    self._send(*given)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def scored(request, **values):
    """An answer to a request: VQ is ten times the video's number, and what else is said."""
    rows = [{"id": i["id"], "VQ": 10.0 * int(i["id"]), **values} for i in request["items"]]
    return rows


def packed(rows):
    return 200, msgpack.packb({"scores": rows, "model": "m", "ms": 1.0})


def good(request, number):
    return packed(scored(request, MQ=1))


def ask(url, *, scores=("VQ",), batch=2, retries=3, timeout=30.0, concurrency=1, fps=None):
    """(values of VQ, faults, seconds waited before tries)."""
    waits = []
    server = Server(url, timeout, retries, waits.append)
    found, faults = judge(VIEW, server, scores, fps, 90, batch, concurrency)
    return found["VQ"], faults, waits


def free_url():
    """Where nobody listens."""
    with serving(good) as (url, _):
        return url


def test_what_is_sent_and_answered():
    with serving(good) as (url, requests):
        found = rewards.resolve("http")(VIEW, url=url, scores="VQ, MQ", batch=2, fps=4, quality=80)
        weighted = rewards.resolve("http")(VIEW, url=f"{url}/", scores="VQ,MQ", weights={"VQ": 0.5, "MQ": 2})
        alone = rewards.resolve("http")(VIEW, url=url, scores="VQ", concurrency=1)
    np.testing.assert_array_equal(found.values["VQ"], 10.0 * np.arange(VIDEOS))
    np.testing.assert_array_equal(found.values["MQ"], 1.0)
    np.testing.assert_array_equal(weighted.values, 5.0 * np.arange(VIDEOS) + 2)
    np.testing.assert_array_equal(alone.values, found.values["VQ"])
    assert found.faults == ()
    sent = [request for path, request in requests[:3] if path == "/v1/score"]
    assert {(request["version"], request["fps"]) for request in sent} == {(1, 4.0)}
    items = sorted((item for request in sent for item in request["items"]), key=lambda item: item["id"])
    assert [(item["id"], item["prompt"], len(item["frames"])) for item in items] == [
        (str(i), f"prompt {i}", 2) for i in range(VIDEOS)
    ]
    assert all(frame[:2] == b"\xff\xd8" for item in items for frame in item["frames"])
    assert len(requests[-1][1]["items"][0]["frames"]) == 6 and requests[-1][1]["fps"] == 12.0


def test_a_server_that_is_down_at_the_start_is_one_line():
    url = free_url()
    term = RewardTerm("q", rewards.resolve("http"), options={"url": url, "scores": "VQ"}, place="config.rewards.q")
    with pytest.raises(UserError, match=rf"^config\.rewards\.q: no reward server answers at {url}/v1/health \("):
        rewards.start([term])
    with serving(good) as (url, _):
        rewards.start([RewardTerm("q", rewards.resolve("http"), options={"url": url, "scores": "VQ"})])


@pytest.mark.parametrize(
    "health, said",
    [((404, b"no"), "answers 404"), ((200, b"<html>"), "answers 200"), ((200, b"[1]"), "200"), ((200, b"{}"), "200")],
)
def test_another_server_at_the_start_is_one_line(health, said):
    line = f"{said}.* is no reward server of version 1"
    with serving(good, health) as (url, _), pytest.raises(UserError, match=line):
        Server(url, 5.0, 0).check()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"url": "http://a"}, "the option scores is empty"),
        ({"scores": "VQ"}, "the option url is ''; name a server"),
        ({"scores": "VQ", "url": "localhost:1"}, "the option url is 'localhost:1'"),
        ({"scores": "VQ", "url": "http://a", "weights": {"MQ": 1}}, "the option weights is about MQ, scores about VQ"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(UserError, match=said):
        rewards.start([RewardTerm("q", rewards.resolve("http"), options=options)])
    with pytest.raises(UserError, match=said):
        rewards.resolve("http")(VIEW, **options)


def test_tries_are_counted_and_wait_longer_each_time():
    with serving(lambda request, number: good(request, number) if number > 3 else (503, b"loading")) as (url, requests):
        values, faults, waits = ask(url, batch=VIDEOS)
    np.testing.assert_array_equal(values, 10.0 * np.arange(VIDEOS))
    assert (waits, len(requests), faults) == ([1.0, 2.0, 4.0], 4, ())


def test_a_server_that_never_answers_well():
    with serving(lambda *_: (500, b"out of memory\n")) as (url, requests):
        values, faults, waits = ask(url, batch=3)
        assert len(requests) == 8
    assert np.isnan(values).all() and waits == [1.0, 2.0, 4.0] * 2
    assert faults == (f"{url} answers 500 out of memory, tried 4 times",) * 2


def test_a_request_that_is_refused_is_not_sent_again():
    with serving(lambda *_: (400, b"no fps")) as (url, requests):
        values, faults, waits = ask(url, batch=VIDEOS)
        assert len(requests) == 1
    assert np.isnan(values).all() and waits == [] and faults == (f"{url} answers 400 no fps",)


def test_a_server_that_dies_in_the_middle():
    """After the first of three requests every connection is cut: its videos are judged, the others are not."""
    with serving(lambda request, number: good(request, number) if number == 1 else None) as (url, _):
        values, faults, waits = ask(url, retries=1)
    np.testing.assert_array_equal(values, [0.0, 10.0, np.nan, np.nan, np.nan])
    assert len(faults) == 2 and waits == [1.0, 1.0] and all("tried 2 times" in fault for fault in faults)
    values, faults, waits = ask(url, batch=VIDEOS, retries=2)  # and is gone
    assert np.isnan(values).all() and waits == [1.0, 2.0] and len(faults) == 1


def test_an_answer_that_is_late():
    late = threading.Event()

    def answer(request, number):
        if number == 1:
            late.wait(30)
        return good(request, number)

    with serving(answer) as (url, requests):
        values, _, waits = ask(url, batch=VIDEOS, timeout=1.0, retries=9)
        np.testing.assert_array_equal(values, 10.0 * np.arange(VIDEOS))  # the second try, or a later one if we are slow
        assert waits[0] == 1.0 and len(requests) > 1
        requests.clear()
        late.clear()
        values, faults, _ = ask(url, batch=VIDEOS, timeout=1.0, retries=0)
        late.set()
    assert np.isnan(values).all() and faults == (f"{url} takes longer than 1 s, tried 1 times",)


def test_an_answer_that_trickles_is_late_as_a_whole(monkeypatch):
    clock = iter(range(0, 1000, 10))  # ten seconds between any two looks at it
    with serving(good) as (url, _):
        monkeypatch.setattr("greedy_distill_jax.rewards.http.time", types.SimpleNamespace(monotonic=clock.__next__))
        values, faults, _ = ask(url, batch=VIDEOS, timeout=5.0, retries=0)
    assert np.isnan(values).all() and faults == (f"{url} takes longer than 5 s, tried 1 times",)


def changed(change):
    """Answers whose rows are changed first."""

    def answer(request, number):
        rows = scored(request)
        return packed(change(rows) or rows)

    return answer


@pytest.mark.parametrize(
    "answer, lost, said",
    [
        (changed(lambda rows: rows[1].update(VQ="good")), [1], "answers 'good' as VQ"),
        (changed(lambda rows: rows[1].update(VQ=None)), [1], "answers None as VQ"),
        (changed(lambda rows: rows[1].update(VQ=True)), [1], "answers True as VQ"),
        (changed(lambda rows: rows[1].update(VQ=[1.0])), [1], r"answers \[1.0\] as VQ"),
        (changed(lambda rows: rows[1].__delitem__("VQ")), [1], "answers None as VQ"),
        (changed(lambda rows: rows[1].update(VQ=float("nan"))), [1], "the reward gave NaN"),
        (changed(lambda rows: rows[1].update(VQ=1e30)), [1], r"q is 1e\+30, outside \[0, 100\]"),
        (changed(lambda rows: rows[1].update(VQ=-1)), [1], r"q is -1, outside"),
        (changed(lambda rows: rows[1].update(VQ=1e300)), [1], r"q is inf, outside"),
        (changed(lambda rows: rows[:3]), [3, 4], "answers 0 times about a video"),
        (changed(lambda rows: [*rows, rows[2]]), [2], "answers 2 times about a video"),
        (changed(lambda rows: [*rows, {"id": "9", "VQ": 1.0}]), range(5), "answers about the video '9'"),
        (changed(lambda rows: rows[1].update(id=[])), range(5), r"answers about the video \[\]"),
        (changed(lambda rows: [1.0] * 5), range(5), "answers without a list of scores"),
        (lambda *_: (200, msgpack.packb([1.0] * 5)), range(5), "answers without a list of scores"),
        (lambda *_: (200, b"\xc1"), range(5), "answers something else than msgpack"),
        (lambda *_: (200, b""), range(5), "answers something else than msgpack"),
        (lambda *_: (200, bytes(2**22 + 1)), range(5), "answers more than 4194304 bytes"),
        (lambda *_: (302, b"elsewhere"), range(5), "answers 302 elsewhere"),
    ],
)
def test_faults_of_an_answer_are_those_videos_alone(answer, lost, said):
    expected = 10.0 * np.arange(VIDEOS)
    expected[list(lost)] = np.nan
    with serving(answer) as (url, requests):
        options = {"url": url, "scores": "VQ", "batch": VIDEOS, "retries": 1}
        term = RewardTerm("q", rewards.resolve("http"), low=0.0, high=100.0, options=options)
        line = rf"^reward q: {len(lost)} of 5 videos are not judged \(.*{said}"
        with pytest.warns(UserWarning, match=line):
            found = rewards.on_host([term], VIEW)
        with pytest.raises(UserError, match=line):
            rewards.on_host([term], VIEW, failed="stop")
        assert len(requests) == 2  # such an answer is not asked for again
    np.testing.assert_array_equal(found["q"], expected)


def test_requests_at_a_time_are_bounded():
    """Two are always under way together, and never a third."""
    pair, lock, now, most = threading.Barrier(2, timeout=30), threading.Lock(), [0], [0]

    def answer(request, number):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        pair.wait()
        time.sleep(0.02)  # a third would come now
        with lock:
            now[0] -= 1
        return good(request, number)

    view = HostView(*(np.concatenate([x] * 2)[:6] for x in VIEW[:2]), [*VIEW.captions, "more"], 12.0)
    with serving(answer) as (url, requests):
        found, faults = judge(view, Server(url, 30.0, 0), ["VQ"], None, 90, 1, 2)
    np.testing.assert_array_equal(found["VQ"], 10.0 * np.arange(6))
    assert (faults, most[0], len(requests)) == ((), 2, 6)


def test_without_the_extra_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(UserError, match=r"need httpx; install it with: pip install 'greedy_distill_jax\[rewards\]'"):
        rewards.resolve("http")(VIEW, url="http://127.0.0.1:1", scores="VQ")
