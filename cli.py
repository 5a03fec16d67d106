"""The command line: parse, call one function, print one renderable. The only place with a Console and exit codes."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from rich.console import Console

from shardwright.errors import ShardwrightError

if TYPE_CHECKING:
    from shardwright.profiler.capture import Progress
    from shardwright.profiler.formats.costs import Costs
    from shardwright.profiler.profile import Profile
    from shardwright.sharder.planning.plan import Objective, Plan
    from shardwright.sharder.planning.problem import Recompute, Transfers, Wanted

app = typer.Typer(
    name="shardwright",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Profile a PyTorch model on your devices, split it by proof instead of by guess, and run the split.",
)
out = Console()
err = Console(stderr=True)

TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="TARGET", help="The model: file.py:Name or package.module:Name (a class, factory or instance)."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Keyword argument of the class or factory; repeatable."),
]
InputsOption = Annotated[
    str | None, typer.Option("--inputs", metavar="FILE:FUNCTION", help="Function that returns args, or (args, kwargs).")
]
InputOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input", metavar="SHAPE", help="An input spelled out: 8x3x224x224, ids=int64[0,32000]:4x512; repeatable."
    ),
]
DevicesOption = Annotated[
    str | None,
    typer.Option(
        "--devices",
        metavar="LIST",
        help="cuda:0,cuda:1 or CPU workers cpu:0,cpu:1; default all GPUs, else two CPU workers.",
    ),
]
CsvOption = Annotated[
    Path | None, typer.Option("--csv", metavar="FILE", help="Also write the measurements as a table.")
]
ParquetOption = Annotated[
    Path | None, typer.Option("--parquet", metavar="FILE", help="Likewise, as Parquet; needs pyarrow.")
]
GraphmlOption = Annotated[
    Path | None,
    typer.Option(
        "--graphml",
        metavar="FILE",
        help="Also write the cost graph at the largest number of micro-batches.",
    ),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from shardwright import __version__

        out.print(f"shardwright {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors. May stand anywhere.")] = False,
) -> None:
    """Hold the options that come before a command."""


@app.command()
def profile(
    target: TargetArgument,
    devices: DevicesOption = None,
    cluster: Annotated[
        Path | None,
        typer.Option(
            "--cluster", metavar="FILE", help="Devices and links declared in a file; what is not here is estimated."
        ),
    ] = None,
    out_path: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Where to write the profile; default NAME.profile.json."),
    ] = None,
    inference: Annotated[bool, typer.Option("--inference", help="Measure the forward only.")] = False,
    optimizer: Annotated[
        str, typer.Option("--optimizer", help="From torch.optim, such as adamw or sgd(momentum=0.9), or package.Class.")
    ] = "adam",
    master_weights: Annotated[
        bool, typer.Option("--master-weights", help="Count fp32 copies of parameters of lower precision.")
    ] = False,
    microbatches: Annotated[
        str | None,
        typer.Option("--microbatches", metavar="LIST", help="Numbers of micro-batches to measure; default 1,2,4,8."),
    ] = None,
    depth: Annotated[
        int | None, typer.Option("--depth", min=1, help="Units are the modules so deep in the model; 1 = its children.")
    ] = None,
    units: Annotated[
        list[str] | None,
        typer.Option("--unit", metavar="PATTERN", help="Modules that are units whatever they hold; repeatable."),
    ] = None,
    split_backward: Annotated[
        bool,
        typer.Option("--split-backward", help="Time each backward in two parts too, for --schedule zero-bubble."),
    ] = False,
    precision: Annotated[
        float,
        typer.Option("--precision", metavar="PART", min=0, help="How well each median is to be known; 0.02 = 2%."),
    ] = 0.02,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="How often each unit is timed, at most.")] = 31,
    budget: Annotated[
        float, typer.Option("--budget", metavar="SECONDS", help="For the timing, six rounds apart.")
    ] = 45,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Measure again what earlier profiles have measured.")
    ] = False,
    csv: CsvOption = None,
    parquet: ParquetOption = None,
    graphml: GraphmlOption = None,
    settings: SetOption = None,
    inputs: InputsOption = None,
    input_specs: InputOption = None,
) -> None:
    """Time and weigh every unit of a model on every device."""
    counts = _numbers(microbatches) if microbatches is not None else None
    path = _checked_folder(_out_path(out_path, target, "profile"))
    _check_exports(csv, parquet, graphml)
    known = (0, 0)
    with _progress() as tell:

        def progress(what: str, done: int, whole: int) -> None:
            nonlocal known
            known = (done, whole) if what == "known" else known
            tell(what, done, whole)

        progress("load the model", 0, 1)
        from shardwright.profiler.collect import profile as collect
        from shardwright.profiler.target import load_target

        model, (args, kwargs) = load_target(
            target, settings=_settings(settings), inputs=inputs, input_specs=input_specs or ()
        )
        progress("load the model", 1, 1)
        made = collect(
            model,
            args,
            kwargs,
            devices=_names(devices),
            cluster=cluster,
            train=not inference,
            optimizer=optimizer,
            master_weights=master_weights,
            microbatches=counts,
            depth=depth,
            units=units or (),
            split_backward=split_backward,
            precision=precision,
            rounds=rounds,
            budget_s=budget,
            refresh=refresh,
            name=target,
            progress=progress,
        )
    made.save(path)
    from shardwright.reports.profile_report import ProfileReport

    out.print(ProfileReport(made))
    if known[0]:
        out.print(
            f"\n{known[0]} of {known[1]} pieces of work were measured by an earlier profile; --refresh measures anew.",
            highlight=False,
        )
    out.print(f"\nWrote {path}. Next: shard {target} --profile {path}", highlight=False, soft_wrap=True)
    _export(made, csv, parquet, graphml)


@app.command()
def shard(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="TARGET",
            show_default=False,
            help="The model: file.py:Name or package.module:Name. Planning alone needs none: --profile FILE is enough.",
        ),
    ] = None,
    profile_paths: Annotated[
        list[Path] | None,
        typer.Option(
            "--profile",
            metavar="FILE",
            help="The profile, or costs written by hand, of several numbers of micro-batches if given again; default "
            "NAME.profile.json.",
        ),
    ] = None,
    out_path: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where to write the plan; default NAME.plan.json.")
    ] = None,
    run: Annotated[
        bool, typer.Option("--run", help="Run the plan as a pipeline; time it against one device and naive splits.")
    ] = False,
    devices: DevicesOption = None,
    microbatches: Annotated[
        str, typer.Option("--microbatches", metavar="N", help="One of the profiled numbers, or auto.")
    ] = "auto",
    memory: Annotated[
        list[str] | None, typer.Option("--memory", metavar="DEVICE=SIZE", help="Cap, such as cuda:0=10GiB; repeatable.")
    ] = None,
    pins: Annotated[
        list[str] | None,
        typer.Option("--pin", metavar="UNIT=DEVICE", help="Keep a unit, module or pattern on a device; repeatable."),
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            "--objective",
            help="throughput (of a pipeline), latency (of one input, branches side by side), or memory (least full).",
        ),
    ] = "throughput",
    free: Annotated[
        bool, typer.Option("--free", help="Put each unit on any device: no chain of stages, which --run needs.")
    ] = False,
    schedule: Annotated[
        str,
        typer.Option(
            "--schedule",
            help="1f1b, gpipe, interleaved (several stages a device), zero-bubble (backward in parts), or auto.",
        ),
    ] = "1f1b",
    stages_per_device: Annotated[
        int | None,
        typer.Option("--stages-per-device", metavar="N", min=1, help="If interleaved: so many; default 2."),
    ] = None,
    replicas: Annotated[
        str,
        typer.Option(
            "--replicas",
            metavar="N",
            help="So many equal pipelines, each with a part of the micro-batches; or auto.",
        ),
    ] = "1",
    transfers: Annotated[
        str,
        typer.Option(
            "--transfers", help="relayed (neighbour to neighbour, as --run does), staged (through the host), or direct."
        ),
    ] = "relayed",
    overlap: Annotated[bool, typer.Option("--overlap", help="Take transfers to go on beside compute.")] = False,
    together: Annotated[
        list[str] | None,
        typer.Option(
            "--together",
            metavar="UNITS",
            help="Units, modules or patterns, by comma, that share a device; repeatable.",
        ),
    ] = None,
    offload: Annotated[
        bool, typer.Option(help="In inference, leave weights that fit on no device on the host, as a last resort.")
    ] = True,
    recompute: Annotated[
        str,
        typer.Option(
            "--recompute",
            help="In training, compute stages anew in the backward: auto (only what does not fit else), never, always.",
        ),
    ] = "auto",
    time_limit: Annotated[
        float,
        typer.Option(
            "--time-limit", metavar="SECONDS", min=0, help="For the search of the plan, which Ctrl-C ends, too."
        ),
    ] = 30.0,
    replans: Annotated[
        int,
        typer.Option("--replans", min=0, max=101, help="Plan anew so often with costs drawn within their uncertainty."),
    ] = 0,
    steps: Annotated[int, typer.Option("--steps", min=1, help="With --run: how many steps of each are timed.")] = 11,
    naive: Annotated[
        bool,
        typer.Option(help="With --run: also time the splits by count and by parameters, for a minute at most."),
    ] = True,
    run_out: Annotated[
        Path | None, typer.Option("--run-out", metavar="FILE", help="With --run: where to write what was measured.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            help="Write the predicted timeline, and with --run the measured beside it, for ui.perfetto.dev.",
        ),
    ] = None,
    settings: SetOption = None,
    inputs: InputsOption = None,
    input_specs: InputOption = None,
) -> None:
    """Split a profiled model over its devices, and with --run, run the split."""
    from shardwright.reports.plan_report import PlanReport
    from shardwright.sharder.planning.planner import plan as make_plan

    sources = _profile_paths(profile_paths, target)
    source = sources[0]
    path = _checked_folder(_out_path(out_path, target, "plan") if target else out_path or _plan_path(source))
    for written in filter(None, (run_out, trace)):
        _checked_folder(written)
    run = run or run_out is not None
    made, *others = map(_load_profile, sources)
    if target is not None:
        _check_same_model(target, made.model, source)
    if run and (target is None or not made.of_model):
        what = "--run needs the model" if made.of_model else f"{source} holds costs, with no model that --run could run"
        raise ShardwrightError(f"{what}: give TARGET and its profile, or leave --run out")
    counts = [] if microbatches == "auto" else _numbers(microbatches, "a positive whole number, or auto")
    if len(counts) > 1:
        raise ShardwrightError(
            f"--microbatches {microbatches}: a plan has one number; give one, or auto to compare them"
        )
    count: int | Literal["auto"] = counts[0] if counts else "auto"
    _check_schedule(free=free, latency=objective == "latency", run=run, trace=trace)
    plan = make_plan(
        cast("list[Costs]", [made, *others]) if others else made,
        objective=cast("Objective", objective),
        contiguous=not free,
        microbatches=count,
        memory=_pairs(memory, "--memory", "cuda:0=10GiB"),
        pins=_pairs(pins, "--pin", "head=cuda:1"),
        devices=_names(devices),
        schedule=cast("Wanted", schedule),
        stages_per_device=stages_per_device,
        replicas=_replicas(replicas),
        transfers=cast("Transfers", transfers),
        overlap=overlap,
        together=[_names(group) or [] for group in together or ()],
        offload=offload,
        recompute=cast("Recompute", recompute),
        time_limit_s=time_limit,
        replans=replans,
    )
    if target is not None and (settings or inputs or input_specs) and not run:
        _check_is_planned(target, plan, settings, inputs, input_specs)
    plan.save(path)
    out.print(PlanReport(plan))
    if replans and plan.sensitivity is None:
        out.print(f"\nNot planned anew: {source} does not say how sure its times are.", highlight=False, soft_wrap=True)
    out.print(f"\nWrote {path}.", highlight=False, soft_wrap=True)
    if not run:
        _write_plan_trace(plan, trace)
        return
    if plan.devices == (plan.predicted.baseline_device,) and plan.microbatches == plan.predicted.baseline_microbatches:
        out.print("Nothing to run: the plan is the model on one device, as it is.")
        _write_plan_trace(plan, trace)
        return
    with _progress() as progress:
        progress("load the model", 0, 1)
        from shardwright.profiler.target import load_target
        from shardwright.sharder.runtime.run import run as run_plan

        model, (args, kwargs) = load_target(
            str(target), settings=_settings(settings), inputs=inputs, input_specs=input_specs or ()
        )
        progress("load the model", 1, 1)
        measured = run_plan(model, plan, args, kwargs, steps=steps, naive=naive, progress=progress)
    if run_out is not None:
        measured.save(run_out)
    if trace is not None:
        measured.save_trace(trace)
    from shardwright.reports.run_report import RunReport

    out.print()
    out.print(RunReport(measured))
    if trace is not None:
        _tell_of_trace(trace)


@app.command()
def verify(
    target: TargetArgument,
    plan_path: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="The plan; default NAME.plan.json.")
    ] = None,
    settings: SetOption = None,
    inputs: InputsOption = None,
    input_specs: InputOption = None,
) -> None:
    """Replay a placed model on simulated devices: no GPU needed to find a missing transfer."""
    from shardwright.sharder.planning.plan import Plan

    source = plan_path or _out_path(None, target, "plan")
    plan = Plan.load(source)
    _check_same_model(target, plan.model, source)
    from shardwright.profiler.target import load_target
    from shardwright.sharder.runtime.verify import verify as replay

    model, (args, kwargs) = load_target(
        target, settings=_settings(settings), inputs=inputs, input_specs=input_specs or ()
    )
    check = replay(model, plan, args, kwargs)
    out.print(str(check), highlight=False, soft_wrap=True)
    if not check.ok:
        raise typer.Exit(1)


@app.command()
def report(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A profile, costs, a plan or a run.")],
    csv: CsvOption = None,
    parquet: ParquetOption = None,
    graphml: GraphmlOption = None,
    microbatches: Annotated[
        int | None, typer.Option("--microbatches", metavar="N", help="With --graphml: another of the profiled numbers.")
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Of a plan or a run: its timelines, for ui.perfetto.dev."),
    ] = None,
) -> None:
    """Show a saved profile, plan or run again, or export a profile."""
    from shardwright.sharder.planning.plan import Plan
    from shardwright.sharder.runtime.record import Run

    _check_exports(csv, parquet, graphml)
    if microbatches is not None and graphml is None:
        raise ShardwrightError(f"--microbatches {microbatches} is for the graph: give --graphml FILE too")
    kind = _format_of(path)
    if trace is not None:
        _checked_folder(trace)
        if kind not in (Plan.kind, Run.kind):
            raise ShardwrightError(f"{path} is neither a plan nor a run; --trace is for one: give what `shard` wrote")
    if kind in (Plan.kind, Run.kind) and (csv or parquet or graphml):
        raise ShardwrightError(
            f"{path} is a {kind.rpartition('.')[2]}; --csv, --parquet and --graphml are for a profile"
        )
    if kind == Plan.kind:
        from shardwright.reports.plan_report import PlanReport

        plan = Plan.load(path)
        if trace is not None:
            plan.save_trace(trace)
        out.print(PlanReport(plan))
        if trace is not None:
            _tell_of_trace(trace)
    elif kind == Run.kind:
        from shardwright.reports.run_report import RunReport

        saved = Run.load(path)
        out.print(RunReport(saved))
        if trace is not None:
            saved.save_trace(trace)
            _tell_of_trace(trace)
    else:
        from shardwright.reports.profile_report import ProfileReport

        made = _as_profile(_load_profile(path))
        if microbatches is not None and microbatches not in made.microbatches:
            known = ", ".join(map(str, made.microbatches))
            raise ShardwrightError(f"--microbatches {microbatches}: {path} has {known}; give one of them")
        out.print(ProfileReport(made))
        _export(made, csv, parquet, graphml, microbatches)


@app.command()
def schema(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="costs, profile, plan or run.")],
) -> None:
    """Print the JSON schema of a file."""
    from shardwright.profiler.formats.costs import Costs
    from shardwright.profiler.profile import Profile
    from shardwright.sharder.planning.plan import Plan
    from shardwright.sharder.runtime.record import Run

    documents = {document.kind.rpartition(".")[2]: document for document in (Costs, Profile, Plan, Run)}
    if kind not in documents:
        raise ShardwrightError(f"{kind!r} is not a kind of file; the kinds are {', '.join(documents)}")
    out.print(json.dumps(documents[kind].model_json_schema(), indent=2), highlight=False, soft_wrap=True, markup=False)


def _format_of(path: Path) -> str:
    """The ``format`` field of a JSON file; the empty string when it has none, for the loader to explain.

    Our own files have it in front, and need not be read twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if first := re.match(r'\s*{\s*"format"\s*:\s*"([\w.]+)"', text):
            return first[1]
        content = json.loads(text)
    except (OSError, ValueError):
        return ""
    return str(content.get("format", "")) if isinstance(content, dict) else ""


