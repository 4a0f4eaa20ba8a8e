"""Training images: found (`find_images`), then read into memory, all by one scale (`read_images`)."""

from ddpm_deploy.train.data.find import find_images
from ddpm_deploy.train.data.read import read_images
from ddpm_deploy.train.data.source import DIGITS, Dataset, Range, Source

__all__ = ["DIGITS", "Dataset", "Range", "Source", "find_images", "read_images"]
