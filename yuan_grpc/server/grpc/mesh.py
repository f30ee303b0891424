"""Optional services next to `yuan.v1.YuanService`, for meshes and balancers."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import grpc
from google.protobuf.descriptor_pool import DescriptorPool

from yuan_grpc.server.core.generation_service import GenerationService
from yuan_grpc.server.engine.load import EngineLoad
from yuan_grpc.server.errors import UnavailableError
from yuan_grpc.server.grpc import orca
from yuan_grpc.server.grpc.servicer import NAME
from yuan_grpc.server.settings.mesh import ENGINE_SERVICE, MeshSettings
from yuan_grpc.server.start_error import StartError

if TYPE_CHECKING:
    from yuan_grpc.server.grpc.vllm_engine import VllmEngineService


class Mesh:
    """The optional services that the settings enable.

    Args:
        settings: which services are enabled.
        generation_service: what they serve.

    Attributes:
        served: names of the services whose handlers raise errors, as those of `YuanService` do.

    Raises:
        StartError: a service needs a package that is not installed.
    """

    def __init__(self, settings: MeshSettings, generation_service: GenerationService) -> None:
        self._service = generation_service
        self._reporter = orca.LoadReporter(self._read_loads) if settings.load_reports else None
        self._engine_service = _create_engine_service(generation_service) if settings.vllm_engine else None
        self.served: tuple[str, ...] = (ENGINE_SERVICE,) if self._engine_service else ()

    @property
    def interceptors(self) -> Sequence[grpc.aio.ServerInterceptor]:
        """Interceptors to run inside `StatusInterceptor`."""
        return [orca.LoadReportInterceptor(self._reporter, (NAME, *self.served))] if self._reporter else []

    def attach(self, server: grpc.aio.Server) -> tuple[Sequence[str], Sequence[DescriptorPool]]:
        """Register the services on a server that has not started yet.

        Returns:
            Their names, and pools with definitions that the default pool does not have.
        """
        if self._engine_service:
            self._engine_service.attach(server)
        if not self._reporter:
            return self.served, ()
        self._reporter.attach(server)
        return (*self.served, orca.SERVICE), (orca.POOL,)

    def _read_loads(self) -> Sequence[EngineLoad]:
        try:
            return self._service.engine.loads
        except UnavailableError:
            return ()


def _create_engine_service(generation_service: GenerationService) -> "VllmEngineService":
    try:
        from yuan_grpc.server.grpc.vllm_engine import VllmEngineService
    except ModuleNotFoundError as error:
        if error.name != "smg_grpc_proto":
            raise
        raise StartError("--vllm-engine needs the package smg-grpc-proto: pip install 'yuan-grpc[smg]'") from None
    return VllmEngineService(generation_service)
