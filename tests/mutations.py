"""Hostile files: mutations of whole ones, each run in a process of its own under limits.

    python -m tests.mutations            2,000 of them, and the table of docs/reliability.md
    python -m tests.mutations --count 50 --seed 7

A case is a use of a file, and a number that says how the file is spoilt. It passes where the product answers with
one typed error or with a whole result, within its time and memory, and leaves nothing else behind.
"""

import argparse
import collections
import contextlib
import importlib
import io
import json
import os
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ddpm_deploy.engine.build import EngineSettings, build_engine
from ddpm_deploy.plan import spec_place
from ddpm_deploy.runtime.sampler import Sampler

SECONDS: Final = 60
MEMORY: Final = 3 << 30  # bytes beyond what the process has at its start


@dataclass(frozen=True)
class Use:
    """What people do with a file.

    kind: of file, by its suffix, or of some its whole name. beside: kinds of other files of its folder. words: of the
    command; CASE, FOLDER and OUT stand for the file, the folder it is in,
    and what is written beside it, and the kind of another file for a whole one of that. outputs: of a whole result.
    records: of a training, which stay whatever becomes of it. needs_gpu: and ends with an error where there is none.
    """

    kind: str
    words: str
    outputs: tuple[str, ...] = ()
    records: tuple[str, ...] = ()
    needs_gpu: bool = False
    beside: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the file is called."""
        return f"case{self.kind}" if self.kind.startswith(".") else self.kind


_QUICK: Final = "--threads 1 -o OUT.npz"
_TRAINING: Final = "-o OUT.pt --sample-every 0 --batch-size 4 --workers 1 --device cpu"
_NEW: Final = f"--preset digits --image-size 8 --steps 2 {_TRAINING}"
_TRAINED: Final = {"outputs": ("out.pt",), "records": ("out.train",)}
_DIFFUSERS: Final = ("config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors")
# Every command that reads a file, with each kind of file that it reads.
USES: Final = (
    Use(".npz", f"train CASE {_NEW}", **_TRAINED),
    Use(".npz", f"train CASE --labels {_NEW}", **_TRAINED),
    Use(".png", f"train FOLDER {_NEW}", **_TRAINED),
    Use(".tif", f"train FOLDER {_NEW}", **_TRAINED),
    Use(".zip", f"train CASE --labels {_NEW}", **_TRAINED),
    Use(".idx", f"train CASE {_NEW}", **_TRAINED),
    Use(".pt", "train digits --resume CASE --steps 41 -o OUT.pt --sample-every 0 --device cpu", **_TRAINED),
    Use(".pt", "export CASE -o OUT.onnx", ("out.onnx", "out.proof.npz")),
    Use(".onnx", "export CASE --rtx -o OUT.plan", ("out.plan", "out.plan.sha256")),
    Use(".pt", "verify CASE .onnx --count 1 --steps 2 --threads 1"),
    Use(".onnx", "verify .onnx CASE --count 1 --steps 2 --threads 1"),
    Use(".onnx", "verify CASE --proof .proof.npz --threads 1"),
    Use(".proof.npz", "verify .onnx --proof CASE --threads 1"),
    Use(".plan", "verify CASE --proof .proof.npz", needs_gpu=True),
    Use(".pt", f"run CASE --steps 2 --count 2 {_QUICK}", ("out.npz",)),
    Use(".onnx", f"run CASE --steps 2 --count 2 {_QUICK}", ("out.npz",)),
    Use(".plan", f"run CASE --steps 2 {_QUICK.replace('--threads 1', '')}", ("out.npz",), needs_gpu=True),
    Use(".png", "replay .onnx CASE --threads 1"),
    Use(".snapshot.npz", f"resume .onnx CASE {_QUICK}", ("out.npz",)),
    Use(".pt", "inspect CASE"),
    Use(".onnx", "inspect CASE"),
    Use(".plan", "inspect CASE"),
    Use(".json", "(its ModelSpec)"),
    Use(".openai.pt", "(another's network)"),
    *(
        Use(kind, "(another's network, in a folder)", beside=tuple({*_DIFFUSERS} - {kind}))
        for kind in _DIFFUSERS
    ),
    Use(".flags.txt", "(another's flags)"),
    Use(".spec.toml", "(the spec of a network of one's own)"),
)
Rng = np.random.Generator


def flip(data: bytearray, rng: Rng) -> bytearray:
    """Flip up to eight bits."""
    for place in rng.integers(0, len(data), rng.integers(1, 9)):
        data[place] ^= 1 << int(rng.integers(8))
    return data


def flip_at_the_ends(data: bytearray, rng: Rng) -> bytearray:
    """Flip bits where headers and directories are."""
    edge = min(len(data), 2048)
    for place in rng.integers(0, edge, rng.integers(1, 5)):
        data[int(place) if rng.integers(2) else len(data) - 1 - int(place)] ^= 1 << int(rng.integers(8))
    return data


def cut(data: bytearray, rng: Rng) -> bytearray:
    """Lose the end, the beginning, or a piece in the middle."""
    a, b = sorted(int(place) for place in rng.integers(0, len(data), 2))
    return (data[:a], data[b:], data[:a] + data[b:])[rng.integers(3)] or data[:1]


def splice(data: bytearray, rng: Rng) -> bytearray:
    """Copy one piece over another, or in between."""
    a, b, to = (int(place) for place in rng.integers(0, len(data), 3))
    piece = data[min(a, b) : max(a, b)][:4096]
    return data[:to] + piece + data[to + (len(piece) if rng.integers(2) else 0) :]


def lie(data: bytearray, rng: Rng) -> bytearray:
    """Put a number where a size may stand: huge, zero or negative, in the ways that files write numbers."""
    value = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)[rng.integers(8)]
    written = (
        struct.pack("<I", value & 0xFFFFFFFF),
        struct.pack("<Q", value),
        struct.pack(">I", value & 0xFFFFFFFF),
        bytes([0xFF] * 9 + [0x01]),
        str(value).encode(),
    )[rng.integers(5)]
    edge = min(len(data), 4096)
    to = int(rng.choice([rng.integers(edge), len(data) - 1 - rng.integers(edge), rng.integers(len(data))]))
    data[to : to + len(written)] = written
    return data


def blank(data: bytearray, rng: Rng) -> bytearray:
    """Zeros or noise over a piece."""
    a, length = int(rng.integers(len(data))), int(rng.integers(1, 2000))
    piece = rng.bytes(length) if rng.integers(2) else bytes(length)
    data[a : a + length] = piece
    return data


MUTATIONS: Final[tuple[Callable[[bytearray, Rng], bytearray], ...]] = (
    flip,
    flip_at_the_ends,
    cut,
    splice,
    lie,
    blank,
)


def mutated(whole: bytes, rng: Rng) -> bytes:
    """One to three mutations, one after another."""
    data = bytearray(whole)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        data = MUTATIONS[rng.integers(len(MUTATIONS))](data, rng)
    return bytes(data)


def mutated_inside(kind: str, whole: bytes, rng: Rng) -> bytes:
    """Mutate what a file holds and make its checksums right again, as somebody with intent would."""
    match kind:
        case ".pt" | ".openai.pt" | ".npz" | ".proof.npz" | ".snapshot.npz" | ".zip":
            return _mutated_member(whole, rng)
        case ".onnx":
            return mutated(whole[: whole.rindex(b"\x12ddpm_deploy.sha256") - 3], rng)
        case ".png":
            return _mutated_chunk(whole, rng)
        case ".plan":
            return _mutated_name(whole, rng)
        case (
            ".tif" | ".idx" | ".flags.txt" | ".spec.toml" | "diffusion_pytorch_model.safetensors"
        ):  # they have none
            return mutated(whole, rng)
    return _mutated_value(whole, rng)


def _mutated_name(whole: bytes, rng: Rng) -> bytes:
    """Of an engine: another value in its ModelSpec, where there is room for it."""
    place = spec_place(whole)
    assert place
    text = _mutated_value(whole[place], rng)[: place.stop - place.start]
    return whole[: place.start] + text.ljust(place.stop - place.start) + whole[place.stop :]


def _mutated_member(whole: bytes, rng: Rng) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive, zipfile.ZipFile(out, "w") as copy:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("data.pkl")]
        chosen = pickles[0] if pickles and rng.integers(2) else names[rng.integers(len(names))]
        for name in names:
            data = archive.read(name)
            copy.writestr(name, mutated(data, rng) if name == chosen and data else data)
    return out.getvalue()


def _mutated_chunk(whole: bytes, rng: Rng) -> bytes:
    chunks, place = [], 8
    while place < len(whole):
        (length,) = struct.unpack(">I", whole[place : place + 4])
        chunks.append((whole[place + 4 : place + 8], whole[place + 8 : place + 8 + length]))
        place += length + 12
    chosen = rng.integers(len(chunks) - 1)
    out = whole[:8]
    for i, (name, chunk) in enumerate(chunks):
        data = mutated(chunk, rng) if i == chosen else chunk
        out += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return out


def _mutated_value(whole: bytes, rng: Rng) -> bytes:
    """Of a JSON: another value in one place."""
    content = json.loads(whole)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(content)
    node, key = places[rng.integers(len(places))]
    values: tuple[Any, ...] = (0, -1, 1, 2**31, 2**63, 2**70, 1e308, -1e-308, 0.5, "", "x" * 5000, None, True)
    values += ([], {}, [0] * 1000, 97, 100_000, 16_384)
    node[key] = values[rng.integers(len(values))]
    return json.dumps(content).encode()


def whole_files(checkpoint: Path, onnx: Path, folder: Path) -> dict[str, Path]:
    """A whole file of each kind."""
    from ddpm_deploy.cli import main
    from ddpm_deploy.model_file import open_model

    files = {".pt": checkpoint, ".onnx": onnx, ".proof.npz": onnx.with_suffix(".proof.npz")}
    files |= {kind: folder / f"whole{kind}" for kind in (".npz", ".png", ".json", ".plan", ".snapshot.npz")}
    files |= {kind: folder / f"whole{kind}" for kind in (".tif", ".zip", ".idx")}
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8)
    np.savez(files[".npz"], images=images, labels=np.arange(20) % 3)
    Image.fromarray(images[0].astype(np.float32)).save(files[".tif"])
    _write_archive(files[".zip"], images)
    files[".idx"].write_bytes(b"\0\0\x08\3" + struct.pack(">III", *images.shape) + images.tobytes())
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        main(
            ["run", "-q", str(onnx), "--steps", "5", "--count", "4", "--seed", "1", "-o", str(files[".png"])]
        )
    files[".json"].write_text(open_model(onnx).spec.to_json())
    build_engine(open_model(onnx), files[".plan"], EngineSettings(flavour="tensorrt-rtx"))
    with Sampler.load(onnx, threads=1) as sampler:
        for step, *_ in sampler.stream(2, steps=5, seed=1):
            if step == 2:
                sampler.snapshot().save(files[".snapshot.npz"])
    return files | _foreign_files(folder)


def _foreign_files(folder: Path) -> dict[str, Path]:
    """Of other people's code: a state dict, a folder of diffusers, flags, a spec."""
    import diffusers

    from ddpm_deploy.importers.template import TEMPLATE
    from tests.golden import openai_networks
    from tests.importing import named_weights

    files = {kind: folder / f"whole{kind}" for kind in (".openai.pt", ".flags.txt", ".spec.toml")}
    with np.load(openai_networks.FILE) as golden:
        shapes = json.loads(golden["guided shapes"].tobytes())
    torch.save(named_weights({name: tuple(shape) for name, shape in shapes.items()}), files[".openai.pt"])
    flags = " ".join(f"--{name} {value}" for name, value in openai_networks.CASES["guided"].flags.items())
    files[".flags.txt"].write_text(f'MODEL_FLAGS="{flags}"\npython scripts/image_sample.py $MODEL_FLAGS\n')
    files[".spec.toml"].write_text(TEMPLATE)
    diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        layers_per_block=1,
    ).save_pretrained(folder / "diffusers")
    diffusers.DDIMScheduler(timestep_spacing="trailing").save_pretrained(folder / "diffusers")
    return files | {kind: folder / "diffusers" / kind for kind in _DIFFUSERS}


