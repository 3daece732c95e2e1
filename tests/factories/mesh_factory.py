"""Closed surfaces of known shape."""

import numpy as np
from scipy.spatial import ConvexHull


def sphere(radius: float, center: tuple[float, float, float], num_vertices: int = 2000):
    """Return a mesh of nearly equal triangles."""
    number = np.arange(num_vertices)
    height = 1 - 2 * (number + 0.5) / num_vertices
    angle = np.pi * (1 + 5**0.5) * number
    ring = np.sqrt(1 - height**2)
    vertices = np.stack([ring * np.cos(angle), ring * np.sin(angle), height], axis=1)
    return radius * vertices + center, ConvexHull(vertices).simplices
