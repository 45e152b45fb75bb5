"""What `/metrics` shows, in Prometheus' text form."""

from __future__ import annotations

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

__all__ = ["METRICS_CONTENT_TYPE", "ServerMetrics"]

METRICS_CONTENT_TYPE = CONTENT_TYPE_LATEST
# Answers take from tenths of a second to minutes.
_SECONDS = (0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ServerMetrics:
    """The server's counters; `model` is always one of the served names, or empty, so that series stay few."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        made = self.registry
        self.up = Gauge("kaito_flows_server_up", "1 when the model is loaded and answers.", registry=made)
        self.load_seconds = Gauge(
            "kaito_flows_server_model_load_seconds", "Time from start until the model was ready.", registry=made
        )
        self.requests = Counter(
            "kaito_flows_server_requests", "Requests answered.", ["route", "model", "status"], registry=made
        )
        self.request_seconds = Histogram(
            "kaito_flows_server_request_seconds",
            "Time from a request's arrival to its last byte.",
            ["route", "model"],
            buckets=_SECONDS,
            registry=made,
        )
        self.first_text_seconds = Histogram(
            "kaito_flows_server_time_to_first_text_seconds",
            "Time from a request's arrival in the line to the first text of its answer.",
            ["model"],
            buckets=_SECONDS,
            registry=made,
        )
        self.prompt_tokens = Counter(
            "kaito_flows_server_prompt_tokens", "Tokens of prompts that were worked on.", ["model"], registry=made
        )
        self.generated_tokens = Counter(
            "kaito_flows_server_generated_tokens", "Tokens generated.", ["model"], registry=made
        )
        self.in_flight = Gauge("kaito_flows_server_requests_in_flight", "Requests being handled.", registry=made)
        self.waiting = Gauge(
            "kaito_flows_server_requests_waiting", "Requests in the line before the model.", registry=made
        )

    def render(self) -> bytes:
        """The text of `/metrics`."""
        return generate_latest(self.registry)
