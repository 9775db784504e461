"""What the daemon's instruments say of what happened."""

from innkeeper.core.instance import BootStep
from innkeeper.host.metrics import PHASES, STARTS, HostMetrics


def samples(metrics):
    return {
        (name, *sorted(labels.items())): value
        for family in metrics.families()
        for name, labels, value in family["samples"]
    }


def test_a_start_is_measured_step_by_step():
    metrics = HostMetrics()
    metrics.observe_start([BootStep("active", 0.0), BootStep("vm_started", 200.0), BootStep("ready", 210.0)], "cold")
    found = samples(metrics)
    start = ("start", "cold")
    assert found["innkeeper_start_seconds_count", start] == 1
    assert found["innkeeper_start_seconds_sum", start] == 0.21
    assert found["innkeeper_start_step_seconds_sum", start, ("step", "vm_started")] == 0.2
    assert round(found["innkeeper_start_step_seconds_sum", start, ("step", "ready")], 6) == 0.01


def test_a_command_counts_once_it_has_a_result_and_only_the_phases_that_it_reached():
    metrics = HostMetrics()
    clock = metrics.command_clock()
    for phase in PHASES:
        clock.lap(phase)
    before = samples(metrics)
    assert before["innkeeper_execution_seconds_count",] == 0
    clock.end(timed_out=False)
    resumed = metrics.command_clock()
    resumed.lap("guest")
    resumed.end(timed_out=True)
    metrics.count_lost_command()
    found = samples(metrics)
    assert found["innkeeper_execution_seconds_count",] == 2
    assert found["innkeeper_execution_phase_seconds_count", ("phase", "turn")] == 1
    assert found["innkeeper_execution_phase_seconds_count", ("phase", "guest")] == 2
    assert [found["innkeeper_executions_total", ("outcome", one)] for one in ("done", "timed_out", "lost")] == [1, 1, 1]


def test_every_family_has_its_type_and_a_help_and_a_unit_in_its_name():
    found = HostMetrics().families()
    assert len(found) > 10
    for family in found:
        assert family["type"] in ("counter", "histogram", "gauge") and family["help"].endswith("."), family
        assert family["type"] != "histogram" or family["name"].endswith("_seconds")
        assert not any(name.endswith("_created") for name, _, _ in family["samples"])


def test_every_start_has_its_row_before_the_first_one():
    found = samples(HostMetrics())
    assert {labels[0][1] for name, *labels in found if name == "innkeeper_start_seconds_count"} == set(STARTS)
