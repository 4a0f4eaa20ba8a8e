"""What people tell of a checkpoint, typed or in a file, and what was assumed where they told nothing."""

import json
import re
import shlex
import tomllib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Generic, TypeVar, get_args, get_type_hints

import msgspec

from ddpm_deploy.errors import SettingError, first_line
from ddpm_deploy.files import require_file, show
from ddpm_deploy.importers.flags import FLAGS, Flags, all_names, names_of

F = TypeVar("F", bound=Flags)
_MOST_BYTES: Final = 1 << 20  # of a file of flags
# Of a flag that is true or false, beside these two and 1 and 0.
_WORDS: Final = {**dict.fromkeys(("yes", "y", "t"), True), **dict.fromkeys(("no", "n", "f"), False)}


@dataclass(frozen=True)
class Assumption:
    """Something that neither the weights nor a flag tells.

    flag: that would change it. value: what was taken. others: further values that people use, which images may tell
    from it.
    """

    flag: str
    value: Any
    others: tuple[Any, ...] = ()


@dataclass
class Told(Generic[F]):
    """The flags of a dialect, and what was assumed in place of those that were not told."""

    flags: F
    assumed: list[Assumption] = field(default_factory=list)

    def get(self, name: str, assumed: Any, *others: Any) -> Any:
        """A flag's value; one that was not told is taken as `assumed`, and remembered with its `others`."""
        value = getattr(self.flags, name)
        if value is None:
            self.assumed.append(Assumption(name, assumed, others))
            return assumed
        return value

    def need(self, name: str, why: str) -> Any:
        """A flag without which there is no going on. Raises SettingError where it was not told."""
        value = getattr(self.flags, name)
        if value is None:
            raise SettingError(f"--{name} is needed: {why}")
        return value

    def image_size(self) -> tuple[int, int]:
        """Height and width. Raises SettingError where they were not told, or are none."""
        text = str(self.need("image_size", "nothing in the weights tells how large its images are"))
        sizes = [int(part) if part.isdecimal() else 0 for part in text.lower().split("x")]
        if len(sizes) > 2 or not all(1 <= size <= 4096 for size in sizes):
            raise SettingError(
                f"--image_size {text} is neither a size, as 32, nor a height and a width, as 48x64"
            )
        return sizes[0], sizes[-1]

    def agrees(self, name: str, found: Any, meaning: Callable[[Any], Any] = lambda value: value) -> Any:
        """What the weights say; raises SettingError where the flag was told, and its meaning is another."""
        value = getattr(self.flags, name)
        if value is not None and meaning(value) != found:
            raise SettingError(f"--{name} {value} is not what the weights say: they have {found}")
        return found


def read_flags(path: Path) -> dict[str, Any]:
    """The flags in a file: a .json or .toml of names and values, or a text as it stands on their command lines.

    Raises SettingError where it is none of these.
    """
    require_file(path, SettingError)
    if path.stat().st_size > _MOST_BYTES:
        raise SettingError(f"{show(path)} is too large for a file of flags")
    try:
        text = path.read_text(encoding="utf-8-sig")
        match path.suffix.lower():
            case ".json":
                found = json.loads(text)
            case ".toml":
                found = tomllib.loads(text)
            case _:
                found = _from_command_line(text)
        if not isinstance(found, dict):
            raise ValueError("it holds no names and values")
    except (ValueError, RecursionError) as error:
        raise SettingError(f"{show(path)} is not a file of flags: {first_line(error)}") from error
    # Those that begin with an underscore say what wrote the file, as `_target_` in a bundle of MONAI's.
    return {name: value for name, value in found.items() if not name.startswith("_")}


def _from_command_line(text: str) -> dict[str, str]:
    """`MODEL_FLAGS="--image_size 64 --num_channels 128"`, `python image_sample.py --num_samples 4` → names and values.

    A flag that stands there twice, as where both training and sampling were pasted, must have the same value.
    """
    found: dict[str, str] = {}
    free = frozenset().union(*(kind.ignored for kind in FLAGS.values()))
    for name, value in _pairs(text):
        if found.setdefault(name, value) != value and name not in free:
            raise ValueError(f"--{name} is {found[name]} in one place and {value} in another")
    if not found:
        raise ValueError(
            "no flag stands in it, as --image_size 64; names and values without -- go into a .json or a .toml"
        )
    return found


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    """The flags in a text of shell commands, in order."""
    known: set[str] = set()  # variables
    for command in _commands(text):
        words: list[str] = []
        rest = deque(_behind_program(command))
        while rest:
            word = rest.popleft()
            if words and words[-1].startswith("--") and "=" not in words[-1]:
                words.append(word)  # a value, whatever it looks like
            elif match := re.fullmatch(r"(\w+)\+?=(.*)", word, re.DOTALL):  # NAME="--flags"
                known.add(match[1])
                rest.extendleft(reversed(match[2].split() if re.search(r"--|\$", match[2]) else []))
            elif match := re.fullmatch(r"\$(?:(\w+)|\{(\w+)\})", word):
                if (name := match[1] or match[2]) not in known:
                    raise ValueError(f'{word} stands in it, and no {name}="--flags …" that says what that is')
            else:
                words.append(word)
        yield from _paired(words)


