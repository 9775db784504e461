from __future__ import annotations

from typing import Any

import pytest

from innkeeper.core.build_plan import BuildPlan, plan_build
from innkeeper.core.build_step import CopyStep, DirectoryStep, NoteStep, RunStep, Step, key_material
from innkeeper.core.dockerfile import DockerfileError, parse
from innkeeper.core.image_config import DEFAULT_PATH, ImageConfig, config_from_json, config_to_json

BASE = ImageConfig(user="user", workdir="/home/user", env={"PATH": "/bin", "LANG": "C"}, cmd=("bash",))


def plan(text: str, args: dict[str, str] | None = None, target: str | None = None) -> BuildPlan:
    def config_of(image: str, line: int) -> ImageConfig:
        if image not in ("base", "python"):
            raise DockerfileError(line, f"there is no image {image}")
        return BASE

    return plan_build(parse(text), args or {}, target=target, config_of=config_of)


def steps(text: str, **options: Any) -> tuple[Step, ...]:
    return tuple(s for s in plan(text, **options).stages[-1].steps if not isinstance(s, NoteStep))


def run(text: str, **options: Any) -> RunStep:
    found = steps(text, **options)[-1]
    assert isinstance(found, RunStep)
    return found


def copy(text: str, **options: Any) -> CopyStep:
    found = steps(text, **options)[-1]
    assert isinstance(found, CopyStep)
    return found


def test_run_takes_over_what_the_image_says_and_what_came_before() -> None:
    step = run("FROM base\nENV A=1 PATH=/opt:$PATH\nARG B=2 A=9\nUSER 7:8\nWORKDIR src\nRUN make $B\n")
    assert step.argv == ("/bin/sh", "-c", "make $B")
    assert step.env == {"PATH": "/opt:/bin", "LANG": "C", "A": "1", "B": "2"}
    assert (step.user, step.workdir, step.line) == ("7:8", "/home/user/src", 6)


def test_run_has_a_path_where_nobody_set_one() -> None:
    assert run('FROM scratch\nRUN ["/x"]\n').env == {"PATH": DEFAULT_PATH}


def test_the_exec_form_and_another_shell() -> None:
    assert run('FROM base\nRUN ["a", "$B"]\n').argv == ("a", "$B")
    assert run('FROM base\nSHELL ["/bin/bash", "-ec"]\nRUN a\n').argv == ("/bin/bash", "-ec", "a")


def test_a_here_document_is_the_script_or_the_input_of_one() -> None:
    assert run("FROM base\nRUN <<EOF\na\nb $C\nEOF\n").argv == ("/bin/sh", "-c", "a\nb $C\n")
    assert run("FROM base\nRUN cat <<X > /f\nhi\nX\n").argv == ("/bin/sh", "-c", "cat <<X > /f\nhi\nX\n")
    script = run("FROM base\nRUN <<EOF\n#!/usr/bin/env python3\nprint(1)\nEOF\n")
    assert script.argv == ("/usr/bin/env", "python3", "/dev/stdin")
    assert script.stdin == "#!/usr/bin/env python3\nprint(1)\n"


def test_arguments_come_from_the_caller_else_the_top_else_their_default() -> None:
    text = "ARG V=1\nARG W=$V-w\nFROM base\nARG V\nARG W=own\nARG X\nRUN a\n"
    assert run(text).env == {**BASE.env, "V": "1", "W": "own"}
    assert run(text, args={"V": "2", "X": "x"}).env == {**BASE.env, "V": "2", "W": "own", "X": "x"}
    assert plan(text, args={"NOBODY": "1"}).warnings == ("no ARG takes these build arguments: NOBODY",)
    # Without an ARG of its own, a stage does not see the ones at the top.
    assert "V" not in run("ARG V=1\nFROM base\nRUN a\n").env


def test_the_top_arguments_choose_the_image() -> None:
    assert plan("ARG I=base\nFROM ${I}\n").stages[0].base == "base"
    assert plan("ARG I=base\nFROM ${I}\n", args={"I": "python"}).stages[0].base == "python"
    with pytest.raises(DockerfileError, match="line 1: FROM"):
        plan("FROM $NOTHING\n")


def test_the_configuration_of_the_image() -> None:
    text = """FROM base
    ENV A b
    LABEL x=1 "y z"='2'
    EXPOSE 80 53/udp 9000-9002
    WORKDIR /srv
    USER www
    CMD ["serve", "-v"]
    ENTRYPOINT run $A
    """
    config = plan(text).stages[-1].config
    assert config == ImageConfig(
        user="www",
        workdir="/srv",
        env={**BASE.env, "A": "b"},
        entrypoint=("/bin/sh", "-c", "run $A"),
        cmd=("serve", "-v"),
        exposed_ports=("80/tcp", "53/udp", "9000/tcp", "9001/tcp", "9002/tcp"),
        labels={"x": "1", "y z": "2"},
    )
    assert config_from_json({**config_to_json(config), "newer": 1}) == config


def test_an_entrypoint_drops_the_arguments_of_the_base_image_alone() -> None:
    assert plan('FROM base\nENTRYPOINT ["x"]\n').stages[-1].config.cmd == ()
    assert plan('FROM base\nCMD ["y"]\nENTRYPOINT ["x"]\n').stages[-1].config.cmd == ("y",)


