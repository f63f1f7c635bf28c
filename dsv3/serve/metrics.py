"""What `/metrics` tells, in the format of Prometheus; names are like those of other engines, for their dashboards."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dsv3.serve.engine_client import EngineClient

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Counts of one server."""

    def __init__(self, engine: EngineClient) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_OfEngine(engine))
        self._registry.register(_OfWorkers(engine))
        self._registry.register(_OfExperts(engine))
        self.responses = Counter(
            "dsv3_http_responses", "Answers by path and status.", ["path", "status"], registry=self._registry
        )
        self.first_token = Histogram(
            "dsv3_time_to_first_token_seconds",
            "From a request to its first token.",
            buckets=SECONDS,
            registry=self._registry,
        )
        self.per_token = Histogram(
            "dsv3_time_per_output_token_seconds",
            "Mean time of the tokens after the first, of each answer.",
            buckets=TOKEN_SECONDS,
            registry=self._registry,
        )
        self.end_to_end = Histogram(
            "dsv3_e2e_request_latency_seconds",
            "From a request to its last token.",
            buckets=SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """Return all of it."""
        return generate_latest(self._registry)


class _OfEngine(Collector):
    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        """Tell the engine's own counts, as of its newest step."""
        stats = self._engine.stats
        gauges = {
            "num_requests_waiting": (stats.num_waiting, "Requests that wait for their turn."),
            "num_requests_running": (stats.num_running, "Requests in the engine's steps."),
            "cache_pages": (stats.num_pages, "Pages of the latent cache."),
            "cache_pages_in_use": (stats.num_pages_in_use, "Pages that requests hold."),
            "cache_pages_kept": (stats.num_pages_cached, "Free pages that are still good as a prefix."),
        }
        for name, (value, text) in gauges.items():
            yield GaugeMetricFamily(f"dsv3_{name}", text, value=value)
        counters = {
            "engine_steps": (stats.num_steps, "Steps of the engine."),
            "prompt_tokens": (stats.num_prompt_tokens, "Tokens of prompts."),
            "prefix_cache_hit_tokens": (stats.num_cached_tokens, "Tokens of prompts that were in the cache."),
            "generation_tokens": (stats.num_generated_tokens, "Tokens generated."),
            "preemptions": (stats.num_preemptions, "Requests that had to give up their pages."),
        }
        for name, (value, text) in counters.items():
            yield CounterMetricFamily(f"dsv3_{name}", text, value=value)
        for name, values, text in (
            ("spec_decode_draft_tokens", stats.drafted_at, "Drafts verified, by place in the chain."),
            ("spec_decode_accepted_tokens", stats.accepted_at, "Drafts that were right, by place in the chain."),
        ):
            family = CounterMetricFamily(f"dsv3_{name}", text, labels=["position"])
            for place, value in enumerate(values):
                family.add_metric([str(place)], value)
            yield family
        finished = CounterMetricFamily(
            "dsv3_requests_finished", "Requests by the reason they ended.", labels=["reason"]
        )
        for reason, value in stats.finished.items():
            finished.add_metric([reason], value)
        yield finished


class _OfWorkers(Collector):
    """Nothing where one engine does everything."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        """Tell what each worker has and does, and what goes between them."""
        members, transfers = self._engine.members, self._engine.transfers
        if not members:
            return
        gauges: dict[str, tuple[list[float], str]] = {
            "worker_up": ([member.is_up for member in members], "1 where the worker takes requests."),
            "worker_requests": ([member.num_requests for member in members], "Requests it has or is about to get."),
            "worker_cache_pages": ([member.stats.num_pages for member in members], "Pages of its latent cache."),
            "worker_cache_pages_in_use": ([member.stats.num_pages_in_use for member in members], "Those in use."),
        }
        counters: dict[str, tuple[list[float], str]] = {
            "worker_restarts": ([member.num_restarts for member in members], "Times it was started again."),
            "worker_steps": ([member.stats.num_steps for member in members], "Its steps."),
            "worker_step_seconds": ([member.stats.step_seconds for member in members], "Time its steps took."),
            "worker_read_tokens": ([member.stats.num_read_tokens for member in members], "Tokens its steps read."),
        }
        for family, table in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (values, text) in table.items():
                metric = family(f"dsv3_{name}", text, labels=["worker", "kind"])
                for member, value in zip(members, values, strict=True):
                    metric.add_metric([member.name, member.kind], value)
                yield metric
        for name, value, text in (
            ("handovers", transfers.num_handed_over, "Requests that went from prefill to decoding."),
            ("handover_bytes", transfers.num_bytes, "Bytes of latent cache that went with them."),
            ("handover_seconds", transfers.seconds, "From first tokens until all pages were there, summed."),
            ("retries", transfers.num_retries, "Requests that were placed again, with the tokens told by then."),
        ):
            yield CounterMetricFamily(f"dsv3_{name}", text, value=value)


class _OfExperts(Collector):
    """Nothing where no experts are spread over workers."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    def collect(self) -> Iterable[Metric]:
        """Tell how evenly the workers of each kind share the experts' work, and what has moved."""
        found = [(member, member.stats.experts) for member in self._engine.members if member.stats.experts is not None]
        counters = {
            "expert_rows": ("num_rows", "Rows that experts on the worker have computed."),
            "expert_changes": ("num_changes", "Times that the worker's experts were placed anew."),
            "expert_moves": ("num_moves", "Experts whose weights have come to the worker."),
            "expert_moved_bytes": ("moved_bytes", "Bytes of these weights."),
        }
        gauges = {
            "expert_balance": ("balance", "Mean rows of a worker by the most of one, over layers; in the newest look."),
            "expert_balance_before": ("balance_before", "The same, of the load known then, as experts were placed."),
            "expert_balance_after": ("balance_after", "The same, as they were placed anew."),
            "expert_load_before": ("load_before", "Load of the worker in fair shares, as experts were placed."),
            "expert_load_after": ("load_after", "The same, as they were placed anew."),
        }
        for family, table in ((CounterMetricFamily, counters), (GaugeMetricFamily, gauges)):
            for name, (field, text) in table.items():
                metric = family(f"dsv3_{name}", text, labels=["worker", "kind"])
                for member, experts in found:
                    if (value := getattr(experts, field)) is not None:
                        metric.add_metric([member.name, member.kind], value)
                if found:
                    yield metric
