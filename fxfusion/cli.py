"""The command line: ``fxfusion demo``, ``plan``, ``explain``, ``certify`` and ``fuse``.

torch, timm and transformers take seconds to import, so that only the commands do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree
from typer.core import TyperGroup

from fxfusion.atomic import write_text
from fxfusion.errors import FusionError, OptionError

if TYPE_CHECKING:
    from fxfusion.explain import AxisExplanation, Part, Step
    from fxfusion.inputs import Calibration, Evaluation, Example
    from fxfusion.plan import Plan
    from fxfusion.processes import Processes
    from fxfusion.recipes import Recipe
    from fxfusion.references import ResolvedModel
    from fxfusion.report import FusionReport


class _Group(TyperGroup):
    """Commands whose errors, where the user can act on them, are one message and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FusionError as error:
            # Not through rich: a message may hold brackets, which are markup there, and must not be wrapped.
            typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    name="fxfusion",
    cls=_Group,
    help="Fuse independently trained neural networks with optimal transport.",
    epilog="A MODEL is timm:NAME\\[@weights.safetensors], hf:DIRECTORY, "
    "package.module:factory\\[@weights.safetensors] or a FILE.pt2. Options of a timm model or factory follow "
    "a question mark: 'timm:resnet18?num_classes=10'.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Progress = Callable[[str, int, int], None]
TOP_CAUSES = 10  # of elements without a free axis that ``plan`` lists


class _Words(str, enum.Enum):
    """What an option may say: as ``enum.StrEnum``, which Python 3.10 lacks."""

    def __str__(self) -> str:
        return str(self.value)


class Features(_Words):
    """What units are compared by."""

    weights = "weights"
    activations = "activations"


class Coupling(_Words):
    """Whether a unit is matched to one unit or spread over several."""

    hard = "hard"
    soft = "soft"
    widening = "widening"


class Symmetry(_Words):
    """What may act on a space."""

    none = "none"
    permutation = "permutation"
    largest = "largest"


class Repair(_Words):
    """What calibration data correct after averaging."""

    norms = "norms"
    units = "units"
    layers = "layers"
    none = "none"


class Group(_Words):
    """What acts on every space."""

    permutation = "permutation"
    largest = "largest"


class Method(_Words):
    """Symmetry, repair and refinement by one name."""

    vanilla = "vanilla"
    permutation = "permutation"
    orthogonal = "orthogonal"
    learned = "learned"
    auto = "auto"


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A model reference, see below.")]
InputOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input", metavar="NAME=SHAPE:DTYPE", help="An example input, as x=2x3x32x32:float32; repeatable."
    ),
]
OutputsOption = Annotated[
    str | None,
    typer.Option(
        "--outputs",
        metavar="NAMES",
        help="Outputs to keep, separated by commas \\[default: all but hidden states].",
    ),
]
CalibrationOption = Annotated[
    Path | None,
    typer.Option("--calibration", metavar="FILE", help="An .npz or .safetensors, one array per input name."),
]
RefineOption = Annotated[
    int | None,
    typer.Option(
        "--refine", metavar="STEPS", min=1, help="Learn transports on the calibration data: gradient steps."
    ),
]
LabelsOption = Annotated[
    float,
    typer.Option(
        "--labels",
        metavar="SHARE",
        min=0.0,
        max=1.0,
        help="Learn by labels, too: their share of the loss, by an array 'labels' of the calibration data.",
    ),
]
UntieOption = Annotated[
    bool,
    typer.Option("--untie", help="Give tied output embeddings (hf: models) a tensor of their own."),
]
GroupOption = Annotated[
    Group, typer.Option("--symmetry", help="Permutations, or the largest group of every space.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done, and what it takes; reads no weights.")
]
ReportOption = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the report (with --dry-run: what it takes) as JSON."),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Same inputs and seed, same result.")]
DeviceOption = Annotated[
    str, typer.Option("--device", help="Where to fuse: cpu, cuda, or auto, a GPU if there is one.")
]


