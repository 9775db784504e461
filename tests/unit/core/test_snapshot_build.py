"""What may be asked of the snapshot of an image, and what its steps are."""

from __future__ import annotations

from typing import Any

import pytest

from innkeeper.core.image_config import ImageConfig
from innkeeper.core.snapshot_build import SnapshotBuildRequest
from innkeeper.errors import InvalidRequestError

IMAGE = "registry.example.com/team/app:1"
CONFIG = ImageConfig(workdir="/srv", env={"A": "1", "PATH": "/opt/bin"})


def request(**fields: Any) -> SnapshotBuildRequest:
    return SnapshotBuildRequest(**{"oci_image": IMAGE, **fields})


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        (
            "apt",
            "git g++ libstdc++6:amd64 libc6-dev=2.36-9+deb12u1 python3.11 curl=7.*",
            "-o --option=x bash- a/b ../x x;y $(id) `id` x|y é x\\y 'a' foo=-1 A file:///x",
        ),
        (
            "pip",
            "requests numpy==1.26.* pkg[extra,more]>=1.0,<2 Flask~=3.0 a_b x===1.0+local",
            "-r --index-url=x git+https://x/y pkg@https://x ./x ../x a/b x;y $(id) x[ x== -e pkg[-x] é",
        ),
        (
            "npm",
            "typescript left-pad@1.3.0 @types/node@^20 eslint@latest x@>=1.0 a.b",
            "-g --prefix=/x user/repo git+https://x file:x ../x @/x @a/b/c x@npm:y x@https://y x;y $(id) é ~x",
        ),
    ],
)
def test_names_of_packages(field: str, good: str, bad: str) -> None:
    request(**{field: good})
    for word in bad.split():
        with pytest.raises(InvalidRequestError, match="is not the name of a package") as refused:
            request(**{field: f"a1 {word}"})
        assert repr(word) in str(refused.value)
    with pytest.raises(InvalidRequestError, match="at most"):
        request(**{field: "a1 " * 101})


@pytest.mark.parametrize(
    "reference",
    ["", "python:3", "team/app", "docker://r.example.com/a", "file:/etc", "oci-archive:/x.tar", "dir:/etc", "/etc/passwd",
     "-r.example.com/a", "r.example.com/a b"],
)  # fmt: skip
def test_only_registries_are_asked(reference: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"^oci_image: "):
        request(oci_image=reference)


@pytest.mark.parametrize(
    "url",
    ["http://h.example/x", "git://h/x", "ssh://h/x", "git@h:x", "file:///x", "ext::sh -c id", "--upload-pack=x", "https://u:p@h/x", "https://h",
     "https://h/x?y", "https://h/x#y", "https://h/a b", "https:// h/x", "https:/h/x", "https://h/../x", "https://h/x\n"],
)  # fmt: skip
def test_repositories_over_https_alone(url: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"^build_args\.git_clone_url: ") as refused:
        request(git_url=url)
    assert "p@h" not in str(refused.value)


@pytest.mark.parametrize("branch", ["", "-b", "--x", "a..b", "a b", "a//b", "a.lock", "a/", "a~1", "a:b", "@{u}", "é"])
def test_names_of_branches(branch: str) -> None:
    for good in ("main", "v1.2", "feature/x_y-z", "1.x"):
        request(git_url="https://h.example/x.git", git_branch=good)
    with pytest.raises(InvalidRequestError, match=r"^build_args\.git_clone_branch: "):
        request(git_url="https://h.example/x", git_branch=branch)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"vcpu_count": 9}, "vcpu_count"), ({"memory_mb": 64}, "memory_mb"), ({"disk_gb": 17}, "build_args.disk_size_gb"),
        ({"name": "a\x1b"}, "name"),
        ({"git_branch": "main"}, "build_args.git_clone_branch"), ({"command": " "}, "build_args.post_build_cmd"),
        ({"command": "a\0"}, "build_args.post_build_cmd"),
        ({"envs": {"A=B": "secret"}}, "build_args.envs"), ({"envs": {"A": "secret\0"}}, "build_args.envs.A"),
    ],
)  # fmt: skip
def test_errors_name_the_field_and_no_value(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        request(**fields)
    assert str(refused.value).startswith(f"{name}: ") and "secret" not in str(refused.value)


def test_the_steps_in_their_order() -> None:
    assert request(envs={"A": "2"}).plan(CONFIG) is None
    asked = request(
        apt="git curl", pip="flask", npm="tsc", git_url="https://h.example/x", git_branch="b", command="echo $S", envs={"S": "secret", "A": "2"}
    )  # fmt: skip
    plan = asked.plan(CONFIG)
    assert plan is not None
    (stage,) = plan.stages
    # Words are arguments: no shell reads them.
    assert [step.argv[4:] for step in stage.steps[:3]] == [("git", "curl"), ("flask",), ("tsc",)]
    assert stage.steps[3].argv == ("git", "clone", "--branch=b", "--", "https://h.example/x", "/app/repo")
    assert stage.steps[4].argv == ("/bin/sh", "-c", "echo $S") and stage.steps[4].workdir == "/app/repo"
    assert request(command="x").plan(CONFIG).stages[0].steps[0].workdir == "/srv"
    for step in stage.steps:
        assert (step.env["S"], step.env["A"], step.env["PATH"], step.user) == ("secret", "2", "/opt/bin", "root")
        assert "secret" not in step.text and "echo" not in step.text
    # Nothing of it becomes part of the image.
    assert stage.config == CONFIG and "secret" not in repr(asked) and "echo" not in repr(asked)
