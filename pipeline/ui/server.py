"""The server of the page, on this machine: what its script asks for, answered in JSON and PNG."""

import base64
import binascii
import ipaddress
import json
import logging
import socket
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias, get_args

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from data_prep.images import ImageError, read_mask
from data_prep.masks import MaskPixels
from pipeline.commands.image_files import MOSTLY_WHITE, original_image
from pipeline.filling import FillOptions, Strategy
from pipeline.ui.jobs import FillQueue, FillRequest, words
from pipeline.ui.proposals import DETECTORS, propose_sketch
from pipeline.ui.sessions import LostError, OpenImage, Result, RunningFill, Session, Sessions
from pipeline.ui.shelf import WeightsShelf, devices

log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("page")
FILES = {"": "page.html", "page.js": "page.js", "page.css": "page.css", "plane.js": "plane.js"}
KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
SAFETY = {
    # Nothing from elsewhere, whatever a file name or a message holds.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
SESSION = "x-session"
MEGABYTE = 1_000_000
SLACK_BYTES = 100_000  # of a request for a fill, beside its mask and sketch

Handler: TypeAlias = Callable[[Request, Session], Awaitable[Response]]


class OverLimitError(ValueError):
    """A request that is over a limit."""


@dataclass(frozen=True)
class Limits:
    """What the page takes at most."""

    pixels: int = 25_000_000
    bytes: int = 100 * MEGABYTE


def serve(
    weights: Sequence[str],
    *,
    host: str,
    port: int,
    limits: Limits,
    ready: Callable[[str], None],
) -> None:
    """Serve the page until Ctrl-C; ``ready`` gets its address.

    The first of ``weights`` is loaded before. Raises as ``load_generator`` does, and ValueError for
    an address that cannot be listened on.
    """
    loopback = _is_loopback(host)
    shelf = WeightsShelf(weights, any_source=loopback)
    shelf.opened(weights[0])
    try:
        listening = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except OSError as error:
        raise ValueError(
            f"{host}:{port} cannot be listened on ({error.strerror}): give another --port, "
            "or 0 for any free one"
        ) from error
    if not loopback:
        log.warning("other machines may reach this page: there is no password")
    with listening, tempfile.TemporaryDirectory(prefix="deepfill-ui-") as folder:
        sessions = Sessions(Path(folder))
        app = application(shelf, FillQueue(shelf), sessions, limits, loopback=loopback)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
        shown = f"[{host}]" if ":" in host else host
        ready(f"http://{shown}:{listening.getsockname()[1]}/")
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:  # uvicorn has ended in order, and passes it on
            log.info("the page ended")
        finally:
            sessions.stop_all()


def application(
    shelf: WeightsShelf, queue: FillQueue, sessions: Sessions, limits: Limits, *, loopback: bool
) -> Starlette:
    """The page as an ASGI application. On ``loopback`` it answers to names of this machine alone,
    so that no foreign page can reach it by a name that leads here."""
    page = _Page(shelf, queue, limits)

    def endpoint(handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            if loopback and not _is_loopback(request.url.hostname or ""):
                return _refusal("this page answers on this machine alone", 403)
            try:
                session = sessions.find(request.headers.get(SESSION, ""))
                if session is None and handler != page.session:
                    raise LostError("the page was left for too long: reload it")
                return await handler(request, session or sessions.start())
            except OverLimitError as error:
                return _refusal(str(error), 413)
            except LostError as error:
                return _refusal(str(error), 410)
            except Exception as error:
                return _refusal(words(error), 400)

        return answer

    return Starlette(
        routes=[
            Route("/", _file),
            Route("/{name}", _file),
            Route("/api/session", endpoint(page.session), methods=["POST"]),
            Route("/api/weights", endpoint(page.weights), methods=["POST"]),
            Route("/api/image", endpoint(page.open_image), methods=["POST"]),
            Route("/api/image/{image}", endpoint(page.show_image)),
            Route("/api/mask", endpoint(page.read_mask), methods=["POST"]),
            Route("/api/proposal", endpoint(page.propose), methods=["POST"]),
            Route("/api/fill", endpoint(page.fill), methods=["POST"]),
            Route("/api/fill/{job}", endpoint(page.job)),
            Route("/api/fill/{job}/cancel", endpoint(page.cancel), methods=["POST"]),
            Route("/api/result/{result}/{file}", endpoint(page.show_result)),
            Route("/api/result/{result}/open", endpoint(page.open_result), methods=["POST"]),
        ]
    )


class _Page:
    """The requests of the page's script, each within a session."""

    def __init__(self, shelf: WeightsShelf, queue: FillQueue, limits: Limits) -> None:
        self._shelf, self._queue, self._limits = shelf, queue, limits

    async def session(self, request: Request, session: Session) -> Response:
        """Start a session, or find it again after the page was reloaded."""
        first = await run_in_threadpool(self._shelf.opened, self._shelf.sources[0])
        return _json(
            session=session.key,
            weights=asdict(first),
            sources=self._shelf.sources,
            any_source=self._shelf.any_source,
            devices=devices(),
            strategies=get_args(Strategy),
            detectors=DETECTORS,
            max_pixels=self._limits.pixels,
            max_bytes=self._limits.bytes,
            image=_described(session.image) if session.image else None,
            results=[_result(result) for result in session.results],
        )

    async def weights(self, request: Request, session: Session) -> Response:
        """Open other weights."""
        asked = await self._read_json(request)
        source = str(asked.get("source", "")).strip()
        if not source:
            raise ValueError("weights have no name: give a path, a URL of storage, or models:/…")
        return _json(**asdict(await run_in_threadpool(self._shelf.opened, source)))

    async def open_image(self, request: Request, session: Session) -> Response:
        """Open an image, the body of the request."""
        name = request.query_params.get("name", "image")
        data = await self._body(request, name)
        original = await run_in_threadpool(
            original_image, data, name, max_pixels=self._limits.pixels
        )
        stem = Path(name).stem or "image"
        return _json(**_described(await run_in_threadpool(session.open, original, stem)))

    async def open_result(self, request: Request, session: Session) -> Response:
        """Make a result the image to fill."""
        result = session.result(request.path_params["result"])
        original = await run_in_threadpool(original_image, result.path.read_bytes(), result.name)
        return _json(**_described(await run_in_threadpool(session.open, original, result.name)))

    async def show_image(self, request: Request, session: Session) -> Response:
        image = session.image_of(request.path_params["image"])
        return FileResponse(image.shown, headers=SAFETY)

    async def show_result(self, request: Request, session: Session) -> Response:
        """What the slider shows, or the PNG as the command line writes it: known pixels,
        transparency, 16 bits and color profile stay."""
        result = session.result(request.path_params["result"])
        files = {"before": result.before, "after": result.after, "file": result.path}
        if (path := files.get(request.path_params["file"])) is None:
            raise LostError("this file was not found")
        return FileResponse(path, headers=SAFETY)

    async def read_mask(self, request: Request, session: Session) -> Response:
        """A mask or sketch from a file, the body, for the image opened."""
        image = session.image_of(request.query_params.get("image", ""))
        name = request.query_params.get("name", "the mask")
        data = await self._body(request, name)
        height, width = image.original.pixels.shape[:2]
        try:
            found = await run_in_threadpool(read_mask, data)
            mask = await run_in_threadpool(read_mask, data, size=(height, width))
        except ImageError as error:
            raise ValueError(f"{name} cannot be read as a mask: {error}") from error
        messages = []
        if found.shape != mask.shape:
            messages.append(
                f"{name} is {found.shape[1]}×{found.shape[0]}: stretched to {width}×{height}"
            )
        if (share := mask.mean()) > MOSTLY_WHITE:
            messages.append(
                f"{name} is white to {share:.0%}: invert the hole if it means the opposite"
            )
        return _packed(mask, messages)

    async def propose(self, request: Request, session: Session) -> Response:
        """A sketch of the image inside the hole."""
        asked = await self._read_json(request)
        image = session.image_of(str(asked.get("image")))
        hole = _plane(asked, "mask", image)
        if not hole.any():
            raise ValueError("a sketch is proposed inside the hole: paint the hole first")
        detector = asked.get("detector")
        if detector not in DETECTORS:
            raise ValueError(f"no detector {detector!r}: choose {' or '.join(DETECTORS)}")
        opened = await run_in_threadpool(self._shelf.opened, str(asked.get("weights")))
        as_seen = min(hole.shape) if asked.get("strategy") == "full" else opened.trained_px
        strokes = await run_in_threadpool(
            propose_sketch, detector, image.original.pixels, hole, detect_px=as_seen
        )
        return _packed(strokes)

    async def fill(self, request: Request, session: Session) -> Response:
        """Start to fill; the answer names the job to ask for."""
        asked = await self._read_json(request)
        image = session.image_of(str(asked.get("image")))
        job = self._queue.start(
            session,
            FillRequest(
                image,
                _plane(asked, "mask", image),
                _plane(asked, "sketch", image),
                weights=str(asked.get("weights")),
                device=str(asked.get("device")),
                options=_options(asked.get("options")),
            ),
        )
        return _json(**_job(job))

    async def job(self, request: Request, session: Session) -> Response:
        return _json(**_job(self._find(request, session)))

    async def cancel(self, request: Request, session: Session) -> Response:
        job = self._find(request, session)
        job.cancel.set()
        return _json(**_job(job))

    def _find(self, request: Request, session: Session) -> RunningFill:
        if session.job is None or session.job.key != request.path_params["job"]:
            raise LostError("this fill is not known: start it again")
        return session.job

    async def _read_json(self, request: Request) -> dict[str, Any]:
        planes = 2 * (4 * (self._limits.pixels // 8 + 1) // 3 + 4)
        data = await self._body(
            request, "the request", min(self._limits.bytes, planes + SLACK_BYTES)
        )
        found = json.loads(data)
        if not isinstance(found, dict):
            raise ValueError("the request should be an object in JSON")
        return found

    async def _body(self, request: Request, name: str, limit: int | None = None) -> bytes:
        """The body of the request. OverLimitError, before all is read, where it is too long."""
        limit = limit or self._limits.bytes
        received = bytearray()
        async for chunk in request.stream():
            received += chunk
            if len(received) > limit:
                raise OverLimitError(
                    f"{name} has more bytes than this page takes, {limit / MEGABYTE:.0f} MB: "
                    "start it with a larger --max-mb"
                )
        return bytes(received)


def _options(asked: Any) -> FillOptions:
    """The options of a request. ValueError where one is of another kind."""
    if not isinstance(asked, dict):
        raise ValueError("the request has no options")
    known = {"strategy", "crop_margin_px", "size_limit_px", "dilate_px", "feather_px"}
    if unknown := asked.keys() - known:
        raise ValueError(f"no option {', '.join(sorted(unknown))}: give {', '.join(sorted(known))}")
    for name, value in asked.items():
        if name != "strategy" and value is not None and type(value) is not int:
            raise ValueError(f"{name} is {value!r}: give a whole number")
    return FillOptions(**asked)


def _plane(asked: dict[str, Any], name: str, image: OpenImage) -> MaskPixels:
    """A mask or sketch of a request: base64 of one bit a pixel, row after row."""
    height, width = image.original.pixels.shape[:2]
    expected = -(-height * width // 8)
    try:
        packed = base64.b64decode(str(asked[name]), validate=True)
    except (KeyError, binascii.Error) as error:
        raise ValueError(f"the request has no {name} in base64") from error
    if len(packed) != expected:
        raise ValueError(f"the {name} has {len(packed)} bytes: {expected} are a bit for each pixel")
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=height * width)
    return bits.reshape(height, width)


def _packed(mask: MaskPixels, messages: Sequence[str] = ()) -> Response:
    """An answer with a mask or sketch, written as ``_plane`` reads it."""
    plane = base64.b64encode(np.packbits(mask).tobytes()).decode("ascii")
    return _json(plane=plane, messages=messages)


def _described(image: OpenImage) -> dict[str, Any]:
    height, width = image.original.pixels.shape[:2]
    return {"image": image.key, "name": image.name, "width": width, "height": height}


def _job(job: RunningFill) -> dict[str, Any]:
    return {
        "job": job.key,
        "state": job.state,
        "progress": round(job.progress, 4),
        "messages": list(job.messages),
        "result": _result(job.result) if job.state == "done" and job.result else None,
    }


def _result(result: Result) -> dict[str, Any]:
    return {
        "result": result.key,
        "name": result.name,
        "settings": result.settings,
        "seconds": round(result.seconds, 2),
        "width": result.width,
        "height": result.height,
    }


def _json(**content: Any) -> Response:
    return JSONResponse(content, headers=SAFETY)


def _refusal(text: str, status: int) -> Response:
    return JSONResponse({"error": text}, status_code=status, headers=SAFETY)


async def _file(request: Request) -> Response:
    """One of the page's own files."""
    name = FILES.get(request.path_params.get("name", ""))
    if name is None:
        return _refusal("this page was not found", 404)
    path = PAGE / name
    return Response(path.read_bytes(), media_type=KINDS[path.suffix], headers=SAFETY)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