def _write_archive(path: Path, images: NDArray[np.uint8]) -> None:
    """A .zip of images, with labels as StyleGAN's tools write them."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for i, pixels in enumerate(images):
            picture = io.BytesIO()
            Image.fromarray(pixels).save(picture, "PNG")
            archive.writestr(f"00000/{i}.png", picture.getvalue())
        labels = [[f"00000/{i}.png", i % 3] for i in range(len(images))]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))


def use(what: Use, path: Path, files: dict[str, Path]) -> None:
    """Do with a file what people do with such files; raises SystemExit as the command lines do."""
    from ddpm_deploy.cli import main
    from ddpm_deploy.spec import ChainSettings, ModelSpec

    if what.kind == ".json":
        spec = ModelSpec.from_json(path.read_bytes(), str(path))
        spec.step_table(ChainSettings(steps=min(10, spec.timesteps)))
        spec.embedding.table(spec.timesteps)
        return
    if what.words.startswith("("):
        _use_foreign(what, path, files)
        return
    names = {kind: str(whole) for kind, whole in files.items()}
    names |= {"CASE": str(path), "FOLDER": str(path.parent)}
    names |= {f"OUT{Path(name).suffix}": str(path.parent / name) for name in what.outputs}
    main([names.get(word, word) for word in what.words.split()])


def _use_foreign(what: Use, path: Path, files: dict[str, Path]) -> None:
    """Read what is another's, and ask the network that comes of it once."""
    from ddpm_deploy.importers.dialects import import_checkpoint
    from ddpm_deploy.importers.flags import OpenAIFlags
    from ddpm_deploy.importers.module import read_spec
    from ddpm_deploy.importers.told import parse, read_flags
    from ddpm_deploy.spec import ChainSettings
    from tests.golden import openai_networks
    from tests.importing import predict

    if what.kind == ".flags.txt":
        parse(OpenAIFlags, read_flags(path), "OpenAI")
        return
    if what.kind == ".spec.toml":
        spec = read_spec(path)
    else:
        flags = openai_networks.CASES["guided"].flags if what.kind == ".openai.pt" else {}
        imported = import_checkpoint(path.parent if what.beside else path, flags)
        spec = imported.spec
        labels = torch.zeros(1, dtype=torch.int64) if spec.num_classes else None
        if np.prod(spec.image_shape) < 1 << 16:
            predict(imported, torch.zeros(1, *spec.image_shape), torch.zeros(1, dtype=torch.int64), labels)
    spec.step_table(ChainSettings(steps=min(10, spec.timesteps)))


