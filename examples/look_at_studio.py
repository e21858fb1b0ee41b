# SPDX-License-Identifier: Apache-2.0
"""What the studio shows: a picture with one sample in each row, and how long a sample takes.

    python examples/look_at_studio.py -o studio.png
    python examples/look_at_studio.py --preset occluded --views 6 --seed 3 -o hard.png

Left joints are orange, right ones blue; those that are hidden are hollow.
"""

from __future__ import annotations

import argparse
import time

import torch

from tritool.data.synthetic import Studio, StudioSettings, contact_sheet


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws some samples of the studio.")
    parser.add_argument("-o", "--output", default="studio.png")
    parser.add_argument("--preset", default="default", choices=["easy", "default", "occluded"])
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--size", type=int, nargs=2, default=(144, 160), metavar=("W", "H"))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    settings = StudioSettings.preset(given.preset, views=given.views, image_size=tuple(given.size))
    studio = Studio(settings, length=given.rows, seed=given.seed)
    for _ in range(2):  # the first time includes the making of the subjects
        start = time.process_time()
        samples = [studio[index] for index in range(len(studio))]
        seconds = time.process_time() - start
    seen = torch.stack([sample.visibility.float().mean() for sample in samples]).mean()
    contact_sheet(samples, given.output)
    print(f"{1000 * seconds / len(studio):.0f} ms for a sample of {given.views} views")
    print(f"{100 * float(seen):.0f} % of the joints are visible")
    print("written", given.output)


if __name__ == "__main__":
    main()
