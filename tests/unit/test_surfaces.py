"""Voxels inside closed surfaces of known shape."""

import numpy as np
import pytest
from mesh_factory import sphere
from samgraft.shared.demo.surfaces import voxelize_surface


def distances(shape, affine, center):
    """Return the distance of every voxel from a point in mm."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return np.linalg.norm(grid @ affine[:3, :3].T + affine[:3, 3] - center, axis=-1)


@pytest.mark.parametrize(
    "affine",
    [
        np.eye(4),
        # Left, inferior, anterior axes with another spacing and an offset, as FreeSurfer writes them.
        np.array([[-1.0, 0, 0, 30], [0, 0, 1.5, -5], [0, -2.0, 0, 40], [0, 0, 0, 1]]),
    ],
)
def test_voxelize__sphere_contains_the_voxels_nearer_than_its_radius(affine):
    center, shape = (12.0, 14.0, 15.0), (32, 30, 36)
    inside = voxelize_surface(*sphere(9.3, center), affine=affine, shape=shape)
    distance = distances(shape, affine, center)
    # Between vertices the triangles are a little inside of the sphere.
    assert inside[distance < 9.1].all()
    assert not inside[distance > 9.3].any()
    assert inside.sum() > 100


def test_voxelize__part_outside_of_the_array_is_cut_off():
    shape = (10, 10, 10)
    inside = voxelize_surface(*sphere(6.0, (0.0, 9.0, 9.0)), affine=np.eye(4), shape=shape)
    distance = distances(shape, np.eye(4), (0.0, 9.0, 9.0))
    assert inside[distance < 5.8].all()
    assert not inside[distance > 6.0].any()


def test_voxelize__cavity_is_outside():
    outer, outer_faces = sphere(8.0, (10.0, 10.0, 10.0))
    inner, inner_faces = sphere(4.0, (10.0, 10.0, 10.0))
    faces = np.concatenate([outer_faces, inner_faces + len(outer)])
    inside = voxelize_surface(np.concatenate([outer, inner]), faces, affine=np.eye(4), shape=(20, 20, 20))
    assert not inside[10, 10, 10]
    assert inside[10, 10, 16]
