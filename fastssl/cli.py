"""The ``fastssl`` command."""

import argparse
import dataclasses
import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

DESCRIPTION = "Fused losses for self-supervised learning, and a small trainer that uses them."
COMMANDS = {
    "pretrain": "pretrain a backbone, evaluate it, draw a report",
    "evaluate": "evaluate the backbone of a run",
    "report": "draw the report of a run",
    "verify": "train with the plain PyTorch loss and with the fused ones, and compare step by step",
    "bench": "measure every loss on this machine beside others, or draw what was measured",
    "reproduce": "run an experiment of a few minutes and draw it; without a name, list them",
    "info": "versions, devices, and the backend that would run the losses here",
}
PRETRAIN = """
Start with `fastssl pretrain`: scikit-learn's digits, a small network, a few minutes on a laptop.
Ctrl-C saves the run and says how to continue it. Options may also stand in a YAML file (--config),
one `name: value` a line, the names below written with underscores; what the command line says goes
first.
"""


def _path(text: str) -> Path:
    """A path in which ~ is the user's folder: the shell leaves that of --out=~/run as it is."""
    return Path(os.path.expanduser(text))


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _Parser(prog="fastssl", description=DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help in COMMANDS.items():
        command = commands.add_parser(
            name, help=help, description=f"{help[0].upper()}{help[1:]}.", allow_abbrev=False
        )
        if name in ("evaluate", "report"):
            command.add_argument("run", metavar="RUN", type=_path, help="folder of the run")
            command.add_argument(
                "--data-dir",
                type=_path,
                metavar="DIR",
                help="where the images are now (default where the run found them)",
            )
            if name == "evaluate":
                command.add_argument(
                    "--labels",
                    nargs="+",
                    default=(),
                    metavar="N",
                    help="how many labelled images to fine-tune on, numbers or shares such as 1%% "
                    "(default 20 50 100 200)",
                )
    # Options whose help tells what there is to choose from: it is imported for its command alone.
    further = {
        "pretrain": _add_config_options,
        "verify": _add_verify_options,
        "bench": _add_bench_options,
        "reproduce": _add_reproduce_options,
    }
    try:
        for name in arguments[:1]:
            if name in further:
                further[name](commands.choices[name])
        found, unknown = parser.parse_known_args(arguments)
        options = vars(found)
        name = options.pop("command")
        if unknown:
            commands.choices[name].error(f"unrecognized arguments: {' '.join(unknown)}")
        status: int = globals()[f"_{name}"](**options)
        return status
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fastssl"):
            raise
        extra = "bench" if arguments[0] == "bench" else "train"
        reason = (
            f"{error.name} is not installed; fastssl's '{extra}' extra has it, in a checkout "
            f"pip install '.[{extra}]'"
        )
    except (ValueError, OSError, FloatingPointError) as error:
        from fastssl.trainer import guard

        reason = guard.reason(error)
    except KeyboardInterrupt:
        reason = "interrupted"
    print(f"fastssl: error: {reason}", file=sys.stderr)
    return 130 if reason == "interrupted" else 2


def _add_verify_options(parser: argparse.ArgumentParser) -> None:
    from fastssl.trainer.verify import REFERENCES

    parser.add_argument(
        "--method",
        default="simclr",
        metavar="NAME",
        help=f"{', '.join(REFERENCES)} (default simclr)",
    )
    parser.add_argument(
        "--steps", type=int, default=40, metavar="N", help="steps to compare (default 40)"
    )
    parser.add_argument(
        "--out",
        type=_path,
        default=Path("runs/verify"),
        metavar="DIR",
        help="folder for the plot (default runs/verify)",
    )


def _add_bench_options(parser: argparse.ArgumentParser) -> None:
    from fastssl.benchmarks.cases import LEVELS

    lists = (
        ("--losses", "the losses and primitives to measure"),
        ("--providers", "whose: fastssl, plain, compiled, or a library"),
    )
    for name, help in lists:
        parser.add_argument(name, metavar="NAME[,...]", help=f"{help} (default all)")
    parser.add_argument(
        "--sizes",
        choices=LEVELS,
        help="; ".join(f"{level}: {words}" for level, words in LEVELS.items()),
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="(default cuda where there is one)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of rows of features (default float32)",
    )
    parser.add_argument("--record", metavar="FILE", type=_path, help="JSON file to write")
    parser.add_argument(
        "--plot",
        nargs="+",
        metavar="FILE",
        type=_path,
        help="draw these recorded files beside them instead, and print how cost grows with size",
    )


def _add_reproduce_options(parser: argparse.ArgumentParser) -> None:
    from fastssl.trainer.experiments import EXPERIMENTS

    choices = "; ".join(
        f"{', '.join(experiment.methods)} with {name}"
        for name, experiment in EXPERIMENTS.items()
        if experiment.methods
    )
    # What is left out here has the default that the experiment gives it.
    parser.add_argument("name", metavar="NAME", nargs="?", help=", ".join(EXPERIMENTS))
    for name, kind, metavar, help in (
        ("dataset", str, "NAME", "on which data set (default digits)"),
        ("data-dir", _path, "DIR", "where data sets are kept (default data)"),
        ("method", str, "NAME", f"with which method, where there is a choice: {choices}"),
        ("labels", int, "N", "labelled images, of few-labels (default 200)"),
        ("epochs", int, "N", "passes over the images (default by experiment and data set)"),
        ("seeds", int, "N", "how often everything is trained (default 3)"),
        ("out", _path, "DIR", "folder of the experiment (default runs/NAME-DATASET)"),
    ):
        parser.add_argument(
            f"--{name}", type=kind, metavar=metavar, default=argparse.SUPPRESS, help=help
        )


def _add_config_options(parser: argparse.ArgumentParser) -> None:
    from fastssl.trainer.config import Config, presets

    parser.description = f"{parser.description} {PRETRAIN}"
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=_path,
        help=f"YAML file of options, or a preset: {', '.join(presets())}",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out with its own options, or start it if there is none",
    )
    hints = typing.get_type_hints(Config)
    for option in dataclasses.fields(Config):
        kind = (typing.get_args(hints[option.name]) or (hints[option.name],))[0]
        help = option.metadata["help"]
        if option.metadata["choices"]:
            help += f": {', '.join(option.metadata['choices'])}"
        if option.default is not None and kind is not bool:
            help += f" (default {option.default})"
        word = "DIR" if option.name in ("data_dir", "out") else "NAME"
        value: dict[str, Any] = {"type": kind, "metavar": {int: "N", float: "X"}.get(kind, word)}
        if kind is bool:
            value = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(
            "--" + option.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            help=help.replace("%", "%%"),
            **value,
        )


