"""The files of a run, read by other programs: Python's own `safetensors`, from PyPI."""

import json
import pathlib
import shutil
import struct
import subprocess
import tempfile
import unittest

from hosts import CACHE, environment, example, install

VENV = CACHE / "safetensors-venv"

# Prints the names, shapes and sums of a file's tensors, and some of the numbers, as JSON.
PROGRAM = """
import json, sys
from safetensors.numpy import load_file
tensors = load_file(sys.argv[1])
print(json.dumps({
    name: [str(one.dtype), list(one.shape), one.astype("float64").sum().item(), one.ravel()[:3].tolist()]
    for name, one in tensors.items()
}))
"""


def by_hand(path):
    """The same, by the description of the format: the header's length, the header as JSON, the numbers."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, numbers = json.loads(content[8:8 + length]), content[8 + length:]
    header.pop("__metadata__", None)
    found = {}
    for name, tensor in header.items():
        first, end = tensor["data_offsets"]
        values = struct.unpack(f"<{(end - first) // 4}f", numbers[first:end])
        found[name] = [{"F32": "float32"}[tensor["dtype"]], tensor["shape"], sum(values), list(values[:3])]
    return found


class Files(unittest.TestCase):
    def test_pythons_safetensors_reads_a_checkpoint_and_an_export(self):
        program = example("sharded_ps")
        install(VENV, "safetensors==0.8.0", "numpy==2.4.6")
        folder = pathlib.Path(tempfile.mkdtemp(prefix="ps-files-"))
        self.addCleanup(shutil.rmtree, folder, ignore_errors=True)
        export = folder / "model.safetensors"
        done = subprocess.run(
            [program, "--offline", "--iterations=20", f"--checkpoint-dir={folder / 'saved'}", f"--export={export}"],
            capture_output=True, text=True, env=environment(),
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        (checkpoint,) = (folder / "saved").glob("checkpoint-*")
        read = {}
        for path in (checkpoint / "model.safetensors", checkpoint / "optimizer.safetensors", export):
            done = subprocess.run([VENV / "bin" / "python", "-c", PROGRAM, path], capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stderr)
            read[path] = json.loads(done.stdout)
            expected = by_hand(path)
            self.assertEqual(read[path].keys(), expected.keys())
            for name, (dtype, shape, total, some) in expected.items():
                self.assertEqual(read[path][name][:2], [dtype, shape], name)
                self.assertAlmostEqual(read[path][name][2], total, places=3)
                self.assertEqual(read[path][name][3], some, name)
        model = read[checkpoint / "model.safetensors"]
        self.assertEqual(model, read[export])
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        self.assertEqual({one["name"]: one["shape"] for one in manifest["parameters"]},
                         {name: shape for name, (_, shape, *_) in model.items()})
        # ConvNet has 2 thousand weights, and training has moved them.
        self.assertTrue(all(any(some) for *_, some in model.values()), model)


if __name__ == "__main__":
    unittest.main(verbosity=2)
