"""The reward of kind "http": a server is sent frames and prompts, and answers with scores.

    GET  /v1/health  -> JSON {"version": 1, "model": NAME}
    POST /v1/score   msgpack {"version": 1, "fps": 16.0, "items": [{"id": "0", "prompt": "...", "frames": [JPEG, ...]}]}
                     -> msgpack {"scores": [{"id": "0", "VQ": 1.5, ...}], "model": NAME, "ms": 12.5}

Nothing but numbers is taken from an answer. ``server`` is a server of it.
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ranges import Count, FrameRate, Natural, Positive, between
from greedy_distill_jax.rewards.images import to_jpeg
from greedy_distill_jax.rewards.protocol import HostView, Judged, reward

VERSION = 1
MSGPACK = "application/msgpack"

_LARGEST = 2**22  # bytes of an answer
_FIRST_WAIT = 1.0  # seconds before the second try, then twice as long each time
_AGAIN = (429, 500, 502, 503, 504)  # what the same request may not meet again


@contextlib.contextmanager
def extra() -> Iterator[None]:
    """An import that fails inside the block is the extra that was not installed."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"rewards over http need {error.name}; install it with: pip install 'greedy_distill_jax[rewards]'."
        ) from error


class Failed(Exception):
    """A request that has no answer; one line."""


class _Passing(Failed):
    """One that another try may answer."""


@dataclasses.dataclass(frozen=True)
class Server:
    """Where scores are asked for, and how patiently.

    url: without /v1/. timeout: seconds for each try. retries: further tries after a failed one, 1, 2, 4, ... seconds
    later. sleep: waits so many seconds.
    """

    url: str
    timeout: float | int
    retries: int
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self):
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"the option url is {self.url!r}; name a server, such as http://127.0.0.1:8100.", "options")

    def check(self) -> None:
        """Raises UserError unless the server is there and speaks this version."""
        with extra():
            import httpx
        address = f"{self.url.rstrip('/')}/v1/health"
        try:
            answer = httpx.get(address, timeout=self.timeout)
            version = answer.json().get("version") if answer.status_code == 200 else None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UserError(
                f"no reward server answers at {address} ({_told(error)}); start it, or correct the option url."
            ) from error
        except (ValueError, AttributeError):
            version = None
        if version != VERSION:
            raise UserError(
                f"{address} answers {answer.status_code} and is no reward server of version {VERSION}; correct the "
                f"option url."
            )

    def ask(self, client: Any, body: bytes) -> Any:
        """The answer to one request, tried again as long as that may help; raises ``Failed``."""
        for tried in range(self.retries + 1):
            if tried:
                self.sleep(_FIRST_WAIT * 2.0 ** (tried - 1))
            try:
                return self._try(client, body)
            except _Passing as error:
                last = error
        raise Failed(f"{last}, tried {self.retries + 1} times")

    def _try(self, client: Any, body: bytes) -> Any:
        import httpx
        import msgpack

        until = time.monotonic() + self.timeout
        headers = {"content-type": MSGPACK, "accept-encoding": "identity"}  # what is read is as large as what is sent
        read = b""
        try:
            with client.stream(
                "POST", f"{self.url.rstrip('/')}/v1/score", content=body, headers=headers, timeout=self.timeout
            ) as answer:
                for part in answer.iter_raw():
                    read += part
                    if len(read) > _LARGEST:
                        raise Failed(f"{self.url} answers more than {_LARGEST} bytes")
                    if time.monotonic() > until:
                        raise _Passing(f"{self.url} takes longer than {self.timeout:g} s")
        except httpx.TimeoutException as error:
            raise _Passing(f"{self.url} takes longer than {self.timeout:g} s") from error
        except httpx.InvalidURL as error:
            raise Failed(f"{self.url} is no address ({_told(error)})") from error
        except httpx.HTTPError as error:
            raise _Passing(f"{self.url}: {_told(error)}") from error
        if answer.status_code != 200:
            text = " ".join(read[:200].decode("utf-8", "replace").split())
            kind = _Passing if answer.status_code in _AGAIN else Failed
            raise kind(f"{self.url} answers {answer.status_code} {text}".strip())
        try:
            return msgpack.unpackb(read)
        except (ValueError, msgpack.UnpackException) as error:
            raise Failed(f"{self.url} answers something else than msgpack") from error


def _ready(options: Mapping[str, Any]) -> None:
    _names(options["scores"], options["weights"])
    Server(options["url"], options["timeout"], options["retries"]).check()


