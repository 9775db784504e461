"""Cells of Python, node and bash in the shipped images, through `/execute`: what a notebook shows, what stays, how each of them ends."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from server_fixture import Server

Cell = Callable[..., dict[str, Any]]
FIGURE = "import matplotlib.pyplot as plt\nplt.figure(figsize=({}, 1)); lines = plt.plot([1, 3, 2])\n"


@pytest.fixture(scope="module")
def cell(innkeeper: Server) -> Iterator[Cell]:
    """Runs cells in one VM on `python-data-science`. The interpreter keeps what the tests before left in it."""
    yield from cells_in(innkeeper, "python-data-science")


@pytest.fixture(scope="module")
def node(innkeeper: Server) -> Iterator[Cell]:
    """Runs cells in one VM on `node`."""
    yield from cells_in(innkeeper, "node")


def cells_in(innkeeper: Server, image: str) -> Iterator[Cell]:
    with innkeeper.client() as client:
        vm = client.post("/v1/vms", json={"image_variant": image, "memory_mb": 1024}).json()["vm_id"]

        def run(code: str, language: str = "python", **more: Any) -> dict[str, Any]:
            answer = client.post("/execute", json={"vm_id": vm, "code": code, "language": language, **more})
            assert answer.status_code == 200, answer.text
            said: dict[str, Any] = answer.json()
            return said

        yield run
        client.delete(f"/v1/vms/{vm}")


def good(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer of a cell that has to succeed and complain about nothing."""
    assert (answer["exit_code"], answer["stderr"]) == (0, ""), answer
    return answer


def types(answer: dict[str, Any]) -> list[tuple[str, list[str]]]:
    return [(row["kind"], sorted(row["data"])) for row in answer["results"]]


def widths(answer: dict[str, Any]) -> list[int]:
    """The widths in pixels of the pictures among the results."""
    found = []
    for row in answer["results"]:
        picture = base64.b64decode(row["data"]["image/png"], validate=True)
        assert picture.startswith(b"\x89PNG\r\n\x1a\n") and picture.endswith(b"IEND\xaeB`\x82")
        found.append(struct.unpack(">I", picture[16:20])[0])
    return found


def charts_and_tables(cell: Cell) -> None:
    """What matplotlib and pandas show, whichever shell runs the cells."""
    one = good(cell(FIGURE.format(2)))
    assert types(one) == [("display", ["image/png", "text/plain"])]
    assert one["results"][0]["data"]["text/plain"] == "<Figure size 200x100 with 1 Axes>"
    # In the order in which they are shown; what is drawn after a show() is another figure; one that was closed is not shown.
    shown = (
        FIGURE.format(2)
        + "plt.show()\nleft = plt.get_fignums()\n"
        + FIGURE.format(6)
        + FIGURE.format(4)
        + "plt.show()\n"
    )
    several = good(cell(shown + FIGURE.format(8) + "plt.close()\n" + FIGURE.format(10) + "print(left)"))
    first, *later = widths(several)
    assert len(later) == 3 and first < later[1] < later[0] < later[2]
    assert several["stdout"] == "[]\n"
    # As the value of the last expression it is that, and not shown once more; also when it is closed.
    assert types(good(cell("figure = plt.figure(); figure"))) == [("result", ["image/png", "text/plain"])]
    assert types(good(cell("figure"))) == [("result", ["image/png", "text/plain"])]
    assert good(cell("plt.get_fignums()"))["stdout"] == "[]\n"
    table = good(cell("import pandas as pd\nframe = pd.DataFrame({'name': ['<b>', 'c'], 'n': [1, 2]})\nframe"))
    assert types(table) == [("result", ["text/html", "text/plain"])]
    assert "<td>&lt;b&gt;</td>" in table["results"][0]["data"]["text/html"]
    assert table["stdout"] == "  name  n\n0  <b>  1\n1    c  2\n"
    assert good(cell("display(int(frame.n.sum())); frame.plot(); float(frame.n.mean())"))["stdout"] == "3\n1.5\n"


def ends(cell: Cell) -> None:
    """How cells end, and what of the state is there afterwards, whichever shell runs them."""
    good(cell("kept = 5\ndef reciprocal(n):\n    return 1 / n"))
    wrong = cell("reciprocal(0)")
    assert wrong["exit_code"] == 1 and wrong["stderr"].splitlines()[-1] == "ZeroDivisionError: division by zero"
    assert "return 1 / n" in wrong["stderr"] and "Traceback" in wrong["stderr"] and "<kernel>" not in wrong["stderr"]
    good(cell("import asyncio\nasync def late():\n    await asyncio.sleep(0.01)\n    return kept"))
    assert good(cell("await late()"))["stdout"] == "5\n"
    assert good(cell("_ * 2"))["stdout"] == "10\n"
    limited = cell("while True: pass", timeout=2)
    assert (limited["exit_code"], limited["timed_out"], limited["kernel"]["lost"]) == (124, True, False)
    flood = good(cell("print('x' * 3_000_000)"))
    assert (len(flood["stdout"]), flood["stdout_truncated"]) == (1_048_576, True)
    assert cell("raise SystemExit(7)")["exit_code"] == 7
    assert good(cell("kept"))["stdout"] == "5\n"


def test_charts_and_tables(cell: Cell) -> None:
    charts_and_tables(cell)
    ends(cell)
    assert good(cell("import sys\n'IPython' in sys.modules"))["stdout"] == "False\n"


