"""A server of the reward "http" that judges by any host reward of ours: the protocol in one file, to start from.

    python -m greedy_distill_jax.rewards.server --reward jpeg_size --port 8100

It judges one request at a time. SIGTERM lets the request in work end.
"""

import asyncio
import json
import math
import socket
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from greedy_distill_jax import cli, rewards
from greedy_distill_jax.cli import extensions
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ranges import Natural
from greedy_distill_jax.rewards.http import MSGPACK, VERSION, extra
from greedy_distill_jax.rewards.images import from_jpeg

_LARGEST = 2**28  # bytes of a request
_PIXELS = 2**28  # of all of its frames together
_SHAPE = '{"version", "fps", "items": [{"id", "prompt", "frames": [JPEG, ...]}]}'


class Refused(Exception):
    """A request that is not answered: status and one line."""

    def __init__(self, status: int, line: str):
        super().__init__(line)
        self.status = status


def make_app(name: str, reward: rewards.Reward, options: Mapping[str, Any], largest: int = _LARGEST) -> Any:
    """A Starlette application; ``largest``: bytes of a request."""
    with extra():
        import msgpack
        from starlette.applications import Starlette
        from starlette.concurrency import run_in_threadpool
        from starlette.responses import JSONResponse, PlainTextResponse, Response
        from starlette.routing import Route

    one_at_a_time = asyncio.Lock()

    def judge(body: bytes) -> bytes:
        started = time.perf_counter()
        ids, view = read_request(body)
        try:
            values = reward(view, **options)
        except UserError as error:
            raise Refused(422, str(error)) from error
        values = values.values if isinstance(values, rewards.Judged) else values
        named = values if isinstance(values, Mapping) else {name: values}
        rows = [{"id": id_} | {key: float(x[i]) for key, x in named.items()} for i, id_ in enumerate(ids)]
        return msgpack.packb({"scores": rows, "model": name, "ms": (time.perf_counter() - started) * 1e3})

    async def score(request):
        body = bytearray()
        try:
            async for part in request.stream():
                body += part
                if len(body) > largest:
                    raise Refused(413, f"the request is larger than {largest} bytes; send fewer videos")
            async with one_at_a_time:
                return Response(await run_in_threadpool(judge, bytes(body)), media_type=MSGPACK)
        except Refused as error:
            return PlainTextResponse(str(error), error.status)

    async def health(request):
        return JSONResponse({"version": VERSION, "model": name})

    return Starlette(routes=[Route("/v1/health", health), Route("/v1/score", score, methods=["POST"])])


def read_request(body: bytes) -> tuple[list[str], rewards.HostView]:
    """(ids, view) of a request; its frames are the view's first ones, too. Raises ``Refused``."""
    import msgpack

    try:
        request = msgpack.unpackb(body)
    except (ValueError, msgpack.UnpackException) as error:
        raise Refused(400, "the request is not msgpack") from error
    if not isinstance(request, dict) or request.get("version") != VERSION:
        raise Refused(400, f"the request is not of version {VERSION}: {_SHAPE}")
    fps, items = request.get("fps"), request.get("items")
    if not isinstance(fps, int | float) or not 0 < fps < math.inf or not isinstance(items, list) or not items:
        raise Refused(400, f"the request has no fps or no items: {_SHAPE}")
    for item in items:
        texts = isinstance(item, dict) and isinstance(item.get("id"), str) and isinstance(item.get("prompt"), str)
        frames = item.get("frames") if texts else None
        if not frames or not isinstance(frames, list) or not all(isinstance(frame, bytes) for frame in frames):
            raise Refused(400, f"an item lacks id, prompt or frames: {_SHAPE}")
    limit = _PIXELS // sum(len(item["frames"]) for item in items)
    try:
        videos = [[from_jpeg(frame, limit) for frame in item["frames"]] for item in items]
    except ValueError as error:
        raise Refused(400, str(error)) from error
    if len({(len(video), *frame.shape) for video in videos for frame in video}) != 1:
        raise Refused(400, "the videos differ in length or size; send those of one size together")
    video = np.asarray(videos)
    return [i["id"] for i in items], rewards.HostView(video, video, [i["prompt"] for i in items], float(fps))


def main(argv: list[str]) -> None:
    """Command line."""
    parser = cli.Parser(prog="python -m greedy_distill_jax.rewards.server", description=__doc__.split("\n\n")[0])
    parser.add_argument("--reward", required=True, help="a host reward: its name, or file.py:NAME")
    parser.add_argument("--options", default="{}", help="of the reward, as JSON")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=cli.number(Natural), default=8100, help="0: any (default: %(default)s)")
    args = parser.parse_args(argv)
    with cli.places(reward="--reward", options="--options"):
        reward = rewards.resolve(args.reward)
        if reward.kind != "host":
            raise UserError(f"{args.reward!r} is of kind {reward.kind}; name a host reward.", "reward")
        try:
            options = dict(json.loads(args.options))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{args.options!r} is not a JSON object; write '{{\"quality\": 90}}'.", "options"
            ) from error
        rewards.check_options(args.reward, reward, options)
    with extra():
        import uvicorn
    app = make_app(args.reward.rpartition(":")[2], reward, extensions.defaults(reward.function) | options)
    try:
        listening = socket.create_server((args.host, args.port))
    except (OSError, OverflowError) as error:
        raise UserError(f"--port: {args.host}:{args.port} cannot be listened on ({error}); take another.") from error
    print(f"{args.reward} on http://{args.host}:{listening.getsockname()[1]}", flush=True)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=30)
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    cli.run(main)
