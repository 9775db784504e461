"""Images built of Dockerfiles: from the command line through the server into guests, and rooms on what came out."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server_fixture import INN, Api, Server, fresh, plain_environment, server, until
from tests.integration import oci_fixture as oci
from tests.integration.daemon_fixture import build_go

pytestmark = pytest.mark.gvisor_only(reason="the guests of builds are gVisor's whatever those of rooms are")

DOCKERFILE = """\
# syntax=docker/dockerfile:1
ARG BASE=base
FROM ${BASE} AS build
USER root
WORKDIR /src
COPY *.c ./
RUN gcc -O1 -static -o hello hello.c && ./hello > made-by
RUN <<EOF
echo "here $HOME" > here
EOF

FROM base
USER root
ARG GREETING=hello
ENV GREETING=${GREETING} LONG="a b"
COPY --from=build --chown=user:user /src/hello /usr/local/bin/
COPY --from=build /src/here /etc/here
COPY --chmod=0750 tree /srv/tree
ADD pack.tar.gz /srv/packed/
COPY <<conf /etc/app.conf
greeting=$GREETING
conf
RUN rm -rf /usr/share/zoneinfo && mkdir /usr/share/zoneinfo && echo "$GREETING" > /srv/greeting
RUN chmod 755 /srv/tree /srv/tree/deep
WORKDIR /srv/tree
USER user
EXPOSE 8080
LABEL maker="me"
CMD ["hello"]
"""
HELLO = '#include <stdio.h>\nint main(void) { puts("hello from C"); return 0; }\n'
NOTES = ("ARG", "ENV", "USER", "EXPOSE", "LABEL", "CMD", "ENTRYPOINT", "SHELL")


@pytest.fixture
def context(tmp_path: Path) -> Path:
    folder = tmp_path / "context"
    (folder / "tree/deep").mkdir(parents=True)
    (folder / "hello.c").write_text(HELLO)
    (folder / "Dockerfile").write_text(DOCKERFILE)
    (folder / "tree/a").write_text("a\n")
    (folder / "tree/deep/b").write_text("b\n")
    (folder / "tree/secret.key").write_text("s")
    (folder / "tree/link").symlink_to("a")
    (folder / ".dockerignore").write_text("**/*.key\n")
    (folder / "inside").write_text("packed\n")
    with tarfile.open(folder / "pack.tar.gz", "w:gz") as archive:
        archive.add(folder / "inside", "dir/inside")
    (folder / "inside").unlink()
    return folder


@pytest.fixture
def image(innkeeper: Server) -> Iterator[str]:
    """A name for an image, which goes with the test."""
    name = fresh("built")
    yield name
    innkeeper.inn("image", "rm", name)


def build(innkeeper: Server, folder: Path, name: str, *options: str) -> subprocess.CompletedProcess[str]:
    return innkeeper.inn("image", "build", str(folder), "-t", name, *options)


def rooms_output(innkeeper: Server, api: Api, image: str, line: str) -> str:
    name = fresh("on-built")
    room = api.room(api.make_profile(image=image, name=name))
    try:
        return room.output(line)
    finally:
        room.delete()
        innkeeper.inn("profile", "rm", name)


def ran(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The steps that were carried out, by instruction."""
    steps = [line for line in done.stdout.splitlines() if line.startswith("[") and not line.endswith("(kept)")]
    return [name for line in steps if (name := line.split(": ", 1)[1].split()[0]) not in NOTES]


