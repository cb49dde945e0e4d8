"""`make demo`: what README tells a newcomer to run first."""

from __future__ import annotations

import subprocess
import sys

from tests.cluster.gateway_process import ROOT

PICTURE = "a large red circle to the left of a small blue star on a yellow background"
CLIP = "a large green star moves quickly to the right and then turns down on a white background"


def test_the_demo_makes_a_picture_and_a_clip_that_show_what_they_should(tmp_path):
    # A folder of its own, so that a demo beside this test keeps its run folder.
    for name in ("demo", "deploy", "interpolation_svc"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [sys.executable, "-m", "demo", PICTURE, CLIP],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280.0,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the picture shows what the prompt says" in done.stdout
    assert "the clip shows what the prompt says" in done.stdout
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"demo.png", "demo.mp4"}
