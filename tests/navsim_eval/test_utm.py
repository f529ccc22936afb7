"""UTM: what defines a transverse Mercator projection, checked independently of the series that computes it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from navsim_eval.formats import utm
from navsim_eval.formats.utm import central_meridian, lonlat_to_utm, parse_epsg, utm_to_lonlat

E2 = utm.FLATTENING * (2 - utm.FLATTENING)
latitudes = st.floats(-80, 84)
zones = st.integers(1, 60)


@pytest.mark.parametrize("lat", [-80.0, -33.3, 0.0, 1.29, 36.11, 42.35, 84.0])
def test_true_scale_along_the_central_meridian(lat: float) -> None:
    """Northing there is 0.9996 times the length of the meridian, by numerical quadrature."""
    arc, _ = quad(lambda phi: (1 - E2) * (1 - E2 * np.sin(phi) ** 2) ** -1.5, 0, np.radians(lat), epsabs=1e-13)
    easting, northing = lonlat_to_utm(central_meridian(19), lat, 19)
    assert easting == 500000.0
    assert northing == pytest.approx(0.9996 * 6378137.0 * arc, abs=2e-7)


@given(latitudes, st.floats(-3, 3))
def test_conformal(lat: float, dlon: float) -> None:
    """A step east and a step north of equal length on the ellipsoid map to equal, perpendicular steps."""
    step = 1e-5
    phi = np.radians(lat)
    north_m = 6378137.0 * (1 - E2) / (1 - E2 * np.sin(phi) ** 2) ** 1.5
    east_m = 6378137.0 / np.sqrt(1 - E2 * np.sin(phi) ** 2) * np.cos(phi)

    def project(d_east: float, d_north: float) -> np.ndarray:
        lon = central_meridian(31) + dlon + np.degrees(d_east / east_m)
        return np.array(lonlat_to_utm(lon, lat + np.degrees(d_north / north_m), 31))

    metres = step * 6378137.0
    east = (project(metres, 0) - project(-metres, 0)) / (2 * metres)
    north = (project(0, metres) - project(0, -metres)) / (2 * metres)
    np.testing.assert_allclose([north[1], -north[0]], east, atol=2e-7)


@given(latitudes, st.floats(-4, 4), zones, st.booleans())
def test_round_trip(lat: float, dlon: float, zone: int, south: bool) -> None:
    lon = central_meridian(zone) + dlon
    back = utm_to_lonlat(*lonlat_to_utm(lon, lat, zone, south), zone, south)
    np.testing.assert_allclose(back, (lon, lat), atol=1e-12)


@given(latitudes, st.floats(0.01, 3))
def test_mirror_images(lat: float, dlon: float) -> None:
    """East and west of the meridian, north and south of the equator are mirror images; south adds 10 000 km."""
    lon0 = central_meridian(48)
    east, north = lonlat_to_utm(lon0 + dlon, lat, 48)
    np.testing.assert_allclose(lonlat_to_utm(lon0 - dlon, lat, 48), (1e6 - east, north), atol=1e-6)
    np.testing.assert_allclose(lonlat_to_utm(lon0 + dlon, -lat, 48, True), (east, 1e7 - north), atol=1e-6)


def test_arrays_keep_their_shape() -> None:
    lon, lat = np.full((2, 3), -71.06), np.full((2, 3), 42.36)
    east, north = lonlat_to_utm(lon, lat, 19)
    assert east.shape == north.shape == (2, 3)


def test_epsg_codes() -> None:
    assert parse_epsg("epsg:32619") == (19, False)
    assert parse_epsg("EPSG:32748") == (48, True)
    assert parse_epsg("32611") == (11, False)
    for bad in ("epsg:4326", "epsg:32661", "epsg:32600", "utm19", ""):
        with pytest.raises(ValueError, match="is not a WGS 84 / UTM code"):
            parse_epsg(bad)
    with pytest.raises(ValueError, match="UTM zone 61 does not exist"):
        central_meridian(61)
