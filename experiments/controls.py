"""An adapter that is a control, and one that a user could have written:

    python train.py --adapter experiments/controls.py:Constant --l1 0
"""
import torch
from torch import nn


class Constant(nn.Module):
    """The same steering at every token, v = soft(b): W_a = 0, so nothing of the state is read."""

    def __init__(self, d_in, d_sae):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(d_sae).uniform_(-1e-6, 1e-6))
        # At the bias's own size every feature would be dead from the start.
        self.soft_threshold = nn.Parameter(torch.zeros(d_sae))

    def forward(self, x):
        v = self.bias.sign() * (self.bias.abs() - self.soft_threshold).relu()
        return v.expand(*x.shape[:-1], -1)

    @torch.no_grad()
    def project(self):
        self.soft_threshold.clamp_(min=0)
