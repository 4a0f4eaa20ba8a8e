"""A network that somebody else wrote → one that the runtime can ask, checked before anything is written.

Nothing is known of it but that it is forward(x, t), or forward(x, temb), and takes y where the model has classes. What
is found here would otherwise be a model that runs, and makes the wrong images.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from ddpm_deploy.embedding import TimestepItself
from ddpm_deploy.errors import ArtefactError, first_line
from ddpm_deploy.files import show
from ddpm_deploy.importers.imported import with_provenance
from ddpm_deploy.spec import ModelSpec

Form = Literal["int64", "float32", "column", "temb"]

# What the network is given of temb (B, D), by the name of its form.
_FORMS: Final[dict[Form, Callable[[Tensor], Tensor]]] = {
    "int64": lambda temb: temb[:, 0].to(torch.int64),
    "float32": lambda temb: temb[:, 0].clone(),
    "column": lambda temb: temb.clone(),
    "temb": lambda temb: temb.clone(),
}
FORMS: Final[dict[Form, str]] = {
    "int64": "t (B,) in int64",
    "float32": "t (B,) in float32",
    "column": "t (B, 1) in float32",
    "temb": "the embedding (B, D)",
}

# Relative to the RMS of a row. Two calls on the same numbers are the same to the bit on a CPU, but for what sums in any
# order; batches of two sizes are summed in different orders.
_SAME_CALL: Final = 1e-6
_SAME_ROW: Final = 1e-4


class OwnNetwork(nn.Module):
    """Another's network as the runtime asks it: forward(x, temb) and, of a class-conditional one, y.

    network: theirs. form: what it is given of temb.
    """

    def __init__(self, network: nn.Module, form: Form) -> None:
        super().__init__()
        self.network = network
        self.form: Form = form

    @property
    def float32_islands(self) -> Mapping[str, str]:
        """As the network says (`export.precision`), by the names here."""
        said: Mapping[str, str] = getattr(self.network, "float32_islands", {})
        return {f"network.{name}".removesuffix("."): reason for name, reason in said.items()}

    def forward(self, x: Tensor, temb: Tensor, y: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), temb (B, D), y (B,) → (B, C or 2C, H, W) float32."""
        # Copies, as a network may write into what it is given, and that is the chain's own memory.
        inputs = [x.clone(), _FORMS[self.form](temb)] + ([] if y is None else [y.clone()])
        return _tensor(self.network(*inputs)).float()


def own_name(name: str) -> str:
    """The name that a part of an OwnNetwork has in the network itself."""
    return name.removeprefix("network.")


def _tensor(result: Any) -> Tensor:
    """What a network gives: itself, the `.sample` of an output of diffusers', or the only one of a tuple."""
    if isinstance(result, tuple | list) and len(result) == 1:
        return _tensor(result[0])
    result = getattr(result, "sample", result) if not isinstance(result, Tensor) else result
    if not isinstance(result, Tensor):
        what = f"{type(result).__name__} of {len(result)}" if isinstance(result, tuple | list) else None
        raise ArtefactError(
            f"the network gives a {what or type(result).__name__}, and a tensor is needed: return the prediction alone"
        )
    return result


def adapt(network: nn.Module, spec: ModelSpec) -> tuple[OwnNetwork, ModelSpec]:
    """The network as the runtime asks it, in float32, on the CPU and in evaluation mode, and its spec with the digest
    of its weights where that has none.

    Raises ArtefactError where the two do not belong together, or the network is none that can be sampled by rows.
    """
    if isinstance(network, OwnNetwork):
        return network, spec
    try:
        network = network.cpu().float().eval()
    except Exception as error:  # their own code may be called
        raise ArtefactError(f"the network cannot be moved to the CPU: {_said(error)}") from error
    _require_plain(network)
    with torch.no_grad():
        own, once = _in_form(network, spec)
        _require_sound(own, spec, once)
    if not spec.provenance.digest.strip("0"):
        source = spec.provenance.source or type(network).__name__
        spec = with_provenance(network, spec, source)
    return own, spec


def _require_plain(network: nn.Module) -> None:
    """Raise ArtefactError where its modes or its weights are not those of a network that predicts."""
    training = next((name for name, module in network.named_modules() if module.training), None)
    if training is not None:
        raise ArtefactError(
            f"{show(training) or 'the network'} stays in training mode after eval(): let its train() follow mode=False"
        )
    for name, tensor in _weights(network):
        if tensor.is_complex() or tensor.is_sparse or tensor.is_quantized:
            raise ArtefactError(
                f"{show(name)} is not a dense tensor of real numbers, which alone can be exported"
            )


