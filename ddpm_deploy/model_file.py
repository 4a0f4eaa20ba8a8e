"""A model's file, opened once: its kind, its ModelSpec and its seal, without torch, ONNX, a GPU, or the weights.

A checkpoint is a zip archive whose pickle is only scanned for the text, never run; an ONNX file is walked field by
field past its graph; an engine is searched for its network's name; a .ncnn file has a zip at its end.
"""

import pickletools
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

from ddpm_deploy.errors import ArtefactError, SettingError, SpecError
from ddpm_deploy.files import require_file, sha256_of, show
from ddpm_deploy.ncnn_file import NCNN_SUFFIX, NcnnFile
from ddpm_deploy.onnx_file import OnnxFile
from ddpm_deploy.plan import PLAN_SUFFIX, PlanHead, read_plan_head, spec_in_plan
from ddpm_deploy.spec import SEAL_KEY, SPEC_KEY, ModelSpec

Kind = Literal["checkpoint", "onnx", "plan", "ncnn", "foreign"]

CHECKPOINT_SUFFIXES: Final = (".pt", ".pth")
FOREIGN_SUFFIXES: Final = (".ckpt", ".bin", ".safetensors")  # and the first two, without a ModelSpec
ONNX_SUFFIX: Final = ".onnx"
_KINDS: Final[dict[str, Kind]] = {
    **dict.fromkeys(CHECKPOINT_SUFFIXES, "checkpoint"),
    ONNX_SUFFIX: "onnx",
    PLAN_SUFFIX: "plan",
    NCNN_SUFFIX: "ncnn",
    **dict.fromkeys(FOREIGN_SUFFIXES, "foreign"),
}
_DIFFUSERS: Final = ("model_index.json", "config.json")  # that a pipeline, and each of its parts, is known by
_OLD_PYTORCH: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how a file of PyTorch before 1.6 begins
# Far above what our checkpoints hold; a file that asks for more is lying.
_MAX_PICKLE_BYTES: Final = 4 << 20


def open_model(path: str | Path, spec: ModelSpec | None = None) -> "ModelFile":
    """Open a .pt, .onnx, .plan or .ncnn file, which its suffix tells apart, or another's checkpoint (`importers`).

    spec: in place of the file's own, for a graph or an engine that carries none.

    Raises ArtefactError where it is missing, broken or of another kind.
    """
    return ModelFile(Path(path), spec)


def is_of_diffusers(path: Path) -> bool:
    """Whether a folder is a pipeline of diffusers, a part of one, or holds one, by the names in it."""
    parts = any((path / part / "config.json").is_file() for part in ("unet", "unet_ema"))
    cached = all(
        (path / part).is_dir() for part in ("refs", "snapshots")
    )  # as the hub keeps a model on a disk
    return parts or cached or any((path / name).is_file() for name in _DIFFUSERS)