def test_stages_stand_on_each_other_and_only_the_needed_ones_are_there() -> None:
    text = """FROM base AS one
    ENV A=1
    FROM nowhere AS unused
    FROM one AS two
    RUN a
    FROM scratch
    COPY --from=two /a /b
    COPY --from=0 /c /d
    COPY --from=python /e /f
    """
    built = plan(text)
    assert [(s.index, s.base) for s in built.stages] == [(0, "base"), (2, 0), (3, "scratch")]
    assert isinstance(built.stages[1].steps[0], RunStep)
    assert built.stages[1].steps[0].env["A"] == "1"
    assert [s.origin for s in built.stages[2].steps if isinstance(s, CopyStep)] == [2, 0, "python"]
    assert [s.index for s in plan(text, target="two").stages] == [0, 2]
    assert [s.index for s in plan(text, target="0").stages] == [0]


@pytest.mark.parametrize(
    ("line", "sources", "destination", "into"),
    [
        ("COPY a /x", ("a",), "/x", False),
        ("COPY a /x/", ("a",), "/x", True),
        ("COPY a b c/", ("a", "b"), "/home/user/c", True),
        ("COPY a .", ("a",), "/home/user", True),
        ("COPY . .", (".",), "/home/user", True),
        ("COPY /abs/../a* ./b", ("a*",), "/home/user/b", False),
        ('COPY ["with blank", "/to here/"]', ("with blank",), "/to here", True),
        ('COPY ["it\'s", "/x"]', ("it's",), "/x", False),
        ("COPY $LANG /x", ("C",), "/x", False),
        ("COPY a ../../../..", ("a",), "/", True),
    ],
)
def test_sources_and_destination(line: str, sources: tuple[str, ...], destination: str, into: bool) -> None:
    step = copy(f"FROM base\n{line}\n")
    assert (step.sources, step.destination, step.into_directory) == (sources, destination, into)


def test_the_options_of_copy() -> None:
    step = copy("FROM base\nARG U=me\nCOPY --chown=$U:7 --chmod=0755 a /b\n")
    assert (step.chown, step.chmod, step.extract) == ("me:7", 0o755, False)
    assert copy("FROM base\nADD a.tar /b/\n").extract


def test_files_written_in_the_dockerfile() -> None:
    step = copy("FROM base\nENV V=1\nCOPY <<one <<'two' rest /x/\na $V \"q\"\none\nb $V\ntwo\n")
    assert step.documents == (("one", 'a 1 "q"\n'), ("two", "b $V\n"))
    assert step.sources == ("rest",)


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("FROM nowhere\n", 1, "no image nowhere"),
        ("FROM base\nCOPY --from=nowhere a b\n", 2, "no image nowhere"),
        ("FROM base AS x\nCOPY --from=0 a b\n", 2, "no such earlier stage"),
        ("FROM base\nCOPY a\n", 2, "at least one source"),
        ("FROM base\nCOPY ../a /b\n", 2, "out of the build context"),
        ("FROM base\nCOPY a/../../b /b\n", 2, "out of the build context"),
        ("FROM base\nADD https://example.com/x /y\n", 2, "addresses are not fetched"),
        ("FROM base\nADD git@example.com:x /y\n", 2, "addresses are not fetched"),
        ("FROM base\nCOPY --chmod=u+x a b\n", 2, "octal"),
        ("FROM base\nCOPY --chown=a:b:c a b\n", 2, "user or user:group"),
        ("FROM base\nUSER a b\n", 2, "USER"),
        ("FROM base\nUSER $X\n", 2, "USER"),
        ("FROM base\nEXPOSE 70000\n", 2, "EXPOSE"),
        ("FROM base\nEXPOSE 9-1\n", 2, "EXPOSE"),
        ("FROM base\nEXPOSE 80/sctp\n", 2, "EXPOSE"),
        ("FROM base\nENV\n", 2, "needs an argument"),
        ("FROM base\nENV a-b=1\n", 2, "not a name for a variable"),
        ("FROM base\nARG 1=2\n", 2, "not a name for a variable"),
        ("FROM base\nENV A=${B\n", 2, "not closed"),
        ("FROM base\nSHELL bash -c\n", 2, "SHELL wants"),
        ("FROM base\nRUN []\n", 2, "names no program"),
        ("FROM base\nRUN " + "x" * 130_000 + "\n", 2, "COPY a script"),
        ("FROM base\nCOPY --from=base <<A /x\na\nA\n", 2, "takes no here-document"),
    ],
)
def test_what_cannot_be_built_names_its_line(text: str, line: int, says: str) -> None:
    with pytest.raises(DockerfileError, match=says) as caught:
        plan(text)
    assert caught.value.line == line


def test_an_unknown_target() -> None:
    with pytest.raises(DockerfileError, match="no stage x"):
        plan("FROM base\n", target="x")


def test_what_a_step_depends_on_has_no_line_and_misses_nothing() -> None:
    first = key_material(steps("FROM base\nRUN a\n")[0])
    assert key_material(steps("FROM base\n\n# moved\nLABEL a=b\nRUN a\n")[0]) == first
    for other in ("RUN b", "ENV X=1\nRUN a", "USER x\nRUN a", 'RUN ["a"]', "ARG X=1\nRUN a"):
        assert key_material(steps(f"FROM base\n{other}\n")[0]) != first
    assert isinstance(steps("FROM base\nWORKDIR /x\n")[0], DirectoryStep)
