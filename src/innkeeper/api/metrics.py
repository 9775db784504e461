"""What `/metrics` says about HTTP. One registry per application, so that several live in one process; no label has unbounded values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
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

    def render(self, families: Iterable[dict[str, Any]]) -> bytes:
        """The text exposition format: the HTTP side, then families as `core.metric.families` spells them."""
        now = CollectorRegistry()
        now.register(_Page(self.registry.collect(), families))
        return generate_latest(now)


class _Page(Collector):
    """Our own numbers, without the moments when they were begun, and those that others keep, as they told them."""

    def __init__(self, own: Iterable[Metric], families: Iterable[dict[str, Any]]) -> None:
        self._own = own
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """The families."""
        for metric in self._own:
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
        for family in self._families:
            metric = Metric(family["name"], family["help"], family["type"])
            for name, labels, value in family["samples"]:
                metric.add_sample(name, labels, value)
            yield metric
