"""What an operator watches, in Prometheus' form.

Names end as vLLM's do, so that its dashboards need one word changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from ortlm.server.models import Slot
from ortlm.serving.request import Request

# vLLM's begin at 0.3 s, which is too coarse for small models.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
# name -> (what it is, field of EngineStats)
_GAUGES = {
    "num_requests_running": ("requests that run", "running"),
    "num_requests_prefilling": ("requests whose prompt is computed", "prefilling"),
    "num_requests_waiting": ("requests that wait", "waiting"),
    "cache_tokens": ("tokens that running requests hold in the cache", "cache_tokens"),
    "prefix_cache_bytes": ("bytes of prefixes that are kept", "prefix_bytes"),
}
_COUNTERS = {
    "prompt_tokens": ("prompt tokens", "prompt_tokens"),
    "generation_tokens": ("generated tokens", "new_tokens"),
    "prefix_cache_queries": ("prompt tokens that were looked for in the prefix cache", "prompt_tokens"),
    "prefix_cache_hits": ("prompt tokens that came from the prefix cache", "cached_tokens"),
    "num_preemptions": ("requests that lost their row to others", "preempted"),
    "engine_steps": ("steps of a batch", "steps"),
    "spec_decode_num_draft_tokens": ("tokens that were drafted", "drafted_tokens"),
    "spec_decode_num_accepted_tokens": ("drafted tokens that were accepted", "accepted_tokens"),
    "batch_failures": ("batches that failed and were computed again", "batch_failures"),
}
_HISTOGRAMS = {
    "time_to_first_token_seconds": ("time from arrival to the first token", _SECONDS),
    "inter_token_latency_seconds": ("time from one token to the next", _SECONDS),
    "e2e_request_latency_seconds": ("time from arrival to the end", _SECONDS),
    "request_queue_time_seconds": ("time before a prompt is computed", _SECONDS),
    "request_prefill_time_seconds": ("time from there to the first token", _SECONDS),
    "request_decode_time_seconds": ("time from there to the end", _SECONDS),
    "request_prompt_tokens": ("tokens of a prompt", _TOKENS),
    "request_generation_tokens": ("tokens of an answer", _TOKENS),
}


class Metrics:
    """The figures of a server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._models: Sequence[Slot] = ()
        self._histograms = {
            name: Histogram(f"ortlm:{name}", text, ["model_name"], buckets=buckets, registry=self.registry)
            for name, (text, buckets) in _HISTOGRAMS.items()
        }
        self._ended = Counter(
            "ortlm:request_success",
            "requests that ended",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._answers = Counter(
            "ortlm:http_requests",
            "HTTP requests by path and status",
            ["path", "status"],
            registry=self.registry,
        )
        self.registry.register(self)

    def watch(self, models: Sequence[Slot]) -> None:
        """Report on ``models`` and their engines."""
        self._models = models

    def observer(self, name: str) -> ModelObserver:
        """Return what counts the tokens and ends of the model ``name``."""
        return ModelObserver(name, self._histograms, self._ended)

    def answered(self, path: str, status: int) -> None:
        """Count an answer; ``path`` is one that the server knows, never what a client made up."""
        self._answers.labels(path, str(status)).inc()

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        found: bytes = generate_latest(self.registry)
        return found

    def collect(self) -> Iterator[Any]:
        """Yield what the engines count themselves."""
        stats = [(model.name, model.stats()) for model in self._models]
        for name, (text, key) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"ortlm:{name}", text, labels=["model_name"])
            for model, found in stats:
                gauge.add_metric([model], getattr(found, key))
            yield gauge
        usage = GaugeMetricFamily(
            "ortlm:kv_cache_usage_perc", "share of the cache that is in use, 0 to 1", labels=["model_name"]
        )
        for model, found in stats:
            usage.add_metric([model], found.cache_tokens / max(1, found.most_cache_tokens))
        yield usage
        loaded = GaugeMetricFamily("ortlm:model_loaded", "1 if the model is loaded", labels=["model_name"])
        loads = CounterMetricFamily(
            "ortlm:model_loads",
            "attempts to load the model by how they ended",
            labels=["model_name", "result"],
        )
        for slot in self._models:
            loaded.add_metric([slot.name], float(slot.served is not None))
            loads.add_metric([slot.name, "loaded"], slot.loads)
            loads.add_metric([slot.name, "failed"], slot.failures)
        yield from (loaded, loads)
        for name, (text, key) in _COUNTERS.items():
            counter = CounterMetricFamily(f"ortlm:{name}", text, labels=["model_name"])
            for model, found in stats:
                counter.add_metric([model], getattr(found, key))
            yield counter


class ModelObserver:
    """Counts what one engine does, see ``serving.engine.Observer``."""

    def __init__(self, name: str, histograms: dict[str, Any], ended: Any) -> None:
        self._histograms = {key: histogram.labels(name) for key, histogram in histograms.items()}
        self._name, self._ended = name, ended

    def token(self, request: Request, seconds: float | None) -> None:
        """Count a token."""
        if seconds is not None:
            self._histograms["inter_token_latency_seconds"].observe(seconds)
        elif request.first_token is not None:
            self._histograms["time_to_first_token_seconds"].observe(request.first_token - request.submitted)

    def ended(self, request: Request) -> None:
        """Count a request."""
        self._ended.labels(self._name, request.finish_reason or "error").inc()
        seen, timings = self._histograms, request.timings
        seen["e2e_request_latency_seconds"].observe((request.ended or request.submitted) - request.submitted)
        seen["request_queue_time_seconds"].observe(request.queue_seconds)
        seen["request_prompt_tokens"].observe(len(request.ids))
        seen["request_generation_tokens"].observe(timings.new_tokens)
        if request.first_token is not None:
            seen["request_prefill_time_seconds"].observe(timings.prompt_seconds)
            seen["request_decode_time_seconds"].observe(timings.decode_seconds)
