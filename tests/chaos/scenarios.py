"""All scenarios."""

from collections.abc import Awaitable, Callable

from chaos.account import Run
from chaos.connections import few_files, full_disk, hostile_connections
from chaos.engine import engine_killed, front_end_killed
from chaos.mixed import mixed_requests
from chaos.rotation import drain, rotation
from chaos.traffic import idle_streams, readers_that_never_read, ten_times_capacity, vanishing_clients

Scenario = Callable[[Run], Awaitable[None]]

WITHOUT_ENGINE: dict[str, Scenario] = {
    "vanishing-clients": vanishing_clients,
    "never-read": readers_that_never_read,
    "ten-times-capacity": ten_times_capacity,
    "hostile-connections": hostile_connections,
    "few-files": few_files,
    "full-disk": full_disk,
    "rotation": rotation,
    "drain": drain,
    "idle-streams": idle_streams,
    "mixed-requests": mixed_requests,
}
"""Scenarios with a server process that has a fake engine."""

WITH_ENGINE: dict[str, Scenario] = {"front-end-killed": front_end_killed, "engine-killed": engine_killed}
"""Scenarios with `yuan-grpc serve`, the demo model and two front ends."""

ALL = WITHOUT_ENGINE | WITH_ENGINE
