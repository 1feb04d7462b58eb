"""``dge-train``: train a model from a recipe."""

import argparse
from collections.abc import Sequence
from typing import Any

from dge_recipes.cli import command_parser, run_command
from dge_recipes.config import dump_config, launcher_path, list_configs, list_launchers, load_config
from dge_recipes.config.config_errors import list_keys
from dge_recipes.config.loading import first_comment
from dge_recipes.errors import UserError

__all__ = ["main"]

_DESCRIPTION = """\
Train a vision transformer, with or without a Dynamic Grained Encoder, from a recipe.

  dge-train --config digits                     a small model on scikit-learn's digits: minutes on a CPU
  dge-train --config digits train.epochs=2      the same with a key of the recipe changed
  dge-train --list                              the recipes that come with the package
  dge-train --keys                              every key that a recipe has, with its meaning

The run's folder (output.dir) gets config.yaml, metrics.jsonl, summary.json, tensorboard/ and checkpoints/.
"""

_EPILOG = """\
several processes:
  accelerate launch --config_file "$(dge-train --launcher cpu)" -m dge_recipes.train --config digits
  torchrun --nproc_per_node 2 -m dge_recipes.train --config digits
  dge-train --launchers                         the launcher configs that come with the package
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    options = _parser().parse_intermixed_args(arguments)
    return run_command("dge-train", lambda: _run(options), _again(options), whole=options.traceback)


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("dge-train", _DESCRIPTION, _EPILOG)
    parser.add_argument("--config", metavar="NAME_OR_FILE", help="a recipe's name, or a YAML file of your own")
    parser.add_argument("--output", metavar="DIR", help="the run's folder; the same as output.dir=DIR")
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="continue: in the output folder if there is a checkpoint, or from PATH",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what an earlier run left in the output folder"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build everything and train on two images, without writing; absent data are replaced by noise, and told",
    )
    show = parser.add_argument_group("show something and exit")
    show.add_argument("--list", action="store_true", help="the recipes that come with the package")
    show.add_argument("--keys", action="store_true", help="every key of a recipe: name, default, meaning")
    show.add_argument("--show", action="store_true", help="the recipe as it would run, overrides applied")
    show.add_argument("--launchers", action="store_true", help="the launcher configs that come with the package")
    show.add_argument("--launcher", metavar="NAME", help="the path of one launcher config")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="keys to change, for example optim.lr=1e-3"
    )
    return parser


def _run(options: argparse.Namespace) -> None:
    if _show(options):
        return
    if options.config is None:
        raise UserError("say which recipe: --config NAME_OR_FILE (dge-train --list shows the names)")
    config = load_config(options.config, _overrides(options))
    if options.show:
        print(dump_config(config), end="")
        return
    # Imported late: --help and --list answer at once.
    from dge_recipes.dry_run import dry_run
    from dge_recipes.engine.sharding import adopt_launcher
    from dge_recipes.train import train

    config = adopt_launcher(config)
    if options.dry_run:
        print(_tell(options.config, dry_run(config)))
        return
    train(config, resume=options.resume, overwrite=options.overwrite)


def _again(options: argparse.Namespace) -> str:
    """How to go on after what the machine did."""
    if options.dry_run:
        return "start the same command again"
    if options.resume in {None, "auto"}:
        return "continue with --resume auto"
    return "continue with --resume auto, or if nothing has been saved since with the same command and --overwrite"


def _tell(name: str, facts: dict[str, Any]) -> str:
    size = " x ".join(str(side) for side in facts["images"])
    return (
        f"{name}: {facts['parameters'] / 1e6:.2f} M parameters, images {size}, {facts['steps']} steps, "
        f"peak learning rate {facts['lr']:.3g}, loss of one batch {facts['loss']:.3f}"
    )


def _overrides(options: argparse.Namespace) -> list[str]:
    output = [] if options.output is None else [f"output.dir={options.output}"]
    return [*options.overrides, *output]


def _show(options: argparse.Namespace) -> bool:
    """Answer a question about the package; False if none was asked."""
    if options.launcher is not None:
        print(launcher_path(options.launcher))
    elif options.list or options.launchers:
        files = list_configs() if options.list else list_launchers()
        width = max(len(name) for name in files)
        for name, path in files.items():
            print(f"{name:<{width}}  {first_comment(path)}")
    elif options.keys:
        for key, default, meaning in list_keys():
            print(f"{key}  [{default}]\n    {meaning}")
    else:
        return False
    return True
