from pathlib import Path
from types import SimpleNamespace

from innkeeper.core.image import ImageStatus, ShippedImage
from innkeeper.core.instance import Isolation
from innkeeper.core.isolation import Offer
from innkeeper.settings import Settings
from innkeeper.startup_report import TRIAL_COMMAND, Trial, _try_a_room, report

DAEMON = SimpleNamespace(
    drivers=SimpleNamespace(
        offers=lambda: [
            Offer("gvisor", Isolation("gvisor", "gvisor", "systrap", "no KVM here"), "no KVM here"),
            Offer("qemu", None, "QEMU is not installed"),
        ]
    ),
    images=SimpleNamespace(
        list=lambda: [ShippedImage("base", ImageStatus.READY), ShippedImage("node", ImageStatus.BUILDING)]
    ),
    fleet=SimpleNamespace(warm=SimpleNamespace(levels=lambda: [{"pool_key": "k", "size": 2, "ready": 1}])),
    recovered=SimpleNamespace(adopted=3, removed=4),
)
ANSWER = {
    "result": {
        "output": "Hello\nagain",
        "exit_code": 0,
        "files_changed": [{"path": "/home/user/hello.txt", "status": "created", "size": 12}],
    }
}
HOME = Path("/srv/inn")


def said(trial, **settings):
    return report(Settings(home=HOME, **settings), DAEMON, trial, seconds=2.34)


def test_everything_that_is_promised_is_there():
    text = said(Trial("base", ANSWER, 4.4, 11.6))
    for line in (
        "Innkeeper is ready on http://127.0.0.1:7070 after 2.3 s",
        "  driver    gvisor on systrap: no KVM here",
        "  driver    qemu cannot run: QEMU is not installed",
        "  images    base, node (building)",
        "  pools     1/2 guests ready",
        "  adopted   3 guests of an earlier run; 4 leftovers removed",
        "  token     /srv/inn/first-token",
        '  curl -s -H "Authorization: Bearer $(cat /srv/inn/first-token)" http://127.0.0.1:7070/api/profiles',
        "A first room, on profile base: ready after 4 ms",
        f"  $ {TRIAL_COMMAND}",
        "  Hello",
        "  again",
        "  exit code 0 after 12 ms; files changed:",
        "    created  /home/user/hello.txt  12 bytes",
        "Stop with Ctrl-C; guests run on, and the next start adopts them.",
    ):
        assert line in text.splitlines(), line


def test_what_went_wrong_is_said():
    assert said(Trial("base", None, 0, 0, "no answer")).splitlines()[-1] == "A first room could not be used: no answer"
    assert "A first room" not in said(None)
    assert said(Trial("base", ANSWER, 1, 1), keep_machines=False).splitlines()[-1] == "Stop with Ctrl-C."


def test_an_address_with_colons_is_bracketed():
    assert "on http://[::1]:7070 after" in said(None, listen="::1")


def test_a_server_that_does_not_answer_is_no_fault_of_the_report(tmp_path):
    trial = _try_a_room(Settings(home=tmp_path, images="node,base"))
    assert (trial.profile, trial.answer) == ("node", None)
    assert trial.failure
