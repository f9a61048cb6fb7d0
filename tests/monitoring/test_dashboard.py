"""The dashboard that is committed is the one that is written, and Grafana's types read all of it."""

from __future__ import annotations

import json

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

import make_dashboard


def test_the_dashboard_is_the_one_that_is_written() -> None:
    assert make_dashboard.DASHBOARD.read_text() == make_dashboard.built(), make_dashboard.__doc__


def test_grafanas_types_read_the_dashboard_and_leave_nothing_out() -> None:
    """No Grafana is to be had here: its SDK has the types that its own dashboards are made of."""
    committed = json.loads(make_dashboard.DASHBOARD.read_text())
    assert json.loads(json.dumps(Dashboard.from_json(committed), cls=JSONEncoder)) == committed
    misspelt = committed | {"tmie": committed["time"]}
    assert json.loads(json.dumps(Dashboard.from_json(misspelt), cls=JSONEncoder)) != misspelt


def test_panels_have_numbers_and_places_of_their_own() -> None:
    panels = json.loads(make_dashboard.DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = [
        (x, y)
        for panel in panels
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(taken)) == len(taken)
    assert max(x for x, _ in taken) < make_dashboard.WIDTH
