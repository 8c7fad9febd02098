"""Reads the files of MNIST with Python's standard library: found under the names that people have, and checked."""

import gzip, os, struct, zlib

HEIGHT = WIDTH = 28
NUM_CLASSES = 10
MAX_ITEMS = 1_000_000
FOLDERS = ("", "MNIST/raw", "raw")  # torchvision keeps the files in MNIST/raw.
DTYPES = {8: "u8", 9: "i8", 11: "i16", 12: "i32", 13: "f32", 14: "f64"}


class DataError(Exception):
    """A file is missing, or is not what it should be."""


def find(directory, names):
    """Returns the paths of files such as `train-images-idx3-ubyte`, all from one folder: compressed or not, with a dot
    in place of a hyphen, and also where torchvision and Kaggle put them."""
    try:
        there = sorted(os.listdir(directory))
    except OSError as error:
        raise DataError(f"cannot read the data directory {directory}: {error.strerror}") from error
    for folder in FOLDERS:
        paths = [_find_one(os.path.join(directory, folder), name) for name in names]
        if all(paths):
            return paths
    missing = next(name for name in names if not _find_one(directory, name))
    listed = ", ".join(there[:10] + ["..."][: len(there) > 10]) or "nothing"
    raise DataError(f"{directory} does not have {missing}, with or without .gz; it has: {listed}")


def _find_one(folder, name):
    for stem in (name, name.replace("-idx", ".idx")):
        for file in (stem, stem + ".gz"):
            # Kaggle's archive has each file in a folder of the file's name.
            for path in (os.path.join(folder, file), os.path.join(folder, file, file)):
                if os.path.isfile(path):
                    return path
    return None


def read(path, num_dims):
    """Returns the dimensions and the bytes of an IDX file."""
    def wrong(reason):
        return DataError(f"{path}: {reason}; replace the file")

    def check(header):
        zeros, dtype, dims = struct.unpack(">HBB", header[:4])
        if zeros != 0 or dtype not in DTYPES:
            raise wrong(f"it begins with {header[:4].hex()}, so it is no IDX file")
        if (dtype, dims) != (8, num_dims):
            raise wrong(f"it holds {DTYPES[dtype]} in {dims} dimensions, expected u8 in {num_dims}")
        shape = struct.unpack(f">{num_dims}I", header[4:])
        if num_dims == 3 and shape[1:] != (HEIGHT, WIDTH):
            raise wrong(f"its images have {shape[1]}x{shape[2]} pixels, expected {HEIGHT}x{WIDTH}")
        if not 1 <= shape[0] <= MAX_ITEMS:
            raise wrong(f"it announces {shape[0]} items, expected 1 to {MAX_ITEMS}")
        return shape

    try:
        with open(path, "rb") as raw:
            is_gzip = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            with gzip.GzipFile(fileobj=raw) if is_gzip else raw as file:
                header = file.read(4 + 4 * num_dims)
                if len(header) < 4 + 4 * num_dims:
                    raise wrong(f"it has {len(header)} bytes, fewer than a header")
                shape = check(header)
                size = shape[0] * (HEIGHT * WIDTH if num_dims == 3 else 1)
                body = file.read(size + 1)  # One more than announced shows that there is more.
    except EOFError as error:
        raise wrong("the compressed data ends early: it was not copied or downloaded to its end") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise wrong(f"the compressed data is damaged ({error})") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    if len(body) != size:
        found = f"{len(body)}" if len(body) < size else "more"
        raise wrong(f"its header announces {size} bytes of items, it has {found}")
    return shape, body


def load(directory, split="train"):
    """Returns the images (`[len, 28, 28]`, row-major) and the labels, both as bytes."""
    images_path, labels_path = find(directory, [f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte"])
    (num_labels,), labels = read(labels_path, 1)
    (num_images, _, _), images = read(images_path, 3)
    if num_images != num_labels:
        raise DataError(f"{images_path} has {num_images} images, {labels_path} has {num_labels} labels: "
                        "take both from one data set")
    if max(labels) >= NUM_CLASSES:
        index = next(i for i, label in enumerate(labels) if label >= NUM_CLASSES)
        raise DataError(f"{labels_path}: label {index} is {labels[index]}, expected 0 to {NUM_CLASSES - 1}; "
                        "replace the file")
    return images, labels
