"""ddpm-deploy evaluate: the bound of a model on images, as a table, as JSON and as a plot; or their distance."""

import itertools
import json
import math
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Unpack

import click
import numpy as np

from ddpm_deploy.bulk.source import find_samples
from ddpm_deploy.cli.bodies.chain import RequestOptions, request_of
from ddpm_deploy.cli.bodies.models import Place, open_network, require_runnable
from ddpm_deploy.cli.bodies.outputs import check_outputs
from ddpm_deploy.cli.bodies.progress import duration, peak_memory, stage
from ddpm_deploy.cli.bodies.report import finite, require_plotting
from ddpm_deploy.cli.common import logger
from ddpm_deploy.dependencies import require
from ddpm_deploy.errors import plural
from ddpm_deploy.evaluate.data import open_images
from ddpm_deploy.evaluate.likelihood import Estimate, Likelihood, Stratum, Terms, likelihood
from ddpm_deploy.files import atomic, show
from ddpm_deploy.model_file import ModelFile, open_model
from ddpm_deploy.runtime.network import time_call
from ddpm_deploy.spec import ChainSettings
from ddpm_deploy.version import __version__

_COUNT: Final = 1000  # images, where nothing else is said
_TERMS: Final = 20  # of each image
_LINES: Final = 20  # of the table, at most
_SMALL: Final = 1e-3  # bits that four decimals do not show


@dataclass(frozen=True)
class _Evaluation:
    """What was evaluated, and what was found. data: its name. seconds: it took."""

    model: ModelFile
    data: str
    terms: Terms
    seed: int
    found: Likelihood
    seconds: float


class Options(Place, RequestOptions):
    """The options of the place and of a chain; those of both measures, of the bound, and of the distances."""

    count: int | None
    seed: int
    batch: int | None
    array: str
    resize: bool
    as_json: bool
    terms: int | None
    every: bool
    plot: Path | None
    features: str | None
    samples: int | None
    statistics: Path | None


def evaluate(model: Path, data: str, *, nll: bool, fid: bool, **options: Unpack[Options]) -> None:
    """Measure what was asked for, and tell it."""
    if nll == fid:
        raise click.UsageError("say what to measure: --nll, or --fid")
    if nll:
        _tell_bound(model, data, options)
    else:
        _tell_distances(model, data, options)


def _tell_bound(model: Path, data: str, options: Options) -> None:
    """Evaluate the bound, and tell it."""
    plot, every, terms = options["plot"], options["every"], options["terms"]
    _refuse(options, "samples", "statistics", "features", "solver", "eta", "guidance", "labels", of="--fid")
    if not data:
        raise click.UsageError("Missing argument 'DATA'.")
    if every and terms:
        raise click.UsageError("--all is every term: omit it, or omit --terms")
    check_outputs([plot], [model, Path(data)])
    if plot:
        require_plotting(plot)
    opened = open_model(model)
    require_runnable(opened, options)
    chain = ChainSettings(steps=options["steps"], spacing=options["spacing"], timesteps=options["timesteps"])
    found = _evaluated(opened, data, Terms(opened.spec, chain, None if every else terms or _TERMS), options)
    click.echo(json.dumps(_as_json(found), indent=1) if options["as_json"] else _as_text(found))
    if plot:
        _write_plot(found, plot)


def _tell_distances(model: Path, data: str, options: Options) -> None:
    """Measure the distances, and tell them."""
    _refuse(options, "terms", "every", "plot", of="--nll")
    require("torch", "evaluate")
    from ddpm_deploy.cli.bodies.distances import Asked, measure_distances  # which import it

    asked = Asked(
        samples_from=model,
        data=data,
        statistics=options["statistics"],
        features=options["features"],
        samples=options["samples"],
        count=options["count"],
        request=request_of(options, seed=options["seed"]),
        batch=options["batch"],
        array=options["array"],
        resize=options["resize"],
        place=options,
    )
    measure_distances(asked, as_json=options["as_json"])


