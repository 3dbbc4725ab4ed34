"""The command line: ``fxfusion demo``, ``plan``, ``certify`` and ``fuse``.

torch, timm and transformers take seconds to import, so that only the commands do.
"""

from __future__ import annotations

import contextlib
import enum
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from fxfusion.errors import CalibrationRequiredError, FusionError, OptionError, TooFewModelsError

if TYPE_CHECKING:
    from fxfusion.inputs import Calibration, Example
    from fxfusion.plan import Plan
    from fxfusion.references import ResolvedModel


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
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Progress = Callable[[str, int, int], None]


class Features(enum.StrEnum):
    """What units are compared by."""

    weights = "weights"
    activations = "activations"


class Coupling(enum.StrEnum):
    """Whether a unit is matched to one unit or spread over several."""

    hard = "hard"
    soft = "soft"


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
        help="Outputs to keep, separated by commas \\[default: logits, else all].",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Same inputs and seed, same result.")]


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
) -> None:
    pass


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

        found = _plan(references.resolve(model, weights=False), given, outputs)
    _print_plan(console, model, found)
    for function, path in wanted.items():
        _draw(function, found, path)
        console.print(f"wrote {path}", highlight=False)


@app.command(epilog="Example: fxfusion certify hf:checkpoints/bert --seed 3")
def certify(
    model: ModelArgument,
    given: InputOption = None,
    outputs: OutputsOption = None,
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
        options = _outputs_option(outputs)
        result = fxfusion.certify(resolved.model, example.args, example.kwargs, seed=seed, **options)
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
    coupling: Annotated[Coupling | None, typer.Option("--coupling", help="One-to-one, or spread.")] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration", metavar="FILE", help="An .npz or .safetensors, one array per input name."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Of the calibration.")] = 32,
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="0.5,0.5", help="Share of each model \\[default: equal]."),
    ] = None,
    target: Annotated[
        int,
        typer.Option(
            "--target", help="Whose basis and format the result has, counted from 0; -1 is the last."
        ),
    ] = -1,
    given: InputOption = None,
    outputs: OutputsOption = None,
    seed: SeedOption = 0,
) -> None:
    """Fuse models into one: writes OUT and an HTML report beside it, both or neither."""
    if len(models) < 2:
        raise TooFewModelsError(f"fusion needs at least two models, but only {models[0]} is given")
    if features is Features.activations and calibration is None:
        raise CalibrationRequiredError("--features activations compares activations: give --calibration FILE")
    shares = _parse_shares(weights, len(models))
    _check_target(target, len(models))
    console = Console()
    with _progress(console) as progress:
        import fxfusion
        from fxfusion import references

        resolved = []
        for index, model in enumerate(models):
            progress("loading models", index, len(models))
            resolved.append(references.resolve(model))
        progress("loading models", len(models), len(models))
        _check_output(output, resolved, resolved[target])
        batches = _calibration(calibration, resolved[target], batch_size)
        example = _example(resolved[target], given, batches)
        result = fxfusion.fuse(
            [parent.model for parent in resolved],
            example.args,
            example.kwargs,
            calibration=batches,
            weights=shares,
            target=target,
            seed=seed,
            progress=progress,
            **_chosen(features=features, coupling=coupling),
            **_outputs_option(outputs),
        )
    report = _write(resolved[target], result, output)
    console.print(result.report.table())
    console.print(f"wrote {output} and {report}", highlight=False)


def _example(
    resolved: ResolvedModel, given: Sequence[str] | None, batches: Calibration | None = None
) -> Example:
    from fxfusion import inputs

    specifications = [inputs.parse_input(text) for text in given or ()]
    return inputs.example_inputs(resolved.model, specifications, batches)


def _calibration(path: Path | None, resolved: ResolvedModel, batch_size: int) -> Calibration | None:
    from fxfusion import inputs

    return None if path is None else inputs.load_calibration(path, resolved.model, batch_size)


def _plan(resolved: ResolvedModel, given: Sequence[str] | None, outputs: str | None) -> Plan:
    import fxfusion

    example = _example(resolved, given)
    found: Plan = fxfusion.plan(resolved.model, example.args, example.kwargs, **_outputs_option(outputs))
    return found


def _outputs_option(text: str | None) -> dict[str, Any]:
    return {} if text is None else {"outputs": [name.strip() for name in text.split(",")]}


def _chosen(**options: enum.StrEnum | None) -> dict[str, Any]:
    """The options that were given: what is left out takes the library's own default."""
    return {name: option.value for name, option in options.items() if option is not None}


def _parse_shares(text: str | None, count: int) -> list[float] | None:
    if text is None:
        return None
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        raise OptionError(f"--weights {text} is not a list of numbers: write --weights 0.5,0.5") from None
    if len(shares) != count:
        raise OptionError(f"--weights gives {len(shares)} numbers for {count} models")
    return shares


def _check_target(target: int, count: int) -> None:
    if not -count <= target < count:
        raise OptionError(
            f"--target {target} names none of the {count} models: choose -{count} to {count - 1}"
        )


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


def _limits_table(found: Plan) -> Table:
    table = Table(title="what stays fixed, and why")
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
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description:24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=console) as bars:

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


if __name__ == "__main__":
    main()
