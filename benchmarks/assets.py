"""Animates real models by prompt with the product's own command: one contact sheet each, and a table.

    python benchmarks/assets.py                   # writes docs/results/*.jpg and prints the table
    python benchmarks/assets.py --only fox gull

"moved" is the mean over vertices of the largest displacement, in bounding-box diagonals; "edge p99" the 99th percentile over
edges and frames of how much longer or shorter an edge became (1.6 is torn to the eye).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
ASSETS = ROOT.parent / "shared" / "assets"
EXAMPLES = ROOT / "examples"

# name: (file, prompt, front)
CASES = {
    "fox_cub": (EXAMPLES / "fox_cub.glb", "the fox is running", "-Y"),
    "songbird": (EXAMPLES / "songbird.glb", "the bird is flying", "-Y"),
    "sunflower": (EXAMPLES / "sunflower.glb", "the flower is swaying", "-Y"),
    "fox": (ASSETS / "fox.glb", "the fox is running", "-Y"),
    "gull": (ASSETS / "gull.glb", "the gull is flying", "-Y"),
    "cesium_man": (ASSETS / "cesium_man.glb", "the man is walking", "+X"),
    "shark": (ASSETS / "shark.glb", "the shark is swimming", "-Y"),
    "spider": (ASSETS / "spider.glb", "the spider is walking", "-Y"),
    "milk_truck": (ASSETS / "milk_truck.glb", "the truck is bouncing", "+X"),
    "morph_stress_test": (ASSETS / "morph_stress_test.glb", "the blocks are swaying", "-Y"),
    "robot_expressive": (ASSETS / "robot_expressive.glb", "the robot is waving", "-Y"),
    "static_spot": (ASSETS / "static_spot.glb", "the cow is nodding", "+Y"),
    "static_penguin": (ASSETS / "static_penguin.glb", "the penguin is jumping", "-Y"),
}


def animate(file: Path, prompt: str, front: str, sheet: Path) -> dict:
    """Runs the command on one file; returns its report."""
    with tempfile.TemporaryDirectory() as folder:
        report, picture, result = (Path(folder) / name for name in ("report.json", "sheet.png", "result.glb"))
        subprocess.run([sys.executable, "-m", "track4d", "animate", str(file), f"--prompt={prompt}", f"--front={front}",
                        f"--out={result}", f"--sheet={picture}", f"--report={report}"], check=True, capture_output=True)
        image = Image.open(picture).convert("RGB")
        image.resize((960, round(960 * image.height / image.width)), Image.Resampling.LANCZOS).save(sheet, quality=82)
        return json.loads(report.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--sheets", type=Path, default=ROOT / "docs" / "results")
    arguments = parser.parse_args()
    arguments.sheets.mkdir(parents=True, exist_ok=True)
    print("| model | prompt | vertices | moved | edge p99 | capture s | generate s | fit s | all s | peak GB |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name in arguments.only:
        file, prompt, front = CASES[name]
        if not file.exists():
            print(f"| {name} | absent | | | | | | | | |")
            continue
        r = animate(file, prompt, front, arguments.sheets / f"{name}.jpg")
        client, server = r["client_seconds"], r["seconds"]
        print(f"| {name} | {prompt} | {r['vertices']} | {r['moved']:.3f} | {r['edge_change_p99']:.2f} | "
              f"{client['capture']:.1f} | {server['generate']:.1f} | {server['fit']:.1f} | {sum(client.values()):.1f} | "
              f"{r['peak_memory_bytes'] / 1e9:.1f} |",
              flush=True)


if __name__ == "__main__":
    main()