def _commands(text: str) -> Iterator[list[str]]:
    """The words of each command: a line, or what stands between && and the like; a quoted word may be of many lines."""
    text = re.sub(r"[\\^][ \t]*\r?\n", " ", text)
    text = re.sub(r"(?m)(^|\s)#.*", r"\1", text)
    text = re.sub(
        r"(?<!\S)-?[–—]-?(?=\w)", "--", text
    )  # as word processors and web pages make of two hyphens
    text = re.sub(r"(?<!\S)(\d|&)?>>?(&\d|[ \t]*[^\s;&|]+)", "", text)  # > log.txt 2>&1
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    words: list[str] = []
    for word in [*lexer, "\n"]:
        if word and not word.strip(";&|\n"):
            yield words
            words = []
        else:
            words.append(word)


def _behind_program(words: list[str]) -> list[str]:
    """A command without `mpiexec -n 8 python scripts/image_train.py` in front, of what runs it."""
    script = (n for n, word in enumerate(words) if word.endswith(".py") and "=" not in word)
    module = (n for n in range(len(words) - 1, 0, -1) if words[n - 1] == "-m")
    program = next(script, next(module, -1))
    if early := [word for word in words[: program + 1] if word.removeprefix("--") in all_names()]:
        raise ValueError(f"{early[0]} stands before {words[program]}: put it on a line of its own")
    words = words[program + 1 :]
    flags = (n for n, word in enumerate(words) if word.startswith(("--", "$")) or re.match(r"\w+\+?=", word))
    return words[next(flags, len(words)) :]


def _paired(words: list[str]) -> Iterator[tuple[str, str]]:
    """`--name value` and `--name=value` → names and values."""
    rest = iter(words)
    for word in rest:
        name, sign, value = word.partition("=")
        if not re.fullmatch(r"--\w[\w-]*", name):
            raise ValueError(f"{show(word)} is not of the form --name value")
        value = value if sign else next(rest, "--")
        if value.startswith("--"):
            raise ValueError(f"{name} has no value")
        yield name.removeprefix("--").replace("-", "_"), value


def parse(kind: type[F], told: Mapping[str, Any], dialect: str) -> F:
    """The flags of a dialect, out of texts or values by name.

    Raises SettingError where one is not of this dialect, or has no such value.
    """
    told = {name: value for name, value in told.items() if name not in kind.ignored}
    if strays := [name for name in told if name not in names_of(kind)]:
        raise SettingError(
            f"{_typed(strays)} cannot be told of {dialect}: choose from {_typed(names_of(kind))}"
        )
    types = get_type_hints(kind)
    return kind(**{name: _converted(name, value, types[name]) for name, value in told.items()})


def _converted(name: str, value: Any, kind: Any) -> Any:
    """A flag's value, as its type is. Raises SettingError where it is none."""
    try:
        return msgspec.convert(_as_told(value, kind), kind, strict=False)
    except msgspec.ValidationError as error:
        of = get_args(kind)
        what = next(
            said
            for said, is_it in (
                ("a list, as 1,2", _is_list(kind)),
                ("True or False", bool in of),
                ("a whole number", int in of and str not in of),
                ("a number", float in of),
                ("a text", True),
            )
            if is_it
        )
        shown = show(str(value)[:100]) or "''"
        raise SettingError(f"--{name} {shown} is not {what}") from error


def _as_told(value: Any, kind: Any) -> Any:
    """A value as its type takes it: the words and lists of command lines, and the numbers and lists of files."""
    if isinstance(value, str):
        if _is_list(kind):
            return [part.strip() for part in value.strip("()[]").split(",") if part.strip()]
        return _WORDS.get(value.lower(), value) if bool in get_args(kind) else value
    if str not in get_args(kind) or int in get_args(kind) or isinstance(value, bool):
        return value
    if isinstance(value, list) and all(isinstance(part, int | float | str) for part in value):
        return ",".join(map(str, value))
    return str(value) if isinstance(value, int | float) else value


def _is_list(kind: Any) -> bool:
    return any(getattr(part, "__origin__", None) is tuple for part in (kind, *get_args(kind)))


def _typed(names: Iterable[str]) -> str:
    return ", ".join(f"--{name}" for name in names)
