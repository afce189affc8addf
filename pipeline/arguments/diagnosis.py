"""Arguments of the command that looks for what is wrong."""

import argparse

from pipeline.arguments.common import DEMO, DONE, MISTAKE, Commands, add_command, add_overrides


def add_doctor(commands: Commands) -> None:
    sub = add_command(
        commands,
        "doctor",
        "look for what is wrong with storage, cluster, tracker and recipe, and print the cure",
        f"doctor {DEMO} storage=s3://BUCKET/PREFIX",
    )
    sub.add_argument(
        "target",
        nargs="?",
        metavar="RECIPE|URL",
        help="a YAML file of settings, or a storage: path or URL; without it, this machine, the "
        "tracker and the cluster of RAY_ADDRESS",
    )
    add_overrides(sub)
    sub.add_argument("--json", action="store_true", help="print JSON for scripts")
    sub.set_defaults(command=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from pipeline.commands.doctor import diagnose

    right = diagnose(arguments.target, arguments.overrides, as_json=arguments.json)
    return DONE if right else MISTAKE
