"""Rooms that nobody uses: destroyed after the profile's idle time, unless a process of the user runs. Two were made when the server started."""

from __future__ import annotations

from server_fixture import Api, until

# A minute of idleness, and half a minute until somebody looks.
EXPIRED_SECONDS = 150


def test_an_idle_room_goes_and_one_at_work_stays(api: Api) -> None:
    profile = api.profile("short-lived")

    def rooms() -> list[str]:
        return [room["room_id"] for room in api.client.get(f"/api/profile/{profile}/rooms").json()]

    until(lambda: "idle" not in rooms(), seconds=EXPIRED_SECONDS)
    assert rooms() == ["at-work"]
    gone, at_work = api.room(profile, "idle"), api.room(profile, "at-work")
    assert gone.file("/home/user/file.txt").json()["error"] == "instance_not_found"
    assert at_work.output("pgrep -c -x sleep") == "1"
    events = api.client.get("/v1/audit", params={"limit": 1000}).json()["events"]
    assert [event["details"].get("room_id") or event["actor"] for event in events if event["action"] == "room.expire"]
    assert gone.output("ls file.txt || echo new") != "file.txt"
    for room in (gone, at_work):
        assert room.delete().status_code == 204
