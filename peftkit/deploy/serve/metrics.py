"""What a server says about itself to Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper bounds of the latency histograms."""


class Metrics:
    """Counts of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "peftkit_requests", "Requests by path and status", ["path", "status"], registry=self.registry
        )
        self.refused = Counter(
            "peftkit_requests_refused", "Requests refused before any work", ["reason"], registry=self.registry
        )
        self.in_flight = Gauge("peftkit_requests_in_flight", "Requests that are being answered", registry=self.registry)
        self.seconds = Histogram(
            "peftkit_request_seconds",
            "From the first byte to the last, by path",
            ["path"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "peftkit_first_token_seconds",
            "Until the first token, by model",
            ["model"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.prompt_tokens = Counter("peftkit_prompt_tokens", "Tokens read", ["model"], registry=self.registry)
        self.answer_tokens = Counter("peftkit_answer_tokens", "Tokens written", ["model"], registry=self.registry)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
