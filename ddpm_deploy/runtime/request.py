"""A request: which samples to make, and by which chain: what a call, a picture and a command line all ask."""

import secrets
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final, TypedDict, Unpack

import msgspec
import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.errors import DataError, SettingError, first_line, plural
from ddpm_deploy.solvers import StepTable
from ddpm_deploy.spec import DEFAULT_CHAIN, ChainSettings, ModelSpec
from ddpm_deploy.words import AskedSolver, Spacing

Label = int | str
Labels = NDArray[np.int64]
Guidance = float | Sequence[float] | NDArray[Any]

MOST_GUIDANCE: Final = 1000.0  # of either sign; useful are some 1 to 10
_END: Final = 2**64  # of seeds and sample indices
_FRESH_BITS: Final = 53  # of a fresh seed: what every reader of JSON keeps exactly


class Keywords(TypedDict, total=False):
    """The keyword arguments of `Sampler.sample` that make a Request; `make_request` says what each is."""

    steps: int | None
    solver: AskedSolver | None
    eta: float | None
    spacing: Spacing | None
    timesteps: Sequence[int] | None
    table: StepTable | None
    seed: int | None
    first_index: int
    labels: Label | Sequence[Label] | Labels | None
    guidance: Guidance | None
    share_until: int | None
    depth: int | None


