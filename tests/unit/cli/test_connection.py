import pytest
from scripted_server import serving

from innkeeper.cli.connection import encode_segment


def test_no_server_is_69_with_a_hint(inn):
    ended = inn("room", "list")
    assert ended.status == 69
    assert "no server answers at" in ended.err and "inn serve" in ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize(
    "body", [{"error": "conflict", "message": "a\x1b]0;x\x07b\nc"}, {"code": "conflict", "detail": "a\x1b]0;x\x07b\nc"}]
)
def test_an_error_prints_the_servers_message_and_nothing_that_a_terminal_obeys(inn, server, body):
    server.error = (409, body)
    ended = inn("profile", "list")
    assert (ended.status, ended.out) == (1, "")
    assert ended.err == "inn: a\\x1b]0;x\\x07b\\nc\n"


def test_an_unauthorized_answer_says_what_to_set(inn, server):
    server.error = (401, {"error": "unauthorized", "message": "A valid API token is required."})
    assert "INNKEEPER_TOKEN" in inn("profile", "list").err


def test_url_and_token_of_the_environment(inn, server, monkeypatch):
    with serving(server, host="127.0.0.1", port=0) as running:
        port = running.servers[0].sockets[0].getsockname()[1]
        monkeypatch.setenv("INNKEEPER_URL", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("INNKEEPER_TOKEN", "rk_live_1")
        assert inn("profile", "list").status == 0
    assert server.seen[-1].headers["authorization"] == "Bearer rk_live_1"


def test_a_token_file_wins_over_the_environment(inn, server, monkeypatch, tmp_path):
    monkeypatch.setenv("INNKEEPER_TOKEN", "other")
    (tmp_path / "token").write_text("rk_live_2\n")
    assert inn("--token-file", str(tmp_path / "token"), "profile", "list").status == 0
    assert server.seen[-1].headers["authorization"] == "Bearer rk_live_2"


def test_a_token_file_with_two_lines_is_refused_before_anything_is_sent(inn, server, tmp_path):
    (tmp_path / "token").write_text("a\nb\n")
    assert inn("--token-file", str(tmp_path / "token"), "profile", "list").status == 2
    assert server.seen == []


def test_a_token_in_the_clear_is_warned_about(inn, monkeypatch):
    monkeypatch.setenv("INNKEEPER_URL", "http://127.0.0.2:9")
    monkeypatch.setenv("INNKEEPER_TOKEN", "rk_live_1")
    ended = inn("profile", "list")
    assert ended.status == 69 and "in the clear" in ended.err


def test_a_bad_url_is_a_usage_error(inn, monkeypatch):
    monkeypatch.setenv("INNKEEPER_URL", "ftp://x")
    assert inn("profile", "list").status == 2


@pytest.mark.parametrize("room", ["..", ".", "a/b", "a b?#%", "\N{SNOWMAN}", "x" * 255])
def test_any_room_id_arrives_as_it_is(inn, server, room):
    ended = inn("room", "create", "base", room, "--json")
    assert ended.status == 0, ended.err
    from innkeeper.api.dialects.gentility.room_path import parse_room_path

    parsed = parse_room_path(server.seen[-1].path.encode())
    assert parsed is not None and parsed.room_id() == room


def test_segments_hide_dots_and_slashes():
    assert encode_segment("../a") == "%2E%2E%2Fa"


def test_usage_errors_are_2(inn):
    assert inn("room", "create").status == 2
    assert inn("nonsense").status == 2
