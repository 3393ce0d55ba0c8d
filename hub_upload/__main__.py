"""Command line: `python -m hub_upload build OUT`."""

import argparse
import sys

from transformers.utils import logging

from modeling_stts.configuration_stts import METHODS

from .build import DTYPES, TINY, build_hub_folder


def _build(args: argparse.Namespace) -> None:
    folder = build_hub_folder(args.out, args.source, args.prune_ratio, args.method, args.dtype)
    print(f"Built {folder} with {len(list(folder.iterdir()))} files.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m hub_upload", description="Makes hub folders of STTS models.")
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser(
        "build",
        help="make a complete hub folder",
        description="Makes a complete hub folder: weights, configuration, code files, processor and tokenizer.",
    )
    build.add_argument("out", metavar="OUT", help="the folder to make; it must not exist")
    build.add_argument(
        "--source",
        default=TINY,
        help=f'local folder with a Molmo2 or an STTS checkpoint, or "{TINY}", a tiny random model (the default)',
    )
    build.add_argument(
        "--prune-ratio",
        type=float,
        metavar="R",
        help="fraction of a video's tokens to remove, 0 <= R < 1 (default: the source's, else 0.5)",
    )
    build.add_argument("--method", choices=METHODS, help="what scores tokens (default: the source's, else scorer)")
    build.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: the source's)")
    build.set_defaults(run=_build)
    return parser


def main(argv: list[str] | None = None) -> int:
    """
    Runs one command.

    Args:
        argv (`list[str]`, *optional*): the arguments; those of the process if not given.

    Returns:
        `int`: 0, or 1 where the command failed for an expected reason, which stands in one line on stderr. Wrong usage
        raises `SystemExit` with code 2.
    """
    args = _parser().parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        args.run(args)
    except (OSError, ValueError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
