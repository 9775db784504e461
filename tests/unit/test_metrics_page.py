"""The table of metrics in the docs, and the dashboard, name what there is. That the table is that of a live server: tests/acceptance/test_operations.py."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ROW = re.compile(r"^\| `(innkeeper_[a-z_]+)` \| (counter|gauge|histogram) \| ([^|]*) \| ([^|]+\.) \|$", re.MULTILINE)
NAME = re.compile(r"\binnkeeper_[a-z0-9_]+")


def documented():
    """{name: (type, labels)} of the table in docs/operations.md."""
    rows = ROW.findall((ROOT / "docs" / "operations.md").read_text())
    return {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels, _ in rows}


def family(name):
    """The family that a sample's name belongs to."""
    known = documented()
    for suffix in ("_bucket", "_sum", "_count"):
        base = name.removesuffix(suffix)
        if name.endswith(suffix) and known.get(base, ("", set()))[0] == "histogram":
            return base
    return name


def expressions(text):
    return NAME.findall(text)


def test_names_follow_the_conventions():
    found = documented()
    assert len(found) > 60
    for name, (kind, _) in found.items():
        assert name.endswith("_total") == (kind == "counter"), name
        assert not re.search(r"_(mb|ms|kib|mib|milliseconds)(_|$)", name), name


def test_no_label_names_something_without_end():
    for name, (_, labels) in documented().items():
        assert labels <= {
            "host", "process", "state", "kind", "method", "route", "status", "code", "outcome", "start", "step", "phase", "task", "reason",
            "driver",
        }, name  # fmt: skip


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_every_query_names_metrics_and_labels_that_exist(panel):
    found = documented()
    for target in panel["targets"]:
        names = expressions(target["expr"])
        assert names, target
        labels = {"le"}
        for name in names:
            assert family(name) in found, name
            labels |= found[family(name)][1]
        for group in re.findall(r"by \(([^)]*)\)", target["expr"]):
            assert set(re.split(r",\s*", group)) <= labels, target
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels, target
        assert set(re.findall(r"[{,]\s*(\w+)=", target["expr"])) <= labels, target


def test_the_alerts_in_the_docs_name_metrics_that_exist():
    text = (ROOT / "docs" / "operations.md").read_text()
    table = text.partition("| expression | means |")[2].partition("\n\n")[0]
    names = expressions(table)
    assert len(names) >= 8 and all(family(name) in documented() for name in names)


def test_panels_do_not_lie_on_each_other_and_have_ids_of_their_own():
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