class ModelFile:
    """What a model's file says of itself, each thing looked up once.

    path, kind: of the file; "foreign" is another's checkpoint, whose spec an importer makes. name: its path, for
    messages. onnx: of an .onnx file. ncnn: of a .ncnn file. head: of an engine.
    """

    onnx: OnnxFile | None = None
    ncnn: NcnnFile | None = None
    head: PlanHead | None = None

    def __init__(self, path: Path, spec: ModelSpec | None = None) -> None:
        if path.name in _DIFFUSERS and path.is_file():
            path = path.parent
        self.path, self.name, self._given = path, show(path), spec
        self._text: str | bytes | None = None
        if path.is_dir() and is_of_diffusers(path):
            self.kind: Kind = "foreign"
            return
        require_file(path)
        suffix = path.suffix.lower()
        if suffix not in _KINDS:
            pickled = suffix in (".pkl", ".pickle")
            raise ArtefactError(
                f"{self.name} is a pickle, which runs code when it is read: save the state_dict of its network with "
                "torch.save, as a .pt"
                if pickled
                else f"{self.name} is not a model file by its name: a .pt, .onnx, .plan or .ncnn file is needed"
            )
        self.kind = _KINDS[suffix]
        try:
            self._text = self._find_spec()
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, RuntimeError) as error:
            raise ArtefactError(
                f"{self.name} is not a whole {path.suffix} file ({error}): it may be truncated or of another kind"
            ) from error

    def _find_spec(self) -> str | bytes | None:
        match self.kind:
            case "checkpoint":
                text = None if _is_old(self.path) else _spec_in_checkpoint(self.path)
                self.kind = "foreign" if text is None else "checkpoint"
                return text
            case "foreign":
                return None
            case "onnx":
                self.onnx = OnnxFile(self.path)
                return self.onnx.properties.get(SPEC_KEY)
            case "ncnn":
                self.ncnn = NcnnFile(self.path)
                return self.ncnn.spec
            case "plan":
                self.head = read_plan_head(self.path)
                return None if self._given else spec_in_plan(self.path)

    @cached_property
    def spec(self) -> ModelSpec:
        """The ModelSpec: all that is needed to run it. Raises SpecError where there is none, or it is not valid."""
        if self._given is not None:
            return self._given
        if self.kind == "foreign":
            raise SpecError(
                f"{self.name} was not made by ddpm-train: ddpm-export makes an .onnx of another's checkpoint, and that "
                "runs here"
            )
        if self._text is None:
            raise SpecError(
                f"{self.name} carries no ModelSpec: it was not made by ddpm-deploy; "
                "train with ddpm-train and export with ddpm-export"
            )
        return ModelSpec.from_json(self._text, self.name)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file: of its bytes, not of the weights alone."""
        return sha256_of(self.path)

    @property
    def intact(self) -> bool:
        """Whether a file is, to the bit, what ddpm-export wrote; True for the kinds that have no seal."""
        sealed = self.onnx or self.ncnn
        return sealed is None or sealed.intact

    def require_intact(self) -> None:
        """Raise ArtefactError where a file with a seal is damaged or was edited: its images would be wrong,
        unnoticed."""
        if not self.intact:
            purpose = (
                "; or, if it was edited on purpose, see what ddpm-verify says of it, and drop "
                f"{SEAL_KEY} from its metadata"
            )
            raise ArtefactError(
                f"{self.name} is not what ddpm-export wrote: damaged, or edited since. Export it again"
                + (purpose if self.onnx else "")
            )

    def require_finite(self) -> None:
        """Raise ArtefactError where a tensor of an .onnx or .ncnn file holds NaN or infinity."""
        weights = self.onnx or self.ncnn
        if broken := weights and weights.non_finite:
            raise ArtefactError(
                f"{self.name} has numbers that are not finite in {show(broken)}: export it again"
            )

    def require_kind(self, *kinds: Kind) -> None:
        """Raise SettingError unless the file is of one of these kinds."""
        if self.kind not in kinds:
            raise SettingError(f"{self.name} is not {' or '.join(_ARTICLES[kind] for kind in kinds)}")


_ARTICLES: Final[dict[Kind, str]] = {
    "checkpoint": "a checkpoint (.pt)",
    "onnx": "an .onnx file",
    "plan": "an engine (.plan)",
    "ncnn": "a .ncnn file",
    "foreign": "another's checkpoint",
}


def _is_old(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_OLD_PYTORCH)) == _OLD_PYTORCH


def _spec_in_checkpoint(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        pickles = [info for info in archive.infolist() if info.filename.endswith("data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it holds no PyTorch pickle")
        (info,) = pickles
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > _MAX_PICKLE_BYTES:
            raise ValueError("its pickle is not stored as PyTorch stores one")
        data = archive.read(info)
    strings = (arg for _, arg, _ in pickletools.genops(data) if isinstance(arg, str))
    found = SPEC_KEY in strings  # read up to it
    return next(strings, None) if found else None
