"""Does the model look? The same questions with the images and with black ones, compared question by question."""

import dataclasses
import tempfile
from pathlib import Path

from PIL import Image

import medrl
from medrl.data.demo import build_examples

out = Path(tempfile.mkdtemp(prefix="medrl-"))
seen = build_examples("test", 16, seed=0, folder=out / "images")
black = out / "black.png"
Image.new("RGB", (168, 168)).save(black)
unseen = [dataclasses.replace(example, images=(black,)) for example in seen]

policy = medrl.Policy.load("demo-base")
evaluations = {
    name: medrl.evaluate(policy, examples, out=out / name, template="plain", max_new_tokens=40, quiet=True)
    for name, examples in (("image", seen), ("black", unseen))
}
comparison = medrl.compare(evaluations["image"], evaluations["black"], a_name="image", b_name="black")
print(comparison.verdict)
print(f"only with the image right: {comparison.only_a}; only with black right: {comparison.only_b}")
print(f"report: {medrl.write_report([out / 'image'], out / 'report.html')}")
