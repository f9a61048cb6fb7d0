"""The options of several roles as one argument specification for what an inventory may set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: What is judged of a value that is there.  A default is judged where it applies: in its role, templated.
JUDGED = ("type", "choices", "elements", "options")


def inventory_options(specifications: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Option name to what its value must be, from the contents of the roles' ``meta/argument_specs.yml``.

    None is required: what a role requires is given to it by the play.
    """
    mains = [specification["argument_specs"]["main"].get("options", {}) for specification in specifications]
    return {
        name: {key: value for key, value in option.items() if key in JUDGED}
        for options in mains
        for name, option in options.items()
    }


class FilterModule:
    def filters(self) -> dict[str, Any]:
        return {"inventory_options": inventory_options}
