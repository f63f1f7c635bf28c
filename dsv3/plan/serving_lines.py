"""A day of serving, number by number, each with where it comes from, and the published production beside it."""

from dsv3.plan.reason import Line, Source
from dsv3.plan.serving import (
    ATTENTION_TFLOPS,
    EXCHANGE_SECONDS,
    GEMM_TFLOPS,
    GPUS_OF_NODE,
    MEMORY_SHARE,
    READ_SHARE,
    ServingTimes,
)
from dsv3.plan.serving_day import HOURS, Day, Traffic

PUBLISHED = {
    "nodes, mean": 226.75,
    "nodes, peak": 278.0,
    "input of a prefill node": 73_700.0,
    "output of a decode node": 14_800.0,
    "tokens a second of a user": 21.0,
    "cost of the day": 87_072.0,
    "income": 562_027.0,
}
"""Of the production from 27 February 2025, 12:00 UTC+8, for 24 hours (fact sheet 4.2); users had 20 to 22."""
PRICES = {"hit": 0.14, "miss": 0.55, "output": 2.19}
"""Published: USD a million tokens, of R1."""


def serving_lines(day: Day, *, dollars_per_hour: float) -> list[Line]:
    """Return all numbers of a day."""
    return [*_traffic(day.traffic), *_times(day.times, day=day), *_fleet(day, dollars_per_hour=dollars_per_hour)]


def _traffic(traffic: Traffic) -> list[Line]:
    published, assumed, computed = Source.PUBLISHED, Source.ASSUMPTION, Source.COMPUTED
    is_production = traffic == Traffic()
    given = published if is_production else assumed
    where = "production of 27 February 2025" if is_production else "given"
    return [
        _line("traffic", "input", traffic.input_tokens_per_day, "tokens", given, f"a day: {where}"),
        _line("traffic", "output", traffic.output_tokens_per_day, "tokens", given, f"a day: {where}"),
        _line("traffic", "found in a cache", traffic.hit_share, "share", given, f"of the input: {where}"),
        _line("traffic", "cache of a drawn token", traffic.cached_tokens, "tokens", given, f"mean length: {where}"),
        _line("traffic", "spread of lengths", traffic.spread, "", assumed, "lognormal, of the logarithm"),
        _line(
            "traffic", "busiest hour", traffic.peak, "", given, "beside the mean, by the nodes; one wave a day assumed"
        ),
        _line("traffic", "prompt", traffic.prompt_tokens, "tokens", computed, "mean, from these"),
        _line("traffic", "answer", traffic.output_tokens, "tokens", computed, "mean, from these"),
        _line("traffic", "requests a second", traffic.requests_per_second, "", computed, "mean"),
    ]


def _times(times: ServingTimes, *, day: Day) -> list[Line]:
    published, assumed, computed, fitted = Source.PUBLISHED, Source.ASSUMPTION, Source.COMPUTED, Source.FITTED
    cached, deployment, most = day.traffic.cached_tokens, times.deployment, day.hours[0].most_requests
    step = times.step_time(most, cached_tokens=cached)
    section = "a decoding GPU"
    return [
        _line(
            "a prefill GPU",
            "tokens computed",
            times.prefill_tokens_per_second,
            "tokens/s",
            computed,
            "the published training trace's layer, forward: the longer of computing and moving tokens",
        ),
        _line(
            section, "weights", times.weight_bytes, "bytes", computed, "FP8; its experts, all else whole, copies too"
        ),
        _line(section, "cache of a token", times.cache_bytes_per_token, "bytes", computed, "latent and rope key, BF16"),
        _line(section, "memory to be used", MEMORY_SHARE, "share", assumed, "by weights and caches"),
        _line(
            section,
            "requests that fit",
            times.most_requests(cached_tokens=cached),
            "",
            computed,
            "caches of the mean length beside the weights",
        ),
        _line(
            section,
            "requests in a step",
            most,
            "",
            computed,
            f"as many as fit, and get {day.goals.tokens_per_second:g} tokens a second (--speed)",
        ),
        _line(section, "attention", step.attention, "seconds", published, f"FlashMLA, {ATTENTION_TFLOPS:g} TFLOPs/s"),
        _line(
            section,
            "dense",
            step.dense,
            "seconds",
            published,
            f"DeepGEMM, {GEMM_TFLOPS:g} TFLOPs/s, or weights at {READ_SHARE:.0%} of the memory's rate",
        ),
        _line(
            section,
            "experts",
            step.experts,
            "seconds",
            published,
            f"the same; imbalance {deployment.imbalance:.3g}, "
            f"{'assumed' if deployment.prefill_imbalance is None else 'of the loads given'}",
        ),
        _line(
            section,
            "exchange",
            step.exchange,
            "seconds",
            fitted,
            f"FP8 out, BF16 back at the link's rate, and {EXCHANGE_SECONDS * 1e6:.0f} us each: to DeepEP's 561 us",
        ),
        _line(
            section,
            "overhead",
            step.overhead,
            "",
            fitted,
            "of a step, beside the longer of computing and exchange: to 14,800 tokens a second at 21 of a user",
        ),
        _line(section, "step", step.total, "seconds", computed, "two micro-batches, one computing while one travels"),
        _line(section, "tokens of a step", times.tokens_per_step, "", assumed, "of a request; MTP's are not published"),
    ]


def _fleet(day: Day, *, dollars_per_hour: float) -> list[Line]:
    computed, section, traffic = Source.COMPUTED, "the day", day.traffic
    millions = traffic.input_tokens_per_day / 1e6
    income = (
        millions * (traffic.hit_share * PRICES["hit"] + (1 - traffic.hit_share) * PRICES["miss"])
        + traffic.output_tokens_per_day / 1e6 * PRICES["output"]
    )
    cost = day.dollars(per_gpu_hour=dollars_per_hour)
    reserve = f"whole units, {day.goals.reserve:.0%} in reserve (assumption, --reserve)"
    return [
        _line(section, "nodes, mean", day.mean_nodes, "", computed, reserve),
        _line(section, "nodes, peak", day.peak_nodes, "", computed, "of the busiest hour"),
        _line(
            section, "input of a prefill node", day.input_per_prefill_node, "tokens/s", computed, "cache hits included"
        ),
        _line(section, "output of a decode node", day.output_per_decode_node, "tokens/s", computed, "mean of the day"),
        _line(
            section,
            "tokens a second of a user",
            day.tokens_per_second_of_a_user,
            "",
            computed,
            "simulated: median of the requests",
        ),
        _line(
            section,
            "first token, median",
            max(hour.first_token[0] for hour in day.hours),
            "seconds",
            computed,
            "simulated: of the worst hour",
        ),
        _line(
            section, "first token, 99%", max(hour.first_token[2] for hour in day.hours), "seconds", computed, "the same"
        ),
        _line(
            section,
            "cost of the day",
            cost,
            "USD",
            computed,
            f"{GPUS_OF_NODE} GPUs a node, {HOURS} hours, {dollars_per_hour:g} USD each (--dollars-per-hour)",
        ),
        _line(section, "income", income, "USD", computed, "at the published prices of R1, if all were billed"),
        _line(section, "margin", income / cost - 1, "share", computed, "of the cost"),
    ]


def _line(section: str, name: str, value: float, unit: str, source: Source, why: str) -> Line:
    return Line(section=section, name=name, value=value, unit=unit, source=source, why=why)
