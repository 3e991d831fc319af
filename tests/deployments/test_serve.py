"""What `lockstep serve` shows in its terminal."""

import io

from deployments.serve import _OurLines


def test_lines_of_ours_are_shown_without_ray_s_names_and_not_twice_in_a_row():
    terminal = io.StringIO()
    ours = _OurLines(terminal)
    ours.write("(raylet) a warning\n(Driver pid=7) lockstep: needs 2 GP")
    ours.write("Us\nlockstep: needs 2 GPUs\nlockstep: gave up\nlockstep: needs 2 GPUs\n")
    assert terminal.getvalue() == (
        "lockstep: needs 2 GPUs\nlockstep: gave up\nlockstep: needs 2 GPUs\n"
    )
