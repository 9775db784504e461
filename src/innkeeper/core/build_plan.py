"""What a Dockerfile asks for: its stages as steps with every variable replaced, and the configuration that the image gets. Pure."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from innkeeper.core.build_step import CopyStep, DirectoryStep, NoteStep, RunStep, Step
from innkeeper.core.dockerfile import Dockerfile, DockerfileError, HereDocument, Instruction, Stage
from innkeeper.core.dockerfile_words import NAME, WordError, expand, key_values, split_words
from innkeeper.core.image_config import DEFAULT_PATH, ImageConfig

SCRATCH = "scratch"
# What Linux takes as one argument of a process, and what is left of it for a script.
SCRIPT_BYTES_MAX = 122_880
ENV_MAX = 1_000
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,99}(:[A-Za-z0-9_][A-Za-z0-9_.@-]{0,99})?")
_PORT = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?(?:/(tcp|udp))?")
_DEFAULT_SHELL = ("/bin/sh", "-c")
_SHEBANG = re.compile(r"#!\s*(\S.*)")


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage: what it stands on (an earlier stage's index, or an image's name), its steps, and the configuration at its end."""

    index: int
    line: int
    name: str | None
    base: int | str
    steps: tuple[Step, ...]
    config: ImageConfig


@dataclass(frozen=True, slots=True)
class BuildPlan:
    """The stages that the target needs, in order; the last one is the target. `warnings` are for the build's log."""

    stages: tuple[StagePlan, ...]
    warnings: tuple[str, ...]


def plan_build(
    dockerfile: Dockerfile,
    build_args: Mapping[str, str],
    *,
    target: str | None,
    config_of: Callable[[str, int], ImageConfig],
) -> BuildPlan:
    """The plan of a build. `config_of(image, line)` gives an image's configuration and raises where there is none.

    Raises:
        DockerfileError: naming the line.

    """
    return _Planner(dockerfile, build_args, config_of).plan(target)


class _Planner:
    def __init__(
        self, dockerfile: Dockerfile, build_args: Mapping[str, str], config_of: Callable[[str, int], ImageConfig]
    ) -> None:
        self._dockerfile = dockerfile
        self._build_args = build_args
        self.config_of = config_of
        self._plans: dict[int, StagePlan] = {}
        self._used_args: set[str] = set()
        self._global: dict[str, str] = {}

    def plan(self, target: str | None) -> BuildPlan:
        for instruction in self._dockerfile.arguments:
            for name, default in _arguments(instruction, self._dockerfile.escape, self._global):
                self._declare(name, default, self._global)
        self.stage_plan(self._target(target))
        unused = sorted(set(self._build_args) - self._used_args)
        warnings = (f"no ARG takes these build arguments: {', '.join(unused)}",) if unused else ()
        return BuildPlan(tuple(self._plans[index] for index in sorted(self._plans)), warnings)

    def _target(self, target: str | None) -> int:
        stages = self._dockerfile.stages
        if target is None:
            return len(stages) - 1
        for stage in stages:
            if stage.name == target.lower():
                return stages.index(stage)
        if target.isdecimal() and int(target) < len(stages):
            return int(target)
        raise DockerfileError(stages[-1].line, f"there is no stage {target}")

    def _declare(self, name: str, default: str | None, into: dict[str, str]) -> None:
        if name in self._build_args:
            self._used_args.add(name)
            into[name] = self._build_args[name]
        elif default is not None:
            into[name] = default

    def stage_plan(self, index: int) -> StagePlan:
        """The plan of a stage. Stages that the target does not need are never looked at, and their images need not be there."""
        known = self._plans.get(index)
        if known is not None:
            return known
        stage = self._dockerfile.stages[index]
        reference = _expanded(stage.line, stage.image, self._global, self._dockerfile.escape)
        if not reference:
            raise DockerfileError(stage.line, f"FROM {stage.image}: names no image")
        earlier = self.stage_called(reference, before=index)
        base: int | str = reference
        if earlier is not None:
            base, config = earlier, self.stage_plan(earlier).config
        elif reference == SCRATCH:
            config = ImageConfig()
        else:
            config = self.config_of(reference, stage.line)
        plan = _StageReader(self, index, stage, base, config).read()
        self._plans[index] = plan
        return plan

    def stage_called(self, name: str, *, before: int) -> int | None:
        """The index of an earlier stage of that name."""
        for index, stage in enumerate(self._dockerfile.stages[:before]):
            if stage.name == name.lower():
                return index
        return None

    def argument(self, name: str, default: str | None, into: dict[str, str]) -> None:
        """Declare an ARG of a stage: a global one of that name gives the value that has no default of its own."""
        self._declare(name, self._global.get(name) if default is None else default, into)

    @property
    def escape(self) -> str:
        return self._dockerfile.escape


