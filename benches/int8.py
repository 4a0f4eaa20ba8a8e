"""What 8-bit integers give a trained network: `python -m benches.int8 [digits|mnist]` makes the tables of docs/int8.md.

Its convolutions are quantised by onnxruntime.quantization, calibrated on whole chains. `make demo` and `make mnist`
make the models. OpenVINO's rows are there where it is installed.
"""

import argparse
import datetime
import importlib.util
import logging
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from benches.quality.data import Real, digits, mnist
from benches.quality.judge import train_judge
from benches.timing import interleave, median, ratio
from ddpm_deploy.evaluate.frechet import frechet_distance, normal_of
from ddpm_deploy.export.graph import describe
from ddpm_deploy.machine import cpu_threads
from ddpm_deploy.model_file import open_model
from ddpm_deploy.runtime.backends.onnxruntime import OrtNetwork
from ddpm_deploy.runtime.images import to_uint8
from ddpm_deploy.runtime.network import HostNetwork
from ddpm_deploy.runtime.parity import Trajectory, record, teacher_forced
from ddpm_deploy.runtime.protocols import Network
from ddpm_deploy.runtime.sampler import Sampler
from ddpm_deploy.spec import ModelSpec
from ddpm_deploy.words import AskedSolver

_DOCS: Final = Path(__file__).parent.parent / "docs" / "int8.md"
_MARK: Final = "<!-- made by python -m benches.int8 -->"
_REAL: Final = {"digits": digits, "mnist": mnist}
_RANGES: Final = ((0, 10), (10, 100), (100, 1000))
_BATCH: Final = 16
_CALIBRATED: Final = 100  # timesteps of the chains that the ranges of the activations are taken from
_SEEDS: Final = range(5)
_STUDENT: Final = 2.776  # of 95 %, two-sided, for the mean of five
_FAST: Final[tuple[AskedSolver, int]] = ("fast", 20)
# Of MNIST less, as its images take forty times as long.
_CHAINS: Final[dict[str, tuple[tuple[AskedSolver, int], ...]]] = {
    "digits": (_FAST, ("ddpm", 50)),
    "mnist": (_FAST,),
}
_HIGH: Final = "high resolution float"
_JUDGED: Final = (_HIGH, "ends float")  # whose samples are judged
_Wanted = Callable[["Convolution"], bool]


@dataclass(frozen=True)
class Convolution:
    """One of the graph, by name. kernel: its width. pixels: of the image it reads, as a share of the whole image's."""

    name: str
    kernel: int
    pixels: float

    @property
    def is_end(self) -> bool:
        """Whether it is the network's first or last."""
        return self.name in ("conv_in", "conv_out")


# What stays in float32, by the name of the variant.
_VARIANTS: Final[dict[str, _Wanted]] = {
    "all convolutions": lambda each: False,
    "ends float": lambda each: each.is_end,
    "1×1 and ends float": lambda each: each.is_end or each.kernel == 1,
    _HIGH: lambda each: each.is_end or each.pixels >= 1,
}


