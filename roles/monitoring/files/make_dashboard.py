"""Writes dashboard.json beside this file: for Grafana 11.6 or newer, with the types that Grafana's own SDK has for it.

    python roles/monitoring/files/make_dashboard.py

Edit this file, not the dashboard; a test compares the two.  It runs where the tests do, on no host.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models

DASHBOARD = Path(__file__).with_name("dashboard.json")
SOURCE = models.DataSourceRef(type_val="prometheus", uid="${source}")
#: In a query, the hosts that the reader chose.
CHOSEN = 'instance=~"$host"'
WIDTH = 24


@dataclass(frozen=True)
class Query:
    expression: str
    legend: str = "{{instance}}"


@dataclass(frozen=True)
class Panel:
    title: str
    about: str
    unit: str
    queries: Sequence[Query]


def p50_p99(record: str) -> tuple[Query, ...]:
    return tuple(
        Query(f"instance:{record}:{share}_5m{{{CHOSEN}}}", f"{{{{instance}}}} {share}") for share in ("p50", "p99")
    )


def objective(name: str) -> Query:
    return Query(f"glm_ocr:{name}:objective", "objective")


ROWS: dict[str, tuple[Panel, ...]] = {
    "What clients get": (
        Panel(
            "Requests by how they ended",
            "stop: the page was read. length: max_tokens came first. abort: the client gave up. error: the engine.",
            "reqps",
            [
                Query(
                    f"sum by (instance, finished_reason) (instance_reason:vllm_requests:rate5m{{{CHOSEN}}})",
                    "{{instance}} {{finished_reason}}",
                )
            ],
        ),
        Panel(
            "Seconds to the first token",
            "Half of the requests, and all but the slowest in a hundred.",
            "s",
            [*p50_p99("vllm_first_token_seconds"), objective("first_token_seconds")],
        ),
        Panel(
            "Seconds to the last token",
            "Half of the requests, and all but the slowest in a hundred.",
            "s",
            [*p50_p99("vllm_request_seconds"), objective("request_seconds")],
        ),
        Panel(
            "What the engine answered",
            "By status. 4xx: the request was wrong; 5xx: the engine was.",
            "reqps",
            [Query(f"instance_status:http_requests:rate5m{{{CHOSEN}}}", "{{instance}} {{status}}")],
        ),
    ),
    "Load": (
        Panel(
            "Requests running and waiting",
            "Waiting ones begin when the KV cache has room.",
            "short",
            [
                Query(f"sum by (instance) (vllm:num_requests_running{{{CHOSEN}}})", "{{instance}} running"),
                Query(f"sum by (instance) (vllm:num_requests_waiting{{{CHOSEN}}})", "{{instance}} waiting"),
                objective("waiting_requests"),
            ],
        ),
        Panel(
            "KV cache in use",
            "At 100 % the engine takes requests back and computes them again.",
            "percentunit",
            [Query(f"max by (instance) (vllm:kv_cache_usage_perc{{{CHOSEN}}})")],
        ),
        Panel(
            "Tokens",
            "Of prompts, pictures included, and of replies.",
            "short",
            [
                Query(f"sum by (instance) (rate(vllm:prompt_tokens_total{{{CHOSEN}}}[5m]))", "{{instance}} prompt"),
                Query(f"sum by (instance) (rate(vllm:generation_tokens_total{{{CHOSEN}}}[5m]))", "{{instance}} reply"),
            ],
        ),
        Panel(
            "Requests taken back",
            "For want of room in the KV cache, a second.",
            "short",
            [Query(f"sum by (instance) (rate(vllm:num_preemptions_total{{{CHOSEN}}}[5m]))")],
        ),
    ),
    "Front": (
        Panel(
            "What the front answered",
            "By class, the scrapes of the monitoring included.",
            "reqps",
            [Query(f"instance_code:glm_ocr_front_responses:rate5m{{{CHOSEN}}} > 0", "{{instance}} {{code}}")],
        ),
        Panel(
            "Refused by the front itself",
            "For key, rate or form; the front's log has which.",
            "reqps",
            [Query(f"instance:glm_ocr_front_refused:rate5m{{{CHOSEN}}}")],
        ),
        Panel(
            "Connections",
            "And how many there may be.",
            "short",
            [
                Query(f'haproxy_frontend_current_sessions{{proxy="front", {CHOSEN}}}'),
                Query(f'max(haproxy_frontend_limit_sessions{{proxy="front", {CHOSEN}}})', "limit"),
            ],
        ),
        Panel(
            "Days to the certificate's end",
            "As the prober sees it; nothing where the port speaks no TLS.",
            "d",
            [Query(f"(probe_ssl_earliest_cert_expiry{{{CHOSEN}}} - time()) / 86400")],
        ),
    ),
    "Watchdog": (
        Panel(
            "Seconds for one token",
            "The watchdog's own request, through the queue.",
            "s",
            [Query(f"glm_ocr_watchdog_canary_seconds{{{CHOSEN}}}")],
        ),
        Panel(
            "Rounds in a row without a sign of life",
            "Neither an answer nor a token of anybody's.",
            "short",
            [Query(f"glm_ocr_watchdog_consecutive_failures{{{CHOSEN}}}")],
        ),
        Panel(
            "Restarts by the watchdog",
            "Within its window; at its limit it gives up.",
            "short",
            [Query(f"glm_ocr_watchdog_restarts_in_window{{{CHOSEN}}}")],
        ),
        Panel(
            "Seconds since it looked",
            "A line that rises: its timer is stopped.",
            "s",
            [Query(f"time() - glm_ocr_watchdog_last_round_timestamp_seconds{{{CHOSEN}}}")],
        ),
    ),
    "Host": (
        Panel(
            "Memory available",
            "Of all.",
            "percentunit",
            [Query(f"node_memory_MemAvailable_bytes{{{CHOSEN}}} / node_memory_MemTotal_bytes")],
        ),
        Panel(
            "Disk free",
            "Of all, for each file system.",
            "percentunit",
            [
                Query(
                    f'node_filesystem_avail_bytes{{fstype!~"tmpfs|overlay|squashfs|ramfs", {CHOSEN}}}'
                    " / node_filesystem_size_bytes",
                    "{{instance}} {{mountpoint}}",
                )
            ],
        ),
        Panel(
            "CPU in use",
            "Of all cores; tokenising and decoding pictures is done by these.",
            "percentunit",
            [Query(f'1 - avg by (instance) (rate(node_cpu_seconds_total{{mode="idle", {CHOSEN}}}[5m]))')],
        ),
        Panel(
            "Restarts of units",
            "By systemd, since the unit was loaded.",
            "short",
            [Query(f"node_systemd_service_restart_total{{{CHOSEN}}}", "{{instance}} {{name}}")],
        ),
    ),
    "NPU (npu-exporter)": (
        Panel(
            "AI cores in use",
            "As the driver has it.",
            "percent",
            [Query(f"npu_chip_info_utilization{{{CHOSEN}}}", "{{instance}} {{id}}")],
        ),
        Panel(
            "On-chip memory in use",
            "vLLM takes its share at the start and keeps it.",
            "percentunit",
            [
                Query(
                    f"npu_chip_info_hbm_used_memory{{{CHOSEN}}} / npu_chip_info_hbm_total_memory",
                    "{{instance}} {{id}}",
                )
            ],
        ),
        Panel(
            "Temperature",
            "Of the chips.",
            "celsius",
            [
                Query(f"npu_chip_info_temperature{{{CHOSEN}}}", "{{instance}} {{id}}"),
                objective("npu_celsius"),
            ],
        ),
        Panel(
            "Memory errors that could not be corrected",
            "Since the driver was loaded.",
            "short",
            [Query(f"npu_chip_info_hbm_ecc_double_bit_error_cnt{{{CHOSEN}}}", "{{instance}} {{id}}")],
        ),
    ),
}

#: Numbers at the top: green below the threshold, red from it.
NUMBERS = (
    Panel(
        "Alerts that fire",
        "All of this project.",
        "short",
        [Query('count(ALERTS{alertstate="firing", alertname=~"GlmOcr.*"}) or vector(0)')],
    ),
    Panel(
        "Engines down",
        "Whose metrics cannot be read.",
        "short",
        [Query(f'sum(1 - up{{job="glm_ocr_engine", {CHOSEN}}})')],
    ),
    Panel(
        "Ports that do not answer as they should",
        "Asked as a client without a key.",
        "short",
        [Query(f"sum(1 - probe_success{{{CHOSEN}}})")],
    ),
    Panel(
        "Units that failed",
        "For good, in systemd's eyes.",
        "short",
        [Query(f'sum(node_systemd_unit_state{{state="failed", {CHOSEN}}}) or vector(0)')],
    ),
)


def target(query: Query, letter: str, instant: bool = False) -> prometheus.Dataquery:
    one = prometheus.Dataquery().expr(query.expression).legend_format(query.legend).ref_id(letter)
    return one.instant() if instant else one.range()


def number(panel: Panel) -> stat.Panel:
    steps = [models.Threshold(value=None, color="green"), models.Threshold(value=1, color="red")]
    return (
        stat.Panel()
        .title(panel.title)
        .description(panel.about)
        .unit(panel.unit)
        .datasource(SOURCE)
        .targets([target(query, "A", instant=True) for query in panel.queries])
        .thresholds(dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
        .color_mode(common_models.BigValueColorMode.BACKGROUND)
        .graph_mode(common_models.BigValueGraphMode.NONE)
        .height(4)
        .span(WIDTH // len(NUMBERS))
    )


def alerts() -> statetimeline.Panel:
    expression = f'max by (instance, alertname) (ALERTS{{alertstate="firing", alertname=~"GlmOcr.*", {CHOSEN}}})'
    return (
        statetimeline.Panel()
        .title("Alerts")
        .description("docs/runbooks/alerts.md explains each.")
        .datasource(SOURCE)
        .targets([target(Query(expression, "{{instance}} {{alertname}}"), "A")])
        .color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.FIXED).fixed_color("red"))
        .show_value(common_models.VisibilityMode.NEVER)
        .no_value("none")
        .height(6)
        .span(WIDTH)
    )


def curve(panel: Panel) -> timeseries.Panel:
    return (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.about)
        .unit(panel.unit)
        .min(0)
        .datasource(SOURCE)
        .targets([target(query, letter) for query, letter in zip(panel.queries, "ABC", strict=False)])
        .legend(common.VizLegendOptions().show_legend(True))
        .tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
        .override_by_name(
            "objective", [models.DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": "red"})]
        )
        .height(8)
        .span(WIDTH // 4)
    )


def built() -> str:
    """The dashboard as JSON."""
    one = (
        dashboard.Dashboard("GLM-OCR")
        .uid("glm-ocr")
        .description("Written by roles/monitoring/files/make_dashboard.py")
        .tags(["glm-ocr"])
        .time("now-6h", "now")
        .refresh("30s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("source").label("Prometheus").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("host")
            .label("Host")
            .datasource(SOURCE)
            .query('label_values(up{job="glm_ocr_engine"}, instance)')
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(True)
            .include_all(True)
            .current(models.VariableOption(selected=True, text="All", value="$__all"))
        )
    )
    for panel in NUMBERS:
        one = one.with_panel(number(panel))
    one = one.with_panel(alerts())
    for title, panels in ROWS.items():
        one = one.with_row(dashboard.Row(title))
        for panel in panels:
            one = one.with_panel(curve(panel))
    made = one.build()
    # Grafana finds a panel by its number; the builders leave it out, or give rows the same.
    for index, placed in enumerate(made.panels or []):
        placed.id_val = index + 1
    return json.dumps(made, cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    DASHBOARD.write_text(built())
