"""Log lines and tracebacks without secrets, whatever a library puts into them."""

import logging
import sys
import traceback
from types import TracebackType

from cluster.storage import blanked

WITH_TIME = "%(asctime)s %(levelname).1s %(message)s"


class SecretFreeFormatter(logging.Formatter):
    """Formats as usual, then blanks credentials: botocore logs session tokens at DEBUG."""

    def format(self, record: logging.LogRecord) -> str:
        return blanked(super().format(record))


def configure_logs(form: str = "%(message)s") -> None:
    """Log to stderr from INFO on, unless an earlier call or another program has set that up."""
    handler = logging.StreamHandler()
    handler.setFormatter(SecretFreeFormatter(form, datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # A warning for every attempt at a server that is away; whoever asks it reports that once.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    sys.excepthook = _show


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of an error that nothing handles."""
    print(blanked("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)