def _refuse(options: Options, *names: str, of: str) -> None:
    """Refuse options that were typed and are of the other measure."""
    typed = {"every": "all", "labels": "label"}
    for name in names:
        if options[name] not in (None, False, ()):  # type: ignore[literal-required]
            raise click.UsageError(f"--{typed.get(name, name)} is of {of}: omit it")


def _evaluated(model: ModelFile, data: str, terms: Terms, options: Options) -> _Evaluation:
    """Evaluate, after a message that says how long it will take."""
    batch, seed, count = options["batch"], options["seed"], options["count"]
    place: Place = options
    images = open_images(
        data, model.spec, array=options["array"], resize=options["resize"], find=find_samples
    )
    count = min(count or _COUNT, images.count)
    indices = np.linspace(0, images.count - 1, count).astype(np.int64)
    images.read(indices[:1])  # an image that does not fit is told before the network is loaded
    labels = None if images.labels is None else images.labels[indices]
    rows = count * terms.per_image
    with closing(open_network(model, batch and min(batch, rows), **place)) as network:
        together = min(rows, network.max_batch)
        forecast = time_call(network, together) * rows / together
        of = "all" if terms.every else f"{terms.per_image} of"
        logger.info(
            f"{plural(count, 'image')} of {images.count} · {of} {plural(len(terms.table), 'term')} of each · "
            f"{plural(rows, 'prediction')} · about {duration(forecast)}{peak_memory()}"
        )
        start = time.perf_counter()
        with stage("evaluating", rows) as advance:
            found = likelihood(network, terms, images.read, indices, labels, seed=seed, progress=advance)
        return _Evaluation(model, data, terms, seed, found, time.perf_counter() - start)


def _as_text(of: _Evaluation) -> str:
    """Write the parts of the bound, and the curve."""
    found, steps = of.found, len(of.terms.table)
    lines = [
        f"{of.model.name} on {show(of.data)}: {plural(found.images, 'image')}, chain of {plural(steps, 'step')}, "
        f"seed {of.seed}, in {duration(of.seconds)}",
        f"{'':11}{'bits/dim':>10}",
        f"  {'L':<9}{_shown(found.bound)}   the bound",
        f"  {'L_T':<9}{_shown(found.prior)}   to send x_T",
        f"  {'L_t':<9}{_shown(found.between)}   the {plural(steps - 1, 'step')} from there to the last",
        f"  {'L_0':<9}{_shown(found.decoder)}   the last step, to the 256 values of a pixel",
        "",
        f"{'t':>11}{'bits/dim':>10}{'':11}{'rate':>10}{'distortion':>12}",
    ]
    for stratum in _merged(found.strata):
        ends = str(stratum.first) if stratum.steps == 1 else f"{stratum.first} … {stratum.last}"
        lines.append(f"{ends:>11}{_shown(stratum.bits)}{stratum.rate:10.4f}{stratum.distortion:12.2f}")
    lines.append("rate: bits/dim sent so far; distortion: root mean squared error of x̂0, of 0 to 255")
    return "\n".join(lines)


def _shown(estimate: Estimate) -> str:
    """Write an estimate with its standard error, if there is one."""
    error = "" if math.isnan(estimate.error) else f" ± {_number(estimate.error)}"
    return f"{_number(estimate.bits):>10}{error:<11}"


def _number(bits: float) -> str:
    return f"{bits:.4f}" if abs(bits) >= _SMALL or not bits else f"{bits:.1e}"


def _merged(strata: tuple[Stratum, ...]) -> list[Stratum]:
    """Join neighbours until they fit the table: evenly in their bits. The error of a sum of terms is not known."""
    if len(strata) <= _LINES + 1:
        return list(strata)
    bits = np.cumsum([stratum.bits.bits for stratum in strata[:-1]])
    number = np.ceil(_LINES * bits / bits[-1] - 1e-9)
    edges = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(strata) - 1]
    joined = [_join(strata[a:b]) for a, b in itertools.pairwise(edges) if a < b]
    return [*joined, strata[-1]]


