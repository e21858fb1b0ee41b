# SPDX-License-Identifier: Apache-2.0
"""The command ``tritool``: exit status 0 done, 1 bad input, 2 wrong use.

Torch and matplotlib are imported by the commands, after the arguments are understood, so that help
and errors of use come at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from tritool.reconstruction import Spread, Summary

DONE, BAD_INPUT, WRONG_USE = 0, 1, 2
# As a shell reports a program that died of SIGINT, SIGPIPE or SIGTERM.
INTERRUPTED, BROKEN_PIPE, TERMINATED = 130, 141, 143

OUTPUT_SUFFIXES = (".npz", ".csv")
PLOT_SUFFIXES = (".png", ".pdf", ".svg")

Result = Mapping[str, Any]
Command = Callable[[argparse.Namespace], tuple[Result, str]]


class WrongUse(Exception):
    """The command line itself asks for something impossible."""


class BadInput(Exception):
    """What the command line names cannot be used."""


class Terminated(Exception):
    """The command was told to end, and did so in order."""


class _Parser(argparse.ArgumentParser):
    """A parser that leaves printing and exiting to `main`: errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise WrongUse(f"{message} (see '{self.prog} --help')")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"tritool {version('tritool')}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; default those of the process.

    Returns:
        The exit status: 0 done, 1 bad input, 2 wrong use; 130 interrupted, 141 nobody reads, 143
        told to end.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        try:
            status = _run(arguments)
        except SystemExit as leaving:  # argparse, after --help or --version
            status = leaving.code if isinstance(leaving.code, int) else DONE
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough. Let the interpreter's own flush at exit go nowhere, quietly.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    return status


def _run(arguments: list[str]) -> int:
    # Known before parsing, so that --debug also shows where an error of use comes from.
    debug = "--debug" in arguments
    try:
        options = build_parser().parse_args(arguments)
        command: Command = options.command
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            result, text = command(options)
        print(json.dumps(result, indent=2, allow_nan=False) if options.json else text)
        return DONE
    except BrokenPipeError:
        raise
    except Terminated as ending:
        print(f"tritool: {ending}", file=sys.stderr)
        return TERMINATED
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(f"tritool: error: {_explain(error)}", file=sys.stderr)
        return WRONG_USE if isinstance(error, WrongUse) else BAD_INPUT


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    text = " ".join(str(message).removeprefix("tritool:").split())
    print(f"tritool: warning: {text}", file=sys.stderr)