def convolutions(model: Any, spec: ModelSpec) -> list[Convolution]:
    """The convolutions of an onnx.ModelProto that ddpm-export made."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    shapes = {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.value_info)
    }
    weights = {tensor.name: tensor.dims for tensor in graph.initializer}
    whole = spec.image_shape[1] * spec.image_shape[2]
    return [
        Convolution(
            node.name, weights[node.input[1]][2], shapes[node.input[0]][2] * shapes[node.input[0]][3] / whole
        )
        for node in graph.node
        if node.op_type == "Conv"
    ]


class _Questions:
    """What a recorded chain was asked, a timestep at a time, as onnxruntime.quantization reads it."""

    def __init__(self, trajectory: Trajectory) -> None:
        self._feeds = self._all(trajectory)

    @staticmethod
    def _all(trajectory: Trajectory) -> Iterator[dict[str, Any]]:
        spec = trajectory.spec
        table = spec.embedding.table(spec.timesteps).astype(np.float32)
        for t, x in zip(trajectory.timesteps, trajectory.x, strict=True):
            feed = {"x": x, "temb": np.repeat(table[t][None], len(x), axis=0)}
            yield feed | ({"y": trajectory.labels} if spec.num_classes else {})

    def get_next(self) -> dict[str, Any] | None:
        """The next, None after the last."""
        return next(self._feeds, None)


def quantise(source: Path, path: Path, floats: Sequence[str], trajectory: Trajectory) -> None:
    """Write an .onnx with Q/DQ about its convolutions but for `floats`: weights by channel, ranges by min-max."""
    from onnxruntime import quantization

    quantization.quantize_static(
        str(source),
        str(path),
        _Questions(trajectory),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        op_types_to_quantize=["Conv"],
        nodes_to_exclude=list(floats),
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    describe(path, trajectory.spec)


class _OpenVino(HostNetwork):
    """An .onnx in OpenVINO, for one batch. hint: the precision of what is not quantised."""

    def __init__(self, path: Path, hint: str, batch: int) -> None:
        super().__init__(open_model(path).spec, batch)
        import openvino

        core = openvino.Core()
        model = core.read_model(str(path))
        model.reshape({tensor.name: [batch, *tensor.shape] for tensor in self.spec.inputs})
        _take_norms_apart(model)
        settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": cpu_threads()}
        self._request: Any = core.compile_model(model, "CPU", settings).create_infer_request()

    def predict(self, batch: int) -> None:
        """For all of its rows: it is compiled for these."""
        (found,) = self._request.infer(
            {each.name: self.memory[each.name] for each in self.spec.inputs}
        ).values()
        self.memory["prediction"][:] = found


def _take_norms_apart(model: Any) -> None:
    """MVN and a scale and a shift in place of GroupNormalization: in bf16 OpenVINO is up to 1.6 times as fast so."""
    from openvino import opset13 as ops

    for node in model.get_ops():
        if node.get_type_name() == "GroupNormalization":
            x, scale, bias = (node.input_value(place) for place in range(3))
            said = node.get_attributes()
            flat = ops.reshape(x, np.array([0, said["num_groups"], -1]), True)
            normed = ops.mvn(flat, np.array([2]), True, said["epsilon"], "inside_sqrt")
            whole = ops.reshape(normed, ops.shape_of(x), False)
            by_channel = np.array([-1, 1, 1])
            scaled = ops.multiply(whole, ops.reshape(scale, by_channel, False))
            node.output(0).replace(ops.add(scaled, ops.reshape(bias, by_channel, False)).output(0))


def _networks(files: Mapping[str, Path]) -> dict[str, Network]:
    """Each file in each engine; the first is the float32 one."""
    networks: dict[str, Network] = {
        f"{name}, ONNX Runtime": OrtNetwork(open_model(path), max_batch=_BATCH)
        for name, path in files.items()
    }
    if importlib.util.find_spec("openvino"):
        float32, *_ = files.values()
        networks["float32, OpenVINO"] = _OpenVino(float32, "f32", _BATCH)
        networks["bf16, OpenVINO"] = _OpenVino(float32, "bf16", _BATCH)
        for name, path in list(files.items())[1:]:
            networks[f"{name}, OpenVINO, the rest bf16"] = _OpenVino(path, "bf16", _BATCH)
    return networks


def _errors(trajectory: Trajectory, network: Network) -> list[str]:
    """The largest relative RMS error in each range of t."""
    steps = teacher_forced(trajectory, network)
    return [
        f"{max(step.relative_rms for step in steps if low <= step.timestep < high):.1e}"
        for low, high in _RANGES
    ]


def _table(files: Mapping[str, Path], asked: Trajectory) -> str:
    networks = _networks(files)
    times = interleave({name: partial(each.enqueue, _BATCH) for name, each in networks.items()}, 1, 40)
    first = next(iter(times.values()))
    fastest = min(
        (name for name in times if not name.startswith(tuple(_VARIANTS))),
        key=lambda name: median(times[name]),
    )
    lines = [
        "| what | "
        + " | ".join(f"t {low}–{high - 1}" for low, high in _RANGES)
        + " | ms | × float32, ONNX Runtime | "
        f"× {fastest} |",
        "| --- |" + " --- |" * (len(_RANGES) + 3),
    ]
    for name, network in networks.items():
        cells = [name, *_errors(asked, network), f"{median(times[name]) * 1e3:.2f}"]
        cells += [ratio(first, times[name]), f"{median(times[fastest]) / median(times[name]):.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
        network.close()
    return "\n".join(lines) + "\n"


def _distances(real: Real, files: Mapping[str, Path]) -> str:
    """The Fréchet distance of each file's samples, on the same noise, and its paired difference to the first's."""
    judge = train_judge(real.known)
    reference = normal_of(judge.features(real.reference.images))
    lines = ["| chain | what | Fréchet distance | difference |", "| --- | --- | --- | --- |"]
    for solver, steps in _CHAINS[real.name]:
        base = None
        for name, path in files.items():
            with Sampler.load(path) as sampler:
                guidance = 2.0 if sampler.spec.null_class else None
                found = []
                for seed in _SEEDS:
                    images = sampler.sample(
                        real.count, solver=solver, steps=steps, seed=seed, guidance=guidance
                    )
                    made = judge.features(to_uint8(images).transpose(0, 3, 1, 2))
                    found.append(frechet_distance(reference, normal_of(made)))
            distances = np.array(found)
            base = distances if base is None else base
            apart = distances - base
            half = _STUDENT * apart.std(ddof=1) / len(apart) ** 0.5
            said = "" if name == next(iter(files)) else f"{apart.mean():+.2f} ± {half:.2f}"
            lines.append(f"| {solver}, {steps} steps | {name} | {distances.mean():.2f} | {said} |")
            print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def _measure(real: Real, folder: Path) -> str:
    model = onnx.load(real.model)
    spec = open_model(real.model).spec
    network = OrtNetwork(open_model(real.model), max_batch=_BATCH)
    known = record(network, count=_BATCH, seed=1, keep=_CALIBRATED)
    asked = record(network, count=_BATCH, seed=0, keep=200)
    network.close()
    found = convolutions(model, spec)
    files, counts = {"float32": real.model}, []
    for number, (name, stays) in enumerate(_VARIANTS.items()):
        floats = [each.name for each in found if stays(each)]
        files[name] = folder / f"{number}.onnx"
        quantise(real.model, files[name], floats, known)
        counts.append(f"{name}: {len(found) - len(floats)}")
    table = _table(files, asked)
    distances = _distances(real, {name: files[name] for name in ("float32", *_JUDGED)})
    return (
        f"### {real.name}, {spec.image_shape[1]}×{spec.image_shape[2]}, batch {_BATCH}\n\n"
        f"Of {len(found)} convolutions these are quantised: {'; '.join(counts)}. Errors are the largest in each range "
        "of t, RMS relative to that of the prediction.\n\n"
        f"{table}\n{real.count} images of each of {len(_SEEDS)} seeds in ONNX Runtime, the same noise for all:\n\n"
        f"{distances}"
    )


def main() -> None:
    """Measure the models that were named, both where none was, and write the page behind the mark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[*_REAL, "all"], default="all")
    asked: Any = parser.parse_args().names
    names = [*_REAL] if "all" in asked else asked
    logging.disable(logging.WARNING)  # of what quantization would have preferred
    with tempfile.TemporaryDirectory() as folder:
        parts = [_measure(_REAL[name](), Path(folder)) for name in names]
    versions = [
        f"{package} {metadata.version(package)}"
        for package in ("onnxruntime", "openvino")
        if importlib.util.find_spec(package)
    ]
    said = (
        f"Measured {datetime.date.today().isoformat()}: {cpu_threads()} cores, {platform.machine()}, "
        f"{', '.join(versions)}.\n\n"
    )
    _DOCS.write_text(_DOCS.read_text().split(_MARK)[0] + _MARK + "\n\n" + said + "\n".join(parts))
    print(f"wrote {_DOCS}")


if __name__ == "__main__":
    main()
