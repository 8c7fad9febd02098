"""The reader of the MNIST files of the Python worker: damage is an error that names the file, never a traceback."""

import gzip, os, random, struct, sys, tempfile, unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "../../examples/python"))

import mnist
from mnist import DataError

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def images(count=3, height=28, width=28, magic=0x0803):
    body = bytes(i % 251 for i in range(count * height * width))
    return struct.pack(">4I", magic, count, height, width) + body


def labels(values=(7, 0, 9)):
    return struct.pack(">2I", 0x0801, len(values)) + bytes(values)


class Files(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def write(self, path, content):
        path = os.path.join(self.folder, path)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
        return path

    def refuses(self, text, path=""):
        with self.assertRaises(DataError) as caught:
            mnist.load(self.folder)
        self.assertIn(text, str(caught.exception))
        self.assertIn(os.path.join(self.folder, path) if path else self.folder, str(caught.exception))

    def test_the_names_and_folders_that_people_have(self):
        dotted = ("train-images.idx3-ubyte", "train-labels.idx1-ubyte")
        for names in ((IMAGES, LABELS), dotted):
            for folder in ("", "MNIST/raw", "raw"):
                for end, pack in (("", bytes), (".gz", gzip.compress)):
                    for nested in (False, True):
                        with self.subTest(names=names, folder=folder, end=end, nested=nested):
                            self.setUp()
                            for name, content in zip(names, (images(), labels())):
                                file = name + end
                                self.write(os.path.join(folder, file, file) if nested else os.path.join(folder, file), pack(content))
                            self.assertEqual(mnist.load(self.folder), (images()[16:], bytes((7, 0, 9))))

    def test_what_is_missing_is_named_with_what_is_there(self):
        self.refuses(f"does not have {IMAGES}, with or without .gz; it has: nothing")
        self.write("mnist.zip", b"")
        self.refuses("it has: mnist.zip")
        self.write("MNIST/raw/" + IMAGES, images())
        self.write(LABELS, labels())  # Of two places nothing is put together.
        self.refuses(f"does not have {IMAGES}")
        self.folder = os.path.join(self.folder, "none")
        self.refuses("cannot read the data directory")

    def test_each_kind_of_damage_is_named(self):
        whole = gzip.compress(images())
        wrong_crc = whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:]
        for content, text in (
            (b"", "0 bytes, fewer than a header"),
            (images()[:15], "15 bytes"),
            (b"<!DOCTYPE html><html>", "3c21444f, so it is no IDX file"),
            (labels((1,) * 20), "u8 in 1 dimensions, expected u8 in 3"),
            (images(magic=0x0D03), "f32 in 3 dimensions"),
            (images(height=14, width=14), "14x14 pixels, expected 28x28"),
            (images(count=0), "announces 0 items"),
            (struct.pack(">4I", 0x0803, 2**32 - 1, 28, 28), "announces 4294967295 items"),
            (images()[:-1], "announces 2352 bytes of items, it has 2351"),
            (images() + b"x", "it has more"),
            (whole[:-20], "ends early"),
            (whole[:12], "ends early"),
            (wrong_crc, "damaged"),
            (whole + b"garbage", "damaged"),
        ):
            with self.subTest(text):
                self.write(LABELS, labels())
                self.write(IMAGES, content)
                self.refuses(text, IMAGES)

    def test_labels_and_counts_are_checked(self):
        self.write(IMAGES, images())
        self.write(LABELS, labels((1, 10, 2)))
        self.refuses("label 1 is 10, expected 0 to 9", LABELS)
        self.write(LABELS, labels((1, 2)))
        self.refuses("has 3 images", IMAGES)

    def test_damage_is_never_a_traceback(self):
        seed = 11
        chance = random.Random(seed)
        for whole in (images(), gzip.compress(images())):
            for turn in range(300):
                damaged = bytearray(whole)
                for _ in range(chance.randrange(1, 4)):
                    damaged[chance.randrange(min(len(damaged), chance.choice((16, 10**6))))] = chance.randrange(256)
                path = self.write(IMAGES, damaged[: chance.choice((len(damaged), chance.randrange(len(damaged))))])
                try:
                    shape, body = mnist.read(path, 3)
                    self.assertEqual(shape[0] * 784, len(body))
                except DataError as error:
                    self.assertIn(path, str(error))
                except Exception as error:
                    raise AssertionError(f"seed {seed}, turn {turn}") from error


if __name__ == "__main__":
    unittest.main()
