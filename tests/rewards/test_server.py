"""The reference server: what the client gets of it, what it refuses, and how it ends."""

import contextlib
import signal
import subprocess
import sys
import threading
import time

import httpx
import msgpack
import numpy as np
import pytest
import uvicorn

from greedy_distill_jax import rewards
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.rewards import HostView, RewardTerm, server
from greedy_distill_jax.rewards.http import Server
from greedy_distill_jax.rewards.images import from_jpeg, to_jpeg
from tests.conftest import exit_code

FRAME = to_jpeg(np.full((8, 8, 3), 90, np.uint8), 90)
ITEM = {"id": "0", "prompt": "a red square", "frames": [FRAME, FRAME]}


def view(*captions):
    tiles = np.random.default_rng(0).integers(0, 256, (len(captions), 3, 4, 4, 3), np.uint8)
    video = tiles.repeat(16, 2).repeat(16, 3)
    return HostView(video, video[:, :1], list(captions), 8.0)


@contextlib.contextmanager
def running(name, reward=None, **more):
    """The server's url, in a thread of this process."""
    app = server.make_app(name, reward or rewards.resolve(name), {}, **more)
    listening = server.socket.create_server(("127.0.0.1", 0))
    service = uvicorn.Server(uvicorn.Config(app, log_level="critical", access_log=False))
    thread = threading.Thread(target=service.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        service.should_exit = True
        thread.join()


def asked(url, captions, failed="mask", **options):
    options = {"url": url, "scores": "target_colour", "batch": 2, "retries": 0, "quality": 100, **options}
    term = RewardTerm("q", rewards.resolve("http"), options=options)
    rewards.start([term])
    return rewards.on_host([term], view(*captions), failed=failed)


def test_a_host_reward_behind_it_says_nearly_what_it_says_here():
    captions = ["a red square", "a blue circle", "a green thing"]
    here = rewards.on_host([RewardTerm("q", rewards.resolve("target_colour"))], view(*captions))["q"]
    with running("target_colour") as url:
        there = asked(url, captions, "stop")["q"]
        np.testing.assert_allclose(there, here, atol=0.03)  # through JPEG
        with pytest.warns(UserWarning, match="1 of 3 videos are not judged"):
            masked = asked(url, ["a square", *captions[1:]])["q"]
    assert np.isnan(masked[0]) and np.isfinite(masked[1:]).all()


def test_several_values_a_refusal_and_a_mistake():
    @rewards.reward(kind="host")
    def several(view):
        if "wrong" in view.captions:
            raise UserError("the caption 'wrong' is none of mine.")
        if "broken" in view.captions:
            raise KeyError("broken")
        return {"VQ": np.full(len(view.captions), view.fps), "MQ": np.arange(len(view.captions))}

    with running("several", several) as url:
        found = asked(url, ["a", "b"], "stop", scores="VQ,MQ")
        with pytest.raises(UserError, match=r"answers 422 the caption 'wrong' is none of mine\.\)"):
            asked(url, ["wrong"], "stop", scores="VQ")
        with pytest.raises(UserError, match=r"answers 500 Internal Server Error, tried 1 times\)"):
            asked(url, ["broken"], "stop", scores="VQ")
    np.testing.assert_array_equal(found["q/VQ"], 8.0)
    np.testing.assert_array_equal(found["q/MQ"], [0.0, 1.0])


def body(*items, **changed):
    return msgpack.packb({"version": 1, "fps": 8.0, "items": items or [ITEM], **changed})


@pytest.mark.parametrize(
    "sent, said",
    [
        (b"\xc1", "is not msgpack"),
        (b"{}", "is not msgpack"),
        (msgpack.packb([1]), "is not of version 1"),
        (body(version=2), "is not of version 1"),
        (body(fps=0), "has no fps or no items"),
        (body(fps=float("nan")), "has no fps or no items"),
        (body(items=[]), "has no fps or no items"),
        (body({"id": "0"}), "an item lacks"),
        (body({**ITEM, "id": 0}), "an item lacks"),
        (body({**ITEM, "frames": []}), "an item lacks"),
        (body({**ITEM, "frames": ["text"]}), "an item lacks"),
        (body({**ITEM, "frames": [b"GIF89a"]}), "a frame is not a JPEG"),
        (body({**ITEM, "frames": [FRAME[:40]]}), "a frame is not a JPEG"),
        (body(ITEM, {**ITEM, "frames": [FRAME]}), "the videos differ in length or size"),
    ],
)
def test_what_is_no_request_is_refused(sent, said):
    with pytest.raises(server.Refused, match=said) as error:
        server.read_request(sent)
    assert error.value.status == 400 and "\n" not in str(error.value)


def test_a_frame_of_too_many_pixels_is_not_decoded(monkeypatch):
    monkeypatch.setattr(server, "_PIXELS", 127)  # of two frames of 64
    with pytest.raises(server.Refused, match="a frame of 8x8 pixels is too large"):
        server.read_request(body())
    assert from_jpeg(FRAME, 64).shape == (8, 8, 3)


def test_routes_and_sizes_over_the_wire():
    with running("jpeg_size", largest=2000) as url, httpx.Client(base_url=url) as client:
        Server(url, 5.0, 0).check()
        assert client.get("/v1/health").json() == {"version": 1, "model": "jpeg_size"}
        answer = client.post("/v1/score", content=body())
        assert answer.status_code == 200 and answer.headers["content-type"] == "application/msgpack"
        told = msgpack.unpackb(answer.content)
        assert set(told) == {"scores", "model", "ms"} and told["scores"][0]["jpeg_size"] < 0
        large = client.post("/v1/score", content=bytes(2001))
        assert large.status_code == 413 and "larger than 2000 bytes; send fewer" in large.text
        assert client.post("/v1/score", content=b"no").status_code == 400
        assert client.get("/v1/score").status_code == 405


@pytest.mark.parametrize(
    "options, said",
    [
        (["--reward", "flicker"], "error: --reward: 'flicker' is of kind jax; name a host reward."),
        (["--reward", "nice"], "error: --reward: reward 'nice' is not known"),
        (["--reward", "jpeg_size", "--options", "90"], "error: --options: '90' is not a JSON object"),
        (["--reward", "jpeg_size", "--options", '{"q": 1}'], "error: --options: reward 'jpeg_size' has no option 'q'"),
        (["--reward", "jpeg_size", "--host", "1.2.3.4"], "error: --port: 1.2.3.4:8100 cannot be listened on"),
        (["--reward", "jpeg_size", "--port", "70000"], "error: --port: 127.0.0.1:70000 cannot be listened on"),
    ],
)
def test_options_of_the_command(options, said, capsys):
    assert exit_code(server.main, *options) == 2
    assert capsys.readouterr().err.startswith(said)


SLOW = """
import sys, time
import numpy as np
from greedy_distill_jax import rewards

@rewards.reward(kind="host")
def slow(view):
    print("judging", flush=True)
    sys.stdin.readline()
    return np.ones(len(view.captions))
"""


@pytest.mark.subprocesses
def test_sigterm_lets_the_request_in_work_end(tmp_path, subprocess_env):
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, "-m", "greedy_distill_jax.rewards.server", "--reward", f"{tmp_path}/slow.py:slow"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*command, "--port", "0"], env=subprocess_env, text=True, **pipes)
    try:
        url = process.stdout.readline().split()[-1]
        found = []
        thread = threading.Thread(target=lambda: found.append(asked(url, ["a"], "stop", scores="slow")))
        thread.start()
        assert process.stdout.readline() == "judging\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)  # the server has closed its door by then, or closes it later: the answer is the same
        assert process.poll() is None
        process.stdin.write("\n")
        process.stdin.flush()
        thread.join()
        _, errors = process.communicate(timeout=600)
    finally:
        process.kill()
    np.testing.assert_array_equal(found[0]["q"], 1.0)
    assert (process.returncode, errors) == (143, "")