def judge(what: Use, path: Path, files: dict[str, Path]) -> str:
    """Use the file in a process of its own; how that ended, in a word, and in more where it should not have."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(read)
            os.write(write, _child(what, path, files).encode(errors="replace")[:4000])
        finally:
            os._exit(0)
    os.close(write)
    deadline = time.monotonic() + SECONDS
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(read)
            return "hang"
        time.sleep(0.002)
    with os.fdopen(read) as pipe:
        verdict = pipe.read() or "crash"
    there = {p.name for p in path.parent.iterdir()} - {path.name, *what.records, *what.beside}
    if others := sorted(there - set(what.outputs)):
        return f"left behind: {others}"
    if there != set(what.outputs if verdict == "result" else ()):
        return f"{verdict}, and its output does not fit that"
    return verdict


def _child(what: Use, path: Path, files: dict[str, Path]) -> str:
    from ddpm_deploy.errors import DdpmDeployError

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    err, out = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
            use(what, path, files)
    except DdpmDeployError as error:
        return "error" if str(error).count("\n") == 0 else f"an error of several lines: {error}"
    except SystemExit as end:
        lines = [line for line in err.getvalue().splitlines() if line.startswith("Error: ")]
        if end.code in (0, None):
            return "result"
        if end.code == 1 and ("differ" in out.getvalue() or "PAST TOLERANCE" in out.getvalue()):
            return "error"  # a report, not a message
        return "error" if end.code == 1 and len(lines) == 1 else f"exit {end.code}: {err.getvalue()[-500:]}"
    except BaseException:
        return traceback.format_exc()[-1500:]
    return "result"


def judged(what: Use, data: bytes, files: dict[str, Path]) -> str:
    """`judge` of a file with this content, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / what.name
        path.write_bytes(data)
        for kind in what.beside:
            shutil.copy(files[kind], Path(folder) / kind)
        return judge(what, path, files)


