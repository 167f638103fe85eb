"""The folder of a fit: what is stored in it and read again, and whose it is."""

from __future__ import annotations

import copy
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dynablocks.errors import UNREADABLE, BadCheckpoint, DynablocksError, InvalidArgument
from dynablocks.files import expanded, plain_data, read_json, tensor_digest, write_atomically, write_text
from dynablocks.fitting.regression import TIME_OVER
from dynablocks.fitting.surrogates import FlowMap, Structure, build
from dynablocks.run_files import CHECKPOINT, CONFIG, EXAMPLE_DATA, METRICS, PREDICTIONS, REPORT, VERIFICATION, WEIGHTS
from dynablocks.seeding import seeded

if TYPE_CHECKING:
    from dynablocks.fitting.job import FitConfig

HARMLESS = ("max_minutes",)
"""Settings that may differ where a fit goes on."""
DIGEST = "digest"
"""Under this name the file of the weights says what they are, so that a flipped bit is seen."""


def save_fit(directory: str | Path, flow: FlowMap) -> None:
    """Write the surrogate's parameters, units and structure for :func:`load_fit`, into a folder that may be new.

    Raises:
        InvalidArgument: :func:`build` makes another map of the structure, so that :func:`load_fit` would return it.
        BadCheckpoint: the folder holds something else, or a fit of ``dynablocks fit``, whose results are of its own
            parameters.
    """
    import yaml

    structure = _require_built(flow)
    directory = expanded(directory)
    if (directory / CONFIG).exists() and read_config(directory)["fit"]:
        raise BadCheckpoint(f"{directory} holds a fit of dynablocks fit and its results; give another folder.")
    content = {"fit": {}, "structure": plain_data(asdict(structure))}
    write_text(directory / CONFIG, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    write_weights(directory, flow)


def write_weights(directory: Path, flow: FlowMap) -> None:
    """Write the surrogate's parameters and units into a folder whose ``config.yaml`` has its structure."""
    from safetensors.torch import save_model

    write_atomically(directory / WEIGHTS, lambda path: save_model(flow, str(path), {DIGEST: _digest(flow)}))


def _digest(flow: FlowMap) -> str:
    """Of a map's numbers in float64, in which they are loaded whatever they were stored in."""
    state = flow.state_dict().items()
    return tensor_digest({name: value.double() if value.is_floating_point() else value for name, value in state})


def _is_whole(flow: FlowMap, path: Path) -> bool:
    """Whether the numbers of a loaded map are finite, and those that were stored where the file says which."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stream:
        stored = (stream.metadata() or {}).get(DIGEST)
    finite = all(bool(value.isfinite().all()) for value in flow.state_dict().values())
    return finite and stored in (None, _digest(flow))


def _require_built(flow: FlowMap) -> Structure:
    """The structure of the map, its counts as Python has them."""
    with seeded(0):
        built = build(flow.structure)
    if type(flow) is FlowMap and _anatomy(flow) == _anatomy(built) and _acts_alike(flow, built):
        return built.structure
    raise InvalidArgument(
        f"save_fit stores maps that build(structure) makes, here {type(built.field).__name__} by {built.method!r}; "
        f"this {type(flow).__name__} of {type(flow.field).__name__} by {flow.method!r} is another: keep its parameters "
        "with safetensors and build it by your own code."
    )


def _anatomy(flow: FlowMap) -> tuple[Any, ...]:
    """All of a map but the numbers in it."""
    shapes = {name: tuple(value.shape) for name, value in flow.state_dict().items()}
    settings = {k: sorted(map(str, v)) if isinstance(v, frozenset) else repr(v) for k, v in vars(flow.method).items()}
    return type(flow.field), repr(flow.field), type(flow.method), settings, shapes


@torch.no_grad()
def _acts_alike(flow: FlowMap, built: FlowMap) -> bool:
    """Whether the built map, with the parameters of the other, does the same: it may differ in what no name shows."""
    own, built = copy.deepcopy(flow).to(built.centre).eval(), built.eval()
    built.load_state_dict(own.state_dict())
    states = torch.linspace(0, 1, 5 * own.centre.numel(), dtype=built.centre.dtype).reshape(5, -1)
    states = own.centre + own.scale * states
    return all(
        torch.allclose(ours, theirs, rtol=0, atol=0, equal_nan=True)
        for ours, theirs in zip(_doings(own, states), _doings(built, states), strict=True)
    )


def _doings(flow: FlowMap, states: Tensor) -> tuple[Tensor, Tensor]:
    """The field at the states, and one step from them; NaN where there is none."""
    try:
        step = flow(states)
    except DynablocksError:
        step = torch.full_like(states, math.nan)
    return flow.vector_field(states), step


def load_fit(directory: str | Path) -> FlowMap:
    """The surrogate of ``dynablocks fit`` or :func:`save_fit` in a folder, in float64: ``flow(x)``, ``flow(x, step)``.

    Raises:
        BadCheckpoint: the directory holds no finished fit, or one whose numbers are not those that were stored.

    Example:
        >>> load_fit("nowhere")
        Traceback (most recent call last):
        ...
        dynablocks.errors.BadCheckpoint: nowhere holds no finished fit (no config.yaml); make one with dynablocks fit.
    """
    from safetensors.torch import load_model

    directory = expanded(directory)
    content = read_config(directory)
    if not (directory / WEIGHTS).exists():
        raise BadCheckpoint(f"{directory} holds no finished fit (no {WEIGHTS}); run the same dynablocks fit again.")
    try:
        stored = dict(content["structure"])
        weights = stored["weights"]
        stored |= {"names": tuple(stored["names"]), "weights": None if weights is None else tuple(weights)}
        flow = build(Structure(**stored))
        (directory / WEIGHTS).open("rb").close()
        load_model(flow, str(directory / WEIGHTS))
        if not _is_whole(flow, directory / WEIGHTS):
            raise BadCheckpoint("numbers that are not finite, or not those that were stored")
    except OSError as error:
        raise _unread(directory / WEIGHTS, error) from error
    except MemoryError:
        raise
    except Exception as error:
        raise BadCheckpoint(f"{directory} holds a damaged fit; make it again with --overwrite.") from error
    return flow.eval()


def _unread(path: Path, error: OSError) -> DynablocksError:
    """What cannot be read now may be whole; torch's and safetensors' errors of damaged files are others."""
    return DynablocksError(f"{path} cannot be read ({error.strerror or error}); nothing was changed: make it readable.")


def read_config(directory: Path) -> dict[str, Any]:
    """The content of the directory's ``config.yaml``."""
    import yaml

    if not (directory / CONFIG).exists():
        raise BadCheckpoint(f"{directory} holds no finished fit (no {CONFIG}); make one with dynablocks fit.")
    try:
        content = yaml.safe_load((directory / CONFIG).read_text(encoding="utf-8"))
    except OSError as error:
        raise _unread(directory / CONFIG, error) from error
    except (*UNREADABLE, yaml.YAMLError) as error:
        raise BadCheckpoint(f"{directory / CONFIG} cannot be read; make the fit again in another folder.") from error
    if not isinstance(content, dict) or "fit" not in content:
        raise BadCheckpoint(f"{directory} holds something else than a fit; give another folder.")
    return content


def claim(directory: Path, config: FitConfig, structure: Structure, source: dict[str, Any], *, overwrite: bool) -> bool:
    """Make the directory this fit's own; ``True`` when it holds this fit already, finished.

    Raises:
        InvalidArgument: it is a file, or holds something else.
        BadCheckpoint: it holds another fit.
    """
    import yaml

    if directory.exists() and not directory.is_dir():
        raise InvalidArgument(f"--out {directory} is a file; give a folder.")
    content = {"fit": asdict(config), "structure": asdict(structure), "data": source}
    plain = yaml.safe_load(yaml.safe_dump(plain_data(content), allow_unicode=True))
    if overwrite and (directory / CONFIG).exists():
        read_config(directory)  # refuses the folder of anything but a fit
        _forget(directory)
    elif (directory / CONFIG).exists():
        stored = read_config(directory)
        differing = _differing(stored, plain)
        if differing:
            raise BadCheckpoint(
                f"{directory} holds a fit with another {differing}; choose another --out, or --overwrite to fit anew."
            )
        if (directory / METRICS).exists() and (directory / WEIGHTS).exists():
            return True
    elif directory.exists() and not all(_is_harmless(path) for path in directory.iterdir()):
        raise InvalidArgument(f"--out {directory} holds other files; give an empty or a new folder.")
    write_text(directory / CONFIG, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
    return False


def already_there(directory: Path, config: FitConfig) -> str:
    """What to say of a directory that holds this fit, finished; also that its time was over where more is asked for."""
    made, asked = read_config(directory)["fit"].get("max_minutes"), config.max_minutes
    metrics = read_json(directory / METRICS)
    by_time = isinstance(metrics, dict) and metrics.get("stopped") == TIME_OVER
    found = f"{directory} holds this fit already"
    if not by_time or not isinstance(made, int | float) or (asked is not None and asked <= made):
        return f"{found}; --overwrite makes it anew"
    limit = "without a limit of time" if asked is None else f"with --max-minutes {asked:g}"
    return f"{found}, made with --max-minutes {made:g} until its time was over; --overwrite fits anew {limit}"


def _differing(stored: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    for group in ("data", "fit", "structure"):
        held, new = stored.get(group), wanted[group]
        old = held if isinstance(held, dict) else {}
        for key in new:
            if key not in (*HARMLESS, "file") and old.get(key) != new[key]:
                # Of the same --weights, which the settings of the fit are compared by first.
                words = {"names": "choice of --columns", "weights": "scale of its weights, that of an earlier version"}
                word = words.get(key, key) if group == "structure" else key
                return f"{word} ({old.get(key)!r}, now {new[key]!r})" if key != "sha256" else "data file"
    return None


def _is_harmless(path: Path) -> bool:
    """Whether a fit may begin beside this: what a desktop, a lock or a killed writer leaves is hidden."""
    return path.name == EXAMPLE_DATA or path.name.startswith(".")


def _forget(directory: Path) -> None:
    """Remove what a fit made but its settings, which the next one replaces: without them the folder is no fit's."""
    for name in (WEIGHTS, METRICS, VERIFICATION, PREDICTIONS, REPORT):
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / CHECKPOINT, ignore_errors=True)
