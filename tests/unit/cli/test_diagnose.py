from innkeeper.cli.diagnose import speedscope


def test_a_file_for_speedscope_has_every_sample_of_every_thread():
    made = speedscope({"main;a:f;b:g": 3, "main;a:f": 1, "other;b:g": 2}, name="api")
    frames = [frame["name"] for frame in made["shared"]["frames"]]
    assert frames == ["a:f", "b:g"]
    seen = {profile["name"]: profile for profile in made["profiles"]}
    assert seen["main"]["samples"] == [[0, 1], [0]] and seen["main"]["weights"] == [3, 1]
    assert (seen["main"]["endValue"], seen["other"]["samples"]) == (4, [[1]])