def run(
    files: dict[str, Path], count: int, seed: int, report: Callable[[str, str], None]
) -> dict[Use, collections.Counter[str]]:
    """Try `count` mutations, the uses in turn; counts how they ended, by use."""
    endings: dict[Use, collections.Counter[str]] = {what: collections.Counter() for what in USES}
    for number in range(count):
        what = USES[number % len(USES)]
        rng, whole = np.random.default_rng([seed, number]), files[what.kind].read_bytes()
        inside = number // len(USES) % 2
        data = mutated_inside(what.kind, whole, rng) if inside else mutated(whole, rng)
        verdict = judged(what, data, files)
        if verdict not in ("error", "result"):
            report(f"{what.words} {seed}/{number}", verdict)
        endings[what][verdict if verdict in ("error", "result", "crash", "hang") else "other"] += 1
    return endings


def shortly(what: Use) -> str:
    """Its words, without what is only there to make it quick."""
    return re.split(r" (?!--resume|--proof|--rtx|--labels)-", what.words)[0]


def table(endings: dict[Use, collections.Counter[str]]) -> str:
    """The endings as a table of markdown."""
    columns = ("error", "result", "crash", "hang", "other")
    head = "| use of a file | file | " + " | ".join(("typed error", "whole result", *columns[2:])) + " |\n"
    rows = "".join(
        f"| `{shortly(what)}` | {what.kind} | " + " | ".join(str(endings[what][c]) for c in columns) + " |\n"
        for what in USES
    )
    return head + "| --- " * (len(columns) + 2) + "|\n" + rows


