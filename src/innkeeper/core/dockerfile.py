"""Reads a Dockerfile: lines, continuations, comments, here-documents, flags. Pure text work; what an instruction means is `build_plan`'s.

Whatever is not understood is an error that names its line: a build that silently skips an instruction makes a wrong image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from innkeeper.errors import InvalidRequestError

MAX_BYTES = 262_144
MAX_INSTRUCTIONS = 1_000
MAX_STAGES = 100
INSTRUCTIONS = frozenset(
    {"ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "LABEL", "RUN", "SHELL", "USER", "WORKDIR"}
)
FLAGS = {"COPY": frozenset({"from", "chown", "chmod"}), "ADD": frozenset({"chown", "chmod"})}
# Those whose words may begin here-documents.
_HERE_DOCUMENTS = frozenset({"RUN", "COPY", "ADD"})
_DIRECTIVE = re.compile(r"#\s*([A-Za-z][A-Za-z0-9]*)\s*=\s*(.*?)\s*")
_FLAG = re.compile(r"--([A-Za-z-]+)(?:=(\S*))?(?:\s+|$)")
_STAGE = re.compile(r"[a-z][a-z0-9._-]*")


class DockerfileError(InvalidRequestError):
    """A Dockerfile that cannot be built, naming the line."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(f"Dockerfile line {line}: {message}")
        self.line = line


@dataclass(frozen=True, slots=True)
class HereDocument:
    """`<<NAME` and the lines up to NAME. `expand`: variables in it are replaced, which a quoted name forbids."""

    name: str
    content: str
    expand: bool


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: its first line, its name in capitals, its flags, the text after them without continuations, and its here-documents."""

    line: int
    name: str
    flags: dict[str, str]
    text: str
    documents: tuple[HereDocument, ...] = ()

    @property
    def summary(self) -> str:
        """The instruction as one line for people."""
        flags = "".join(f" --{name}={value}" for name, value in self.flags.items())
        return f"{self.name}{flags} {self.text}"

    def exec_form(self) -> tuple[str, ...] | None:
        """The words of the JSON form (`["a", "b"]`), or None where the text is not one: then it is a shell line, as for Docker."""
        if not self.text.startswith("["):
            return None
        try:
            words = json.loads(self.text)
        except ValueError:
            return None
        return tuple(words) if isinstance(words, list) and all(isinstance(word, str) for word in words) else None


@dataclass(frozen=True, slots=True)
class Stage:
    """`FROM image AS name` and what follows it. `image` is as written: it may hold variables, or name an earlier stage."""

    line: int
    image: str
    name: str | None
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True, slots=True)
class Dockerfile:
    """A parsed file: the ARGs before the first FROM, the stages, and the character that escapes."""

    escape: str
    arguments: tuple[Instruction, ...]
    stages: tuple[Stage, ...]


def parse(text: str) -> Dockerfile:
    """The Dockerfile of a text.

    Raises:
        DockerfileError: it is not understood, naming the line.

    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise DockerfileError(1, f"larger than {MAX_BYTES} bytes")
    if "\0" in text:
        raise DockerfileError(text[: text.index("\0")].count("\n") + 1, "a NUL character")
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    escape, first = _directives(lines)
    arguments: list[Instruction] = []
    stages: list[Stage] = []
    current: list[Instruction] = []
    for count, instruction in enumerate(_instructions(lines, first, escape)):
        if count == MAX_INSTRUCTIONS:
            raise DockerfileError(instruction.line, f"more than {MAX_INSTRUCTIONS} instructions")
        if instruction.name == "FROM":
            current = []
            if len(stages) == MAX_STAGES:
                raise DockerfileError(instruction.line, f"more than {MAX_STAGES} stages")
            stages.append(_stage(instruction, stages))
        elif stages:
            current.append(instruction)
        elif instruction.name == "ARG":
            arguments.append(instruction)
            continue
        else:
            raise DockerfileError(instruction.line, f"{instruction.name} before the first FROM")
        last = stages[-1]
        stages[-1] = Stage(last.line, last.image, last.name, tuple(current))
    if not stages:
        raise DockerfileError(len(lines), "there is no FROM")
    return Dockerfile(escape, tuple(arguments), tuple(stages))


def _directives(lines: list[str]) -> tuple[str, int]:
    """The escape character, and the index of the first line that is no directive. Directives stand before everything else."""
    escape, seen = "\\", set[str]()
    for index, line in enumerate(lines):
        found = _DIRECTIVE.fullmatch(line.strip())
        if found is None or found[1].lower() not in ("escape", "syntax", "check"):
            return escape, index
        name = found[1].lower()
        if name in seen:
            raise DockerfileError(index + 1, f"the directive {name} is given twice")
        seen.add(name)
        if name == "escape":
            if found[2] not in ("\\", "`"):
                raise DockerfileError(index + 1, "escape is either \\ or `")
            escape = found[2]
    return escape, len(lines)


