"""Longitude and latitude to UTM metres and back, on the WGS 84 ellipsoid.

Krüger's series to sixth order in the third flattening n, the same projection as PROJ's `utm` (they agree to a few
nanometres over a zone). Coefficients and the exact inverse of the conformal latitude: C. F. F. Karney, "Transverse
Mercator with an accuracy of a few nanometers", Journal of Geodesy 85 (2011), equations 7-9, 35 and 36.
"""

from __future__ import annotations

import re

import numpy as np

SEMI_MAJOR_AXIS_M = 6378137.0
FLATTENING = 1.0 / 298.257223563
SCALE = 0.9996
FALSE_EASTING_M = 500000.0
FALSE_NORTHING_SOUTH_M = 10000000.0

_N = FLATTENING / (2.0 - FLATTENING)
_ECCENTRICITY = np.sqrt(FLATTENING * (2.0 - FLATTENING))
_RADIUS_M = SCALE * SEMI_MAJOR_AXIS_M / (1.0 + _N) * (1.0 + _N**2 / 4.0 + _N**4 / 64.0 + _N**6 / 256.0)
_NEWTON_STEPS = 5

# Row j holds the coefficients of sin(2(j+1)ξ) by powers n¹…n⁶.
_FORWARD = np.array(
    [
        [1 / 2, -2 / 3, 5 / 16, 41 / 180, -127 / 288, 7891 / 37800],
        [0, 13 / 48, -3 / 5, 557 / 1440, 281 / 630, -1983433 / 1935360],
        [0, 0, 61 / 240, -103 / 140, 15061 / 26880, 167603 / 181440],
        [0, 0, 0, 49561 / 161280, -179 / 168, 6601661 / 7257600],
        [0, 0, 0, 0, 34729 / 80640, -3418889 / 1995840],
        [0, 0, 0, 0, 0, 212378941 / 319334400],
    ]
) @ (_N ** np.arange(1, 7))
_INVERSE = np.array(
    [
        [1 / 2, -2 / 3, 37 / 96, -1 / 360, -81 / 512, 96199 / 604800],
        [0, 1 / 48, 1 / 15, -437 / 1440, 46 / 105, -1118711 / 3870720],
        [0, 0, 17 / 480, -37 / 840, -209 / 4480, 5569 / 90720],
        [0, 0, 0, 4397 / 161280, -11 / 504, -830251 / 7257600],
        [0, 0, 0, 0, 4583 / 161280, -108847 / 3991680],
        [0, 0, 0, 0, 0, 20648693 / 638668800],
    ]
) @ (_N ** np.arange(1, 7))


def lonlat_to_utm(
    lon: np.ndarray, lat: np.ndarray, zone: int, south: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Easting and northing [m] of longitude and latitude [deg], any equal shape."""
    lat = np.radians(np.asarray(lat, np.float64))
    dlon = np.radians(np.asarray(lon, np.float64) - central_meridian(zone))
    tau = _conformal_tangent(np.tan(lat))
    xi = np.arctan2(tau, np.cos(dlon))
    eta = np.arcsinh(np.sin(dlon) / np.hypot(tau, np.cos(dlon)))
    xi, eta = _apply_series(xi, eta, _FORWARD)
    northing = _RADIUS_M * xi + (FALSE_NORTHING_SOUTH_M if south else 0.0)
    return FALSE_EASTING_M + _RADIUS_M * eta, northing


def utm_to_lonlat(
    easting: np.ndarray, northing: np.ndarray, zone: int, south: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Longitude and latitude [deg] of easting and northing [m]; inverse of `lonlat_to_utm`."""
    eta = (np.asarray(easting, np.float64) - FALSE_EASTING_M) / _RADIUS_M
    xi = (np.asarray(northing, np.float64) - (FALSE_NORTHING_SOUTH_M if south else 0.0)) / _RADIUS_M
    xi, eta = _apply_series(xi, eta, -_INVERSE)
    dlon = np.arctan2(np.sinh(eta), np.cos(xi))
    tau = _geodetic_tangent(np.sin(xi) / np.hypot(np.sinh(eta), np.cos(xi)))
    return np.degrees(dlon) + central_meridian(zone), np.degrees(np.arctan(tau))


def central_meridian(zone: int) -> float:
    """Longitude [deg] of the middle of a UTM zone (1 to 60)."""
    if not 1 <= zone <= 60:
        raise ValueError(f"UTM zone {zone} does not exist; zones are 1 to 60")
    return 6.0 * zone - 183.0


def parse_epsg(text: str) -> tuple[int, bool]:
    """UTM (zone, south) of a code such as `epsg:32619`. Raises ValueError for any other coordinate system."""
    match = re.fullmatch(r"\s*(?:epsg:)?32([67])(\d\d)\s*", str(text), re.IGNORECASE)
    if not match or not 1 <= int(match[2]) <= 60:
        raise ValueError(f"'{text}' is not a WGS 84 / UTM code (epsg:32601-32660 or epsg:32701-32760)")
    return int(match[2]), match[1] == "7"


def _apply_series(xi: np.ndarray, eta: np.ndarray, coefficients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ζ + Σ c_j sin(2jζ) with ζ = ξ + iη, by Clenshaw's recurrence."""
    sine, cosine = np.sin(2.0 * xi), np.cos(2.0 * xi)
    sinh, cosh = np.sinh(2.0 * eta), np.cosh(2.0 * eta)
    twice_cosine = 2.0 * (cosine * cosh - 1j * sine * sinh)
    last, before = np.zeros_like(twice_cosine), np.zeros_like(twice_cosine)
    for coefficient in coefficients[::-1]:
        last, before = coefficient + twice_cosine * last - before, last
    total = last * (sine * cosh + 1j * cosine * sinh)
    return xi + total.real, eta + total.imag


def _conformal_tangent(tau: np.ndarray) -> np.ndarray:
    """Tangent of the conformal latitude from the tangent of the geodetic latitude."""
    sigma = np.sinh(_ECCENTRICITY * np.arctanh(_ECCENTRICITY * tau / np.hypot(1.0, tau)))
    return tau * np.hypot(1.0, sigma) - sigma * np.hypot(1.0, tau)


def _geodetic_tangent(conformal: np.ndarray) -> np.ndarray:
    """Inverse of `_conformal_tangent` by Newton's method (converges quadratically; 3 steps reach double precision)."""
    e2 = _ECCENTRICITY**2
    tau = conformal / (1.0 - e2)
    for _ in range(_NEWTON_STEPS):
        value = _conformal_tangent(tau)
        slope = np.hypot(1.0, value) * np.hypot(1.0, tau) * (1.0 - e2) / (1.0 + (1.0 - e2) * tau**2)
        tau = tau + (conformal - value) / slope
    return tau
