"""From the files that people download to image folders: one file per format, and one line per benchmark.

A new benchmark is a file here, with its function and its flags, and an entry of CONVERTERS.
"""

from data.converters import cifar100, cub, folder, mini_imagenet, tiered_imagenet
from data.converters.converter import Converter

CONVERTERS: dict[str, Converter] = {
    "miniImagenet": mini_imagenet.CONVERTER,
    "tieredImageNet": tiered_imagenet.CONVERTER,
    "CUB": cub.CONVERTER,
    "FC100": cifar100.FC100,
    "CIFAR-FS": cifar100.CIFAR_FS,
    "folder": folder.CONVERTER,
}
