"""An operator's module of tools, as sandboxes import it."""

import dataclasses
import enum
from typing import Annotated, Literal

from pydantic import BaseModel, Field

import agentray
from agentray.tools.spec import ToolContext


class Unit(enum.Enum):
    CELSIUS = "C"
    FAHRENHEIT = "F"


@dataclasses.dataclass
class Place:
    city: str
    country: str = "CH"


class Report(BaseModel):
    place: Place
    degrees: float


@agentray.tool(cpu=2, memory="512MiB", timeout_s=5, on_crash="retry", cache_s=60, version="2")
def forecast(
    place: Place,
    unit: Unit,
    days: Annotated[int, Field(ge=1, le=7, description="How many days.")] = 1,
    detail: Literal["low", "high"] | None = None,
) -> Report:
    """Forecast the weather.

    It is always good.

    Args:
        place: where it is
            asked for.
        unit: of the temperature.

    Returns:
        The report.
    """
    assert unit is Unit.CELSIUS
    assert detail in (None, "low", "high")
    return Report(place=place, degrees=20.5 * days)


@agentray.tool(name="shout", sandbox="jail")
async def _shout(text: str, context: ToolContext) -> str:
    return f"{text.upper()} {context.tenant}"


@agentray.tool
def unjsonable(value: int) -> object:
    return object()


def no_tool() -> None:
    pass