def test_ipython_comes_with_the_first_cell_that_needs_it_and_keeps_what_was_there(cell: Cell) -> None:
    good(cell("before = [3, 2, 1]"))
    timed = good(cell("%time sorted(before)"))
    assert "Wall time" in timed["stdout"] and timed["stdout"].endswith("[1, 2, 3]\n")
    assert timed["kernel"] == {"fresh": False, "lost": False}
    listed = good(cell("files = !printf 'a\\nb\\n'\n!echo $$HOME {len(before)}\nfiles"))
    assert listed["stdout"] == "/root 3\n['a', 'b']\n"
    assert good(cell("%%bash\necho $((6 * 7))"))["stdout"] == "42\n"
    html = good(
        cell("from IPython.display import HTML, display\ndisplay(HTML('<i>'))\nget_ipython().__class__.__name__")
    )
    assert [row["data"].get("text/html") for row in html["results"]] == ["<i>", None]
    assert html["stdout"] == "<IPython.core.display.HTML object>\n'Shell'\n"
    assert cell("no python at all")["stderr"].splitlines()[-1].startswith("SyntaxError")
    charts_and_tables(cell)
    ends(cell)
    # Nothing of it is found among the changed files, nor does it say anything by itself.
    assert good(cell("%pwd"))["files_changed"] == []
    lost = cell("import os\nos._exit(3)")
    assert (lost["exit_code"], lost["kernel"]) == (3, {"fresh": False, "lost": True})
    assert good(cell("'before' in globals(), 'get_ipython' in globals()"))["stdout"] == "(False, True)\n"


def test_an_import_brings_ipython_too(cell: Cell) -> None:
    # A file of the user's that is called like a module keeps no interpreter from starting.
    cell("import os\nwith open('socket.py', 'w') as file: file.write('1 / 0')\nos._exit(0)")
    good(cell("import os; os.unlink('socket.py')"))
    answer = good(cell("mine = 1\nfrom IPython.display import Markdown, display\ndisplay(Markdown('*m*'))"))
    assert answer["results"][0]["data"]["text/markdown"] == "*m*"
    assert good(cell("!echo {mine}"))["stdout"] == "1\n"


def test_cells_of_node(node: Cell) -> None:
    """Each is a program of its own: node takes no descriptors while it runs, so that nothing could tell one cell's output from the next one's."""

    def run(code: str, **more: Any) -> dict[str, Any]:
        return node(code, "node", **more)

    first = good(run("globalThis.kept = 1; const os = require('os'); console.log(os.userInfo().username, 6 * 7)"))
    assert (first["stdout"], first["kernel"], first["results"]) == ("root 42\n", None, [])
    assert good(run("console.log(typeof kept)"))["stdout"] == "undefined\n"
    wrong = run("console.log('before')\nfunction f() { throw new TypeError('not so') }\nf()")
    assert (wrong["exit_code"], wrong["stdout"]) == (1, "before\n")
    assert "TypeError: not so" in wrong["stderr"] and "at f (" in wrong["stderr"]
    assert run("process.exit(9)")["exit_code"] == 9
    late = "setTimeout(() => console.log('second'), 50); Promise.resolve('first').then(console.log)"
    assert good(run(late))["stdout"] == "first\nsecond\n"
    awaited = "import { setTimeout as pause } from 'node:timers/promises'; console.log(await pause(10, 'awaited'))"
    assert good(run(awaited))["stdout"] == "awaited\n"
    # Long enough for node to start on a busy machine: it is its end that is of interest here.
    limited = run("console.log('begun'); while (true);", timeout=6)
    assert (limited["exit_code"], limited["timed_out"], limited["stdout"]) == (124, True, "begun\n")
    written = good(run("require('fs').writeFileSync('made.txt', 'm')"))
    assert {row["path"]: row["status"] for row in written["files_changed"]} == {"/root/made.txt": "created"}


def test_node_has_the_variables_that_were_staged(innkeeper: Server, node: Cell) -> None:
    code = "console.log(process.env.STAGED ?? 'none', require('child_process').execSync('echo $STAGED').toString())"
    before = good(node(code, "node"))
    assert before["stdout"] == "none \n\n"
    with innkeeper.client() as client:
        path, entry = f"/v1/vms/{before['vm_id']}/stage-env", {"env_name": "STAGED", "value": "it's ä value"}
        assert client.post(path, json={"entries": [entry]}).status_code == 200
    assert good(node(code, "node"))["stdout"] == "it's ä value it's ä value\n\n"


@pytest.mark.microvms
def test_cells_of_bash(node: Cell) -> None:
    def run(code: str, **more: Any) -> dict[str, Any]:
        return node(code, "bash", **more)

    assert good(run("kept=1; cd /; words=(a b); echo ${#words[@]}; echo $0 | tr a-z A-Z"))["stdout"] == "2\nBASH\n"
    assert good(run("echo ${kept-none} $PWD"))["stdout"] == "none /root\n"
    wrong = run("echo before; no-such-program; (exit 5)")
    assert (wrong["exit_code"], wrong["stdout"]) == (5, "before\n") and "command not found" in wrong["stderr"]
    assert run("if then")["exit_code"] == 2
    limited = run("echo begun; sleep 60 & wait", timeout=2)
    assert (limited["exit_code"], limited["timed_out"], limited["stdout"]) == (124, True, "begun\n")
    flood = good(run("head -c 3000000 /dev/zero | tr '\\0' x"))
    assert (len(flood["stdout"]), flood["stdout_truncated"]) == (1_048_576, True)