def _pretrain(config: Path | None, resume: bool, **given: Any) -> int:
    from fastssl.trainer import checkpoint, evaluate, loop, parallel
    from fastssl.trainer.config import Config, read_options

    options = {**(read_options(config) if config else {}), **given}
    if resume:
        out = _path(str(options.get("out") or Config.from_dict(options).resolved().out))
        started, saved = {}, checkpoint.latest(out)
        if (out / "config.yaml").exists():
            started = read_options(out / "config.yaml")
        elif saved:
            started = checkpoint.load(saved).get("config", {})
        if started:  # an option of one method or data set alone says nothing of another
            loop.check_same(options, started, ("method", "dataset"), out)
            options = {**started, **options, "out": str(out)}
    run = loop.pretrain(Config.from_dict(options), resume=resume)
    if not run.complete:
        return 130
    if parallel.rank():  # of several processes the lead goes on
        return 0
    page = run.path / "report.html"
    try:
        learned = evaluate.read_results(run.path)
        if learned is None:
            learned = evaluate.evaluate_run(run.path, data=run.data)
            page.unlink(missing_ok=True)
        _print_learned(learned)
        if not page.exists():
            from fastssl.trainer import report

            report.write_report(run.path, data=run.data)
    except KeyboardInterrupt:
        print("stopped after pretraining; continue with:")
        print(f"  {checkpoint.resume_command(run.path)}")
        return 130
    print(f"report: {page}")
    return 0


