"""Voxels inside a closed surface, for scans whose structures are given as meshes.

Shape letters: V = vertices, F = triangles, X, Y, Z = axes of the array.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

NUDGE = (1.1e-4, 1.7e-4)
"""Shift of the mesh along the first two axes in voxels, so that no ray meets an edge shared by two triangles."""

Array = npt.NDArray[Any]


def voxelize_surface(
    vertices_V3: Array, triangles_F3: Array, *, affine: npt.NDArray[np.float64], shape: tuple[int, int, int]
) -> npt.NDArray[np.bool_]:
    """Mark the voxels whose centres are inside a closed surface.

    A ray along the third axis enters and leaves a closed surface an even number of times, so that a voxel is inside if
    the number of crossings before it is odd.

    Args:
        vertices_V3: Positions in the space of ``affine``, usually RAS+ mm.
        triangles_F3: Indexes of the three vertices of each triangle.
        affine: Voxel (i, j, k) to the space of the vertices, 4x4.
        shape: Shape of the result.

    Returns:
        Array of ``shape``, True inside.

    Source:
        Foley et al., Computer Graphics, scan conversion with the even-odd rule.
    """
    inverse = np.linalg.inv(affine)
    corners_F33 = (vertices_V3 @ inverse[:3, :3].T + inverse[:3, 3])[triangles_F3]
    corners_F33[..., :2] += NUDGE
    # One more voxel, so that crossings behind the last voxel have a place.
    crossings_XYZ = np.zeros((shape[0], shape[1], shape[2] + 1), dtype=np.uint8)
    for rows, columns, heights in _crossings(corners_F33):
        seen = (rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1])
        first_inside = np.ceil(heights[seen]).clip(0, shape[2]).astype(int)
        np.bitwise_xor.at(crossings_XYZ, (rows[seen], columns[seen], first_inside), 1)
    return np.bitwise_xor.accumulate(crossings_XYZ, axis=2)[..., :-1].astype(bool)


def _crossings(corners_F33: Array) -> Iterator[tuple[Array, Array, Array]]:
    """Yield row, column and height of the points where rays through voxel centres meet triangles."""
    a_F3, b_F3, c_F3 = corners_F33[:, 0], corners_F33[:, 1], corners_F33[:, 2]
    area_F = _cross(b_F3 - a_F3, c_F3 - a_F3)
    low_F2 = np.ceil(corners_F33[..., :2].min(axis=1)).astype(int)
    size_F2 = np.floor(corners_F33[..., :2].max(axis=1)).astype(int) - low_F2 + 1
    # Triangles are about as large as voxels, so that a loop over the few places in their boxes is short.
    for row in range(size_F2[:, 0].max(initial=0)):
        for column in range(size_F2[:, 1].max(initial=0)):
            reached = (row < size_F2[:, 0]) & (column < size_F2[:, 1]) & (area_F != 0)
            point_N2 = low_F2[reached] + (row, column)
            a_N3, b_N3, c_N3, area_N = a_F3[reached], b_F3[reached], c_F3[reached], area_F[reached]
            # Barycentric coordinates of the point in the projected triangle.
            to_b_N = _cross(point_N2 - a_N3[:, :2], c_N3 - a_N3) / area_N
            to_c_N = _cross(b_N3 - a_N3, point_N2 - a_N3[:, :2]) / area_N
            hit = (to_b_N >= 0) & (to_c_N >= 0) & (to_b_N + to_c_N <= 1)
            height_N = a_N3[:, 2] + to_b_N * (b_N3 - a_N3)[:, 2] + to_c_N * (c_N3 - a_N3)[:, 2]
            yield point_N2[hit, 0], point_N2[hit, 1], height_N[hit]


def _cross(first_N: Array, second_N: Array) -> Array:
    """Return the cross product of vectors in the plane of the first two axes."""
    product: Array = first_N[:, 0] * second_N[:, 1] - first_N[:, 1] * second_N[:, 0]
    return product