def main() -> None:
    """The full run: makes a model, spoils it, prints the table; exits 1 where a case failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--model", type=Path, help="a .pt with its .onnx and proof beside it; none: a new one"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a process that is forked must have no threads
    from tests.models import tiny_checkpoint, tiny_export

    Image.init()
    for module in (
        "ddpm_deploy.importers.dialects",
        "ddpm_deploy.importers.module",
        "onnxscript",
        "torch.onnx",
        "torch.utils.tensorboard",
        "ddpm_deploy.export.graph",
    ):
        importlib.import_module(module)  # once, and not in each process
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.model or tiny_checkpoint(Path(folder) / "m.pt")
        onnx = checkpoint.with_suffix(".onnx") if arguments.model else tiny_export(checkpoint)
        files = whole_files(checkpoint, onnx, Path(folder))
        for what in USES:  # a use that does not get through with a whole file tells nothing of spoilt ones
            verdict = judged(what, files[what.kind].read_bytes(), files)
            if verdict != "result" and not (what.needs_gpu and verdict == "error"):
                sys.exit(f"{what.words}, with a whole file: {verdict}")
        start = time.perf_counter()
        endings = run(
            files, arguments.count, arguments.seed, lambda case, what: print(f"{case}: {what}", flush=True)
        )
    print(f"{arguments.count} files, seed {arguments.seed}, in {time.perf_counter() - start:.0f} s\n")
    print(table(endings))
    sys.exit(any(set(counts) - {"error", "result"} for counts in endings.values()))


if __name__ == "__main__":
    main()