@reward(kind="http", ready=_ready)
def http(
    view: HostView,
    *,
    url: str = "",
    scores: str = "",
    weights: Mapping[str, Any] | None = None,
    fps: FrameRate | None = None,
    quality: Annotated[int, between(1, 100)] = 90,
    batch: Count = 8,
    concurrency: Count = 4,
    timeout: Positive = 120.0,
    retries: Natural = 3,
) -> Judged:
    """What a server says of the judged frames.

    A request that fails, and a video whose score is missing or not a number, give NaN for these videos.

    Args:
      view: the judged videos; their first frames are not sent.
      url: of the server, such as "http://127.0.0.1:8100".
      scores: names of those of its scores that count, such as "VQ,MQ". One of them is the value, several are values of
        their own.
      weights: {score: weight} makes one value of them, the weighted sum.
      fps: frames per second that are sent, None for all frames.
      quality: of the JPEGs, from 1 to 100.
      batch: videos of a request.
      concurrency: requests at a time.
      timeout: seconds for one try of a request.
      retries: further tries after one that failed, 1, 2, 4, ... seconds later.

    Raises:
      UserError: no scores are named, weights of others, or the extra "rewards" is not installed.
    """
    names = _names(scores, weights)
    found, faults = judge(view, Server(url, timeout, retries), names, fps, quality, batch, concurrency)
    if weights:
        return Judged(sum(weights[name] * found[name] for name in names), faults)
    return Judged(found[names[0]] if len(names) == 1 else found, faults)


def judge(
    view: HostView,
    server: Server,
    names: Sequence[str],
    fps: float | int | None,
    quality: int,
    batch: int,
    concurrency: int,
) -> Judged:
    """({score: [B]}, what failed); see ``http`` for the arguments."""
    with extra():
        import httpx
        import msgpack

    kept = _kept(view.video_BTHWC.shape[1], view.fps, fps)
    rate = view.fps if fps is None else min(float(fps), view.fps)

    def score(videos: range) -> tuple[dict[str, list[float]], list[str]]:
        items = [
            {
                "id": str(i),
                "prompt": view.captions[i],
                "frames": [to_jpeg(view.video_BTHWC[i, t], quality) for t in kept],
            }
            for i in videos
        ]
        try:
            body = msgpack.packb({"version": VERSION, "fps": rate, "items": items})
            return _read(server, server.ask(client, body), [item["id"] for item in items], names)
        except Failed as error:
            return {name: [math.nan] * len(videos) for name in names}, [str(error)]

    requests = [range(i, min(i + batch, len(view.captions))) for i in range(0, len(view.captions), batch)]
    pool = concurrent.futures.ThreadPoolExecutor(concurrency)
    with httpx.Client(limits=httpx.Limits(max_connections=concurrency)) as client, pool:
        answers = list(pool.map(score, requests))
    values = {name: np.asarray([x for found, _ in answers for x in found[name]]) for name in names}
    return Judged(values, tuple(fault for _, faults in answers for fault in faults))


def _names(scores: str, weights: Mapping[str, Any] | None) -> list[str]:
    names = [name.strip() for name in scores.split(",") if name.strip()]
    if not names:
        raise UserError("the option scores is empty; name the scores that count, such as VQ,MQ.", "options")
    if weights and set(weights) != set(names):
        raise UserError(
            f"the option weights is about {', '.join(sorted(weights))}, scores about {', '.join(names)}; give every "
            f"score one weight.",
            "options",
        )
    return names


def _kept(frames: int, fps: float, wanted: float | int | None) -> list[int]:
    """Indices of the frames that are sent: those nearest to the times of the wanted rate, none twice."""
    if wanted is None or wanted >= fps:
        return list(range(frames))
    return sorted({min(frames - 1, round(i * fps / wanted)) for i in range(math.ceil(frames * wanted / fps))})


def _read(server: Server, answer: Any, ids: Sequence[str], names: Sequence[str]) -> tuple[dict, list[str]]:
    """({score: a value per id}, faults) of an answer; what is not a number there is NaN."""
    rows = answer.get("scores") if isinstance(answer, Mapping) else None
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise Failed(f"{server.url} answers without a list of scores")
    of: dict[Any, list[Mapping]] = {id_: [] for id_ in ids}
    for row in rows:
        if row.get("id") not in ids:
            raise Failed(f"{server.url} answers about the video {row.get('id')!r}, which it was not asked about")
        of[row["id"]].append(row)
    values, faults = {name: [] for name in names}, []
    for given in of.values():
        if len(given) != 1:
            faults.append(f"{server.url} answers {len(given)} times about a video")
        for name in names:
            value = given[0].get(name) if len(given) == 1 else math.nan
            if not isinstance(value, int | float) or isinstance(value, bool):
                faults.append(f"{server.url} answers {value!r:.40} as {name}")
                value = math.nan
            values[name].append(float(value))
    return values, faults


def _told(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
