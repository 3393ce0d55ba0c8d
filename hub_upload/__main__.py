"""Command line: `python -m hub_upload build|check|push|convert|card`."""

import argparse
import sys

from transformers.utils import logging

from modeling_stts.configuration_stts import METHODS
from modeling_stts.stts_release import VERSION

from .build import DTYPES, TINY, build_hub_folder
from .card import RELATIONS, write_card
from .check import check, report_path
from .convert import convert
from .push import MAIN, MESSAGE, Target, plan_push, push


def _build(args: argparse.Namespace) -> int:
    folder = build_hub_folder(args.out, args.source, args.prune_ratio, args.method, args.dtype, adapter=args.adapter)
    print(f"Built {folder} with {len(list(folder.iterdir()))} files.")
    return 0


def _check(args: argparse.Namespace) -> int:
    report = check(args.folder)
    print(report.to_json() if args.json else report.to_text())
    print(f"The report is in {report_path(args.folder)}", file=sys.stderr)
    return 0 if report.passed else 1


def _card(args: argparse.Namespace) -> int:
    card = write_card(
        args.folder,
        args.repo_id,
        license=args.license,
        revision=args.revision,
        base_model=args.base_model,
        base_model_relation=args.base_model_relation,
        datasets=args.dataset,
        results=args.results,
        about=args.about,
    )
    print(f"Wrote {card}")
    return 0


def _push(args: argparse.Namespace) -> int:
    names = ("repo_id", "public", "branch", "tag", "pull_request", "message")
    target = Target(**{name: getattr(args, name) for name in names})
    plan = plan_push(args.folder, target)
    print(plan.to_text())
    if args.dry_run:
        return 0
    if not args.yes and not _agrees("Push this? [y/N] "):
        print("error: nothing was pushed", file=sys.stderr)
        return 1
    result = push(plan)
    print(f"Pushed {result.commit} and compared it with the folder: {result.url}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    conversion = convert(
        args.out,
        args.source,
        processor=args.processor,
        prune_ratio=args.prune_ratio,
        method=args.method,
        dtype=args.dtype,
        max_position_embeddings=args.max_position_embeddings,
    )
    print(conversion.to_text())
    print(f"Converted {args.source} to {conversion.folder}")
    return 0


def _agrees(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _add_build(commands) -> None:
    build = commands.add_parser(
        "build",
        help="make a complete hub folder from a checkpoint",
        description="Makes a complete hub folder: weights, configuration, code files, processor and tokenizer.",
    )
    build.add_argument("out", metavar="OUT", help="the folder to make; it must not exist")
    build.add_argument(
        "--source",
        default=TINY,
        help=f'local folder with a Molmo2 or an STTS checkpoint, or "{TINY}", a tiny random model (the default)',
    )
    build.add_argument(
        "--adapter", metavar="FOLDER", help="LoRA adapter of PEFT to merge into the source's weights; needs peft"
    )
    _add_settings(build)
    build.set_defaults(run=_build)


def _add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--prune-ratio",
        type=float,
        metavar="R",
        help="fraction of a video's tokens to remove, 0 <= R < 1 (default: the source's, else 0.5)",
    )
    command.add_argument("--method", choices=METHODS, help="what scores tokens (default: the source's, else scorer)")
    command.add_argument("--dtype", choices=DTYPES, help="type of the weights (default: the source's)")


def _add_check(commands) -> None:
    command = commands.add_parser(
        "check",
        help="meet a hub folder as a stranger would",
        description="Checks a hub folder: files, configuration, code, weights and card, and then in a fresh process "
        "without network that everything loads, runs and saves. The report stands beside the folder as "
        "FOLDER.check.json. Exit code 0 if everything is as it must be, else 1.",
    )
    command.add_argument("folder", metavar="FOLDER", help="a hub folder with a model card")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=_check)


