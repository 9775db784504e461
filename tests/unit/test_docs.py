"""The pages say what the program does: every command, option and setting is there, and the generated parts are current."""

from pathlib import Path

import pytest
import typer

from innkeeper.cli.main import COMMANDS, build
from innkeeper.cli.reference import PAGES, WIDTH, generated, with_generated
from innkeeper.settings import Settings
from innkeeper.settings_sources import ENV_PREFIX

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(("page", "part"), PAGES.items())
def test_the_generated_part_is_current(page, part):
    text = (DOCS / page).read_text()
    assert with_generated(text, part) == text, "run: python -m innkeeper.cli.reference docs"


def _commands(command, path):
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from _commands(child, [*path, name])


def test_every_command_and_option_is_documented():
    text = (DOCS / "cli.md").read_text()
    count = 0
    for path, command in _commands(typer.main.get_command(build()), ["inn"]):
        heading = f"## {' '.join(path)}\n"
        assert heading in text
        section = text.partition(heading)[2].partition("\n## ")[0]
        for parameter in command.params:
            for option in parameter.opts if parameter.param_type_name == "option" else ():
                assert option in section, (path, option)
                count += 1
            if parameter.param_type_name == "option":
                assert parameter.help, f"{path}: {parameter.name} has no help"
    assert count > 60


def test_every_command_has_help():
    for path, command in _commands(typer.main.get_command(build()), ["inn"]):
        assert command.help, path


def test_every_setting_is_documented_with_a_meaning():
    text = (DOCS / "operations.md").read_text()
    for name, field in Settings.model_fields.items():
        assert f"| `{ENV_PREFIX}{name.upper()}` |" in text
        assert field.description and field.description.endswith(".")


def test_every_check_of_doctor_is_explained():
    from innkeeper.host.probes import machine

    text = (DOCS / "operations.md").read_text()
    names = {check.name for check in machine.machine_checks(Settings())}
    names |= {
        "runsc",
        "sandbox",
        "runsc network",
        "cgroups",
        "loop devices",
        "overlay",
        "erofs",
        "reflink",
        "nft",
        "iproute2",
    }
    names |= {"qemu", "tsc", "kvm", "forwarding", "ip_forward", "platform"}
    for name in names:
        assert f"`{name}`" in text, name


def test_help_does_not_depend_on_the_terminal(monkeypatch):
    before = generated("commands")
    monkeypatch.setenv("COLUMNS", str(WIDTH - 60))
    assert generated("commands") == before


def test_only_the_asked_command_is_built():
    from innkeeper.cli.main import asked

    assert asked(["room", "list"]) == ("room",)
    assert asked(["--home", "/x", "run", "b", "r", "--", "room"]) == ("run",)
    for argv in ([], ["--help"], ["--help", "room"], ["--home", "run", "room", "list"], ["typo"]):
        assert asked(argv) == tuple(COMMANDS)