def _load_profile(path: Path) -> Profile | Costs:
    """A saved profile, or costs."""
    from shardwright.profiler.profile import Profile

    found = _format_of(path)
    if found != Profile.kind:
        from shardwright.profiler.formats.costs import Costs

        if found == Costs.kind:
            return Costs.load(path)
        if path.is_file():
            what = f"its format is {found!r}" if found else "it is no JSON with a format field"
            raise ShardwrightError(
                f"{path} is neither a profile nor costs: {what}; give what `profile` wrote, or costs whose format is "
                f"{Costs.kind!r}"
            )
    return Profile.load(path)


def _as_profile(made: Profile | Costs) -> Profile:
    """Costs as a profile, with a record of every time."""
    from shardwright.profiler.profile import Profile

    return made if isinstance(made, Profile) else made.profile()


def _profile_paths(given: list[Path] | None, target: str | None) -> list[Path]:
    """The profile to plan from, or costs of several numbers of micro-batches; they have to be there."""
    if not given and target is None:
        raise ShardwrightError("nothing to plan: give TARGET, or --profile FILE with a profile or costs")
    sources = given or [_out_path(None, str(target), "profile")]
    for source in sources:
        if not source.exists():
            remedy = f"make it with `profile {target} --out {source}`" if target else "give a profile or costs"
            raise ShardwrightError(f"there is no {source}: {remedy}")
    return sources