def test_a_build_from_the_command_line_to_a_room(innkeeper: Server, api: Api, context: Path, image: str) -> None:
    began = time.monotonic()
    done = build(innkeeper, context, image, "--build-arg", "GREETING=good day")
    first_seconds = time.monotonic() - began
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"built {image} (" in done.stdout
    shown = json.loads(innkeeper.inn("image", "show", image, "--json").stdout)
    assert (shown["source"], shown["status"], shown["user"], shown["workdir"]) == (
        "build",
        "ready",
        "user",
        "/srv/tree",
    )
    assert (shown["cmd"], shown["exposed_ports"], shown["labels"]) == (["hello"], ["8080/tcp"], {"maker": "me"})
    assert {name: shown["env"][name] for name in ("GREETING", "LONG", "LANG")} == {
        "GREETING": "good day",
        "LONG": "a b",
        "LANG": "C.UTF-8",
    }
    line = (
        "whoami; pwd; echo $GREETING; hello; cat /etc/here /etc/app.conf /srv/greeting /srv/packed/dir/inside; "
        "stat -c '%U %a' /usr/local/bin/hello /srv/tree/a; ls /srv/tree /usr/share/zoneinfo; test -e /src || echo no src"
    )
    assert rooms_output(innkeeper, api, image, line).splitlines() == [
        *("user", "/srv/tree", "good day", "hello from C", "here /root", "greeting=good day", "good day", "packed"),
        *("user 755", "root 750", "/srv/tree:", "a", "deep", "link", "", "/usr/share/zoneinfo:", "no src"),
    ]
    # Again: no step runs, and it is the same image.
    began = time.monotonic()
    again = build(innkeeper, context, image, "--build-arg", "GREETING=good day")
    second_seconds = time.monotonic() - began
    assert (again.returncode, ran(again)) == (0, []), again.stdout
    assert json.loads(innkeeper.inn("image", "show", image, "--json").stdout)["digest"] == shown["digest"]
    print(f"built in {first_seconds:.1f} s, again from kept steps in {second_seconds:.1f} s")
    # A changed file runs its step and those after it, and none before.
    (context / "tree/a").write_text("changed\n")
    assert ran(build(innkeeper, context, image, "--build-arg", "GREETING=good day")) == [
        *("COPY", "ADD", "COPY", "RUN", "RUN", "WORKDIR"),
    ]
    assert rooms_output(innkeeper, api, image, "sudo cat /srv/tree/a") == "changed"


def test_a_step_that_fails_says_its_line_its_status_and_its_last_words(
    innkeeper: Server, context: Path, image: str
) -> None:
    (context / "Dockerfile").write_text(
        "FROM base\nRUN echo fine\nRUN echo last words >&2; \\\n exit 7\nRUN echo never\n"
    )
    done = build(innkeeper, context, image)
    assert done.returncode == 1
    assert "Dockerfile line 3: RUN echo last words" in done.stderr and "exit code 7\nlast words" in done.stderr
    assert "never" not in done.stdout
    listed = json.loads(innkeeper.inn("image", "builds", image, "--json").stdout)
    assert [one["status"] for one in listed] == ["failed"] and "exit code 7" in listed[0]["error"]
    shown = json.loads(innkeeper.inn("image", "show", image, "--json").stdout)
    assert shown["status"] == "failed" and "line 3" in shown["last_error"]
    # The log can be read again, by name and by id.
    for which in (image, listed[0]["id"]):
        logged = innkeeper.inn("image", "log", which)
        assert logged.returncode == 1 and "last words" in logged.stdout and "line 3" in logged.stderr


