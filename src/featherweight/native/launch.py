"""Loading machine code onto a GPU and launching it on torch's current stream, through `cuda.bindings`.

The launches can be captured into CUDA graphs. A kernel may start while the one before it ends (programmatic dependent
launch), and must then wait itself for what that one writes.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any

import torch

from featherweight.native.nvrtc import driver_value


@dataclass
class Module:
    """The kernels of one cubin on one device."""

    device: torch.device
    code: bytes
    _handle: Any = None
    _functions: dict[str, Any] = field(default_factory=dict)
    _configs: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def function(self, name: str, shared_bytes: int = 0) -> Any:
        """A kernel by its name, allowed to use `shared_bytes` of shared memory."""
        from cuda.bindings import driver

        if name not in self._functions:
            with torch.cuda.device(self.device):
                torch.cuda.current_stream().synchronize()  # so that torch has made its context current
                if self._handle is None:
                    self._handle = driver_value(driver.cuModuleLoadData(self.code))
                found = driver_value(driver.cuModuleGetFunction(self._handle, name.encode()))
                limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                if shared_bytes:
                    driver_value(driver.cuFuncSetAttribute(found, limit, shared_bytes))
                self._functions[name] = found
        return self._functions[name]

    def clusters(self, name: str, threads: int, shared_bytes: int, size: int) -> int:
        """How many clusters of `size` CTAs can run at once; 0 when the GPU cannot run one."""
        from cuda.bindings import driver

        function = self.function(name, shared_bytes)
        config = _config(driver, 1024 * size, threads, shared_bytes, 0, size, False)
        status, number = driver.cuOccupancyMaxActiveClusters(function, config)
        return int(number) if status == 0 else 0

    def launch(
        self, name: str, grid: int, threads: int, shared_bytes: int, params: ctypes.Structure, cluster: int, early: bool
    ) -> None:
        """Start a kernel that takes one struct, on the current stream.

        Args:
            cluster: CTAs of a cluster; 0 on GPUs that have none.
            early: it may start before the kernel in front has ended.
        """
        from cuda.bindings import driver

        stream = torch._C._cuda_getCurrentRawStream(self.device.index)
        key = (name, grid, threads, shared_bytes, cluster, early, stream)
        if key not in self._configs:
            self._configs[key] = _config(driver, grid, threads, shared_bytes, stream, cluster, early)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(params))
        status = driver.cuLaunchKernelEx(self._configs[key], self._functions[name], ctypes.addressof(pointers), 0)
        driver_value(status)


def _config(driver: Any, grid: int, threads: int, shared_bytes: int, stream: int, cluster: int, early: bool) -> Any:
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared_bytes, driver.CUstream(stream)
    attributes = []
    if cluster:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        dim = attribute.value.clusterDim
        dim.x, dim.y, dim.z = cluster, 1, 1
        attributes.append(attribute)
    if early:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config
