"""JPEG decoding on the GPU, through the nvJPEG that torchvision's CUDA builds carry."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from navsim_eval.errors import DataError, UserError
from navsim_eval.formats.sensors import check_whole


def require_nvjpeg(device: torch.device) -> None:
    """Raises UserError where this device or this build of torchvision cannot decode JPEG."""
    remedy = "use sensors.decode=turbo"
    if device.type != "cuda":
        raise UserError(f"sensors.decode=nvjpeg needs a CUDA device, but the planner runs on '{device}'; {remedy}")
    _, encoded = cv2.imencode(".jpg", np.zeros((16, 16, 3), np.uint8))
    try:
        decode_on_device([encoded.tobytes()], ["a test image"], device)
    except DataError as error:
        raise UserError(f"sensors.decode=nvjpeg does not work here ({error.problem}); {remedy}") from error


def decode_on_device(contents: list[bytes], names: list[str], device: torch.device) -> Tensor:
    """N encoded images of one size -> (N, 3, H, W) uint8 RGB on the device, decoded as one batch.

    Raises DataError with the name of the image that ends early or has another size, or of all where nvJPEG refuses.
    """
    for content, name in zip(contents, names, strict=True):
        check_whole(content, name)
    encoded = [torch.frombuffer(bytearray(content), dtype=torch.uint8) for content in contents]
    try:
        images = decode_jpeg(encoded, mode=ImageReadMode.RGB, device=device)
    except RuntimeError as error:
        message = str(error).splitlines()[0]
        raise DataError(", ".join(names), f"nvJPEG cannot decode these images ({message})") from error
    for image, name in zip(images, names, strict=True):
        if image.shape != images[0].shape:
            sizes = f"{tuple(image.shape[1:])} px beside one of {tuple(images[0].shape[1:])} px"
            raise DataError(name, f"an image of {sizes}")
    return torch.stack(images)
