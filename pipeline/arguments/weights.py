"""Arguments of the commands that use and convert weights, and draw what they do."""

import argparse
import math

from models.options import ATTENTION_PRESETS
from pipeline.arguments.common import (
    DONE,
    Commands,
    add_command,
    add_group,
    add_image_arguments,
    add_old_spelling,
    add_overrides,
    add_recipe_option,
    add_weights_argument,
    load_recipe,
    local_path,
)


def add_inpaint(commands: Commands) -> None:
    sub = add_command(
        commands,
        "inpaint",
        "fill the holes of one image or of a folder of images",
        "inpaint checkpoint/ema.safetensors photo.jpg mask.png --out filled.png",
    )
    add_weights_argument(sub)
    add_image_arguments(sub, "file or folder")
    sub.add_argument(
        "--out",
        type=local_path,
        required=True,
        help="file or folder to write; known pixels stay exactly as they are, except in JPEG",
    )
    sub.add_argument(
        "--memory-gib",
        type=float,
        help="limit of the memory to use, in GiB; without it, most of what is free",
    )
    sub.add_argument(
        "--strategy",
        choices=("full", "crop", "resize"),
        default="full",
        help="what the network sees: the image as it is, the surroundings of each hole at the size "
        "that it was trained at, or the image at that size; without it, full",
    )
    for flag, default, text in (
        ("--crop-margin", None, "known pixels around a hole in a crop; without it, half the hole"),
        (
            "--size-limit",
            None,
            "longest side of what the network sees in crop and resize; without it, the size that "
            "it was trained at, 256 where no checkpoint says",
        ),
        ("--dilate", 0, "grow the holes by so many pixels"),
        (
            "--feather",
            0,
            "blend the fill into so many known pixels around the holes, which then change",
        ),
    ):
        sub.add_argument(flag, type=int, metavar="PX", default=default, help=text)
    sub.add_argument(
        "--fit-mask", action="store_true", help="stretch masks and sketches of another size"
    )
    sub.add_argument("--invert-mask", action="store_true", help="masks are black in the hole")
    sub.add_argument(
        "--skip-existing",
        action="store_true",
        help="keep outputs that exist: resumes a folder that was cut short",
    )
    sub.add_argument(
        "--batch",
        type=int,
        default=1,
        help="images or crops of one size to fill at a time, which pays on a GPU; without it, 1",
    )
    sub.set_defaults(command=_inpaint)


def add_ui(commands: Commands) -> None:
    sub = add_command(
        commands,
        "ui",
        "serve a page with two brushes, hole and sketch, to this machine's browser",
        "ui checkpoint/ema.safetensors",
    )
    add_weights_argument(sub, more=True)
    sub.add_argument("--port", type=int, default=7860, help="port to listen on; 0: any free one")
    sub.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; without it, this machine alone reaches the page, which asks "
        "for no password",
    )
    sub.add_argument(
        "--max-pixels", type=int, default=25_000_000, help="largest image to take, in pixels"
    )
    sub.add_argument(
        "--max-mb", type=int, default=100, help="largest file to take, in millions of bytes"
    )
    sub.set_defaults(command=_ui)


def add_weights(commands: Commands) -> None:
    actions = add_group(
        commands,
        "weights",
        "import weights of other codes, export ours as ONNX or .pt2",
        "weights export checkpoint/ema.safetensors --format onnx --out generator.onnx",
    )
    sub = add_command(
        actions,
        "import",
        "convert weights of the authors or of nipponjo's port to ours",
        "weights import snap-0 --out official.safetensors",
    )
    sub.add_argument(
        "file",
        type=local_path,
        metavar="FILE",
        help="a TensorFlow checkpoint, an .npz of its variables, or one of nipponjo's .pth files",
    )
    sub.add_argument(
        "--out", type=local_path, required=True, help=".safetensors file to write the generator to"
    )
    sub.add_argument(
        "--discriminator",
        type=local_path,
        help="second file to write, the discriminator, for train.init_discriminator_from",
    )
    orders = ("rgb", "bgr")
    sub.add_argument(
        "--colors",
        choices=orders,
        help="channel order of the images of the other code; known for the authors' weights",
    )
    sub.add_argument(
        "--attention",
        choices=tuple(ATTENTION_PRESETS),
        help="contextual attention to record; without it, what the other code computes",
    )
    sub.add_argument("--license", help="license to record instead of that of the release")
    add_old_spelling(sub, "--colours", "--colors", choices=orders)
    add_old_spelling(sub, "--licence", "--license")
    sub.set_defaults(command=_import_weights)
    sub = add_command(
        actions,
        "export",
        "write a generator as ONNX or as torch's .pt2, checked against torch",
        "weights export checkpoint/ema.safetensors --format pt2 --out generator.pt2",
    )
    add_weights_argument(sub)
    sub.add_argument("--format", choices=("onnx", "pt2"), required=True, help="format to write")
    sub.add_argument("--out", type=local_path, required=True, help="file to write")
    sub.set_defaults(command=_export_weights)