def _plan_path(source: Path) -> Path:
    """Where the plan of a profile or costs goes when no target names it: ``costs.plan.json`` in this folder."""
    return Path(f"{source.name.removesuffix('.json').removesuffix('.profile')}.plan.json")


def _check_exports(csv: Path | None, parquet: Path | None, graphml: Path | None) -> None:
    """Refuse what cannot be written later."""
    for path in filter(None, (csv, parquet, graphml)):
        _checked_folder(path)
    if parquet is not None:
        from shardwright.profiler.formats.export import check_parquet

        check_parquet()


def _export(
    made: Profile, csv: Path | None, parquet: Path | None, graphml: Path | None, microbatches: int | None = None
) -> None:
    """Write the profile for other tools, and say where."""
    from shardwright.profiler.formats.export import write_csv, write_graphml, write_parquet

    if csv is not None:
        write_csv(made, csv)
    if parquet is not None:
        write_parquet(made, parquet)
    if graphml is not None:
        write_graphml(made, graphml, microbatches)
    if written := [str(path) for path in (csv, parquet, graphml) if path is not None]:
        out.print(f"Wrote {', '.join(written)}.", highlight=False, soft_wrap=True)


def _check_schedule(*, free: bool, latency: bool, run: bool, trace: Path | None) -> None:
    """Refuse what a plan that is no pipeline could not give later."""
    if run and (free or latency):
        raise ShardwrightError(
            "--run needs a chain of stages, which --free and --objective latency do not make: leave it out, and place "
            "the plan with sw.place"
        )
    if trace is not None and free and not latency:
        raise ShardwrightError(
            "--trace is of a timeline, which a free assignment does not have: leave --free out, or ask for "
            "--objective latency"
        )