class _StageReader:
    """Goes through the instructions of a stage with the configuration as it stands at each."""

    def __init__(
        self,
        planner: _Planner,
        index: int,
        stage: Stage,
        base: int | str,
        config: ImageConfig,
    ) -> None:
        self._planner = planner
        self._index = index
        self._stage = stage
        self._base = base
        self._config = config
        self._arguments: dict[str, str] = {}
        self._shell: tuple[str, ...] = _DEFAULT_SHELL
        self._own_cmd = False

    def read(self) -> StagePlan:
        steps = tuple(self._step(instruction) for instruction in self._stage.instructions)
        return StagePlan(self._index, self._stage.line, self._stage.name, self._base, steps, self._config)

    @property
    def _variables(self) -> dict[str, str]:
        return {**self._arguments, **self._config.env}

    def _step(self, instruction: Instruction) -> Step:
        return _READERS[instruction.name](self, instruction)

    def _expand(self, instruction: Instruction, text: str, *, quotes: bool = True) -> str:
        return _expanded(instruction.line, text, self._variables, self._planner.escape, quotes=quotes)

    def _words(self, instruction: Instruction) -> list[str]:
        """The words of COPY, ADD or EXPOSE, in either form, with their variables replaced."""
        words = instruction.exec_form()
        if words is not None:
            # Quotes mean themselves there.
            return [self._expand(instruction, word, quotes=False) for word in words]
        try:
            return [self._expand(instruction, word) for word in split_words(instruction.text, self._planner.escape)]
        except WordError as error:
            raise DockerfileError(instruction.line, f"{instruction.name}: {error}") from None

    def _pairs(self, instruction: Instruction) -> dict[str, str]:
        try:
            return dict(key_values(instruction.text, self._planner.escape, self._variables))
        except WordError as error:
            raise DockerfileError(instruction.line, f"{instruction.name}: {error}") from None

    def arg(self, instruction: Instruction) -> Step:
        for name, default in _arguments(instruction, self._planner.escape, self._variables):
            self._planner.argument(name, default, self._arguments)
        return _note(instruction)

    def env(self, instruction: Instruction) -> Step:
        pairs = self._pairs(instruction)
        for name in pairs:
            if not NAME.fullmatch(name):
                raise DockerfileError(instruction.line, f"ENV: {name[:40]}: not a name for a variable")
        env = {**self._config.env, **pairs}
        if len(env) > ENV_MAX:
            raise DockerfileError(instruction.line, f"ENV: more than {ENV_MAX} variables")
        self._config = replace(self._config, env=env)
        return _note(instruction)

    def label(self, instruction: Instruction) -> Step:
        self._config = replace(self._config, labels={**self._config.labels, **self._pairs(instruction)})
        return _note(instruction)

    def workdir(self, instruction: Instruction) -> Step:
        path = self._expand(instruction, instruction.text)
        path = posixpath.normpath(posixpath.join(self._config.workdir, path))
        path = "/" + path.lstrip("/")
        self._config = replace(self._config, workdir=path)
        return DirectoryStep(instruction.line, instruction.summary, path)

    def user(self, instruction: Instruction) -> Step:
        user = self._expand(instruction, instruction.text)
        if not _USER.fullmatch(user):
            raise DockerfileError(instruction.line, f"USER {user[:40]}: wants a name or number, and a group after `:`")
        self._config = replace(self._config, user=user)
        return _note(instruction)

    def shell(self, instruction: Instruction) -> Step:
        words = instruction.exec_form()
        if not words:
            raise DockerfileError(instruction.line, 'SHELL wants the form ["program", "argument"]')
        self._shell = words
        return _note(instruction)

    def cmd(self, instruction: Instruction) -> Step:
        self._config = replace(self._config, cmd=self._command(instruction))
        self._own_cmd = True
        return _note(instruction)

    def entrypoint(self, instruction: Instruction) -> Step:
        # The base image's arguments were meant for the base image's program.
        cmd = self._config.cmd if self._own_cmd else ()
        self._config = replace(self._config, entrypoint=self._command(instruction), cmd=cmd)
        return _note(instruction)

    def _command(self, instruction: Instruction) -> tuple[str, ...]:
        words = instruction.exec_form()
        return (*self._shell, instruction.text) if words is None else words

    def expose(self, instruction: Instruction) -> Step:
        ports = list(self._config.exposed_ports)
        for word in self._words(instruction):
            found = _PORT.fullmatch(word)
            low = int(found[1]) if found else 0
            high = int(found[2] or found[1]) if found else 0
            if found is None or not 1 <= low <= high <= 65_535:
                raise DockerfileError(instruction.line, f"EXPOSE {word[:40]}: wants a port, a range, and /tcp or /udp")
            ports += [f"{port}/{found[3] or 'tcp'}" for port in range(low, high + 1)]
        self._config = replace(self._config, exposed_ports=tuple(dict.fromkeys(ports)))
        return _note(instruction)

    def run(self, instruction: Instruction) -> Step:
        argv = instruction.exec_form()
        stdin = None
        if argv is None:
            script = instruction.text
            documents = instruction.documents
            if len(documents) == 1 and re.fullmatch(r"<<-?[\"']?\w[\w.]*[\"']?", instruction.text):
                # The here-document is the script itself; its first line may name who reads it.
                script = documents[0].content
                shebang = _SHEBANG.match(script)
                if shebang is not None:
                    argv, stdin = (*shebang[1].split(), "/dev/stdin"), script
            elif documents:
                script += "\n" + "".join(f"{document.content}{document.name}\n" for document in documents)
            argv = argv or (*self._shell, script)
        if not argv:
            raise DockerfileError(instruction.line, "RUN: names no program")
        if sum(len(word.encode("utf-8", "surrogatepass")) + 1 for word in argv) > SCRIPT_BYTES_MAX:
            raise DockerfileError(
                instruction.line, f"RUN: more than {SCRIPT_BYTES_MAX} bytes; COPY a script and run that"
            )
        if any("\0" in word for word in argv):
            raise DockerfileError(instruction.line, "RUN: NUL in a word")
        env = {"PATH": DEFAULT_PATH, **self._variables}
        return RunStep(instruction.line, instruction.summary, argv, env, self._config.user, self._config.workdir, stdin)

    def copy(self, instruction: Instruction) -> Step:
        *sources, destination = self._words(instruction)
        documents = list(instruction.documents)
        inline: list[tuple[str, str]] = []
        paths: list[str] = []
        for source in sources:
            if source.startswith("<<") and documents:
                inline.append(self._inline(instruction, documents.pop(0)))
            else:
                paths.append(self._source(instruction, source))
        if not inline and not paths:
            raise DockerfileError(instruction.line, f"{instruction.name} wants at least one source and a destination")
        origin = self._origin(instruction)
        if origin is not None and inline:
            raise DockerfileError(instruction.line, "COPY --from takes no here-document")
        absolute = posixpath.join(self._config.workdir, destination)
        into = (
            destination.endswith(("/", "/.", "/..")) or destination in (".", "..", "") or len(inline) + len(paths) > 1
        )
        normal = "/" + posixpath.normpath(absolute).lstrip("/")
        return CopyStep(
            instruction.line,
            instruction.summary,
            tuple(paths),
            normal,
            into_directory=into,
            origin=origin,
            documents=tuple(inline),
            chown=self._chown(instruction),
            chmod=self._chmod(instruction),
            extract=instruction.name == "ADD",
        )

    def _inline(self, instruction: Instruction, document: HereDocument) -> tuple[str, str]:
        content = document.content
        if document.expand:
            try:
                content = expand(content, self._variables, self._planner.escape, quotes=False)
            except WordError as error:
                raise DockerfileError(instruction.line, f"<<{document.name}: {error}") from None
        return document.name, content

    def _source(self, instruction: Instruction, source: str) -> str:
        if instruction.name == "ADD" and re.match(r"[a-z][a-z0-9+.-]*://|git@", source, re.IGNORECASE):
            raise DockerfileError(
                instruction.line, f"ADD {source[:80]}: addresses are not fetched; use RUN curl, or COPY a file"
            )
        normal = posixpath.normpath(source.lstrip("/") or ".")
        if normal.split("/")[0] == "..":
            raise DockerfileError(instruction.line, f"{instruction.name} {source[:80]}: leads out of the build context")
        return normal

    def _origin(self, instruction: Instruction) -> int | str | None:
        if "from" not in instruction.flags:
            return None
        name = self._expand(instruction, instruction.flags["from"])
        earlier = self._planner.stage_called(name, before=self._index)
        if earlier is None and name.isdecimal():
            if int(name) >= self._index:
                raise DockerfileError(instruction.line, f"COPY --from={name}: there is no such earlier stage")
            earlier = int(name)
        if earlier is not None:
            self._planner.stage_plan(earlier)
            return earlier
        if not name or name == SCRATCH:
            raise DockerfileError(instruction.line, "COPY --from: names neither a stage nor an image")
        self._planner.config_of(name, instruction.line)
        return name

    def _chown(self, instruction: Instruction) -> str | None:
        if "chown" not in instruction.flags:
            return None
        owner = self._expand(instruction, instruction.flags["chown"])
        if not _USER.fullmatch(owner):
            raise DockerfileError(instruction.line, f"--chown={owner[:40]}: wants user or user:group")
        return owner

    def _chmod(self, instruction: Instruction) -> int | None:
        if "chmod" not in instruction.flags:
            return None
        mode = self._expand(instruction, instruction.flags["chmod"])
        if not re.fullmatch(r"[0-7]{3,4}", mode):
            raise DockerfileError(instruction.line, f"--chmod={mode[:40]}: wants octal digits, as 755")
        return int(mode, 8)


