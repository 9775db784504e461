import base64
import json


def test_each_setting_with_where_it_is_from(inn, tmp_path, monkeypatch):
    key = base64.b64encode(b"hunter2 " * 4).decode()
    file = tmp_path / "x.toml"
    file.write_text("port = 8000\n")
    monkeypatch.setenv("INNKEEPER_MASTER_KEY", key)
    monkeypatch.setenv("INNKEEPER_DATABASE_URL", "sqlite:////x?p=1")
    ended = inn("settings", "--config", str(file), "--json")
    rows = {row["name"]: row for row in json.loads(ended.out)}
    assert (rows["INNKEEPER_PORT"]["value"], rows["INNKEEPER_PORT"]["source"]) == ("8000", str(file))
    assert (rows["INNKEEPER_MASTER_KEY"]["value"], rows["INNKEEPER_MASTER_KEY"]["source"]) == (
        "(hidden)",
        "environment",
    )
    assert rows["INNKEEPER_LISTEN"]["source"] == "default"
    assert key not in ended.out + ended.err


def test_what_is_wrong_is_said_with_status_2(inn, monkeypatch):
    monkeypatch.setenv("INNKEEPER_POTR", "1")
    ended = inn("settings")
    assert (ended.status, ended.out) == (2, "")
    assert "did you mean INNKEEPER_PORT?" in ended.err
