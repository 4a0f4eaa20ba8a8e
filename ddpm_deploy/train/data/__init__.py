"""Training images: found (`find_images`), then read into memory, all by one scale (`read_images`)."""

from ddpm_deploy.train.data.find import find_images
from ddpm_deploy.train.data.read import read_images
from ddpm_deploy.train.data.source import DIGITS, DataRange, Dataset, Source

__all__ = ["DIGITS", "DataRange", "Dataset", "Source", "find_images", "read_images"]
