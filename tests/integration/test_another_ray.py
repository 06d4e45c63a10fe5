"""With a Ray in which none of the private parts that we use exists, the whole road still works."""

import os
import re
import subprocess
import sys
from pathlib import Path

from patience import scaled

ROOT = Path(__file__).resolve().parents[2]

# Python imports this by itself in every process whose PYTHONPATH has its folder, Ray's workers
# included. What `ray_internals` then finds of Ray is what Ray's public interface promises.
SITECUSTOMIZE = '''
import builtins, importlib.abc, importlib.util, sys

NAME = "caption_ray.ray_internals"

def public_only(name, globals=None, locals=None, fromlist=(), level=0):
    if "._" in name or name == "ray.serve.context":
        raise ImportError(f"{name} is private")
    return builtins.__import__(name, globals, locals, fromlist, level)

class Public:
    """A part of Ray without what its public interface does not promise."""
    def __init__(self, whole):
        self.whole = whole
    def __getattr__(self, name):
        if name.startswith("_") and name != "__version__" or name == "DataContext":
            raise AttributeError(f"{name} is private")
        if name == "get_actor":
            return lambda *names, **named: Public(self.whole.get_actor(*names, **named))
        found = getattr(self.whole, name)
        return Public(found) if name in ("data", "util") else found

class Handle:
    def options(self, **options):
        raise TypeError(f"{options} are private")

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != NAME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            module.__builtins__ = {**vars(builtins), "__import__": public_only}
            load(module)
            module.ray = Public(module.ray)
            send = module.without_object_store
            def without_object_store(handle):
                send(Handle())
                return handle
            module.without_object_store = without_object_store
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
'''

ROAD = """
import sys
from pathlib import Path
import own_ray
from tiny_runs import tiny_config
from caption_ray.data.ingest import ingest
from caption_ray.training import trainer

scenes, out = sys.argv[1:]
own_ray.start()
ingest(scenes, f"{out}/shards", image_size=None, images_per_shard=15, seed=0,
       splits=("train", "val"), progress=False)
config = tiny_config(f"{out}/shards", out, "run", epochs=1, num_workers=2)
finished = trainer.train(config)
print("steps", [point["step"] for point in finished.history if "val/loss" in point])
picture = next(Path(scenes, "val").iterdir()).read_bytes()
print("answer", own_ray.serve_once(finished.run, picture).decode())
"""


def test_without_its_private_parts_the_whole_road_works_and_says_what_is_lost(
    scenes: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    paths = (tmp_path, ROOT, ROOT / "tests", ROOT / "tests/integration")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, "-c", ROAD, str(scenes), str(tmp_path / "out")],
        capture_output=True, text=True, env=environment, timeout=scaled(240),
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-6000:]
    assert "steps [4]" in said  # 40 pictures, 2 x 5 a step
    assert '"generated_text"' in said
    lost = re.findall(r"Ray [\d.]+ has changed: (.*?) \(", said)
    for gain in (  # by the driver; the logs of others are not shown here
        "Ray Data polls its tasks without a pause",
        "Ray Train does not see $",
        "nobody notices that two endpoints share a port",
    ):
        assert any(text.startswith(gain) for text in lost), (gain, lost)