@pytest.mark.parametrize(
    ("dockerfile", "says"),
    [
        ("FROM base\nVOLUME /x\n", "line 2: VOLUME"),
        ("FROM nosuchimage\n", "line 1: there is no image 'nosuchimage'"),
        ("FROM base\nADD https://example.com/x /\n", "line 2: ADD https://example.com/x: addresses are not fetched"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_sent(
    innkeeper: Server, context: Path, image: str, dockerfile: str, says: str
) -> None:
    (context / "Dockerfile").write_text(dockerfile)
    done = build(innkeeper, context, image)
    assert done.returncode == 1 and says in done.stderr
    assert innkeeper.inn("image", "show", image).returncode == 1


def test_a_source_that_is_not_sent_names_its_line(innkeeper: Server, context: Path, image: str) -> None:
    (context / "Dockerfile").write_text("FROM base\nCOPY tree/secret.key /\n")
    done = build(innkeeper, context, image)
    assert done.returncode == 1 and "line 2: tree/secret.key: no such file" in done.stderr


def test_an_image_of_nothing_but_a_program(innkeeper: Server, context: Path, image: str) -> None:
    """No shell, no /etc/passwd, no libc: the exec form works, and the shell form says what is missing."""
    subprocess.run(["gcc", "-O1", "-static", "-o", context / "hello", context / "hello.c"], check=True)
    (context / "Dockerfile").write_text(
        'FROM scratch\nCOPY hello /bin/\nRUN ["/bin/hello"]\nUSER 1234\nENTRYPOINT ["/bin/hello"]\n'
    )
    done = build(innkeeper, context, image)
    assert done.returncode == 0 and "hello from C\n" in done.stdout, done.stdout + done.stderr
    (context / "Dockerfile").write_text("FROM scratch\nCOPY hello /bin/\nRUN echo x\n")
    without = build(innkeeper, context, fresh("shell-less"))
    assert without.returncode == 1 and "line 3: RUN echo x: /bin/sh" in without.stderr


def test_a_build_goes_on_without_its_client_and_can_be_cancelled(innkeeper: Server, context: Path, image: str) -> None:
    (context / "Dockerfile").write_text("FROM base\nRUN echo begun; sleep 600\n")
    client = begin_build(innkeeper, context, image)
    client.kill()
    client.wait()
    assert status(innkeeper, image) == "running"
    assert innkeeper.inn("image", "rm", image).returncode == 1
    assert build(innkeeper, context, image).returncode == 1
    assert innkeeper.inn("image", "cancel", image).stdout == "cancelled\n"
    assert status(innkeeper, image) == "cancelled"
    (host,) = json.loads(innkeeper.inn("host", "list", "--json").stdout)
    assert host["leaked"] == 0


def status(innkeeper: Server, image: str) -> str:
    found: list[dict[str, Any]] = json.loads(innkeeper.inn("image", "builds", image, "--json").stdout)
    return str(found[0]["status"])


def test_a_killed_server_leaves_nothing_of_a_build_and_says_that_it_failed(context: Path) -> None:
    (context / "Dockerfile").write_text("FROM base\nRUN echo begun; sleep 600\n")
    with server("base") as own:
        for kill in (lambda: os.kill(own.api_pid(), signal.SIGKILL), own.kill):
            client = begin_build(own, context, "app")
            kill()
            client.wait()
            if own.process is None:
                own.start()
            until(lambda: own.inn("image", "builds").returncode == 0)
            assert status(own, "app") == "failed"
            logged = own.inn("image", "log", "app")
            assert logged.returncode == 1 and re.search("server ended during|connection to the host", logged.stderr)
            assert json.loads(own.inn("image", "show", "app", "--json").stdout)["last_error"]
            until(lambda: settled(own))
            assert not list((own.home / "api" / "builds").glob("*/context.tar"))


def settled(innkeeper: Server) -> bool:
    """Nothing runs on the host and nothing is leaked."""
    (host,) = json.loads(innkeeper.inn("host", "list", "--json").stdout)
    return bool(host["machines"] == 0 and host["leaked"] == 0)


def begin_build(innkeeper: Server, context: Path, image: str) -> subprocess.Popen[bytes]:
    """A client whose build has come to a step that says `begun` and goes on for ever."""
    client = subprocess.Popen(
        [INN, "image", "build", context, "-t", image],
        env={**plain_environment(), "INNKEEPER_HOME": str(innkeeper.home)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert client.stdout is not None
    with client.stdout as said:
        assert any(line == b"begun\n" for line in said)
    return client


def test_an_image_with_a_shell_that_is_not_bash_and_no_users(
    innkeeper: Server, api: Api, context: Path, image: str
) -> None:
    """One static file is all that is in it: the shell form runs, users are numbers, and rooms run commands."""
    shell = build_go(Path(__file__).parents[1] / "tiny_shell", "tiny-shell")
    shutil.copyfile(shell, context / "sh")
    (context / "Dockerfile").write_text(
        "FROM scratch\nCOPY --chmod=755 sh /bin/\nENV WORD=hello\nRUN echo $WORD > /made ; id\n"
        "USER 1234:56\nRUN id\nWORKDIR /work\n"
    )
    done = build(innkeeper, context, image)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 0 /\n" in done.stdout and "1234 56 /\n" in done.stdout
    assert rooms_output(innkeeper, api, image, "cat /made; id; echo $WORD").splitlines() == [
        "hello",
        "1234 56 /",
        "hello",
    ]
    (context / "Dockerfile").write_text(
        f"FROM {image}\nCOPY --from={image} /made /copied\nUSER 0\nRUN cat /copied; exit 9\n"
    )
    failed = build(innkeeper, context, fresh("fails"))
    assert failed.returncode == 1 and "exit code 9\nhello" in failed.stderr


def test_on_an_image_of_another_c_library(
    innkeeper: Server, api: Api, context: Path, image: str, tmp_path: Path
) -> None:
    """Musl's own loader and library, imported, built upon, and run: steps, users by name, files in and out, a second stage."""
    below = fresh("musl")
    archive = tmp_path / "musl.tar"
    archive.write_bytes(oci.musl_archive(tmp_path))
    assert innkeeper.inn("image", "import", below, f"oci-archive:{archive}").returncode == 0
    (context / "Dockerfile").write_text(
        f"FROM {below} AS first\nRUN maps > /mapped ; echo from a step > /said\n"
        f'FROM {below}\nENV WORD=hello\nCOPY tree/a /srv/a\nCOPY --from=first /mapped /said /srv/\nUSER app\nRUN ["sh", "-c", "user"]\n'
        "RUN user > /tmp/who\nWORKDIR /srv\n"
    )
    done = build(innkeeper, context, image)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "app hello\n" in done.stdout
    said = rooms_output(innkeeper, api, image, "cat a ; cat said ; cat /tmp/who ; user ; cat mapped")
    assert said.splitlines()[:4] == ["a", "from a step", "app hello", "app hello"] and "ld-musl" in said
    assert innkeeper.inn("image", "rm", below).returncode == 0


def most_memory_mib(pid: int) -> int:
    """The most that a process ever had resident."""
    found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc", str(pid), "status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) >> 10


@pytest.mark.long
@pytest.mark.timeout(1_800)
def test_two_hundred_thousand_files(innkeeper: Server, api: Api, context: Path, image: str) -> None:
    """Made by a step, copied between stages, exported, and counted in a room; the figures go into the documentation."""
    count = 200_000
    assert innkeeper.process is not None
    daemon = innkeeper.process.pid
    (context / "make.py").write_text(
        "import os\n"
        f"for folder in range({count // 1000}):\n"
        "    os.makedirs(f'/many/{folder}')\n"
        "    for number in range(1000):\n"
        "        with open(f'/many/{folder}/{number}', 'w') as file:\n"
        "            file.write(str(number))\n"
    )
    (context / "Dockerfile").write_text(
        "FROM base AS many\nUSER root\nCOPY make.py /\nRUN python3 /make.py\n"
        "FROM base\nUSER root\nCOPY --from=many /many /copied\n"
    )
    for what in ("built", "built again from kept steps"):
        began = time.monotonic()
        done = subprocess.run(
            [INN, "image", "build", context, "-t", image],
            env={**plain_environment(), "INNKEEPER_HOME": str(innkeeper.home)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=1_200,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        print(f"{count} files {what} in {time.monotonic() - began:.1f} s")
        print("\n".join(line for line in done.stdout.splitlines() if " s" in line))
        print(f"most memory ever: daemon {most_memory_mib(daemon)} MiB, API {most_memory_mib(innkeeper.api_pid())} MiB")
    assert rooms_output(innkeeper, api, image, "find /copied -type f | wc -l") == str(count)