def _write_plan_trace(plan: Plan, trace: Path | None) -> None:
    """Where it is asked for; the planner may have found that one device is better, which is no mistake."""
    if trace is None:
        return
    from shardwright.sharder.planning.chrome import no_timeline

    if why := no_timeline(plan):
        out.print(f"Wrote no {trace}: {why}.", highlight=False, soft_wrap=True)
        return
    plan.save_trace(trace)
    _tell_of_trace(trace)


def _tell_of_trace(path: Path) -> None:
    out.print(f"\nWrote {path}: open it at https://ui.perfetto.dev.", highlight=False, soft_wrap=True)


def _out_path(given: Path | None, target: str, kind: str) -> Path:
    """``given``, or the target's name in lower case: ``netdict.plan.json``."""
    return given or Path(f"{target.rpartition(':')[2].lower()}.{kind}.json")


def _checked_folder(path: Path) -> Path:
    """``path``, if a file can be written there: better said before the work than after it."""
    if path.is_dir():
        raise ShardwrightError(f"cannot write {path}: it is a folder; choose a file in it")
    if not os.access(path.parent, os.W_OK):
        raise ShardwrightError(f"cannot write {path}; choose a file in a folder that exists and is writable")
    return path


def _check_same_model(target: str, model: str, source: Path) -> None:
    """Refuse a file whose model has another name than the target; shapes are compared when the model is loaded."""
    names = [name.rpartition(":")[2] for name in (target, model)]
    if names[0] != names[1]:
        raise ShardwrightError(f"{source} is of {model}, not of {target}: give the file that was made for {names[0]}")


