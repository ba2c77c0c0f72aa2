import torch

from dsdistill.objectives import total_variation


def test_differences_to_the_right_below_and_along_both_diagonals():
    image = torch.zeros(1, 1, 3, 3)
    image[0, 0, 1, 1] = 2.0
    # The middle differs by 2 from two neighbours in each of the four directions.
    torch.testing.assert_close(total_variation(image), torch.tensor(4 * (2 * 2.0**2) ** 0.5))


def test_a_plane_is_smooth():
    assert total_variation(torch.full((2, 3, 4, 5), 7.0)) == 0