def _explain(error: Exception) -> str:
    """One line about an error, in the user's words where it is the user's."""
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{os.fsdecode(error.filename)}: {error.strerror}"
    elif isinstance(error, WrongUse | BadInput):
        message = str(error)
    else:
        # Unforeseen, and perhaps pages long: torch lists its dispatch tables.
        start = str(error).partition("\n")[0][:300]
        message = f"{type(error).__name__}: {start} (--debug shows where)"
    return " ".join(message.split())


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of the whole command line, without importing torch."""
    common = _Parser(add_help=False)
    # SUPPRESS: the subcommand must not reset what was given before its name.
    common.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks of errors"
    )
    json_option = _Parser(add_help=False)
    json_option.add_argument("--json", action="store_true", help="print the result as JSON")

    parser = _Parser(
        prog="tritool",
        parents=[common],
        description="Multi-view geometry for PyTorch: from calibrated cameras and 2D points to 3D.",
        epilog="exit status: 0 done, 1 bad input, 2 wrong use",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str, command: Command, summary: str, example: str, *parents: _Parser
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            parents=[*parents, common, json_option],
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n{example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        added.set_defaults(command=command)
        return added

    demo = add(
        "demo",
        _demo,
        "show what the geometry does, on generated data",
        "  tritool demo -o tritool-demo\n"
        "  tritool triangulate tritool-demo/recording.npz -o walk.csv --plot walk.png",
    )
    demo.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("tritool-demo"),
        help="folder for the picture, table and recording, made if need be (default: %(default)s)",
    )
    demo.add_argument(
        "--networks",
        action="store_true",
        help="instead train the three small networks that come with the package a little further "
        "on generated people, and compare them; started again it goes on where it was",
    )
    demo.add_argument(
        "--from-scratch",
        action="store_true",
        help="with --networks, train them from the first weights on, which takes hours",
    )
    demo.add_argument(
        "--seed",
        metavar="N",
        type=_seed,
        help="with --networks, draw other samples, and compare on other people (default: 0)",
    )
    demo.add_argument(
        "--steps",
        metavar="N",
        type=_positive,
        help="with --networks, replace the length of each training",
    )
    demo.add_argument(
        "--samples", metavar="N", type=_positive, help="with --networks, compare on N samples only"
    )

    triangulate = add(
        "triangulate",
        _triangulate,
        "triangulate the 2D points of a recording, without training and without a GPU",
        "  tritool triangulate walk.npz -o walk.csv --plot walk.png\n\n"
        "RECORDING is an .npz with K [V,3,3], R [V,3,3], t [V,3] (x_cam = R X + t),\n"
        "kp2d [F,A,V,J,2] (pixels as measured, NaN where missing) and, if known, conf [F,A,V,J],\n"
        "dist [V,5] (OpenCV's order), image_size [V,2], joint_names, camera_names, frame_ids,\n"
        "gt3d [F,A,J,3], board_points [J,3], meta: V views, F frames, A actors, J joints.",
    )
    triangulate.add_argument("recording", metavar="RECORDING", type=Path)
    triangulate.add_argument(
        "-o",
        "--output",
        metavar="OUT",
        type=_path_with(OUTPUT_SUFFIXES),
        required=True,
        help="where to write the 3D points, .npz or .csv; an existing file is replaced",
    )
    triangulate.add_argument(
        "--plot",
        metavar="FILE",
        type=_path_with(PLOT_SUFFIXES),
        help="also draw the result, as .png, .pdf or .svg; an existing file is replaced",
    )
    triangulate.add_argument(
        "--mode",
        choices=("homogeneous", "inhomogeneous"),
        default="homogeneous",
        help="constraint of the linear solution: that of the paper (default), or the one that does "
        "not depend on the world's unit and origin",
    )
    triangulate.add_argument(
        "--reweight",
        metavar="N",
        type=_rounds,
        default=0,
        help="rounds of dividing each view by its depth; with --mode inhomogeneous, 1 comes close "
        "to the least reprojection error (default: %(default)s)",
    )
    triangulate.add_argument(
        "--min-confidence",
        metavar="X",
        type=_confidence,
        default=0.0,
        help="leave views out that are less confident (default: %(default)s)",
    )
    triangulate.add_argument(
        "--unweighted", action="store_true", help="weight all views alike, not by confidence"
    )

    _add_training(add)
    add("info", _info, "say what is installed and how each operation runs here", "  tritool info")
    return parser


def _add_training(add: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands about networks."""
    device = _Parser(add_help=False)
    device.add_argument(
        "--device",
        metavar="DEVICE",
        type=_device,
        help="cpu, cuda or cuda:1 (default: a GPU if there is one)",
    )
    config = _Parser(add_help=False)
    config.add_argument(
        "config",
        metavar="CONFIG",
        help="a YAML file, or the name of a preset such as small-algebraic",
    )
    config.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="replace a setting, as in --set training.batch_size=4; may be given again",
    )

    train = add(
        "train",
        _train,
        "train a network, or go on where its training stopped",
        "  tritool train small-algebraic -o runs/algebraic\n"
        "  torchrun --nproc-per-node 4 -m tritool train official-volumetric -o runs/volumetric\n\n"
        "A run that was killed goes on from its last checkpoint when started again.",
        config,
        device,
    )
    train.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        type=Path,
        required=True,
        help="folder for checkpoints, learning curves and TensorBoard's files",
    )
    train.add_argument(
        "--steps", metavar="N", type=_positive, help="replace the length of training"
    )

    evaluate = add(
        "evaluate",
        _evaluate,
        "measure a trained network on the validation part of its data",
        "  tritool evaluate small-algebraic --checkpoint runs/algebraic/best.safetensors \\\n"
        "      --views 2,3 -o evaluation",
        config,
        device,
    )
    evaluate.add_argument(
        "--checkpoint", metavar="FILE", type=Path, required=True, help="the trained weights"
    )
    evaluate.add_argument(
        "--views",
        metavar="N,N,...",
        type=_numbers,
        help="also measure with so many views of each sample",
    )
    evaluate.add_argument("--samples", metavar="N", type=_positive, help="only the first N samples")
    evaluate.add_argument(
        "-o", "--output", metavar="DIR", type=Path, help="folder for pictures and a JSON"
    )

    predict = add(
        "predict",
        _predict,
        "find the 3D pose of one person in each image, with a trained network of kind weak",
        "  tritool predict photo.jpg --checkpoint runs/weak/best.safetensors \\\n"
        "      --box 410,80,760,1020 --intrinsics 1450,1450,959.5,539.5 -o poses\n\n"
        "Pixels are those of the image as it is shown, after its EXIF orientation.",
        device,
    )
    predict.add_argument(
        "images",
        metavar="IMAGE",
        nargs="+",
        type=Path,
        help="an image, or a folder: all images in it",
    )
    predict.add_argument(
        "--checkpoint", metavar="FILE", type=Path, required=True, help="the trained weights"
    )
    predict.add_argument(
        "-o", "--output", metavar="DIR", type=Path, help="folder for pictures and a JSON"
    )
    predict.add_argument(
        "--box",
        metavar="X0,Y0,X1,Y1",
        type=_box,
        help="around the person, pixels, the same in all images; if X0 is below 0, type "
        "--box=X0,Y0,X1,Y1 (default: the whole image)",
    )
    predict.add_argument(
        "--intrinsics",
        metavar="FX,FY,CX,CY",
        type=_intrinsics,
        help="of the whole images, pixels (default: a guess, which may be far off)",
    )


