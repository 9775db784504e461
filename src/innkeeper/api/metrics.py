"""What `/metrics` says about HTTP. One registry per application, so that several live in one process; no label has unbounded values."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 120, 600, 3600)


class HttpMetrics:
    """Requests by method, route template and status; their duration; how many are in flight; what the hosts report."""

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
        self.hosts = {
            field: Gauge(f"innkeeper_host_{field}", text, ("host",), registry=self.registry)
            for field, text in (
                ("machines", "Running guests."),
                ("frozen", "Guests without processor time while they are idle."),
                ("memory_committed_mb", "Memory promised to guests, MiB."),
                ("disk_free_mb", "Free disk, MiB."),
                ("leaked", "Resources that belong to no instance; must be 0."),
            )
        }
        self.pool_ready = Gauge("innkeeper_host_pool_ready", "Warm guests nobody has claimed yet.", ("host",), registry=self.registry)  # fmt: skip

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request."""
        self._requests.labels(method if method in _METHODS else "other", route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)
