"""DTensors in and out: `Shard(2)` on a mesh of one dimension, as FSDP2 and tensor-parallel models spread a sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from farlight.errors import ArgumentError, UnsupportedError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["local_operands", "spread_result"]


def local_operands(
    q: Any, k: Any, v: Any, mesh: DeviceMesh | None, group: ProcessGroup | None
) -> tuple[tuple[Tensor, Tensor, Tensor], DeviceMesh]:
    """The local shards of three DTensors, differentiable, and their mesh. Raises UnsupportedError for another placement."""
    from torch.distributed.tensor import DTensor, Shard

    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, DTensor):
            raise ArgumentError(
                f"{name} is {type(x).__name__}, but others are DTensors; pass three DTensors or three local tensors."
            )
        if x.device_mesh.ndim != 1 or tuple(x.placements) != (Shard(2),):
            raise UnsupportedError(
                f"{name} is placed as {x.placements} on a mesh of {x.device_mesh.ndim} dimensions; attention over ranks takes "
                "Shard(2) on a mesh of one dimension. Redistribute it, or pass local tensors with mesh=."
            )
        if x.device_mesh != q.device_mesh:
            raise ArgumentError(f"q and {name} are on different meshes; redistribute them to one.")
    if group is not None or (mesh is not None and mesh != q.device_mesh):
        raise ArgumentError("DTensors bring their mesh; leave group out, and pass no other mesh.")
    return (q.to_local(), k.to_local(), v.to_local()), q.device_mesh


def spread_result(result: Tensor | tuple[Tensor, Tensor], q: Any, mesh: DeviceMesh) -> Any:
    """The local output, and lse, as DTensors of the shape that q gives them."""
    from torch.distributed.tensor import DTensor, Shard

    def wrap(x: Tensor) -> DTensor:
        shape = q.shape if x.dim() == 4 else q.shape[:3]
        stride = [1] * len(shape)
        for dim in reversed(range(len(shape) - 1)):
            stride[dim] = stride[dim + 1] * shape[dim + 1]
        return DTensor.from_local(x, mesh, [Shard(2)], shape=shape, stride=tuple(stride))

    return tuple(map(wrap, result)) if isinstance(result, tuple) else wrap(result)
