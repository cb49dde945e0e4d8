"""What films have and drawings have not: rounding by a codec, light that changes."""

import torch

from demo.interpolation.filmed import BLOCK_PX, MAX_DRIFT, MAX_ROUNDING, cosines, filmed, rounded

SIDE_PX = 64


def test_the_transform_is_orthonormal_and_starts_with_the_mean() -> None:
    basis = cosines()
    torch.testing.assert_close(basis @ basis.T, torch.eye(BLOCK_PX), atol=1e-6, rtol=0)
    torch.testing.assert_close(basis[0], torch.full((BLOCK_PX,), BLOCK_PX**-0.5))


def test_rounding_leaves_multiples_of_its_step_block_by_block() -> None:
    pictures = torch.rand(2, 3, SIDE_PX, SIDE_PX, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([0.05, 0.2]).view(2, 1, 1, 1)
    out, basis = rounded(pictures, steps), cosines()
    for step, before, after in zip(steps.flatten().tolist(), pictures, out, strict=True):
        for top, left in ((0, 0), (8, 40)):
            block = after[:, top : top + BLOCK_PX, left : left + BLOCK_PX]
            waves = basis @ block @ basis.T / step
            torch.testing.assert_close(waves, waves.round(), atol=1e-3, rtol=0)
        # Evenly spread between two multiples, what is lost deviates by a step over the root of 12.
        assert abs((after - before).std().item() / (step / 12**0.5) - 1) < 0.1
    torch.testing.assert_close(rounded(pictures, torch.zeros(2, 1, 1, 1)), pictures, atol=2e-3, rtol=0)


def test_light_changes_evenly_and_the_wanted_picture_has_none_of_the_noise() -> None:
    count = 32
    gray, times = torch.full((count, 3, SIDE_PX, SIDE_PX), 0.5), torch.full((count,), 0.25)
    first, wanted, second = filmed(gray, gray, gray, times, torch.Generator().manual_seed(0))
    levels = [x.mean((1, 2, 3)) for x in (first, second)]
    darker, lighter = (0.5 - levels[0], levels[1] - 0.5)
    assert 0.25 * 0.5 * MAX_DRIFT / 2 < darker.abs().max() < 0.25 * 0.5 * MAX_DRIFT + MAX_ROUNDING / 16
    far = darker.abs() > 0.004
    assert far.any()
    torch.testing.assert_close(lighter[far] / darker[far], torch.full((int(far.sum()),), 3.0), atol=1.0, rtol=0)
    assert (wanted - wanted.mean((2, 3), keepdim=True)).abs().max() < 1e-4
    assert first.std((2, 3)).max() > 0.003