def _instructions(lines: list[str], at: int, escape: str) -> Iterator[Instruction]:
    while at < len(lines):
        if not lines[at].strip() or lines[at].lstrip().startswith("#"):
            at += 1
            continue
        start = at + 1
        text, at = _logical_line(lines, at, escape)
        instruction = _instruction(start, text)
        if instruction.name in _HERE_DOCUMENTS and instruction.exec_form() is None:
            documents, at = _here_documents(lines, at, instruction, escape)
            instruction = Instruction(start, instruction.name, instruction.flags, instruction.text, documents)
        yield instruction


def _logical_line(lines: list[str], at: int, escape: str) -> tuple[str, int]:
    """A line joined with those that continue it, and the index after them. Comments and empty lines within are left out, as Docker does."""
    joined = ""
    while at < len(lines):
        line = lines[at]
        at += 1
        if joined and (not line.strip() or line.lstrip().startswith("#")):
            continue
        stripped = line.rstrip(" \t")
        if not stripped.endswith(escape):
            return joined + line, at
        joined += stripped[: -len(escape)]
        # Even where the line held nothing else: the next one still continues it.
        joined = joined or " "
    return joined, at


def _instruction(line: int, text: str) -> Instruction:
    name, *after = text.strip().split(None, 1)
    upper, rest = name.upper(), after[0] if after else ""
    if upper not in INSTRUCTIONS:
        raise DockerfileError(line, f"{name[:40]}: not an instruction that can be built here")
    flags: dict[str, str] = {}
    while rest.startswith("--") and upper != "ENTRYPOINT" and (found := _FLAG.match(rest)) is not None:
        flag = found[1]
        if flag not in FLAGS.get(upper, frozenset()):
            raise DockerfileError(line, f"{upper} --{flag}: not supported")
        if flag in flags or not found[2]:
            raise DockerfileError(line, f"{upper} --{flag}: wants one value")
        flags[flag] = found[2]
        rest = rest[found.end() :]
    if not rest:
        raise DockerfileError(line, f"{upper} needs an argument")
    return Instruction(line, upper, flags, rest)


def _stage(instruction: Instruction, before: list[Stage]) -> Stage:
    words = instruction.text.split()
    name = None
    if len(words) == 3 and words[1].upper() == "AS":
        name = words[2].lower()
        if not _STAGE.fullmatch(name):
            raise DockerfileError(instruction.line, f"{words[2]}: not a name for a stage")
        if any(stage.name == name for stage in before):
            raise DockerfileError(instruction.line, f"there is a stage {name} already")
    elif len(words) != 1:
        raise DockerfileError(instruction.line, "FROM wants an image, or an image AS a name")
    return Stage(instruction.line, words[0], name, ())


def here_document_marks(text: str, escape: str) -> list[tuple[str, bool, bool]]:
    """The `<<NAME` words of a line, in order: name, whether it is quoted, whether leading tabs go (`<<-`). Quoted text holds none."""
    marks = []
    quote, at = "", 0
    pattern = re.compile(
        r"<<(-?)(?:\"([A-Za-z_][A-Za-z0-9_.]*)\"|'([A-Za-z_][A-Za-z0-9_.]*)'|([A-Za-z_][A-Za-z0-9_.]*))"
    )
    while at < len(text):
        char = text[at]
        if char == escape and quote != "'":
            at += 2
            continue
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif text.startswith("<<<", at):
            at += 3
            continue
        elif (found := pattern.match(text, at)) is not None:
            marks.append((found[2] or found[3] or found[4], found[4] is None, bool(found[1])))
            at = found.end()
            continue
        at += 1
    return marks


def _here_documents(
    lines: list[str], at: int, instruction: Instruction, escape: str
) -> tuple[tuple[HereDocument, ...], int]:
    documents = []
    for name, quoted, strip_tabs in here_document_marks(instruction.text, escape):
        content = []
        while True:
            if at == len(lines):
                raise DockerfileError(instruction.line, f"the here-document {name} has no end")
            line = lines[at].lstrip("\t") if strip_tabs else lines[at]
            at += 1
            if line == name:
                break
            content.append(line + "\n")
        documents.append(HereDocument(name, "".join(content), not quoted))
    return tuple(documents), at