def _check_is_planned(
    target: str, plan: Plan, settings: list[str] | None, inputs: str | None, input_specs: list[str] | None
) -> None:
    """Refuse a plan of another model than these options make, or of other inputs; a run looks by itself."""
    from shardwright.profiler.target import load_target
    from shardwright.sharder.runtime.check import check_inputs, check_model

    model, (args, kwargs) = load_target(
        target, settings=_settings(settings), inputs=inputs, input_specs=input_specs or ()
    )
    check_model(plan, model)
    check_inputs(plan, args, kwargs)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str, wanted: str = "a list of positive whole numbers, such as 1,2,4,8") -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ShardwrightError(f"--microbatches {text!r} is not {wanted}")
    return [int(part) for part in parts]


def _replicas(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise ShardwrightError(f"--replicas {text!r} is neither a positive whole number nor auto")
    return int(text)


def _pairs(texts: list[str] | None, option: str, example: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise ShardwrightError(f"{option} {text!r} is not KEY=VALUE; write for example {option} {example}")
        if pairs.get(key, value) != value:
            raise ShardwrightError(f"{option} gives {key} both {pairs[key]} and {value}; keep one of them")
        pairs[key] = value
    return pairs


def _settings(texts: list[str] | None) -> dict[str, Any]:
    """Keyword arguments; a value is JSON where it can be read so, else text."""
    settings: dict[str, Any] = {}
    for key, value in _pairs(texts, "--set", "layers=12").items():
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return settings


@contextmanager
def _progress() -> Iterator[Progress]:
    """A progress bar on the terminal's error stream: what is being done, and how much of it."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Drawn seldom: on a machine whose every core is a device, the bar itself would show in the measurement.
    with Bar(*columns, console=err, transient=True, refresh_per_second=2, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def tell(what: str, done: int, whole: int) -> None:
            bar.update(task, description=what, completed=done, total=whole)

        try:
            yield tell
        except KeyboardInterrupt:
            bar.stop()
            err.print("interrupted; nothing was written; finished measurements are kept for next time", soft_wrap=True)
            raise typer.Exit(130) from None


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a user's mistake is one line on the error stream and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = app(arguments, standalone_mode=False)
    except ShardwrightError as error:
        if debug:
            err.print_exception()
            if detail := getattr(error, "detail", ""):
                err.print(detail, highlight=False, markup=False, soft_wrap=True)
        _say(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(130)
    except Exception as error:
        _refuse_usage(error)
        raise
    if code:
        sys.exit(code)


def _refuse_usage(error: Any) -> None:
    """Say in one line what is wrong with the words of a command, if that is what ``error`` is about.

    Their class is click's or one of typer's own, as its release has it.
    """
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        sys.exit(2)
    if not hasattr(error, "format_message"):
        return
    command = error.ctx.command_path if getattr(error, "ctx", None) else "shardwright"
    _say(f"{error.format_message().rstrip('.')}; see {command} --help")
    sys.exit(2)


def _say(error: str) -> None:
    err.print("[bold red]error:[/] ", end="")
    err.print(" ".join(error.split()), highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