def _add_card(commands) -> None:
    command = commands.add_parser(
        "card",
        help="write the model card of a hub folder",
        description="Writes README.md into a hub folder, from its configuration, its weights and result files "
        "(their format: `python -m pydoc hub_upload.card`).",
    )
    command.add_argument("folder", metavar="FOLDER", help="a hub folder")
    command.add_argument("repo_id", metavar="REPO", help="where it will be published: user/name")
    command.add_argument("--license", required=True, help="license of the weights, such as apache-2.0")
    command.add_argument(
        "--revision", default=f"v{VERSION}", help="tag or branch that the snippet pins (default: %(default)s)"
    )
    command.add_argument("--base-model", metavar="REPO", help="the model that this one was made from")
    command.add_argument("--base-model-relation", choices=RELATIONS, default="finetune", help="(default: %(default)s)")
    command.add_argument(
        "--dataset", action="append", default=[], metavar="REPO", help="a dataset it was trained on; may be repeated"
    )
    command.add_argument(
        "--results", action="append", default=[], metavar="FILE", help="a result file (JSON); may be repeated"
    )
    command.add_argument("--about", metavar="FILE", help="Markdown text to stand under the title")
    command.set_defaults(run=_card)


def _add_push(commands) -> None:
    command = commands.add_parser(
        "push",
        help="publish a hub folder that passed check",
        description="Publishes a hub folder that passed `check` in one commit, shows what will change and asks first, "
        "never deletes anything, and compares what the Hub holds afterwards. A push that was interrupted goes on when "
        "it is run again.",
    )
    command.add_argument("folder", metavar="FOLDER", help="a hub folder that passed `check`, unchanged since")
    command.add_argument("repo_id", metavar="REPO", help="where to: user/name")
    command.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    command.add_argument("--branch", default=MAIN, help="branch to commit to (default: %(default)s)")
    command.add_argument("--tag", help="new tag for the commit, such as v1")
    command.add_argument("--pull-request", action="store_true", help="open a pull request on main instead")
    command.add_argument("--message", default=MESSAGE, help="message of the commit (default: %(default)s)")
    command.add_argument("--dry-run", action="store_true", help="only show what would change")
    command.add_argument("--yes", action="store_true", help="do not ask")
    command.set_defaults(run=_push)


def _add_convert(commands) -> None:
    command = commands.add_parser(
        "convert",
        help="make a hub folder from a native checkpoint, in little memory",
        description="Converts a native checkpoint of the reference (config.yaml with model.pt, safetensors files or "
        "model_and_optim) or a Molmo2 checkpoint of the Hub to a hub folder, one shard at a time, and prints what "
        "became of every tensor.",
    )
    command.add_argument("out", metavar="OUT", help="the folder to make; it must not exist")
    command.add_argument("source", metavar="SOURCE", help="local folder with the checkpoint")
    command.add_argument(
        "--processor",
        metavar="FOLDER",
        help="local folder with tokenizer and processor files, such as a Molmo2 checkpoint of the same size; native "
        "checkpoints need it (default: SOURCE)",
    )
    _add_settings(command)
    command.add_argument(
        "--max-position-embeddings",
        type=int,
        metavar="N",
        help="longest prompt in tokens, for native checkpoints: 36864 for Molmo2-4B and 8B, 65536 for Molmo2-O-7B "
        "(default: that of their training)",
    )
    command.set_defaults(run=_convert)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hub_upload", description="Makes, checks and publishes hub folders of STTS models."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_build, _add_check, _add_push, _add_convert, _add_card):
        add(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """
    Runs one command.

    Args:
        argv (`list[str]`, *optional*): the arguments; those of the process if not given.

    Returns:
        `int`: 0, or 1 where the command failed for an expected reason, which stands in one line on stderr, or a check
        was not passed. Wrong usage raises `SystemExit` with code 2.
    """
    args = _parser().parse_args(argv)
    logging.set_verbosity_error()
    try:
        return args.run(args)
    except (OSError, ValueError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