def _evaluate(run: Path, data_dir: Path | None, labels: Sequence[str]) -> int:
    from fastssl.trainer import evaluate

    _print_learned(evaluate.evaluate_run(run, labels=labels, data_dir=data_dir))
    return 0


def _print_learned(results: dict[str, Any]) -> None:
    """Print what ``evaluate_run`` found as a small table."""
    if "skipped" in results:
        print(f"evaluation skipped: {results['skipped']}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="accuracy on the test split", title_justify="left")
    table.add_column("")
    columns = {"pretrained": "pretrained", "random": "without pretraining"}
    if "weights" in results["knn"]:
        columns["weights"] = "as it began"
    for column in columns.values():
        table.add_column(column, justify="right")
    rows = [
        ("nearest neighbours, frozen features", results["knn"]),
        ("linear probe, frozen features", results["linear"]),
        *((f"linear probe after {stage['name']}", stage) for stage in results["stages"][:-1]),
    ]
    for words, row in rows:
        table.add_row(words, *(f"{row[arm]:.1%}" for arm in columns))
    for row in results["few_labels"]:
        arms = (row["fine_tuned"], row["from_scratch"])
        cells = (f"{arm['mean']:.1%} ± {100 * arm['std']:.1f}" for arm in arms)
        table.add_row(f"trained on {row['labels']} labels", *cells)
    Console().print(table)


def _report(run: Path, data_dir: Path | None) -> int:
    from fastssl.trainer import report

    print(f"report: {report.write_report(run, data_dir=data_dir)}")
    return 0


def _verify(method: str, steps: int, out: Path) -> int:
    from fastssl.trainer import verify

    return 0 if verify.verify(method, steps=steps, out=out) else 1


def _bench(plot: Sequence[Path] | None, record: Path | None, **options: str | None) -> int:
    if plot:
        from fastssl.benchmarks.plot import draw_files

        draw_files(plot)
        return 0
    import pytest
    import pytest_benchmark  # noqa: F401 # named at once where it is missing

    from fastssl.benchmarks import cases, measure

    cases.choose(options["losses"], options["providers"])
    measure.device_for(options["device"])
    given = {**options, "record": record and str(record.with_suffix(".json").absolute())}
    folder = Path(cases.__file__).resolve().parent
    # Nothing of a project that this command happens to run in: its options, plugins or caches.
    own = ["-c", os.devnull, f"--rootdir={folder}", f"--confcutdir={folder}", "-pno:cacheprovider"]
    quiet = ["-q", "--no-header", "--disable-warnings"]
    chosen = [f"--{name}={value}" for name, value in given.items() if value]
    status = pytest.main([str(folder), "--import-mode=importlib", *own, *quiet, *chosen])
    return 130 if status == pytest.ExitCode.INTERRUPTED else int(status)


def _reproduce(name: str | None, **given: Any) -> int:
    from fastssl.trainer.experiments import EXPERIMENTS
    from fastssl.trainer.reproduce import reproduce

    if name is None:
        for known, experiment in EXPERIMENTS.items():
            print(f"{known:18}{experiment.line} (about {experiment.takes})")
        return 0
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment must be one of {', '.join(EXPERIMENTS)}, got {name!r}")
    return 0 if reproduce(EXPERIMENTS[name], **given) else 130


def _info() -> int:
    from fastssl.ops import backend
    from fastssl.trainer.environment import environment

    for title, lines in (("", environment()), ("backend 'auto' takes", backend.describe())):
        if title:
            print(f"\n{title}")
        for name, value in lines.items():
            print(f"{name:14}{value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
