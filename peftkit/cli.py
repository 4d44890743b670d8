"""The command line: parses, calls one function, prints. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftkit import __version__, onednn, threads
from peftkit.backbones.quiet import hush_bitsandbytes
from peftkit.bench import verbs as harness
from peftkit.deploy import export_verbs as exports
from peftkit.deploy import harness_flags as lm_tasks
from peftkit.deploy import proof_verbs as proofs
from peftkit.deploy import use_verbs as uses
from peftkit.deploy import verbs as adapters
from peftkit.errors import DOES_NOT_FIT, InputError, PeftkitError, nearest
from peftkit.report import verbs as finished

if TYPE_CHECKING:
    from peftkit.recipe import Recipe
    from peftkit.record import Metric, RunRecord

DESCRIPTION = "Finetune pretrained transformers: know before you run, compare fairly, prove after you merge."


class Parser(argparse.ArgumentParser):
    """A parser that names the nearest verb or flag."""

    def error(self, message: str) -> Any:
        self.exit(2, f"peftkit: {message}. See `{self.prog} --help`.\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit code: 0 done, 1 ran and failed, 2 the input is wrong, 3 it does not fit."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    hush_bitsandbytes()
    given = list(sys.argv[1:] if arguments is None else arguments)
    verbs = tuple(VERBS)
    if given and not given[0].startswith("-") and given[0] not in verbs:
        print(f"peftkit: no verb {given[0]!r}{nearest(given[0], verbs)}. Verbs: {', '.join(verbs)}.", file=sys.stderr)
        return 2
    options = parse(given)
    if options.verb not in LIGHT:
        threads.settle()
        onednn.bound_caches()
    try:
        return int(VERBS[options.verb](options) or 0)
    except PeftkitError as fault:
        print(f"{type(fault).__name__}: {fault}", file=sys.stderr)
        return fault.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def parse(given: Sequence[str]) -> argparse.Namespace:
    """The verb with its flags; overrides may stand before and behind them."""
    parser = build_parser()
    options, rest = parser.parse_known_args(given)
    overrides = vars(options).get("overrides")
    strange = [word for word in rest if overrides is None or word.startswith("-") or "=" not in word]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if overrides is not None:
        overrides.extend(rest)
    return options


def build_parser() -> Parser:
    """The verbs and their flags."""
    parser = Parser(prog="peftkit", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"peftkit {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=Parser)

    def overridable(made: argparse.ArgumentParser) -> None:
        hint = "override any field, such as training.epochs=1 or method=qlora"
        made.add_argument("overrides", nargs="*", metavar="key=value", help=hint)

    def verb(name: str, summary: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=summary, description=summary)
        made.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
        return made

    train = verb("train", "train and evaluate a recipe")
    train.add_argument("recipe", type=Path)
    overridable(train)
    train.add_argument("--out", type=Path, help="folder of the run; default runs/LABEL-DIGEST")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    train.add_argument("--fit", action="store_true", help="change what has to change so that it fits, and say what")
    train.add_argument("--no-plan", action="store_true", help="train even where the plan says that it cannot fit")
    plan = verb("plan", "say what a run needs before it runs, and whether a card has it")
    plan.add_argument("recipe", type=Path)
    overridable(plan)
    plan.add_argument("--gpu", metavar="NAME or SIZE", help="such as 'RTX 3060' or 12GiB; default: this machine")
    question = plan.add_mutually_exclusive_group()
    question.add_argument("--fit", action="store_true", help="search for the fastest changes that fit")
    question.add_argument("--compare", action="store_true", help="a line for each method on this backbone and card")
    question.add_argument("--models", action="store_true", help="which sizes of backbone fit this card")
    trainer = "predict this trainer; peer: transformers and PEFT as they come (padded, full logits, cache on)"
    question.add_argument("--as", dest="trainer", choices=("peftkit", "peer"), default="peftkit", help=trainer)
    plan.add_argument("--plot", type=Path, metavar="PNG", help="draw the memory of a step")
    score = verb("eval", "score a run, a merged model or a plain backbone")
    score.add_argument("reference", help="a run's folder, a model folder, a hub id or a packaged backbone")
    score.add_argument("recipe", type=Path, nargs="?", help="whose task and data to use; default: the run's own")
    overridable(score)
    score.add_argument("--out", type=Path, help="where eval.json goes")
    lm_tasks.add_flags(score)
    generate = verb("generate", "write an answer to a prompt")
    generate.add_argument("reference", help="a run's folder, a model folder, a hub id or a packaged backbone")
    generate.add_argument("prompt")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token each time")
    generate.add_argument("--seed", type=int, default=0)
    proofs.add_flags(verb)
    adapters.add_flags(verb)
    exports.add_flags(verb)
    uses.add_flags(verb)
    overridable(harness.add_flags(verb))
    finished.add_flags(verb)
    data = verb("data", "show rendered examples, token by token, and what carries loss")
    data.add_argument("recipe", type=Path)
    overridable(data)
    data.add_argument("-n", type=int, default=3, help="how many examples")
    recipes = verb("recipes", "list, show or copy the presets")
    recipes.add_argument("action", choices=("list", "show", "copy"))
    recipes.add_argument("name", nargs="?")
    recipes.add_argument("--to", type=Path, default=Path(), help="folder to copy to")
    verb("doctor", "what this machine can do")
    return parser


def _train(options: argparse.Namespace) -> None:
    from peftkit.folder import finished_record
    from peftkit.recipe import load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    if options.fit:
        from peftkit.plan.answer import fitted

        recipe = fitted(recipe, say=_tell)
    out = options.out or Path("runs") / f"{recipe.label}-{recipe.digest[:8]}"
    record = finished_record(recipe, out)
    if record is None:
        record = _start(recipe, out, options)
    if options.json:
        print(json.dumps(record.model_dump(mode="json", exclude_none=True)))
    else:
        _print_run(record, out)


def _plan(options: argparse.Namespace) -> int:
    from peftkit.plan import door
    from peftkit.recipe import load_recipe

    alone = "peer" if options.trainer == "peer" else "plan"
    asked = next((name for name in ("fit", "compare", "models") if getattr(options, name)), alone)
    found = door.answer(asked, load_recipe(options.recipe, options.overrides), options.gpu)
    _print_answer(options, found.document, found.shown)
    if options.plot is not None:
        from peftkit.plan.answer import draw

        draw(found, options.plot)
    return 0 if found.fits else DOES_NOT_FIT


def _start(recipe: Recipe, out: Path, options: argparse.Namespace) -> RunRecord:
    """Train, watched by a bar on a terminal and by plain lines elsewhere."""
    from peftkit.run import train
    from peftkit.train.progress import BarObserver, PlainObserver

    flags = {"resume": options.resume, "planned": not options.no_plan}
    if sys.stderr.isatty() and not options.json:
        with BarObserver() as observer:
            return train(recipe, out, observer=observer, **flags)
    return train(recipe, out, observer=PlainObserver(), **flags)


def _tell(text: str) -> None:
    """A line about work under way: on standard error, so that the answer alone is on standard output."""
    print(text, file=sys.stderr, flush=True)


def _eval(options: argparse.Namespace) -> None:
    if lm_tasks.is_asked(options):
        metrics = lm_tasks.answer(options)
    else:
        from peftkit.recipe import load_recipe
        from peftkit.run import evaluate

        if options.recipe is not None and "=" in str(options.recipe):
            raise InputError("overrides need a recipe before them: peftkit eval RUN RECIPE key=value.")
        recipe = load_recipe(options.recipe, options.overrides) if options.recipe else None
        metrics = evaluate(options.reference, recipe, out=options.out)
    if options.json:
        print(json.dumps({name: metric.model_dump(exclude_none=True) for name, metric in metrics.items()}))
    else:
        _print_metrics(metrics)


def _generate(options: argparse.Namespace) -> None:
    from peftkit.deploy.generate import generate

    text = generate(
        options.reference,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
    )
    print(json.dumps({"prompt": options.prompt, "answer": text}) if options.json else text)


def _proofs(options: argparse.Namespace) -> int:
    answer = proofs.ANSWERS[options.verb](options, _tell)
    print(json.dumps(answer.document) if options.json else "\n".join(answer.lines))
    return answer.code


def _adapters(options: argparse.Namespace) -> None:
    _print_answer(options, *adapters.ANSWERS[options.verb](options, _tell))


def _export(options: argparse.Namespace) -> int:
    document, text, code = exports.answer_export(options, _tell)
    print(json.dumps(document) if options.json else text)
    return code


def _print_answer(options: argparse.Namespace, document: dict[str, Any], shown: Any) -> None:
    show: Any = print if options.json else _console().print
    show(json.dumps(document) if options.json else shown)


def _bench(options: argparse.Namespace) -> int:
    return harness.answer(options, _console, _tell)


def _finished(options: argparse.Namespace) -> int:
    document, shown, code = finished.ANSWERS[options.verb](options, _tell)
    if options.json:
        print(json.dumps(document))
    else:
        print(shown) if isinstance(shown, str) else _console().print(shown)
    return code


def _data(options: argparse.Namespace) -> None:
    from peftkit.data.preview import render_preview
    from peftkit.recipe import load_recipe
    from peftkit.run import preview_data

    previews = preview_data(load_recipe(options.recipe, options.overrides), count=options.n)
    if options.json:
        print(json.dumps(previews))
    else:
        _console().print(render_preview(previews), soft_wrap=True)


def _recipes(options: argparse.Namespace) -> None:
    from peftkit import presets

    if options.action == "list":
        found = presets.list_presets()
        if options.json:
            print(json.dumps([{"name": p.name, "description": p.description} for p in found]))
        else:
            width = max(len(preset.name) for preset in found)
            print("\n".join(f"{preset.name:<{width}}  {preset.description}" for preset in found))
        return
    if options.name is None:
        raise InputError(f"which recipe? peftkit recipes {options.action} NAME. See `peftkit recipes list`.")
    if options.action == "show":
        text = presets.show(options.name)
        print(json.dumps({"name": options.name, "text": text}) if options.json else text, end="")
        return
    path = presets.copy(options.name, options.to)
    print(json.dumps({"path": str(path)}) if options.json else f"copied to {path}")


def _doctor(options: argparse.Namespace) -> None:
    from peftkit.doctor import examine, render, to_document

    report = examine()
    _print_answer(options, to_document(report), render(report))


def _print_run(record: RunRecord, out: Path) -> None:
    from peftkit.units import format_bytes, format_seconds

    print(f"{record.label}  seed {record.seed}  {out}")
    if record.loss and record.loss.first is not None and record.loss.last is not None:
        text = f"loss       {record.loss.first:.4f} -> {record.loss.last:.4f}"
        validation = record.loss.validation
        print(text + (f", validation {validation:.4f}" if validation is not None else ""))
    _print_metrics(record.metrics or record.validation_metrics)
    if record.throughput and record.memory and record.memory.peak_bytes:
        memory = format_bytes(record.memory.peak_bytes - (record.memory.baseline_bytes or 0))
        print(
            f"training   {format_seconds(record.throughput.train_seconds)}, "
            f"{record.throughput.tokens_per_second:.0f} tokens/s, peak {memory} over the loaded model"
        )
    for kind, folder in record.artifacts.items():
        size = record.parameters.artifact_bytes if record.parameters else None
        print(f"{kind:<10} {out / folder}" + (f" ({format_bytes(size)})" if size else ""))


def _print_metrics(metrics: dict[str, Metric]) -> None:
    for name, metric in metrics.items():
        interval = (
            f"  [{metric.low:.4f}, {metric.high:.4f}]" if metric.low is not None and metric.high is not None else ""
        )
        chance = f"  chance {metric.chance:.4f}" if metric.chance is not None else ""
        print(f"{name:<15}{metric.value:.4f}{interval}  n={metric.n}{chance}")


def _console() -> Any:
    from rich.console import Console

    return Console()


VERBS = {
    "train": _train,
    "plan": _plan,
    "eval": _eval,
    "generate": _generate,
    **dict.fromkeys(proofs.ANSWERS, _proofs),
    **dict.fromkeys(adapters.ANSWERS, _adapters),
    "export": _export,
    **uses.VERBS,
    "bench": _bench,
    **dict.fromkeys(finished.ANSWERS, _finished),
    "data": _data,
    "recipes": _recipes,
    "doctor": _doctor,
}
LIGHT = frozenset({"report", "compare", "recipes"})
"""Verbs that compute nothing for which threads would wait."""

if __name__ == "__main__":
    sys.exit(main())
