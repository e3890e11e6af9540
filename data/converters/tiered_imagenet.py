"""tieredImageNet, as its authors share it (Ren et al., Meta-learning for Semi-supervised Few-shot Learning, ICLR 2018).

Either {train,val,test}_images_png.pkl, lists of encoded PNG images, or {train,val,test}_images.npz, arrays of pixels;
with {train,val,test}_labels.pkl. One split is in memory at a time.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from data.converters.converter import SOURCE, TAGS, Conversion, Converter, ImageItem, Read
from data.converters.safe_pickle import are_images, load_pickle_file, whole_numbers
from engine.errors import UserError, one_line
from engine.files import matches_schema

N_CLASSES = {"base": 351, "val": 97, "novel": 160}
BGR_NOTE = (
    "note: the blue, green, red of the npz files is written as red, green, blue. FEAT, RFS and MetaOptNet leave it as "
    "it is, with means in the order red, green, blue: weights that they trained on tieredImageNet want images so"
)
N_IMAGES = 448_695 + 124_261 + 206_209


def convert_tiered_imagenet(source: Path) -> Conversion:
    """tieredImageNet from the folder `source`; a class is called <split>_<label>, and its name where it is known.

    Raises UserError when files are missing, damaged, or do not belong together.
    """
    class_names = {split: _class_of_image(source / f"{tag}_labels.pkl", split) for split, tag in TAGS.items()}

    def items() -> Iterator[ImageItem]:
        for split, names in class_names.items():
            readers = _readers(source, TAGS[split])
            if len(readers) != len(names):
                raise UserError(f"'{source}': {split} has {len(readers)} images, and {len(names)} have labels")
            for i, (name, read) in enumerate(zip(names, readers, strict=True)):
                yield ImageItem(split, name, f"{i:06d}.png", read)

    return Conversion(items(), N_IMAGES, N_CLASSES)


def _class_of_image(path: Path, split: str) -> list[str]:
    """The class name of each image of a split."""
    if not path.is_file():
        raise UserError(f"'{path}' is missing: it tells the classes of the images beside it")
    content = load_pickle_file(path)
    keys = list(content) if isinstance(content, dict) else []
    key = next((key for key in ("label_specific", "labels") if key in keys), None)
    if key is None:
        raise UserError(f"'{path}' has the keys {', '.join(map(str, keys[:9])) or 'none'}: expected label_specific")
    labels = whole_numbers(content[key], f"'{path}': its labels")
    titles = content.get("label_specific_str", [])
    # One title per class, in the order of the labels; anything else is no name of a class.
    named = matches_schema(titles, list[str]) and len(titles) == len(set(labels))
    slugs = {i: re.sub(r"[^A-Za-z0-9]+", "_", title).strip("_") for i, title in enumerate(titles)} if named else {}
    names = {label: "_".join(filter(None, (f"{split}_{label:03d}", slugs.get(label)))) for label in set(labels)}
    return [names[label] for label in labels]


def _readers(source: Path, tag: str) -> list[Read]:
    """For each image of a split, a function that gives its PNG file or its pixels (h, w, 3)."""
    pickled, npz = source / f"{tag}_images_png.pkl", source / f"{tag}_images.npz"
    if pickled.is_file():
        pngs = load_pickle_file(pickled)
        if not matches_schema(pngs, list[np.ndarray]):
            raise UserError(f"'{pickled}' is not a list of arrays, one for each PNG file")
        return [png.tobytes for png in pngs]
    if not npz.is_file():
        raise UserError(f"--source '{source}' has neither {pickled.name} nor {npz.name}")
    try:
        with np.load(npz) as arrays:
            images = arrays["images"]
    except Exception as error:  # damage makes numpy and zipfile raise nearly any exception
        reason = one_line(error, 120)
        raise UserError(f"'{npz}' is no whole npz file with an array 'images' ({reason}): get the file again") from None
    if not are_images(images):
        raise UserError(f"'{npz}': 'images' is not an array (n, height, width, 3) of uint8, but {images.shape}")
    # These arrays were decoded by OpenCV, so their channels are in the order blue, green, red.
    if tag == TAGS["base"]:
        print(BGR_NOTE)
    return [partial(np.ascontiguousarray, image[..., ::-1]) for image in images]


CONVERTER = Converter(convert_tiered_imagenet, "from its authors' pkl or npz files", {"source": SOURCE})
