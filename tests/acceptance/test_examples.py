"""Every example command of the endpoint's page, as it stands there, and what the page says of the answer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from internet_fixture import Internet
from server_fixture import Api, Room, Server

HOME = "/home/user"
PNG = b"\x89PNG\r\n\x1a\n"
CA = f"{HOME}/authority.pem"

ANALYSIS = """python -c "
import pandas as pd
import matplotlib.pyplot as plt

# Create sample data  
data = {'x': [1,2,3,4,5], 'y': [2,4,6,8,10]}
df = pd.DataFrame(data)

# Create visualization
plt.figure(figsize=(8,6))
plt.plot(df['x'], df['y'], 'o-')
plt.title('Sample Data')
plt.savefig('/tmp/analysis.png')
print('Analysis complete!')
"
"""  # noqa: W291 - as it stands there
CHART = "python -c 'import matplotlib.pyplot as plt; plt.plot([1,2,3,4]); plt.savefig(\"/tmp/chart.png\")'"


@pytest.fixture(scope="module")
def science(api: Api) -> Iterator[Room]:
    """A room on `python-data-science`."""
    room = api.room(api.profile("python-data-science"))
    room.create()
    yield room
    room.delete()


@pytest.fixture
def node(api: Api, world: Internet) -> Iterator[Room]:
    """A room on `node` that trusts the tests' authority, as a company's own registry would be used."""
    env = {"npm_config_registry": "https://registry.test/", "NODE_EXTRA_CA_CERTS": CA, "GIT_SSL_CAINFO": CA}
    room = api.room(api.make_profile("node", env=env, memory_mb=1024))
    room.create()
    assert room.put(CA, world.ca_pem).status_code == 201
    room.output("true")
    yield room
    room.delete()


@pytest.mark.parametrize(
    ("command", "output"),
    [
        ("python -c 'print(\"Hello World\")'", "Hello World"),
        ("python -c 'print(\"Hello, World!\")'", "Hello, World!"),
    ],
)
def test_hello_world(shared: Room, command: str, output: str) -> None:
    answer = shared.run(command)
    assert (answer["command"], answer["status"]) == (command, "success")
    result = answer["result"]
    assert (result["output"], result["exit_code"], result["files_changed"]) == (output, 0, [])


def test_a_chart(science: Room, innkeeper: Server) -> None:
    answer = science.run(CHART)
    assert (answer["status"], answer["result"]["output"], answer["result"]["exit_code"]) == ("success", "", 0)
    (row,) = answer["result"]["files_changed"]
    assert (row["path"], row["status"], row["mime_type"]) == ("/tmp/chart.png", "created", "image/png")
    assert row["public_url"] == f"/vm/{answer['instance_id']}/file/tmp/chart.png"
    picture = innkeeper.client(token=None).get(row["public_url"])
    assert picture.headers["Content-Type"] == "image/png"
    assert picture.content.startswith(PNG) and len(picture.content) == row["size"] > 5000


def test_data_analysis(science: Room) -> None:
    answer = science.run(ANALYSIS)
    assert (answer["status"], answer["result"]["output"]) == ("success", "Analysis complete!")
    assert [(row["path"], row["status"], row["mime_type"]) for row in answer["result"]["files_changed"]] == [
        ("/tmp/analysis.png", "created", "image/png")
    ]


def test_listing_the_home(room: Room) -> None:
    answer = room.run("ls -la /home/user")
    lines = answer["result"]["output"].splitlines()
    assert lines[0].startswith("total ") and answer["result"]["files_changed"] == []
    assert {".", "..", ".bash_logout", ".bashrc", ".profile", ".cache"} <= {line.split()[-1] for line in lines[1:]}
    assert all(line.split()[2:4] == ["user", "user"] for line in lines[1:] if not line.endswith(".."))


def test_a_failure(room: Room) -> None:
    answer = room.run("python nonexistent_script.py")
    assert (answer["status"], answer["result"]["exit_code"], answer["result"]["files_changed"]) == ("error", 2, [])
    # The page's Python is an older one, which named the file without its directory.
    assert answer["result"]["output"] == (
        "python: can't open file '/home/user/nonexistent_script.py': [Errno 2] No such file or directory"
    )


def test_npm(node: Room) -> None:
    answer = node.run("npm init -y && npm install express", timeout=110)
    assert answer["status"] == "success", answer["result"]["output"]
    changed = {row["path"]: row["status"] for row in answer["result"]["files_changed"]}
    assert {f"{HOME}/package.json", f"{HOME}/package-lock.json", f"{HOME}/node_modules/express/index.js"} <= set(
        changed
    )
    assert node.output("node -p \"require('express')()\"") == "a tiny express"


def test_git(node: Room) -> None:
    answer = node.run("git clone https://github.com/user/repo.git && cd repo && npm install", timeout=110)
    assert answer["status"] == "success", answer["result"]["output"]
    changed = {row["path"] for row in answer["result"]["files_changed"]}
    assert {f"{HOME}/repo/package.json", f"{HOME}/repo/node_modules/express/package.json"} <= changed
    assert f"{HOME}/repo/.git/HEAD" in changed


def test_a_csv_file(room: Room) -> None:
    room.create()
    assert room.put(f"{HOME}/data.csv", b"name,age,city\nAda,36,London\nAlan,41,Wilmslow\n").status_code == 201
    room.output("true")
    answer = room.run("echo \"Processing data...\" && cat data.csv | tail -n +2 | cut -d',' -f1,3 > processed.csv")
    assert (answer["status"], answer["result"]["output"]) == ("success", "Processing data...")
    assert [(row["path"], row["mime_type"]) for row in answer["result"]["files_changed"]] == [
        (f"{HOME}/processed.csv", "text/csv")
    ]
    assert room.file(f"{HOME}/processed.csv").json()["content"] == "Ada,London\nAlan,Wilmslow\n"


def test_pip(api: Api, world: Internet) -> None:
    room = api.room(api.make_profile(env={"PIP_INDEX_URL": "https://index.test/simple/", "PIP_CERT": CA}))
    room.create()
    assert room.put(CA, world.ca_pem).status_code == 201
    answer = room.run("pip install tinywheel", timeout=110)
    assert answer["status"] == "success", answer["result"]["output"]
    assert any(row["path"].endswith("/tinywheel.py") for row in answer["result"]["files_changed"])
    assert room.output("python -c 'import tinywheel; print(tinywheel.greet())'") == "hello from a wheel"
    room.delete()