def _path_with(suffixes: tuple[str, ...]) -> Callable[[str], Path]:
    def path(text: str) -> Path:
        if Path(text).suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"{text!r} must end in {' or '.join(suffixes)}")
        return Path(text)

    return path


def _rounds(text: str) -> int:
    return _whole(text, 0)


def _seed(text: str) -> int:
    return _whole(text, 0)


def _positive(text: str) -> int:
    return _whole(text, 1)


def _whole(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number >= {least}")
    return number


def _device(text: str) -> str:
    if re.fullmatch(r"cpu|cuda(:\d+)?", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu, cuda or cuda:1")
    return text


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _four(text: str) -> tuple[float, float, float, float]:
    try:
        a, b, c, d = map(float, text.split(","))
    except ValueError:
        a = b = c = d = float("nan")
    if not all(map(math.isfinite, (a, b, c, d))):
        raise argparse.ArgumentTypeError(f"{text!r} is not four numbers with commas between")
    return a, b, c, d


def _box(text: str) -> tuple[float, float, float, float]:
    box = _four(text)
    if not (box[0] < box[2] and box[1] < box[3]):
        raise argparse.ArgumentTypeError(f"{text!r} must have X0 below X1 and Y0 below Y1")
    return box


def _intrinsics(text: str) -> tuple[float, float, float, float]:
    intrinsics = _four(text)
    if not min(intrinsics[:2]) > 0:
        raise argparse.ArgumentTypeError(f"{text!r} must have FX and FY above 0")
    return intrinsics


def _confidence(text: str) -> float:
    try:
        confidence = float(text)
    except ValueError:
        confidence = -1.0
    if not 0 <= confidence < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number >= 0")
    return confidence


def _triangulate(options: argparse.Namespace) -> tuple[Result, str]:
    outputs = [path for path in (options.output, options.plot) if path is not None]
    for path in outputs:
        if path.exists() and options.recording.exists() and path.samefile(options.recording):
            raise WrongUse(f"{path} is the recording itself, it would be overwritten")
        if not path.parent.is_dir():
            raise BadInput(f"{path}: there is no folder {path.parent}")

    from tritool.data.recording import RecordingError, read_recording, write_reconstruction
    from tritool.reconstruction import reconstruct, summarise

    try:
        recording = read_recording(options.recording)
    except RecordingError as error:
        raise BadInput(str(error)) from error
    frames, actors, views, joints, _ = recording.kp2d.shape
    with _progress(frames * actors * joints, "point", options) as advance:
        reconstruction = reconstruct(
            recording,
            mode=options.mode,
            reweight=options.reweight,
            min_confidence=options.min_confidence,
            weighting="none" if options.unweighted else "confidence",
            progress=advance,
        )
    summary = summarise(recording, reconstruction)
    write_reconstruction(options.output, reconstruction)
    if options.plot is not None:
        from tritool.plot import plot_reconstruction

        plot_reconstruction(options.plot, recording, reconstruction)

    shape = {"frames": frames, "actors": actors, "views": views, "joints": joints}
    result = {
        "recording": str(options.recording),
        **shape,
        "settings": dict(reconstruction.settings),
        **summary.to_json(),
        "written": [str(path) for path in outputs],
    }
    counted = (_count(number, name.removesuffix("s")) for name, number in shape.items())
    head = f"{options.recording}: {', '.join(counted)}"
    written = f"written    {', '.join(map(str, outputs))}"
    return result, "\n".join([head, *_summary_lines(summary), written])


def _summary_lines(summary: Summary) -> Iterator[str]:
    share = 100 * summary.found / summary.total
    yield f"found      {summary.found} of {_count(summary.total, 'point')} ({share:.1f} %)"
    if summary.missing:
        reasons = ", ".join(f"{count} {reason}" for reason, count in summary.missing.items())
        yield f"missing    {reasons}"
    width = max(map(len, summary.camera_errors))
    yield "reprojection error, measured pixels"
    for name, spread in summary.camera_errors.items():
        worst = "   worst" if name == summary.worst_camera else ""
        yield f"  {name:{width}}  {_spread(spread, 'view')}{worst}"
    if len(summary.camera_errors) > 1:
        yield f"  {'all':{width}}  {_spread(summary.reprojection_error, 'view')}"
    if summary.reference_error is not None:
        yield f"distance to the reference (gt3d), {summary.unit}"
        yield f"  {_spread(summary.reference_error, 'point')}"
    if summary.board_error is not None:
        yield f"distance to the rigid board, {summary.unit}"
        yield f"  {_spread(summary.board_error, 'point')}"


def _spread(spread: Spread, what: str) -> str:
    if spread.median is None:
        return "nothing to measure"
    return (
        f"median {spread.median:8.2f}   mean {spread.mean:8.2f}   90 % {spread.p90:8.2f}"
        f"   ({_count(spread.count, what)})"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _demo(options: argparse.Namespace) -> tuple[Result, str]:
    folder: Path = options.output
    asked = (options.steps, options.samples, options.seed)
    if not options.networks and (options.from_scratch or any(x is not None for x in asked)):
        raise WrongUse("--from-scratch, --seed, --steps and --samples belong to --networks")
    folder.mkdir(parents=True, exist_ok=True)
    if options.networks:
        with _one_line():
            from tritool.demo.networks import run_networks

            networks = run_networks(
                folder,
                seed=options.seed or 0,
                from_scratch=options.from_scratch,
                steps=options.steps,
                samples=options.samples,
                show=not options.json and sys.stderr.isatty(),
                progress=lambda text: print(f"tritool: {text}", file=sys.stderr),
            )
        return networks.to_json(), networks.to_text()

    from tritool.demo import STEPS, run_demo

    with _progress(STEPS, "step", options) as advance:
        report = run_demo(folder, progress=advance)
    return report.to_json(), report.to_text()


def _train(options: argparse.Namespace) -> tuple[Result, str]:
    with _one_line():
        from tritool.training import load_config, train

        config = load_config(options.config, overrides=options.set, steps=options.steps)
        result = train(
            config,
            options.output,
            device=options.device,
            progress=not options.json and sys.stderr.isatty(),
        )
    if os.environ.get("RANK", "0") != "0":  # one of several processes; the first one tells
        raise SystemExit(TERMINATED if result.stopped == "SIGTERM" else DONE)
    if result.stopped == "SIGTERM":
        raise Terminated(
            f"stopped after step {result.step} and saved; the same command goes on from there"
        )
    return result.to_json(), result.to_text()


def _evaluate(options: argparse.Namespace) -> tuple[Result, str]:
    with _one_line():
        from tritool.training import evaluate, load_config

        config = load_config(options.config, overrides=options.set)
        total = config.data.validation.length
        total = min(total, options.samples or total)
        with _progress(total, "sample", options) as advance:
            result = evaluate(
                config,
                options.checkpoint,
                views=options.views,
                output=options.output,
                limit=options.samples,
                device=options.device,
                progress=advance,
            )
    return result.to_json(), result.table()


def _predict(options: argparse.Namespace) -> tuple[Result, str]:
    with _one_line():
        from tritool.training import predict_images
        from tritool.training.prediction import find_images

        images = find_images(options.images)
        with _progress(len(images), "image", options) as advance:
            result = predict_images(
                images,
                options.checkpoint,
                output=options.output,
                box=options.box,
                intrinsics=options.intrinsics,
                device=options.device,
                progress=advance,
            )
    return result.to_json(), result.to_text()


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """What is wrong with a file, an argument or the installation is said in its own words."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise BadInput(str(error)) from error


def _info(options: argparse.Namespace) -> tuple[Result, str]:
    import tritool.ops  # noqa: F401 (defines the ops that are described)
    from tritool._native import describe

    # Through JSON and back: what --json prints is exactly what the text shows.
    facts = json.loads(json.dumps(describe(), default=str))
    return facts, "\n".join(_fact_lines(facts))


def _fact_lines(facts: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    width = max((len(name) for name in facts), default=0)
    for key, value in facts.items():
        name = key.replace("_", " ")
        if isinstance(value, Mapping):
            yield f"{indent}{name}"
            yield from _fact_lines(value, f"{indent}  ")
        else:
            yield f"{indent}{name:{width}}  {_fact(value)}"


def _fact(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_fact, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value in (None, "") else str(value)


@contextlib.contextmanager
def _progress(total: int, unit: str, options: argparse.Namespace) -> Iterator[Callable[[int], Any]]:
    """A bar on standard error, for people only: not into files, not beside JSON."""
    from tqdm import tqdm

    quiet = options.json or not sys.stderr.isatty()
    with tqdm(total=total, unit=f" {unit}s", file=sys.stderr, leave=False, disable=quiet) as bar:
        yield bar.update
