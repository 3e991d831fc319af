"""What `lockstep serve` shows in its terminal, and what it gives Ray to read."""

import io
import os
import socket

from deployments.serve import _OurLines
from workers.config import SERVE_PORTS, set_serve_ports


def test_lines_of_ours_are_shown_without_ray_s_names_and_not_twice_in_a_row():
    terminal = io.StringIO()
    ours = _OurLines(terminal)
    ours.write("(raylet) a warning\n(Driver pid=7) lockstep: needs 2 GP")
    ours.write("Us\nlockstep: needs 2 GPUs\nlockstep: gave up\nlockstep: needs 2 GPUs\n")
    assert terminal.getvalue() == (
        "lockstep: needs 2 GPUs\nlockstep: gave up\nlockstep: needs 2 GPUs\n"
    )


def test_serve_gets_ports_of_its_own_unless_the_operator_has_chosen(monkeypatch):
    chosen, *others = SERVE_PORTS
    for name in others:
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv(chosen, "8500")
    set_serve_ports()
    ports = [int(os.environ[name]) for name in others]
    assert os.environ[chosen] == "8500"
    assert len(set(ports)) == len(ports)
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
