"""What is counted and averaged over held-out pairs: sparse features of tokens, intervals over questions.

`Counts` is what analyze.py's HeldOut is made on; it knows numbers, and nothing of models.
"""
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as nnf
from tqdm import tqdm

from lib.stats import bootstrap


@dataclass
class Sparse:
    """The few active features of N tokens; those of one token, under one of S steerings, are a bag."""
    token: torch.Tensor      # (n,) which of the N
    feature: torch.Tensor    # (n,) which of F
    value: torch.Tensor      # (n,)
    bag: torch.Tensor        # (n,) token * S + steering
    start: torch.Tensor      # (N*S,) where the entries of each bag begin

    @classmethod
    def of(cls, *dense):
        """dense: (N,F) of each steering; their features share one numbering."""
        together, S = torch.cat(dense, 1), len(dense)
        token, feature = together.nonzero(as_tuple=True)
        ends = torch.tensor([x.shape[1] for x in dense], device=feature.device).cumsum(0)
        bag = token * S + torch.bucketize(feature, ends, right=True)
        count = torch.bincount(bag, minlength=len(together) * S)
        return cls(token, feature, together[token, feature], bag, count.cumsum(0) - count)

    def sums(self, table, weight=None):
        """Σ over each bag of weight · table[feature].  table (F,K) -> (N*S,K)"""
        if len(self.feature) and table.device.type != "mps":                # mps has no embedding_bag
            how = {"mode": "sum", "per_sample_weights": weight}
            return nnf.embedding_bag(self.feature, table, self.start, **how)
        rows = table[self.feature] if weight is None else table[self.feature] * weight[:, None]
        return table.new_zeros(len(self.start), table.shape[1]).index_add(0, self.bag, rows)


def widest(device):
    """float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def answer_means(batch, x):
    """Means of x (B,T,K) over the tokens of the chosen and of the rejected answers. -> two of (B,K)"""
    out = []
    for side in (1, 2):
        mine = (batch.branch == side)[..., None]
        wide = x.to(torch.promote_types(torch.float32, x.dtype))
        out.append((wide * mine).sum(1) / mine.sum(1))
    return out


def spread_of(x):
    """Mean of the draws of a control, and the range of 95 in 100."""
    low, high = np.percentile(x, [2.5, 97.5])
    return {"mean": np.mean(x), "low": low, "high": high}


class Counts:
    """Numbers by pair (P of them) and by feature (F).

    Needs clusters (P,), numbers that are equal for pairs to be drawn together; rows with index, branch
    and the Sparse v and f; d_sae = F, directions (F,D), steerings with an sae each.
    """
    progress = True

    def bar(self, items, name):
        return tqdm(items, desc=name, leave=False, dynamic_ncols=True, disable=not self.progress)

    def spread(self, index, values):
        """Values of the pairs `index` in their places among all P, nan elsewhere."""
        out = np.full((len(self.clusters), *values.shape[1:]), np.nan)
        out[index] = values
        return out

    def interval(self, statistic, *columns):
        """`bootstrap` of columns (P,), clusters drawn whole. nan in the first: not measured there."""
        columns = [np.asarray(x, dtype=np.float64) for x in columns]
        there = ~np.isnan(columns[0])
        return bootstrap([x[there] for x in columns], self.clusters[there], statistic)

    def mean(self, values, den=None):
        """Σ values / Σ den over pairs (den None: their mean), with its interval."""
        return self.interval(np.divide, values, np.ones(len(values)) if den is None else den)

    def without(self, features):
        """keep (F,) that masks these."""
        return torch.ones(self.d_sae).index_fill(0, torch.as_tensor(features), 0.0)

    def events(self, kind, weight=torch.ones_like, branches=(0, 1, 2)):
        """Σ over the tokens of these branches of what each feature does there, (F,). kind: "v" or "f";
        weight: of the values; without one, how often it is active"""
        total = np.zeros(self.d_sae)
        for r in self.rows:
            s = getattr(r, kind)
            branch = r.branch[s.token]
            there = sum(branch == wanted for wanted in branches)
            amount = (weight(s.value) * there).cpu().double()
            total += torch.bincount(s.feature.cpu(), amount, self.d_sae).numpy()
        return total

    def usage(self):
        """Σ|v_i||d_i| of each feature over all steered tokens, (F,)."""
        lengths = self.directions.float().norm(dim=-1)
        return self.events("v", torch.abs) * lengths.cpu().double().numpy()

    def feature_name(self, i):
        """"17", or "L3/17" where several layers are steered."""
        first = 0
        for s in self.steerings:
            if i < first + s.sae.d_sae:
                return str(i) if len(self.steerings) == 1 else f"L{s.sae.layer}/{i - first}"
            first += s.sae.d_sae
