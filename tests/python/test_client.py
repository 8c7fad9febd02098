"""What the Python client takes and refuses. Needs nothing but Python; with NumPy, its arrays too.

    python3 -m unittest discover -v tests/python
"""

import array, ctypes, os, socket, struct, sys, unittest, unittest.mock

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "../../examples/python"))

import ps_client
from ps_client import InvalidInput, NotContiguous, WrongDtype, WrongKind, WrongSize, float32_bytes

try:
    import numpy
except ImportError:
    numpy = None

NUMBERS = [1.0, -2.5, 0.0, 3e-9]
BYTES = struct.pack("<4f", *NUMBERS)


class Client(unittest.TestCase):
    def refuses(self, numbers, error, text):
        with self.assertRaises(error) as caught:
            float32_bytes(numbers, len(NUMBERS))
        self.assertIn(text, str(caught.exception))
        self.assertIsInstance(caught.exception, InvalidInput)

    def takes(self, numbers):
        self.assertEqual(bytes(float32_bytes(numbers, len(NUMBERS))), BYTES)

    def test_bytes_and_buffers_of_float32_are_taken(self):
        for numbers in (BYTES, bytearray(BYTES), memoryview(BYTES), array.array("f", NUMBERS), (ctypes.c_float * 4)(*NUMBERS)):
            self.takes(numbers)

    def test_buffers_of_the_right_size_and_another_type_are_refused(self):
        self.refuses(array.array("i", [1, 2, 3, 4]), WrongDtype, "'i'")
        self.refuses(array.array("d", [1.0, 2.0]), WrongDtype, "'d'")
        self.refuses(array.array("B", BYTES), WrongDtype, "'B'")
        self.refuses(array.array("u", "text"), WrongDtype, "'")
        self.refuses(memoryview(BYTES).cast("I"), WrongDtype, "'I'")
        self.refuses((ctypes.c_float.__ctype_be__ * 4)(*NUMBERS), WrongDtype, "little-endian")

    def test_objects_without_bytes_are_refused(self):
        for numbers in ("sixteen letters!", NUMBERS, None, 4, iter(NUMBERS), object()):
            self.refuses(numbers, WrongKind, f"is a {type(numbers).__name__}")

    def test_another_size_is_refused(self):
        self.refuses(BYTES[:-4], WrongSize, "12 bytes, expected 16")
        self.refuses(b"", WrongSize, "0 bytes")
        self.refuses(array.array("f", NUMBERS + [1.0]), WrongSize, "20 bytes")

    def test_what_is_not_contiguous_is_refused(self):
        self.refuses(memoryview(BYTES * 2)[::2], NotContiguous, "not contiguous")

    def test_a_loss_and_a_number_of_examples_are_numbers(self):
        self.assertEqual((ps_client._number(2), ps_client._count(True)), (2.0, 1))
        for loss in ("2.3", None, [1.0, 2.0], b"1"):
            with self.assertRaises(WrongKind):
                ps_client._number(loss)
        for count in (1.5, "3", None):
            with self.assertRaises(WrongKind):
                ps_client._count(count)
        for count in (-1, 2**32):
            with self.assertRaises(InvalidInput):
                ps_client._count(count)

    def test_an_address_and_a_token_are_checked_before_anything_is_sent(self):
        for address in ("127.0.0.1:port", "http://127.0.0.1:8265"):
            with self.assertRaisesRegex(InvalidInput, "is not HOST:PORT"):
                ps_client.Connection(address)
        for token in ("line\nline", "schl\u00fcssel"):
            with unittest.mock.patch.dict(os.environ, PS_TOKEN=token), self.assertRaisesRegex(InvalidInput, "PS_TOKEN"):
                ps_client.Connection("127.0.0.1:1")

    def test_who_does_not_answer_is_named(self):
        with socket.socket() as taken, unittest.mock.patch.object(ps_client, "PATIENCE_S", -1):
            taken.bind(("127.0.0.1", 0))  # Bound, but nobody listens.
            address = "127.0.0.1:%d" % taken.getsockname()[1]
            with self.assertRaisesRegex(ps_client.Unreachable, address):
                ps_client.Connection(address).call("GET", "/v1/status")

    @unittest.skipIf(numpy is None, "NumPy is not installed")
    def test_numpy_arrays(self):
        f4 = numpy.array(NUMBERS, dtype="<f4")
        self.takes(f4)
        self.takes(f4.reshape(2, 2))
        self.refuses(f4.astype(">f4"), WrongDtype, "little-endian")
        self.refuses(f4.astype("f2"), WrongDtype, "'e'")
        self.refuses(f4.astype("f8")[:2], WrongDtype, "'d'")
        self.refuses(f4.astype("i4"), WrongDtype, "astype")
        self.refuses(numpy.frombuffer(BYTES, dtype="u1"), WrongDtype, "'B'")
        self.refuses(numpy.array(["text"]), WrongDtype, "'")
        self.refuses(numpy.asfortranarray(f4.reshape(2, 2)), NotContiguous, "Fortran")
        self.refuses(numpy.repeat(f4, 2)[::2], NotContiguous, "ascontiguousarray")
        self.assertEqual(ps_client._number(f4[0]), 1.0)
        self.assertEqual(ps_client._count(numpy.int64(3)), 3)


if __name__ == "__main__":
    unittest.main()