def _join(strata: tuple[Stratum, ...]) -> Stratum:
    """Make one of neighbours."""
    steps = np.array([stratum.steps for stratum in strata])
    squares = np.array([stratum.distortion for stratum in strata]) ** 2
    rates = np.array([stratum.rate for stratum in strata])
    bits = Estimate(sum(stratum.bits.bits for stratum in strata), math.nan)
    return Stratum(
        strata[0].first,
        strata[-1].last,
        int(steps.sum()),
        strata[0].bits if len(strata) == 1 else bits,
        float(np.average(rates, weights=steps)),
        float(np.sqrt(np.average(squares, weights=steps))),
    )


def _as_json(of: _Evaluation) -> dict[str, Any]:
    """Return every figure."""
    found = of.found
    return {
        "ddpm_deploy": __version__,
        "model": of.model.spec.provenance.digest,
        "data": of.data,
        "images": found.images,
        "seed": of.seed,
        "steps": len(of.terms.table),
        "terms_of_each_image": of.terms.per_image,
        "predictions": found.images * of.terms.per_image,
        "seconds": of.seconds,
        "bits_per_dimension": {
            "bound": _estimate_json(found.bound),
            "L_T": _estimate_json(found.prior),
            "L_t": _estimate_json(found.between),
            "L_0": _estimate_json(found.decoder),
        },
        "strata": [
            {
                "first": stratum.first,
                "last": stratum.last,
                "steps": stratum.steps,
                **_estimate_json(stratum.bits),
                "rate": stratum.rate,
                "distortion": stratum.distortion,
            }
            for stratum in found.strata
        ],
    }


def _estimate_json(estimate: Estimate) -> dict[str, float | None]:
    bits, error = finite([estimate.bits, estimate.error])
    return {"bits": bits, "standard_error": error}


def _title(bound: Estimate) -> str:
    """Write the bound; a single image has no error."""
    error = "" if math.isnan(bound.error) else f" ± {bound.error:.3f}"
    return f"{bound.bits:.3f}{error} bits/dim"


def _write_plot(of: _Evaluation, path: Path) -> None:
    """Plot distortion against rate, and the terms by t."""
    figure = require("matplotlib.figure", "plot").Figure(figsize=(9, 3.6), layout="constrained")
    curve, terms = figure.subplots(1, 2)
    found = of.found
    strata = found.strata
    # x_0 itself was sent at the end.
    curve.plot(
        [*(stratum.rate for stratum in strata), found.bound.bits],
        [*(stratum.distortion for stratum in strata), 0.0],
        ".-" if len(strata) < 100 else "-",
    )
    curve.set(
        xlabel="rate (bits/dim)",
        ylabel="distortion (RMSE, 0 to 255)",
        title=_title(found.bound),
    )
    if middle := strata[:-1]:
        ends = np.array([(stratum.last, stratum.first) for stratum in middle], np.float64)
        each = [stratum.bits.bits / stratum.steps for stratum in middle]
        errors = [stratum.bits.error / stratum.steps for stratum in middle]
        t = ends.mean(axis=1)
        terms.errorbar(t, each, yerr=errors, xerr=np.abs(ends.T - t), fmt=".", markersize=3, elinewidth=0.8)
    terms.plot([strata[-1].last], [strata[-1].bits.bits], "s", color="C1", label=r"$L_0$, the decoder")
    terms.set(xlabel="t", ylabel="bits/dim of one step", title=r"$L_t$ by $t$", yscale="log", xscale="symlog")
    terms.set_xlim(left=-0.3)
    terms.legend()
    for axes in (curve, terms):
        axes.grid(alpha=0.3)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150)
