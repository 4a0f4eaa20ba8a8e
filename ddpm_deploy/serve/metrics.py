"""What Prometheus reads of a service: a registry of its own, so that several services live in one process."""

from collections.abc import Iterable
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ddpm_deploy.serve.batcher import Status

_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_GAUGES: Final = {
    "waiting": ("ddpm_queue_requests", "Requests that have images left to begin."),
    "running": ("ddpm_images_running", "Images that run."),
    "rows": ("ddpm_slots_in_use", "Rows of the batch in use."),
    "capacity": ("ddpm_slots", "Rows of the batch."),
    "width": ("ddpm_slots_open", "Rows up to which any request may join."),
    "step_seconds": ("ddpm_step_seconds", "Seconds of a step with as many rows as are in use."),
}
_OUTCOMES: Final = ("completed", "cancelled", "failed", "refused")


class Metrics:
    """Of one service. source: gives its status, None before it has one."""

    def __init__(self, source: Any) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_State(source))
        self._latency = Histogram(
            "ddpm_request_seconds",
            "Seconds from a request to its images.",
            ["route"],
            registry=self.registry,
            buckets=_SECONDS,
        )
        self._images = Counter("ddpm_images", "Images that were made.", registry=self.registry)
        self._answers = Counter(
            "ddpm_http_answers", "Answers, by status.", ["status"], registry=self.registry
        )

    def done(self, route: str, images: int, seconds: float) -> None:
        """A request was done."""
        self._latency.labels(route).observe(seconds)
        self._images.inc(images)

    def answered(self, status: int) -> None:
        """An answer was begun."""
        self._answers.labels(str(status)).inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)


class _State(Collector):
    """The batcher's own numbers, as they are when somebody looks."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def collect(self) -> Iterable[Metric]:
        status: Status | None = self._source()
        if status is None:
            return
        for field, (name, about) in _GAUGES.items():
            yield GaugeMetricFamily(name, about, value=getattr(status, field))
        yield CounterMetricFamily("ddpm_steps", "Steps that were taken.", value=status.steps)
        requests = CounterMetricFamily(
            "ddpm_requests", "Requests, by what became of them.", labels=["outcome"]
        )
        for outcome in _OUTCOMES:
            requests.add_metric([outcome], getattr(status, outcome))
        yield requests

    def describe(self) -> Iterable[Metric]:
        return []
