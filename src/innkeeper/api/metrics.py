"""What `/metrics` says about HTTP. One registry per application, so that several live in one process; no label has unbounded values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from innkeeper.control.hosts import HostView

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_HOST_GAUGES = {
    "machines": "Running guests.",
    "frozen": "Guests without processor time while they are idle.",
    "memory_mb": "Memory of the host, MiB.",
    "memory_committed_mb": "Memory promised to guests, MiB.",
    "disk_free_mb": "Free disk, MiB.",
    "leaked": "Resources that belong to no instance; must be 0.",
}
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120, 600, 3600)


class HttpMetrics:
    """Requests by method, route template and status; their duration; how many are in flight."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "innkeeper_http_requests",
            "Requests answered.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "innkeeper_http_request_seconds",
            "Time from a request's header to the end of its answer.",
            ("route",),
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "innkeeper_http_requests_in_flight", "Requests being answered now.", registry=self.registry
        )

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request."""
        self._requests.labels(method if method in _METHODS else "other", route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def render(self, control: Mapping[str, float], hosts: Iterable[HostView]) -> bytes:
        """The text exposition format: the HTTP side, the control side's counters, and what the hosts say of themselves now."""
        now = CollectorRegistry()
        now.register(_Snapshot(control, hosts))
        return generate_latest(self.registry) + generate_latest(now)


class _Snapshot(Collector):
    """Numbers that others keep, read once."""

    def __init__(self, control: Mapping[str, float], hosts: Iterable[HostView]) -> None:
        self._control = control
        self._hosts = list(hosts)

    def collect(self) -> Iterator[Metric]:
        """The families."""
        for name, value in self._control.items():
            family = CounterMetricFamily(f"innkeeper_control_{name}", f"Since the start: {name.replace('_', ' ')}.")
            family.add_metric((), value)
            yield family
        reachable = GaugeMetricFamily("innkeeper_host_reachable", "Whether the host answers.", labels=("host",))
        for view in self._hosts:
            reachable.add_metric((view.host.name,), float(view.reachable))
        yield reachable
        for field, text in _HOST_GAUGES.items():
            gauge = GaugeMetricFamily(f"innkeeper_host_{field}", text, labels=("host",))
            for view in self._hosts:
                if isinstance(view.status.get(field), (int, float)):
                    gauge.add_metric((view.host.name,), view.status[field])
            yield gauge
        ready = GaugeMetricFamily("innkeeper_host_pool_ready", "Warm guests nobody has claimed yet.", labels=("host",))
        for view in self._hosts:
            ready.add_metric((view.host.name,), sum(pool["ready"] for pool in view.status.get("pools", ())))
        yield ready