def _weights(network: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from network.named_parameters()
    yield from network.named_buffers()


def _in_form(network: nn.Module, spec: ModelSpec) -> tuple[OwnNetwork, Tensor]:
    """The network with the first form of t that it takes and gives a prediction of the right shape for, and that."""
    failed: ArtefactError | None = None
    for form in _forms(spec):
        own = OwnNetwork(network, form).eval()
        try:
            once = _ask(own, spec)
            _require_shape(once, spec)
        except ArtefactError as error:
            # The first says most, but where it is that t was none it could take.
            failed = failed or error
        else:
            return own, once
    assert failed
    raise failed


def _forms(spec: ModelSpec) -> list[Form]:
    if not isinstance(spec.embedding, TimestepItself):
        return ["temb"]
    return ["int64", "float32", "column"] if spec.embedding.whole else ["float32", "column"]


def _require_shape(prediction: Tensor, spec: ModelSpec) -> None:
    """Raise ArtefactError unless a prediction for two images is as the spec says."""
    got, wanted = tuple(prediction.shape), (2, *spec.prediction_shape)
    if got == wanted:
        return
    channels = spec.image_shape[0]
    if got[:1] + got[2:] == wanted[:1] + wanted[2:]:
        if got[1] == 2 * channels:
            raise ArtefactError(
                f"the network gives {got[1]} channels for images of {channels}, as one that learned its variance, and "
                f'the spec says variance = "{spec.variance}": set "learned_range"'
            )
        if got[1] == channels:
            raise ArtefactError(
                f'the spec says variance = "learned_range", for which the network must give {2 * channels} channels, '
                f'and it gives {channels}: set "fixed_large" or "fixed_small"'
            )
    if len(got) < 2:
        raise ArtefactError(
            f"the network gives one number{' an image' * len(got)}, as a loss, and a prediction of {wanted} is needed: "
            "name a function that makes the network itself, not what trains or samples it"
        )
    raise ArtefactError(
        f"the network gives {got} for 2 images, and {wanted} is needed: image_shape in the spec is (C, H, W), here "
        f"{spec.image_shape}"
    )


def _ask(
    own: OwnNetwork,
    spec: ModelSpec,
    *,
    seeds: tuple[int, ...] = (0, 1),
    timesteps: tuple[int, ...] | None = None,
    labels: tuple[int, ...] | None = None,
) -> Tensor:
    """The prediction for noise of these seeds, one a row, at one timestep each (None: in the middle)."""
    timesteps = timesteps or (spec.timesteps // 2,) * len(seeds)
    x = torch.stack(
        [torch.randn(spec.image_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    temb = torch.from_numpy(spec.embedding.table(spec.timesteps)[list(timesteps)])
    inputs = [x, temb]
    if spec.num_classes:
        inputs.append(torch.tensor(labels or [0] * len(seeds)))
    try:
        return own(*inputs)  # type: ignore[no-any-return]
    except ArtefactError:
        raise
    except Exception as error:  # it is their own code
        label = f" and the labels {tuple(inputs[2].tolist())}" if spec.num_classes else ""
        numbers = temb[:, 0].to(torch.int64) if own.form == "int64" else temb[:, 0]
        half = "; make it in float32, as by use_fp16=False" if "Half" in str(error) else ""
        told = f", {tuple(numbers.tolist())}" if own.form != "temb" else ""
        raise ArtefactError(
            f"the network fails on x {tuple(x.shape)} and {FORMS[own.form]}{told}{label}: {_said(error)}{half}; it "
            "must be forward(x, t), with y where num_classes in the spec is not 0, for images of its image_shape"
        ) from error


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _require_sound(own: OwnNetwork, spec: ModelSpec, once: Tensor) -> None:
    """Raise ArtefactError where the network is not a function of each row alone, or not of t and y.

    once: its prediction for two rows.
    """
    if not once.isfinite().all():
        raise ArtefactError("the network's prediction for noise is not finite: its weights are broken")
    alone = _ask(own, spec, seeds=(0,))
    if (by := _difference(_ask(own, spec, seeds=(0,)), alone)) > _SAME_CALL:
        raise ArtefactError(
            f"two calls of the network on the same numbers differ by {by:.0e} of their RMS: something in it is random "
            "or remembers, as dropout by F.dropout without training=self.training"
        )
    _require_rows(own, spec, once, alone)
    _require_dependence(own, spec)


def _require_rows(own: OwnNetwork, spec: ModelSpec, once: Tensor, alone: Tensor) -> None:
    """Raise ArtefactError where an image hangs on what is beside it, or on whether anything is."""
    beside = _ask(own, spec, seeds=(0, 2), timesteps=(spec.timesteps // 2, spec.timesteps - 1))
    if (by := _difference(beside[:1], once[:1])) > _SAME_ROW:
        raise ArtefactError(
            f"the rows of a batch depend on one another: an image changes by {by:.0e} of its RMS with the image beside "
            "it, as by a batch norm that still trains or keeps no running statistics"
        )
    if (by := _difference(alone, once[:1])) > _SAME_ROW:
        raise ArtefactError(
            f"the network's prediction for an image alone and in a batch differs by {by:.0e} of its RMS: it must not "
            "depend on the batch"
        )


def _require_dependence(own: OwnNetwork, spec: ModelSpec) -> None:
    """Raise ArtefactError where all timesteps, or all labels, are one to the network."""
    last = spec.timesteps - 1
    ends = _ask(own, spec, seeds=(0, 0), timesteps=(0, last))
    if last and torch.equal(ends[0], ends[1]):
        raise ArtefactError(
            f"the network's prediction does not depend on the timestep: it is the same at t = 0 and t = {last}; are "
            "these trained weights, and are scale and offset of the embedding in the spec as it was trained?"
        )
    if spec.num_labels > 1:
        classes = _ask(own, spec, seeds=(0, 0), labels=(0, spec.num_labels - 1))
        if torch.equal(classes[0], classes[1]):
            raise ArtefactError(
                f"the network's prediction does not depend on its label: it is the same for 0 and {spec.num_labels - 1}"
            )


def _difference(got: Tensor, wanted: Tensor) -> float:
    """RMS of the difference, relative to that of what is wanted; infinite where it is not finite."""
    if torch.equal(got, wanted):
        return 0.0
    ratio = (got.double() - wanted.double()).square().mean() / wanted.double().square().mean()
    return ratio.sqrt().nan_to_num(nan=float("inf")).item()
