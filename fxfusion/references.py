"""Models by name, as the command line takes them.

==============================================  ==========================================================
``timm:NAME[?option=value&...][@FILE]``         a timm model, with the weights of a safetensors file
``hf:DIRECTORY``                                a local Hugging Face directory, of the class in its config
``package.module:factory[?...][@FILE]``         what a function of yours returns
``model.pt2``                                   a program saved with ``torch.export.save``
==============================================  ==========================================================

Nothing is downloaded and no pickle is opened. Code runs only from installed packages and from the module
that a factory reference names.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import importlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from fxfusion import checkpoints
from fxfusion.archives import SUFFIX, hollow_archive, load_archive
from fxfusion.devices import device_of
from fxfusion.errors import CheckpointError, FusionError, ModelReferenceError
from fxfusion.hollow import hollow

Kind: TypeAlias = Literal["timm", "hf", "factory", "pt2"]

FORMS = (
    "timm:NAME[@weights.safetensors], hf:DIRECTORY, package.module:factory[@weights.safetensors] or FILE.pt2"
)

# Options of timm.create_model that would download or unpickle.
_TIMM_REFUSED = frozenset(
    {
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "checkpoint_path",
        "cache_dir",
        "pretrained_strict",
    }
)


@dataclasses.dataclass(frozen=True, eq=False)
class ResolvedModel:
    """A model that a reference named.

    Attributes
    ----------
    reference : str
        As the user wrote it.
    model : torch.nn.Module or torch.export.ExportedProgram
        The model, a module in evaluation mode.
    kind : str
        ``timm``, ``hf``, ``factory`` or ``pt2``.
    files : tuple of Path
        The weight files that were read, which an output must not replace; empty where the weights are
        the initialisation or the factory's own.
    directory : Path, optional
        The directory of a Hugging Face model.
    """

    reference: str
    model: nn.Module | ExportedProgram
    kind: Kind
    files: tuple[Path, ...] = ()
    directory: Path | None = None

    def placed(self, device: torch.device) -> ResolvedModel:
        """Return the model on a device: itself if it is there."""
        model = self.model
        if isinstance(model, nn.Module):
            return dataclasses.replace(self, model=model.to(device))
        if device_of(model.state_dict.values()) == device:
            return self
        return dataclasses.replace(self, model=move_to_device_pass(model, device))

    @property
    def writes_directory(self) -> bool:
        """Whether :meth:`save` writes a directory, else one safetensors file."""
        return self.directory is not None

    def save(self, state: Mapping[str, Tensor], out: str | Path) -> None:
        """Write weights in this model's own format, whole or not at all.

        Parameters
        ----------
        state : mapping of str to Tensor
            Weights by the names of the model's ``state_dict()``.
        out : str or Path
            A ``.safetensors`` file, or a directory for a Hugging Face model.

        Raises
        ------
        CheckpointError
            ``out`` is not of that form or holds unrelated content.
        """
        from fxfusion.atomic import replacing

        self.check_output(out)
        with replacing(out) as temporary:
            self.write(state, temporary)

    def write(self, state: Mapping[str, Tensor], path: Path) -> None:
        """:meth:`save` straight to ``path``, for a caller that already replaces atomically."""
        if self.directory is not None:
            with quiet_transformers():
                checkpoints.write_huggingface(self.model, self.directory, state, path)
        else:
            checkpoints.write_safetensors(state, path)

    def check_output(self, out: str | Path) -> None:
        """Refuse an output path that :meth:`save` could not or should not write.

        Parameters
        ----------
        out : str or Path
            Where the result is to go.

        Raises
        ------
        CheckpointError
            The path has the wrong form, its parent directory does not exist, or it holds this model.
        """
        out = Path(out)
        if not out.absolute().parent.is_dir():
            raise CheckpointError(f"cannot write {out}: there is no directory {out.absolute().parent}")
        if self.directory is not None:
            checkpoints.check_output_directory(out)
        elif out.suffix != ".safetensors":
            raise CheckpointError(
                f"the fusion of {self.reference} is a .safetensors file, but the output is {out}"
            )
        elif out.is_dir():
            raise CheckpointError(f"cannot write {out}: it is a directory")

    def reads(self, path: str | Path) -> bool:
        """Whether this model was read from ``path``, which an output must not replace then."""
        sources = (*self.files, *([self.directory] if self.directory is not None else []))
        return Path(path).resolve() in {source.resolve() for source in sources}


def resolve(reference: str, *, weights: bool = True) -> ResolvedModel:
    """Find the model that a reference names and load its weights.

    Parameters
    ----------
    reference : str
        One of the forms above.
    weights : bool, default True
        Whether to load the weights. Without them a Hugging Face model is built on the meta device, which
        takes no memory: enough for :func:`fxfusion.plan`.

    Returns
    -------
    ResolvedModel
        The model and how to write a fusion in its format. An initialisation without weights is the same
        every time.

    Raises
    ------
    ModelReferenceError
        The reference has none of the forms, or names a model, module, function or option that does not
        exist.
    CheckpointError
        The weights are missing, malformed or do not fit the model.

    Examples
    --------
    >>> resolve("timm:test_vit?num_classes=7").model.num_classes
    7
    """
    if reference.startswith("timm:"):
        return _resolve_timm(reference, weights)
    if reference.startswith("hf:"):
        return _resolve_huggingface(reference, weights)
    if reference.endswith(SUFFIX):
        return _resolve_exported(reference, weights)
    if ":" in reference:
        return _resolve_factory(reference, weights)
    raise ModelReferenceError(f"{reference!r} names no model: write {FORMS}{_path_hint(reference)}")


def resolve_hollow(reference: str) -> tuple[ResolvedModel, Path]:
    """Find the model that a reference names, and where its weights are, without reading them.

    Parameters
    ----------
    reference : str
        ``hf:DIRECTORY``, ``FILE.pt2``, or ``timm:NAME@FILE`` or a factory with a file.

    Returns
    -------
    ResolvedModel, Path
        The model as :func:`fxfusion.hollow.hollow` or :func:`fxfusion.archives.hollow_archive` makes it, and
        the directory or file of its weights.

    Raises
    ------
    ModelReferenceError, CheckpointError
        As :func:`resolve`, or if the reference names no weights.
    """
    if reference.startswith("hf:"):
        directory = Path(reference.removeprefix("hf:"))
        config = _read_config(reference, directory)
        model_class = _architecture(reference, config)
        settings = model_class.config_class.from_dict(config)
        files = checkpoints.checkpoint_files(directory)
        with quiet_transformers():
            model = hollow(lambda: _build(reference, lambda: model_class._from_config(settings)))
        return ResolvedModel(reference, model, "hf", files, directory), directory
    if reference.endswith(SUFFIX):
        return _resolve_exported(reference, weights=False), Path(reference)
    head, at, file = reference.partition("@")
    if not at or not file:
        raise ModelReferenceError(
            f"{reference} names no weights that could be read by and by: give hf:DIRECTORY, FILE.pt2, "
            "timm:NAME@weights.safetensors or package.module:factory@weights.safetensors"
        )
    files = checkpoints.checkpoint_files(file)
    kind: Kind = "timm" if head.startswith("timm:") else "factory"
    model = hollow(lambda: module_of(resolve(head, weights=False)))
    return ResolvedModel(reference, model, kind, files), Path(file)


def module_of(resolved: ResolvedModel) -> nn.Module:
    """Return a resolved model that is no exported program."""
    assert isinstance(resolved.model, nn.Module)
    return resolved.model


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and load reports off the terminal, where ours are drawn."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _path_hint(reference: str) -> str:
    path = Path(reference)
    if (path / "config.json").is_file():
        return f"; did you mean hf:{reference}?"
    if path.suffix == ".safetensors":
        return f"; weights alone do not say which model they are of: write timm:NAME@{reference}"
    return ""


def _resolve_timm(reference: str, weights: bool) -> ResolvedModel:
    import timm

    name, options, file = _parts(reference, reference.removeprefix("timm:"))
    if not timm.is_model(name):
        close = _close(name.partition(".")[0], timm.list_models())
        raise ModelReferenceError(f"timm has no model {name!r}{close}")
    if refused := sorted(_TIMM_REFUSED & set(options)):
        raise ModelReferenceError(
            f"{reference}: the option {refused[0]} would download or unpickle weights; name a safetensors "
            f"file: timm:{name}@weights.safetensors"
        )
    model = _build(reference, lambda: timm.create_model(name, pretrained=False, **options))
    return _with_weights(reference, model, "timm", file if weights else None)


def _resolve_factory(reference: str, weights: bool) -> ResolvedModel:
    target, options, file = _parts(reference, reference)
    module_name, _, attribute = target.partition(":")
    factory = _attribute(reference, _import(reference, module_name), attribute)
    model = _build(reference, lambda: factory(**options))
    return _with_weights(reference, model, "factory", file if weights else None)


def _parts(reference: str, text: str) -> tuple[str, dict[str, Any], Path | None]:
    """Split ``NAME?key=value&...@FILE``; a file name may hold any character."""
    head, at, file = text.partition("@")
    if at and not file:
        raise ModelReferenceError(f"{reference} names no file after @")
    name, question, query = head.partition("?")
    return name, _options(reference, query) if question else {}, Path(file) if file else None


def _options(reference: str, query: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for item in query.split("&"):
        key, equals, value = item.partition("=")
        if not equals or not key.isidentifier() or key in options:
            raise ModelReferenceError(
                f"{reference}: {item!r} is not an option; write ?option=value&option=value"
            )
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value  # A bare word is a string: ?act_layer=relu
    return options


def _close(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _import(reference: str, name: str) -> Any:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ModelReferenceError(f"{reference!r} names no model: write {FORMS}")
    # The installed `fxfusion` script does not have the working directory on its path, as `python -m` has.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            close = _close(name, {*_modules_here(), "timm", "hf"})
            raise ModelReferenceError(
                f"{reference}: there is no module {error.name}, neither installed nor in {Path.cwd()}{close}"
            ) from None
        raise ModelReferenceError(f"{reference}: importing {name} failed: {error}") from error
    except Exception as error:
        raise ModelReferenceError(
            f"{reference}: importing {name} failed: {type(error).__name__}: {error}"
        ) from error


def _modules_here() -> set[str]:
    entries = Path.cwd().iterdir()
    return {path.stem for path in entries if path.suffix == ".py" or (path / "__init__.py").is_file()}


def _attribute(reference: str, module: Any, path: str) -> Callable[..., Any]:
    found = module
    for part in path.split("."):
        if not hasattr(found, part):
            names = [name for name in dir(found) if not name.startswith("_")]
            raise ModelReferenceError(f"{reference}: {module.__name__} has no {path!r}{_close(part, names)}")
        found = getattr(found, part)
    if not callable(found) or isinstance(found, nn.Module):
        raise ModelReferenceError(
            f"{reference}: {path} is a {type(found).__name__}; name a class or function that returns the "
            "model"
        )
    return found


def _build(reference: str, build: Callable[[], Any]) -> nn.Module:
    # A fixed seed: weights that a checkpoint does not set must not differ from run to run.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = build()
        except FusionError:
            raise
        except Exception as error:
            raise ModelReferenceError(
                f"{reference}: building the model failed: {type(error).__name__}: {error}"
            ) from error
    if not isinstance(model, nn.Module):
        raise ModelReferenceError(f"{reference} gives a {type(model).__name__}, not a torch.nn.Module")
    return model.eval()


def _with_weights(reference: str, model: nn.Module, kind: Kind, file: Path | None) -> ResolvedModel:
    if file is None:
        return ResolvedModel(reference, model, kind)
    checkpoints.load_into(model, checkpoints.read_weights(file), reference)
    return ResolvedModel(reference, model, kind, checkpoints.checkpoint_files(file))


def _resolve_huggingface(reference: str, weights: bool) -> ResolvedModel:
    directory = Path(reference.removeprefix("hf:"))
    config = _read_config(reference, directory)
    model_class = _architecture(reference, config)
    if not weights:
        with quiet_transformers(), torch.device("meta"):
            model = _build(
                reference, lambda: model_class._from_config(model_class.config_class.from_dict(config))
            )
        return ResolvedModel(reference, model, "hf", directory=directory)
    # Before transformers reads them: shards stay inside the directory, and only safetensors are opened.
    files = checkpoints.checkpoint_files(directory)
    model = _load_huggingface(reference, model_class, directory)
    return ResolvedModel(reference, model.eval(), "hf", files, directory)


def _read_config(reference: str, directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise ModelReferenceError(
            f"{reference}: there is no directory {directory}{_close_directory(directory)}; models are not "
            "downloaded: fetch it first (hf download) and name the directory"
        )
    path = directory / "config.json"
    if not path.is_file():
        raise ModelReferenceError(f"{reference}: {directory} holds no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelReferenceError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ModelReferenceError(f"{path} does not hold a JSON object")
    return config


def _close_directory(directory: Path) -> str:
    parent = directory.absolute().parent
    return _close(directory.name, [entry.name for entry in parent.iterdir()]) if parent.is_dir() else ""


def _architecture(reference: str, config: Mapping[str, Any]) -> Any:
    import transformers

    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise ModelReferenceError(
            f'{reference}: its config.json has no "architectures"; add the class, such as ["BertForMaskedLM"]'
        )
    found = getattr(transformers, architectures[0], None)
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    if "auto_map" in config:
        raise ModelReferenceError(
            f"{reference}: {architectures[0]} is defined by code inside the directory, which fxfusion does "
            "not run; build the model in a function of yours and name it as package.module:factory"
        )
    names = [name for name in dir(transformers) if "For" in name or name.endswith("Model")]
    raise ModelReferenceError(
        f"{reference}: transformers {transformers.__version__} has no model class {architectures[0]!r}"
        f"{_close(architectures[0], names)}"
    )


def _load_huggingface(reference: str, model_class: Any, directory: Path) -> nn.Module:
    try:
        with quiet_transformers():
            model, report = model_class.from_pretrained(
                directory,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # They are reported below, by name and with the rest.
            )
    except Exception as error:
        # Which of its files is at fault shows when we read them ourselves.
        checkpoints.read_weights(directory)
        raise CheckpointError(f"{reference} cannot be loaded: {type(error).__name__}: {error}") from error
    problems = [
        f"  {what}: {checkpoints.listed(sorted(map(str, report[key])))}"
        for key, what in (
            ("missing_keys", "missing"),
            ("unexpected_keys", "unexpected"),
            ("mismatched_keys", "of another shape"),
        )
        if report.get(key)
    ]
    if problems:
        raise CheckpointError(
            f"the weights of {reference} do not fit {model_class.__name__}, the class in its config.json:\n"
            + "\n".join(problems)
            + '\nIf they belong to another class, name that one under "architectures" in config.json.'
        )
    return model


def _resolve_exported(reference: str, weights: bool) -> ResolvedModel:
    path = Path(reference)
    return ResolvedModel(reference, load_archive(path) if weights else hollow_archive(path), "pt2", (path,))