def add_figures(commands: Commands) -> None:
    sub = add_command(
        commands,
        "show-gates",
        "draw what the gates of every layer let through",
        "show-gates checkpoint/ema.safetensors photo.jpg mask.png --out gates.png",
    )
    add_weights_argument(sub)
    add_image_arguments(sub, "file")
    sub.add_argument("--out", type=local_path, required=True, help="image to write")
    sub.set_defaults(command=_show_gates)
    sub = add_command(
        commands,
        "show-masks",
        "draw a sheet of the masks of a recipe",
        'show-masks masks.mixture="{official: 1, brush: 1}" --out masks.png',
    )
    add_overrides(sub)
    add_recipe_option(sub)
    sub.add_argument("--out", type=local_path, required=True, help="image to write")
    sub.set_defaults(command=_show_masks)


def _inpaint(arguments: argparse.Namespace) -> int:
    from pipeline.commands.inpaint import MaskReading, inpaint
    from pipeline.filling import FillOptions

    memory = arguments.memory_gib
    if memory is not None and not 0 < memory < math.inf:
        raise ValueError(f"--memory-gib {memory} should be above 0")
    for path in inpaint(
        arguments.weights,
        arguments.image,
        arguments.mask,
        arguments.out,
        sketch=arguments.sketch,
        options=FillOptions(
            strategy=arguments.strategy,
            crop_margin_px=arguments.crop_margin,
            size_limit_px=arguments.size_limit,
            dilate_px=arguments.dilate,
            feather_px=arguments.feather,
            batch=arguments.batch,
            max_memory_bytes=None if memory is None else int(memory * 2**30),
        ),
        reading=MaskReading(fit=arguments.fit_mask, invert=arguments.invert_mask),
        skip_existing=arguments.skip_existing,
    ):
        print(path)
    return DONE


def _ui(arguments: argparse.Namespace) -> int:
    from pipeline.ui.server import MEGABYTE, Limits, serve

    for flag in ("max_pixels", "max_mb"):
        if getattr(arguments, flag) < 1:
            name = flag.replace("_", "-")
            raise ValueError(f"--{name} {getattr(arguments, flag)} should be above 0")
    if not 0 <= arguments.port < 2**16:
        raise ValueError(f"--port {arguments.port} should be from 0 to {2**16 - 1}")
    limits = Limits(arguments.max_pixels, arguments.max_mb * MEGABYTE)
    serve(
        arguments.weights,
        host=arguments.host,
        port=arguments.port,
        limits=limits,
        ready=lambda url: print(f"open {url} (Ctrl-C ends it)", flush=True),
    )
    return DONE


def _import_weights(arguments: argparse.Namespace) -> int:
    from pipeline.commands.weights import import_weights

    for line in import_weights(
        arguments.file,
        arguments.out,
        colors=arguments.colors,
        attention=arguments.attention,
        license=arguments.license,
        discriminator=arguments.discriminator,
    ):
        print(line)
    return DONE


def _export_weights(arguments: argparse.Namespace) -> int:
    from pipeline.commands.weights import export_weights

    for line in export_weights(arguments.weights, arguments.out, format=arguments.format):
        print(line)
    return DONE


def _show_gates(arguments: argparse.Namespace) -> int:
    from pipeline.commands.figures import show_gates

    print(
        show_gates(
            arguments.weights,
            arguments.image,
            arguments.mask,
            arguments.out,
            sketch=arguments.sketch,
        )
    )
    return DONE


def _show_masks(arguments: argparse.Namespace) -> int:
    from data_prep.masks import MaskSampler
    from pipeline.commands.figures import show_masks

    cfg = load_recipe(arguments)
    sampler = MaskSampler(cfg.masks)
    sampler.check(cfg.train.size_px, cfg.train.size_px)
    print(show_masks(sampler, arguments.out, size_px=cfg.train.size_px, seed=cfg.train_seed))
    return DONE
