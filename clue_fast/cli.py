"""The command ``clue-fast``: parses, calls the workflow, prints. Errors of the package end with exit code 2."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from clue_fast.errors import ClueFastError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from clue_fast.criteria.circuit import CircuitSettings
    from clue_fast.sparse import LayerRate

CIRCUIT_OPTION = "circuit_"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, or 2 with one line on stderr for a ClueFastError."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("clue_fast").setLevel(logging.WARNING if options.quiet else logging.INFO)
    try:
        options.run(options)
    except ClueFastError as error:
        print(f"clue-fast: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("clue-fast: interrupted; nothing half-written was left", file=sys.stderr)
        return 130
    return 0


def _demo(options: argparse.Namespace) -> None:
    from clue_fast.demo import run_demo

    print(run_demo(options.output, seed=options.seed, progress=not options.quiet))


def _localize(options: argparse.Namespace) -> None:
    from clue_fast.data import load_sets
    from clue_fast.files import check_output_file
    from clue_fast.localization import localize

    check_output_file(options.output)
    circuit = _circuit(options)
    sets = load_sets(options.forget, options.retain)
    model, tokenizer = _load(options.model, options)
    selection = localize(
        model,
        sets["forget"],
        sets["retain"],
        tokenizer=tokenizer,
        criterion=options.criterion,
        fraction=options.fraction,
        scope=options.scope,
        categories=options.categories,
        strict=options.strict,
        permutations=options.permutations,
        circuit=circuit,
        seed=options.seed,
        max_length=options.max_length,
        progress=not options.quiet,
    )
    selection.save(options.output)
    print(selection.summary())


def _unlearn(options: argparse.Namespace) -> None:
    from clue_fast.data import load_sets
    from clue_fast.files import check_output
    from clue_fast.selection import Selection
    from clue_fast.unlearning import unlearn

    check_output(options.output)
    circuit = _circuit(options)
    sets = load_sets(options.forget, options.retain, options.held_out)
    model, tokenizer = _load(options.model, options)
    reference = None if options.reference is None else _load(options.reference, options)[0]
    result = unlearn(
        model,
        tokenizer,
        forget=sets["forget"],
        retain=sets["retain"],
        held_out=sets.get("held_out"),
        reference=reference,
        output_dir=options.output,
        selection=Selection.load(options.selection, model) if options.selection else None,
        criterion=options.criterion,
        fraction=options.fraction,
        scope=options.scope,
        categories=options.categories,
        strict=options.strict,
        permutations=options.permutations,
        circuit=circuit,
        objective=options.objective,
        alternate=options.alternate,
        stages=options.stages,
        learning_rate=options.learning_rate,
        layer_lr=None if options.layer_lr is None else _layer_rate(options.layer_lr),
        master=options.master,
        epochs=options.epochs,
        batch_size=options.batch_size,
        retain_ratio=options.retain_ratio,
        forget_target=options.forget_target,
        samples=options.samples,
        relearn=options.relearn,
        seed=options.seed,
        max_length=options.max_length,
        progress=not options.quiet,
    )
    print(result.table())


def _evaluate(options: argparse.Namespace) -> None:
    from clue_fast.data import load_sets
    from clue_fast.files import check_output_file, save_json
    from clue_fast.reporting import evaluation_table
    from clue_fast.unlearning import evaluate_model

    if options.output is not None:
        check_output_file(options.output)
    sets = load_sets(options.forget, options.retain, options.held_out)
    model, tokenizer = _load(options.model, options)
    reference = None if options.reference is None else _load(options.reference, options)[0]
    evaluation = evaluate_model(
        model,
        tokenizer,
        forget=sets["forget"],
        retain=sets["retain"],
        held_out=sets.get("held_out"),
        reference=reference,
        samples=options.samples,
        relearn=options.relearn,
        seed=options.seed,
        max_length=options.max_length,
        progress=not options.quiet,
    )
    if options.output is not None:
        save_json(options.output, evaluation)
    print(evaluation_table(evaluation))


def _report(options: argparse.Namespace) -> None:
    from clue_fast.reporting import load_results, results_table

    print(results_table(load_results(options.folder)))


def _doctor(options: argparse.Namespace) -> None:
    from clue_fast.env import diagnosis

    print(diagnosis())


def _load(name: str, options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers.utils.logging import disable_progress_bar

    from clue_fast.unlearning import load_model

    if options.quiet:
        disable_progress_bar()  # type: ignore[no-untyped-call]
    return load_model(name, trust_remote_code=options.trust_remote_code)


def _circuit(options: argparse.Namespace) -> CircuitSettings | None:
    """The settings of circuits that were given, or None."""
    from clue_fast.criteria.circuit import CircuitSettings

    given = {
        name.removeprefix(CIRCUIT_OPTION): value
        for name, value in vars(options).items()
        if name.startswith(CIRCUIT_OPTION) and value is not None
    }
    return CircuitSettings(**given) if given else None


def _layer_rate(text: str) -> LayerRate:
    from clue_fast.errors import SettingError
    from clue_fast.sparse import LinearLayerRate

    kind, _, ratio = text.rpartition(":")
    try:
        if kind in ("", "linear"):
            return LinearLayerRate(float(ratio)) if kind else float(ratio)
    except ValueError:
        pass
    raise SettingError(f"layer-lr {text!r} is neither a number nor linear:NUMBER")


def _share_or_none(text: str) -> float | None:
    return None if text == "none" else float(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="clue-fast", description="Conflict-guided unlearning of language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train, localize, unlearn and evaluate on invented people, on this machine")
    demo.add_argument("--output", default="demo", metavar="DIR", help="folder for the results (default: demo)")
    demo.set_defaults(run=_demo)

    localize = commands.add_parser("localize", help="find the units where forget and retain data conflict")
    _add_model_and_data(localize)
    _add_localization(localize)
    localize.add_argument("--output", required=True, metavar="FILE", help="the selection, a safetensors file")
    localize.set_defaults(run=_localize)

    unlearn = commands.add_parser("unlearn", help="localize, train only the selected units, evaluate, save")
    _add_model_and_data(unlearn)
    _add_localization(unlearn)
    _add_evaluation(unlearn)
    unlearn.add_argument("--output", required=True, metavar="DIR", help="folder for checkpoint, results and plots")
    unlearn.add_argument("--selection", metavar="FILE", help="a selection made by localize, instead of a new one")
    unlearn.add_argument("--objective", help="loss to minimize (default: undial, strength 20, retain weight 10)")
    unlearn.add_argument("--learning-rate", type=float, metavar="LR", help="of the first layer (default: 1.2 / width)")
    unlearn.add_argument(
        "--layer-lr",
        metavar="RATIO",
        help="rate of the last layer over the first (0.2), geometric between; linear:RATIO in equal steps",
    )
    unlearn.add_argument("--master", default="fp32", help="keep small updates in fp32 copies, or round: stochastic")
    unlearn.add_argument("--alternate", metavar="FILE", help="other answers to the forget questions, for dpo, refusal")
    unlearn.add_argument(
        "--stages",
        help="clue: forget units for one epoch, then conflict units for five, and what was published with it",
    )
    unlearn.add_argument("--epochs", type=float, default=None, help="passes over the forget set (10, or 200 steps)")
    unlearn.add_argument("--batch-size", type=int, default=8, help="forget records a step (8)")
    unlearn.add_argument("--retain-ratio", type=int, help="retain records beside each forget record (4)")
    unlearn.add_argument(
        "--forget-target",
        type=_share_or_none,
        metavar="SHARE",
        help="shrink the update until just this share of one half of the forget questions is unanswered (none)",
    )
    unlearn.set_defaults(run=_unlearn)

    evaluate = commands.add_parser("evaluate", help="measure what a model still knows of forget and retain data")
    _add_model_and_data(evaluate)
    _add_evaluation(evaluate)
    evaluate.add_argument("--output", metavar="FILE", help="also write the figures as JSON")
    evaluate.set_defaults(run=_evaluate)

    report = commands.add_parser("report", help="print the table of an earlier run")
    report.add_argument("folder", metavar="DIR", help="output folder of unlearn or demo")
    report.set_defaults(run=_report)

    doctor = commands.add_parser("doctor", help="show what can run on this machine, and why not the rest")
    doctor.set_defaults(run=_doctor)

    for command in commands.choices.values():
        command.add_argument("--quiet", action="store_true", help="no progress bars, no log")
    for command in (demo, localize, unlearn, evaluate):
        command.add_argument("--seed", type=int, default=0, help="of everything that is random (0)")
    return parser


def _add_model_and_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face model: a folder, or a name on the hub")
    parser.add_argument("--forget", required=True, help="what must be forgotten: JSON lines, or hub name:subset")
    parser.add_argument("--retain", required=True, help="what must stay: JSON lines, or hub name:subset")
    parser.add_argument("--max-length", type=int, default=512, help="longer records are cut, in tokens (512)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def _add_localization(parser: argparse.ArgumentParser) -> None:
    from clue_fast.criteria import CRITERIA

    criteria = f"formula of the score: {', '.join(CRITERIA)} (default: difference)"
    parser.add_argument("--criterion", default="difference", help=criteria)
    parser.add_argument("--fraction", type=float, help="share of the units to select (default: 0.3)")
    parser.add_argument("--categories", action="store_true", help="tell forget, retain and conflict units apart")
    parser.add_argument("--strict", action="store_true", help="stop at a layer that is not known or cannot be fused")
    parser.add_argument(
        "--permutations",
        type=int,
        default=30,
        metavar="N",
        help="exchanges of labels that the selection is compared with, 0 for none (30)",
    )
    parser.add_argument("--scope", default="layer", help="rank within each layer, or global (default: layer)")
    circuits = parser.add_argument_group("circuits", "of the criterion circuit")
    circuits.add_argument("--circuit-edges", type=float, metavar="N", help="edges, a number or a share (0.05)")
    circuits.add_argument("--circuit-steps", type=int, metavar="N", help="runs that gradients are averaged over (0)")
    circuits.add_argument("--circuit-corruption", metavar="HOW", help="what is replaced in corrupted prompts (auto)")
    circuits.add_argument("--circuit-logic", metavar="LOGIC", help="published, or cut: decides more (published)")
    circuits.add_argument("--circuit-granularity", metavar="UNITS", help="neuron, or node: all of an MLP (neuron)")
    circuits.add_argument("--circuit-time-limit", type=float, metavar="S", help="of the solver, in seconds")
    circuits.add_argument("--circuit-tokens-per-batch", type=int, metavar="N", help="in one forward pass (512)")


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--held-out", metavar="FILE", help="records to keep that take no part in scoring or training")
    parser.add_argument("--reference", metavar="MODEL", help="a model that never saw the forget set, to compare with")
    parser.add_argument(
        "--samples", type=int, default=0, metavar="K", help="also sample K answers a forget question (0)"
    )
    parser.add_argument(
        "--relearn", type=int, default=0, metavar="N", help="also let a copy learn N forget records again (0)"
    )


if __name__ == "__main__":
    sys.exit(main())
