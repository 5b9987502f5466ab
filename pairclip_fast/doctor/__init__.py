"""`pairclip-fast doctor`: what this machine can do, what will be used, and why.

Nothing is decided here: each answer comes from the function that decides it in a run (precision, loader, kernels, text
encoder, source), so that the doctor cannot say one thing and `train` do another. The rooms are imported when asked.
"""

from pairclip_fast.doctor.check import Check
from pairclip_fast.doctor.command import refuse_if_lacking, render_doctor, run_doctor

__all__ = ["Check", "refuse_if_lacking", "render_doctor", "run_doctor"]