_READERS: dict[str, Callable[[_StageReader, Instruction], Step]] = {
    "ADD": _StageReader.copy,
    "ARG": _StageReader.arg,
    "CMD": _StageReader.cmd,
    "COPY": _StageReader.copy,
    "ENTRYPOINT": _StageReader.entrypoint,
    "ENV": _StageReader.env,
    "EXPOSE": _StageReader.expose,
    "LABEL": _StageReader.label,
    "RUN": _StageReader.run,
    "SHELL": _StageReader.shell,
    "USER": _StageReader.user,
    "WORKDIR": _StageReader.workdir,
}


def _note(instruction: Instruction) -> NoteStep:
    return NoteStep(instruction.line, instruction.summary)


def _expanded(line: int, text: str, variables: Mapping[str, str], escape: str, *, quotes: bool = True) -> str:
    try:
        return expand(text, variables, escape, quotes=quotes)
    except WordError as error:
        raise DockerfileError(line, str(error)) from None


def _arguments(instruction: Instruction, escape: str, variables: Mapping[str, str]) -> list[tuple[str, str | None]]:
    """The names that an ARG declares, each with its default; None where it has none."""
    found: list[tuple[str, str | None]] = []
    known = dict(variables)
    try:
        for word in split_words(instruction.text, escape):
            name, equals, value = word.partition("=")
            if not NAME.fullmatch(name):
                raise WordError(f"{name[:40]}: not a name for a variable")
            default = expand(value, known, escape) if equals else None
            if default is not None:
                known[name] = default
            found.append((name, default))
    except WordError as error:
        raise DockerfileError(instruction.line, f"ARG: {error}") from None
    return found
