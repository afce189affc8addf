"""The command line: ``python -m pipeline COMMAND``."""

import argparse
import sys
from collections.abc import Callable, Sequence

from cluster.storage import describe_error
from pipeline import config
from pipeline.arguments import diagnosis, evaluation, stages, storage, weights
from pipeline.arguments.common import DEMO, EXAMPLE, MISTAKE, STOPPED, help_format
from pipeline.errors import describe_missing_package
from pipeline.logs import WITH_TIME, configure_logs
from pipeline.stop_request import interrupts_answered

__all__ = ["EXAMPLE", "build_parser", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 done, 1 a mistake of the user or of the environment, 3 stopped on request with everything
    saved. Wrong usage raises SystemExit with 2.
    """
    parsed = _parsed(arguments)
    configure_logs(WITH_TIME)
    command: Callable[[argparse.Namespace], int] = parsed.command
    try:
        with interrupts_answered():
            return command(parsed)
    except KeyboardInterrupt:
        print("stopped: run the same command to resume", file=sys.stderr)
        return STOPPED
    except ModuleNotFoundError as error:  # first: what follows imports as well
        print(describe_missing_package(error), file=sys.stderr)
        return MISTAKE
    except config.ConfigError as error:  # one line for every mistake
        print(f"ConfigError: {error}", file=sys.stderr)
        return MISTAKE
    except _full_memory() as error:
        print(
            "the GPU has no memory left: use smaller images or batches, end other processes on it, "
            f"or hide it with CUDA_VISIBLE_DEVICES= ({describe_error(error)})",
            file=sys.stderr,
        )
        return MISTAKE
    except _reported_without_traceback() as error:
        print(describe_error(error, max_chars=2000), file=sys.stderr)
        return MISTAKE


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with settings also after flags, where argparse alone refuses them."""
    parser = build_parser()
    parsed, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or "=" not in word]
    if unknown or (rest and "overrides" not in parsed):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if rest:
        parsed.overrides += rest
    return parsed


def _full_memory() -> tuple[type[Exception], ...]:
    torch = sys.modules.get("torch")
    return (torch.OutOfMemoryError,) if torch else ()


def _reported_without_traceback() -> tuple[type[Exception], ...]:
    """Errors of the user or of the environment; any other is a bug and keeps its traceback."""
    from cluster.session import SessionError
    from cluster.submit import SubmitError
    from pipeline.checkpoints import CheckpointError
    from pipeline.errors import TrainingError

    return (ValueError, OSError, SessionError, SubmitError, CheckpointError, TrainingError)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline",
        description="Train free-form, sketch-guided image inpainting: from photographs to verified "
        "checkpoints.",
        epilog=f"{EXAMPLE}run {DEMO}\n\n"
        "exit codes:\n"
        "  0 done, 1 a mistake (one line says which), 2 wrong usage,\n"
        "  3 stopped on request with everything saved: run the same command to resume",
        formatter_class=help_format,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    stages.add_init(commands)
    stages.add_stages(commands)
    stages.add_parity(commands)
    evaluation.add_evaluate(commands)
    evaluation.add_evalpack(commands)
    weights.add_inpaint(commands)
    weights.add_ui(commands)
    weights.add_weights(commands)
    weights.add_figures(commands)
    storage.add_checkpoints(commands)
    storage.add_dataset(commands)
    evaluation.add_compare(commands)
    stages.add_sweep(commands)
    stages.add_fork(commands)
    evaluation.add_tracking(commands)
    diagnosis.add_doctor(commands)
    stages.add_demo(commands)
    return parser