class Request(ChainSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Samples first_index .. first_index + count - 1 of a seed, by the chain of these settings.

    seed: 0 .. 2⁶⁴ - 1 (None: a fresh one, once it is checked). labels, guidance: the sample of index i has number
    i mod length of them, so a part of a request has the same for each sample; no labels: each class in turn; no
    guidance: without. table: a caller's own, in place of the chain's settings.
    share_until: 0 .. T; the samples share the noise of x_T and of the steps from timesteps t ≥ share_until, which is
    that of sample 0 of the seed: at 0 all of it, at T only x_T (None: no noise). depth: 1 .. T; the chain begins at
    images that are given, in place of x_T, and has the steps from timesteps t < depth alone (None: all).

    A Request is complete, and in range for a model, once it went through `checked`.
    """

    count: int = 1
    seed: int | None = None
    first_index: int = 0
    labels: tuple[Label, ...] = ()
    guidance: tuple[float, ...] = ()
    share_until: int | None = None
    depth: int | None = None
    table: StepTable | None = None

    def checked(self, spec: ModelSpec) -> "Request":
        """The same request, complete: with a seed and a number of steps, its labels in numbers.

        Raises SettingError where something is out of range, or the model does not support it.
        """
        self._require_types()
        seed = secrets.randbits(_FRESH_BITS) if self.seed is None else self.seed
        if self.count < 1:
            raise SettingError(f"count must be 1 or more, not {self.count}")
        if not 0 <= seed < _END:
            raise SettingError(f"seed must be from 0 to 2^64 - 1, not {seed}")
        if not 0 <= self.first_index <= _END - self.count:
            raise SettingError(f"first_index must be from 0 to 2^64 - count, not {self.first_index}")
        if not 0 <= (self.share_until or 0) <= spec.timesteps:
            raise SettingError(f"share_until must be from 0 to {spec.timesteps}, not {self.share_until}")
        if self.depth is not None and not 1 <= self.depth <= spec.timesteps:
            raise SettingError(f"depth must be from 1 to {spec.timesteps}, not {self.depth}")
        if self.table is not None and (self.chain != DEFAULT_CHAIN or self.depth is not None):
            raise SettingError(
                "a table is instead of steps, solver, eta, spacing, timesteps and depth: leave these out"
            )
        if self.guidance and not spec.null_class:
            raise SettingError(
                "guidance needs a model that knows the null class: train with --labels and --label-dropout"
            )
        for scale in self.guidance:
            if not abs(scale) <= MOST_GUIDANCE:  # nor NaN
                raise SettingError(
                    f"guidance must be from {-MOST_GUIDANCE:.0f} to {MOST_GUIDANCE:.0f}, not {scale}"
                )
        labels = tuple(spec.label(label) for label in self.labels)
        request = msgspec.structs.replace(self, seed=seed, labels=labels)
        request.table_for(spec)  # it raises an error where there is no such chain
        if self.table:
            return request
        chain = spec.completed(self.chain)
        return msgspec.structs.replace(
            request, steps=chain.steps, solver=chain.solver, eta=chain.eta, spacing=chain.spacing
        )

    def _require_types(self) -> None:
        if self.table is not None and not isinstance(self.table, StepTable):
            raise SettingError(
                f"table must be a StepTable, as solvers.ddim makes one, not {type(self.table).__name__}"
            )
        # A solver or spacing that is not known is told later, with those that are.
        known = {"table": None, "solver": DEFAULT_CHAIN.solver, "spacing": DEFAULT_CHAIN.spacing}
        try:
            msgspec.convert(msgspec.structs.asdict(self) | known, Request)
        except msgspec.ValidationError as error:
            raise SettingError(f"this is not a request: {first_line(error)}") from error

    @property
    def chain(self) -> ChainSettings:
        """The settings of the chain alone."""
        return ChainSettings(
            steps=self.steps,
            solver=self.solver,
            eta=self.eta,
            spacing=self.spacing,
            timesteps=self.timesteps,
        )

    @property
    def rows(self) -> int:
        """Rows of the batch that it takes: guidance takes two for each sample."""
        return self.count * (2 if self.guidance else 1)

    def __getitem__(self, part: slice) -> "Request":
        """The request of some of its samples: request[a:b]."""
        start, stop, step = part.indices(self.count)
        if step != 1 or stop <= start:
            raise IndexError(f"{part} is no part of {self.count} samples")
        return msgspec.structs.replace(self, first_index=self.first_index + start, count=stop - start)

    def table_for(self, spec: ModelSpec) -> StepTable:
        """The rows that it runs; the same object for the same settings."""
        return _table(spec, self.chain, self.depth) if self.table is None else self.table

    def addresses(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """The seed and index of each sample's noise, (count,) each."""
        assert self.seed is not None
        return np.full(self.count, self.seed, np.uint64), self._indices()

    def label_numbers(self, spec: ModelSpec) -> Labels | None:
        """The label of each sample, (count,); None of an unconditional model."""
        if not spec.num_classes:
            return None
        return np.array(self.labels or range(spec.num_classes), np.int64)[
            self._turns(len(self.labels) or spec.num_classes)
        ]

    def scales(self) -> NDArray[np.float32] | None:
        """The scale of each sample's guidance, (count,); None without."""
        if not self.guidance:
            return None
        return np.array(self.guidance, np.float32)[self._turns(len(self.guidance))]

    def _turns(self, length: int) -> NDArray[np.uint64]:
        """Each sample's index modulo a length."""
        return self._indices() % np.uint64(length)

    def _indices(self) -> NDArray[np.uint64]:
        return np.uint64(self.first_index) + np.arange(self.count, dtype=np.uint64)

    def to_builtins(self) -> dict[str, Any]:
        """As JSON has it. Raises SettingError for a table of a caller's own, which has no such form."""
        if self.table is not None:
            raise SettingError("a table of your own has no form in JSON: say steps, solver and spacing")
        fields: dict[str, Any] = msgspec.to_builtins(self)
        del fields["table"]
        for name in ("share_until", "depth"):  # which most requests, and those of older versions, do not have
            if fields[name] is None:
                del fields[name]
        return fields

    @classmethod
    def from_builtins(cls, fields: Any, source: str) -> "Request":
        """From what JSON holds; `source` names it in errors. Raises DataError where it is no request."""
        try:
            return msgspec.convert(fields, cls)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise DataError(f"{source} is not a request: {first_line(error)}") from error


def make_request(spec: ModelSpec, count: int, **keywords: Unpack[Keywords]) -> Request:
    """The checked request of keyword arguments, as `Sampler.sample` takes them.

    Raises SettingError where one is of another type or out of range.
    """
    return unchecked_request(count, **keywords).checked(spec)


def unchecked_request(
    count: int,
    *,
    steps: int | None = None,
    solver: AskedSolver | None = None,
    eta: float | None = None,
    spacing: Spacing | None = None,
    timesteps: Sequence[int] | None = None,
    table: StepTable | None = None,
    seed: int | None = None,
    first_index: int = 0,
    labels: Label | Sequence[Label] | Labels | None = None,
    guidance: Guidance | None = None,
    share_until: int | None = None,
    depth: int | None = None,
) -> Request:
    """The request of keyword arguments, not checked for a model yet.

    labels, guidance: one for all, or a sequence with one for each of the samples.

    Raises SettingError where one is of another type.
    """
    count, first_index = _whole("count", count), _whole("first_index", first_index)
    return Request(
        count=count,
        steps=None if steps is None else _whole("steps", steps),
        solver=None if solver is None else _word("solver", solver),  # type: ignore[arg-type]
        eta=None if eta is None else _number("eta", eta),
        spacing=None if spacing is None else _word("spacing", spacing),  # type: ignore[arg-type]
        timesteps=None if timesteps is None else tuple(_whole("a timestep", t) for t in timesteps),
        seed=None if seed is None else _whole("seed", seed),
        first_index=first_index,
        labels=_each("label", labels, count, first_index),
        guidance=tuple(
            _number("guidance", scale) for scale in _each("guidance scale", guidance, count, first_index)
        ),
        share_until=None if share_until is None else _whole("share_until", share_until),
        depth=None if depth is None else _whole("depth", depth),
        table=table,
    )


@lru_cache(maxsize=64)
def _table(spec: ModelSpec, settings: ChainSettings, depth: int | None) -> StepTable:
    table = spec.step_table(settings)
    return table if depth is None else table.below(depth)


def _each(noun: str, given: Any, count: int, first_index: int) -> tuple[Any, ...]:
    """One for all, or one for each sample, as they take their turns by sample index."""
    if given is None:
        return ()
    if isinstance(given, np.ndarray | np.number):
        given = given.tolist()
    if isinstance(given, int | float | str | bytes):
        return (given,)
    try:
        values = tuple(value.item() if isinstance(value, np.number) else value for value in given)
    except TypeError as error:
        raise SettingError(
            f"give one {noun} for all images, or a sequence with one for each, and not {given!r}"
        ) from error
    if len(values) != count:
        raise SettingError(
            f"{plural(len(values), noun)} for {plural(count, 'image')}: give one for all of them, or one for each"
        )
    turn = first_index % max(count, 1)
    return values[count - turn :] + values[: count - turn]


def _whole(name: str, value: Any) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise SettingError(f"{name} must be a whole number, not {value!r}")
    return int(value)


def _number(name: str, value: Any) -> float:
    if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
        raise SettingError(f"{name} must be a number, not {value!r}")
    try:
        return float(value)
    except OverflowError as error:
        raise SettingError(f"{name} must be a number, not {value!r}") from error


def _word(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise SettingError(f"{name} must be a name, not {value!r}")
    return value