def main() -> None:
    """Run the command line."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        try:
            typer.echo(f"fxfusion {metadata.version('fxfusion')}")
        except metadata.PackageNotFoundError:
            typer.echo("fxfusion, run from its sources without being installed")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Log to standard error what is done, with times.")
    ] = False,
) -> None:
    if verbose:
        import logging

        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger = logging.getLogger("fxfusion")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


@app.command(epilog="Example: fxfusion demo --seed 1 --output /tmp/demo")
def demo(
    seed: SeedOption = 0,
    output: Annotated[Path, typer.Option("--output", help="Directory for checkpoints and reports.")] = Path(
        "fxfusion-demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Smaller parents, trained for seconds.")] = False,
) -> None:
    """Train two small vision transformers on handwritten digits, fuse them, and compare."""
    from fxfusion import demo as demonstration

    _check_parent(output)
    if output.exists() and not output.is_dir():
        raise OptionError(f"--output {output} is a file, but must be a directory")
    demonstration.run(seed, output, Console(), quick)


@app.command(epilog="Example: fxfusion plan timm:vit_tiny_patch16_224 --svg vit.svg")
def plan(
    model: ModelArgument,
    given: InputOption = None,
    outputs: OutputsOption = None,
    symmetry: GroupOption = Group.permutation,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Draw the flow graph.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the flow graph.")
    ] = None,
    dot: Annotated[Path | None, typer.Option("--dot", metavar="FILE", help="Write Graphviz source.")] = None,
    mermaid: Annotated[
        Path | None, typer.Option("--mermaid", metavar="FILE", help="Write Mermaid source.")
    ] = None,
) -> None:
    """Show which hidden units of a model may be permuted, and what had to stay fixed."""
    drawings = {"to_svg": svg, "to_json": json_file, "to_dot": dot, "to_mermaid": mermaid}
    wanted = {function: path for function, path in drawings.items() if path is not None}
    for path in wanted.values():
        _check_parent(path)
    console = Console()
    with _status(console, "planning"):
        from fxfusion import references

        found = _plan(references.resolve(model, weights=False), given, outputs, symmetry)
    _print_plan(console, model, found)
    for function, path in wanted.items():
        _draw(function, found, path)
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


@app.command(epilog="Example: fxfusion explain timm:vit_tiny_patch16_224 pos_embed")
def explain(
    model: ModelArgument,
    parameter: Annotated[
        str, typer.Argument(metavar="PARAMETER", help="A name, or a pattern such as '*.norm.weight'.")
    ],
    axis: Annotated[int | None, typer.Option("--axis", metavar="N", help="One axis only, from 0.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write it as JSON.")
    ] = None,
    given: InputOption = None,
    outputs: OutputsOption = None,
) -> None:
    """Say what the axes of a parameter enumerate, and why what is fixed is fixed.

    A pattern that fits several parameters gives a table of their first causes.
    """
    if json_file is not None:
        _check_parent(json_file)
    console = Console()
    with _status(console, "planning"):
        from fxfusion import references

        found = _plan(references.resolve(model, weights=False), given, outputs)
        names = _matching(found, parameter)
        explained = {name: found.explain(name, axis) for name in names}
    if len(explained) == 1:
        console.print(_tree(names[0], explained[names[0]]))
    else:
        console.print(_summary(explained))
    if json_file is not None:
        _write_json(json_file, explained)
        console.print(f"wrote {json_file}", highlight=False, soft_wrap=True)


@app.command(epilog="Example: fxfusion certify hf:checkpoints/bert --seed 3")
def certify(
    model: ModelArgument,
    given: InputOption = None,
    outputs: OutputsOption = None,
    symmetry: GroupOption = Group.permutation,
    seed: SeedOption = 0,
) -> None:
    """Check a model's plan: a random element of the inferred group must not change its outputs.

    Exits with 0 if it does not and with 1 if it does.
    """
    console = Console()
    with _status(console, "certifying"):
        import fxfusion
        from fxfusion import references

        resolved = references.resolve(model)
        example = _example(resolved, given)
        options = {"symmetry": symmetry.value, "seed": seed, **_outputs_option(outputs)}
        result = fxfusion.certify(resolved.model, example.args, example.kwargs, **options)
    verdict = Text("the function is kept", "green") if result.ok else Text("the function changed", "red")
    console.print(verdict)
    console.print(f"maximum relative error {result.max_relative_error:.2e}", highlight=False)
    console.print(f"moved {100 * result.moved:.2f} % of the parameter elements", highlight=False)
    if not result.ok:
        raise typer.Exit(1)


@app.command(
    epilog="Example: fxfusion fuse timm:resnet18@a.safetensors timm:resnet18@b.safetensors "
    "--calibration images.npz -o fused.safetensors"
)
def fuse(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL MODEL...", help="Two or more model references.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT", help="A .safetensors file; a directory for hf: models."
        ),
    ],
    features: Annotated[
        Features | None,
        typer.Option(
            "--features", help="What units are compared by \\[default: activations with --calibration]."
        ),
    ] = None,
    coupling: Annotated[
        Coupling | None,
        typer.Option("--coupling", help="One-to-one, spread, or spread only where a parent is narrower."),
    ] = None,
    symmetry: Annotated[
        Symmetry | None,
        typer.Option("--symmetry", help="Nothing, permutations, or the largest group of every space."),
    ] = None,
    repair: Annotated[
        Repair | None,
        typer.Option("--repair", help="Correct batch norms; also every unit; or fit layers."),
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option("--method", help="Symmetry and repair by one name; auto chooses by calibration data."),
    ] = None,
    refine: RefineOption = None,
    labels: LabelsOption = 0.0,
    gap: Annotated[
        float,
        typer.Option(
            "--gap",
            min=0.0,
            help="How far above the least cost an assignment may be, as a share: 0.01 is several times "
            "faster at thousands of units; what is certified is reported. 0 is exact.",
        ),
    ] = 0.0,
    untie: UntieOption = False,
    calibration: CalibrationOption = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Of the calibration.")] = 32,
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="0.5,0.5", help="Share of each model \\[default: equal]."),
    ] = None,
    flow: Annotated[
        str | None,
        typer.Option(
            "--flow",
            metavar="CHOICES",
            help="Solve layer by layer, as the paper does: 'reference', or choices such as "
            "residual=skip,heads=ignored,metric=cosine.",
        ),
    ] = None,
    observe: Annotated[
        str | None,
        typer.Option(
            "--observe",
            metavar="CHOICES",
            help="Which activations count: positions=first (class token), positions=centre, "
            "positions=random,share=0.25, confident=0.5 (share of samples).",
        ),
    ] = None,
    target: Annotated[
        int,
        typer.Option(
            "--target", help="Whose basis and format the result has, counted from 0; -1 is the last."
        ),
    ] = -1,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="From file to file, without loading a model: OUT is a directory. "
            "An interrupted run is gone on with.",
        ),
    ] = False,
    shard_size: Annotated[
        float, typer.Option("--shard-size", min=0.001, metavar="GB", help="Of a file, with --stream.")
    ] = 1.0,
    max_memory: Annotated[
        float,
        typer.Option(
            "--max-memory",
            min=0.001,
            metavar="GB",
            help="With --stream, of calibration and of weights in comparison: the rest waits in files.",
        ),
    ] = 4.0,
    given: InputOption = None,
    outputs: OutputsOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "cpu",
    dry_run: DryRunOption = False,
    json_file: ReportOption = None,
) -> None:
    """Fuse models into one: writes OUT and an HTML report beside it, both or neither.

    Under torchrun its processes share the work, with the same result: torchrun --nproc-per-node 2
    --no-python fxfusion fuse ...
    """
    from fxfusion.recipes import Recipe

    given_options: dict[str, Any] = {
        name: option.value
        for name, option in {
            "features": features,
            "coupling": coupling,
            "symmetry": symmetry,
            "repair": repair,
            "method": method,
        }.items()
        if option is not None
    }
    recipe = Recipe(
        tuple(models),
        output,
        **given_options,
        refine=refine,
        labels=labels,
        gap=gap,
        untie=untie,
        calibration=calibration,
        batch_size=batch_size,
        weights=_parse_shares(weights),
        flow=flow,
        observe=observe,
        target=target,
        stream=stream,
        shard_size=shard_size,
        max_memory=max_memory,
        inputs=tuple(given or ()),
        outputs=_names(outputs),
        seed=seed,
        device=device,
    )
    _carry_out(recipe, dry_run, json_file)


@app.command(epilog="Example: fxfusion run merge.toml --dry-run")
def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file, see the README.")],
    dry_run: DryRunOption = False,
    json_file: ReportOption = None,
) -> None:
    """Fuse models as a recipe says: the options of fuse, and couplings by space, in a file."""
    from fxfusion.recipes import Recipe

    _carry_out(Recipe.read(recipe), dry_run, json_file)


@app.command(
    epilog="Example: fxfusion barrier timm:resnet18@a.safetensors timm:resnet18@b.safetensors "
    "--calibration images.npz --evaluation test.npz --plot barrier.svg"
)
def barrier(
    first: ModelArgument,
    second: ModelArgument,
    evaluation: Annotated[
        Path,
        typer.Option(
            "--evaluation", metavar="FILE", help="Inputs as for --calibration, and an array 'labels'."
        ),
    ],
    calibration: CalibrationOption = None,
    methods: Annotated[
        str, typer.Option("--methods", metavar="NAMES", help="What is compared; learned takes minutes.")
    ] = "vanilla,permutation,orthogonal",
    refine: RefineOption = None,
    untie: UntieOption = False,
    points: Annotated[int, typer.Option("--points", min=3, help="On the line, with both ends.")] = 11,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the curves: .svg, .png, .pdf.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the curves as JSON.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Of all data.")] = 32,
    given: InputOption = None,
    outputs: OutputsOption = None,
    seed: SeedOption = 0,
) -> None:
    """Loss and accuracy along the line between two parents, aligned by several methods."""
    for path in (plot, json_file):
        if path is not None:
            _check_parent(path)
    console = Console()
    with _progress(console) as progress:
        import fxfusion
        from fxfusion import inputs, references

        progress("loading models", 0, 2)
        resolved = [references.resolve(first), references.resolve(second)]
        progress("loading models", 2, 2)
        resolved = _untied(resolved, untie)
        batches = _calibration(calibration, resolved[1], batch_size)
        samples = inputs.load_evaluation(evaluation, resolved[1].model, batch_size)
        example = _example(resolved[1], given, samples.inputs)
        found = fxfusion.barrier(
            [parent.model for parent in resolved],
            example.args,
            example.kwargs,
            calibration=batches,
            evaluation=samples,
            methods=[name.strip() for name in methods.split(",")],
            points=points,
            refine=refine,
            seed=seed,
            progress=progress,
            **_outputs_option(outputs),
        )
    console.print(found.table())
    if plot is not None:
        found.plot(plot)
        console.print(f"wrote {plot}", highlight=False, soft_wrap=True)
    if json_file is not None:
        curves = {
            curve.method: {**dataclasses.asdict(curve), "barrier": curve.barrier} for curve in found.curves
        }
        write_text(json_file, json.dumps(curves, indent=2) + "\n")
        console.print(f"wrote {json_file}", highlight=False, soft_wrap=True)


@app.command(epilog="Example: fxfusion sweep timm 'resnet*' --jobs 2 --output sweep")
def sweep(
    source: Annotated[str, typer.Argument(metavar="LIBRARY", help="timm, transformers, torchvision or all.")],
    patterns: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATTERN]...", help="Names; of timm, any variant or module \\[default: one per module]."
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Where records are kept; a sweep goes on there."),
    ] = Path("sweep"),
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Models at a time.")] = 1,
    time_limit: Annotated[float, typer.Option("--time-limit", help="Seconds per model.")] = 600.0,
    memory_limit: Annotated[float, typer.Option("--memory-limit", help="GiB per model; 0 for none.")] = 10.0,
    recover: Annotated[
        bool, typer.Option("--recover/--no-recover", help="Plant a symmetric twin and fuse it.")
    ] = True,
    symmetry: GroupOption = Group.permutation,
    seed: SeedOption = 0,
    page: Annotated[
        Path | None, typer.Option("--page", metavar="FILE", help="Write a Markdown page.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every record.")
    ] = None,
) -> None:
    """Certify every model of a library: with random weights, each in a process of its own.

    Exits with 0 unless a plan turns out unsound.
    """
    from fxfusion.testing import summary
    from fxfusion.testing.catalogue import SOURCES
    from fxfusion.testing.sweeps import sweep as run

    for path in (page, json_file):
        if path is not None:
            _check_parent(path)
    console = Console()
    found = {}
    with _progress(console) as progress:
        for name in SOURCES if source == "all" else (source,):

            def report(_: str, done: int, total: int, name: str = name) -> None:
                progress(name, done, total)

            found[name] = run(
                name,
                output,
                patterns or (),
                jobs=jobs,
                time_limit=time_limit,
                memory_limit=memory_limit,
                recover=recover,
                symmetry=symmetry.value,
                seed=seed,
                progress=report,
            )
    for name, records in found.items():
        console.print(summary.table(records, name))
        console.print(summary.sentence(records, name), highlight=False)
    if page is not None:
        write_text(page, summary.page(found))
    if json_file is not None:
        summary.save_json(found, json_file)
    if any(record.status == "unsound" for records in found.values() for record in records):
        raise typer.Exit(1)


def _example(
    resolved: ResolvedModel, given: Sequence[str] | None, batches: Calibration | None = None
) -> Example:
    from fxfusion import inputs

    specifications = [inputs.parse_input(text) for text in given or ()]
    return inputs.example_inputs(resolved.model, specifications, batches)


def _calibration(path: Path | None, resolved: ResolvedModel, batch_size: int) -> Calibration | None:
    from fxfusion import inputs

    return None if path is None else inputs.load_calibration(path, resolved.model, batch_size)


def _labelled(
    path: Path | None, resolved: ResolvedModel, batch_size: int, labels: float
) -> tuple[Calibration | None, Calibration | Evaluation | None]:
    """Return calibration data, alone and with labels if these count."""
    from fxfusion import inputs

    if path is None or not labels:
        batches = _calibration(path, resolved, batch_size)
        return batches, batches
    found = inputs.load_evaluation(path, resolved.model, batch_size)
    return found.inputs, found


def _plan(
    resolved: ResolvedModel,
    given: Sequence[str] | None,
    outputs: str | None,
    symmetry: Group = Group.permutation,
) -> Plan:
    import fxfusion

    example = _example(resolved, given)
    options = {"symmetry": symmetry.value, **_outputs_option(outputs)}
    found: Plan = fxfusion.plan(resolved.model, example.args, example.kwargs, **options)
    return found


def _outputs_option(text: str | None) -> dict[str, Any]:
    return {} if text is None else {"outputs": list(_names(text) or ())}


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(","))


def _untied(resolved: list[ResolvedModel], wanted: bool) -> list[ResolvedModel]:
    """Return models whose output embeddings have a tensor of their own, if that is wanted."""
    if not wanted:
        return resolved
    import fxfusion

    return [dataclasses.replace(item, model=fxfusion.untied(item.model)) for item in resolved]


def _parse_shares(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise OptionError(f"--weights {text} is not a list of numbers: write --weights 0.5,0.5") from None


def _check_output(output: Path, resolved: Sequence[ResolvedModel], target: ResolvedModel) -> None:
    target.check_output(output)
    for parent in resolved:
        if parent.reads(output):
            raise OptionError(
                f"--output {output} is what {parent.reference} was read from; name another output"
            )


def _check_parent(path: Path) -> None:
    if not path.absolute().parent.is_dir():
        raise OptionError(f"cannot write {path}: there is no directory {path.absolute().parent}")


@contextlib.contextmanager
def _processes() -> Iterator[tuple[Processes, Console]]:
    """Yield the processes that torchrun started, and where to write: the leading one writes alone."""
    from fxfusion.processes import launched

    with launched() as processes:
        yield processes, Console(quiet=not processes.leads)


def _carry_out(recipe: Recipe, dry_run: bool, json_file: Path | None) -> None:
    """Fuse as a recipe says, or say what that takes."""
    if json_file is not None:
        _check_parent(json_file)
    if dry_run:
        _foretell(recipe, json_file)
        return
    with _processes() as (processes, console):
        report, written = (_fuse_files if recipe.stream else _fuse_loaded)(recipe, processes, console)
        console.print(report.table())
        if json_file is not None:
            processes.once(lambda: write_text(json_file, report.to_json(timings=True)))
            written = (*written, json_file)
    console.print(f"wrote {' and '.join(map(str, written))}", highlight=False, soft_wrap=True)


def _foretell(recipe: Recipe, json_file: Path | None) -> None:
    """Print the plan of the target, and what a fusion takes."""
    console = Console()
    with _status(console, "planning"):
        from fxfusion.estimate import estimate

        found, foretold = estimate(recipe)
    _print_plan(console, recipe.models[recipe.target], found)
    console.print(foretold.table())
    if json_file is not None:
        content = {**dataclasses.asdict(foretold), "seconds": foretold.seconds}
        write_text(json_file, json.dumps(content, indent=2) + "\n")
        console.print(f"wrote {json_file}", highlight=False, soft_wrap=True)
    console.print("no weights were read, nothing was fused", highlight=False)


def _fuse_loaded(
    recipe: Recipe, processes: Processes, console: Console
) -> tuple[FusionReport, tuple[Path, ...]]:
    """Fuse models in memory; return the report, and where it and the weights are."""
    with _progress(console) as progress:
        import fxfusion
        from fxfusion import references
        from fxfusion.devices import chosen

        device = chosen(recipe.device)
        resolved = []
        for index, model in enumerate(recipe.models):
            progress("loading models", index, len(recipe.models))
            resolved.append(references.resolve(model))
        progress("loading models", len(resolved), len(resolved))
        resolved = [item.placed(device) for item in _untied(resolved, recipe.untie)]
        target = resolved[recipe.target]
        _check_output(recipe.output, resolved, target)
        batches, seen = _labelled(recipe.calibration, target, recipe.batch_size, recipe.labels)
        example = _example(target, recipe.inputs, batches)
        result = fxfusion.fuse(
            [parent.model for parent in resolved],
            example.args,
            example.kwargs,
            calibration=seen,
            weights=recipe.shares,
            target=recipe.target,
            seed=recipe.seed,
            progress=progress,
            **recipe.options(),
        )
        report = processes.once(lambda: _write(target, result, recipe.output))
    return result.report, (recipe.output, report)


def _fuse_files(
    recipe: Recipe, processes: Processes, console: Console
) -> tuple[FusionReport, tuple[Path, ...]]:
    """Fuse from file to file; return the report, and where everything is."""
    from fxfusion import references
    from fxfusion.streaming import fuse_files

    _check_parent(recipe.output)
    with _progress(console) as progress:
        found = [references.resolve_hollow(model) for model in recipe.models]
        for resolved, _ in found:
            if resolved.reads(recipe.output):
                raise OptionError(f"--output {recipe.output} is a parent: name another output")
        target = found[recipe.target][0]
        batches = _calibration(recipe.calibration, target, recipe.batch_size)
        example = _example(target, recipe.inputs, batches)
        report = fuse_files(
            [path for _, path in found],
            recipe.output,
            [resolved.model for resolved, _ in found],
            example.args,
            example.kwargs,
            weights=recipe.shares,
            target=recipe.target,
            seed=recipe.seed,
            outputs=recipe.outputs,
            shard_bytes=int(recipe.shard_size * 1e9),
            calibration=batches,
            memory=int(recipe.max_memory * 1e9),
            gap=recipe.gap,
            progress=progress,
        )
    return report, (recipe.output,)


def _write(target: ResolvedModel, result: Any, output: Path) -> Path:
    """Write weights and report, both or neither, and return where the report is."""
    from fxfusion.atomic import replacing
    from fxfusion.checkpoints import REPORT_SUFFIX

    if target.writes_directory:
        name = output.absolute().name + REPORT_SUFFIX
        with replacing(output) as directory:
            target.write(result.state_dict(), directory)
            result.report.save_html(directory / name)
        return output / name
    report = output.with_name(output.stem + REPORT_SUFFIX)
    existed = report.exists()
    try:
        with replacing(output) as weights_file:
            target.write(result.state_dict(), weights_file)
            with replacing(report) as report_file:
                result.report.save_html(report_file)
    except BaseException:
        # The report is in place before the weights are.
        if not existed:
            report.unlink(missing_ok=True)
        raise
    return report


def _draw(function: str, found: Plan, path: Path) -> None:
    from fxfusion import drawing
    from fxfusion.atomic import write_text

    write_text(path, getattr(drawing, function)(found.graph))


def _print_plan(console: Console, name: str, found: Plan) -> None:
    table = Table(
        title=Text(name), caption="maps: one, or one for every unit of the outer spaces, such as heads"
    )
    table.add_column("space", overflow="fold")
    table.add_column("size", justify="right")
    table.add_column("symmetry", no_wrap=True)
    table.add_column("maps", justify="right")
    table.add_column("touches", justify="right")
    for space in found.spaces:
        maps = math.prod(found.scope_size(outer) for outer in space.scope)
        cells = (space.size, space.symmetry.value, maps, len(space.incidences))
        table.add_row(Text(space.name), *map(str, cells))
    console.print(table)
    console.print(
        f"{len(found.spaces)} free spaces, {100 * found.covered:.2f} % of the parameter elements covered",
        highlight=False,
    )
    if found.limits:
        console.print(_limits_table(found))
    if found.frozen:
        console.print(_frozen_table(found))


def _frozen_table(found: Plan) -> Table:
    shown, rest = found.frozen[:TOP_CAUSES], found.frozen[TOP_CAUSES:]
    table = Table(
        title="elements without a free axis, by first cause",
        caption="fxfusion explain MODEL PARAMETER shows the way to it",
    )
    table.add_column("elements", justify="right")
    for heading in ("first cause", "node", "operator", "source", "parameters"):
        table.add_column(heading, overflow="fold")
    for item in shown:
        cause = item.cause
        cells = (cause.message, _few(item.nodes), cause.operator, cause.source, _few(item.parameters))
        table.add_row(str(item.elements), *map(Text, cells))
    if rest:
        names = dict.fromkeys(name for item in rest for name in item.parameters)
        elements = str(sum(item.elements for item in rest))
        table.add_row(elements, f"{len(rest)} other causes", "", "", "", Text(_few(list(names))))
    return table


def _few(names: Sequence[str], shown: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _matching(found: Plan, pattern: str) -> list[str]:
    """The parameters that a pattern fits, or what is taken for the name of one."""
    from fnmatch import filter as fitting

    names = fitting(found.parameters, pattern)
    return names if names and pattern not in names else [pattern]


def _tree(name: str, axes: Sequence[AxisExplanation]) -> Tree:
    tree = Tree(Text(name, "bold"))
    for axis in axes:
        branch = tree.add(Text(f"axis {axis.axis}: {axis.structure}"))
        for part in axis.parts:
            leaf = branch.add(Text(_place(part, axis) + _status_of(part), "green" if part.free else ""))
            for step in part.chain:
                leaf.add(_step_text(step))
    return tree


def _place(part: Part, axis: AxisExplanation) -> str:
    several = any(other.block for other in axis.parts)
    place = f"block {part.block}, " if several else ""
    return f"{place}factor {part.factor}: " if several or len(axis.parts) > 1 else ""


def _status_of(part: Part) -> str:
    if not part.free:
        return f"{part.size} fixed"
    below = f", for each of {' and '.join(part.scope)}" if part.scope else ""
    return f"{part.size} free: {part.space}{below}"


def _step_text(step: Step) -> Text:
    text = Text(f"{step.node}: {step.message}" if step.node else step.message)
    where = ", ".join(item for item in (step.operator, step.source) if item and item != step.node)
    return text.append(f"\n{where}", "dim") if where else text


def _summary(explained: Mapping[str, Sequence[AxisExplanation]]) -> Table:
    table = Table(caption="fxfusion explain MODEL PARAMETER shows the way to a first cause")
    table.add_column("parameter", overflow="fold")
    table.add_column("axis", justify="right")
    for heading in ("structure", "free", "fixed, and the first cause"):
        table.add_column(heading, overflow="fold")
    for name, axes in explained.items():
        for axis in axes:
            free = dict.fromkeys(f"{part.size}" for part in axis.parts if part.free)
            fixed = dict.fromkeys(
                f"{part.size}: {part.chain[-1].message}" for part in axis.parts if not part.free
            )
            cells = (axis.structure, ", ".join(free), "; ".join(fixed))
            table.add_row(Text(name), str(axis.axis), *map(Text, cells))
    return table


def _write_json(path: Path, explained: Mapping[str, Sequence[AxisExplanation]]) -> None:
    plain = {name: [dataclasses.asdict(axis) for axis in axes] for name, axes in explained.items()}
    write_text(path, json.dumps(plain, indent=2) + "\n")


def _limits_table(found: Plan) -> Table:
    table = Table(
        title="what stays fixed, and why",
        caption="fxfusion explain MODEL PARAMETER shows how it came to that",
    )
    for heading in ("reason", "operator", "source", "parameters"):
        table.add_column(heading, overflow="fold")
    for limit in found.limits:
        table.add_row(
            Text(limit.reason), Text(limit.operator), Text(limit.source), Text(", ".join(limit.parameters))
        )
    return table


@contextlib.contextmanager
def _status(console: Console, text: str) -> Iterator[None]:
    with console.status(text):
        yield


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    """Yield a callback ``(stage, done, total)`` that draws one bar per stage."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=console) as bars:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


if __name__ == "__main__":
    main()
