"""Muon: an optimizer whose step moves a matrix by the same amount in all its directions.

in   gradients of matrices          out  their steps
see  Muon (Jordan et al. 2024; arXiv:2502.16982 for the size of its steps); Polar Express (arXiv:2505.16932) for the coefficients
run  python muon.py muon.png        # what the iterations make of singular values, as a picture

A gradient of a matrix is mostly its few strongest directions: of its singular values some are large and hundreds are small. What is
faint in it, like a copying head that begins to form, hardly moves under plain steps. Muon replaces all singular values of the
averaged gradient by about 1 and keeps its singular vectors: U S V^T becomes U V^T.

A singular value decomposition would do that, slowly. Newton and Schulz need products alone: a X + b (X X^T) X + c (X X^T)^2 X has
X's own singular vectors, and the singular values a s + b s^3 + c s^5. A polynomial that lifts small values and keeps those near 1
where they are, applied a few times, brings all of them near 1. A different one each time needs fewer times: the first lifts most.
"""
import argparse

import torch

# a, b, c of each iteration. The first stays as near to 1 as such a polynomial can on values from 0.01 to 1, the second on what the first
# leaves of these, the third likewise: they end between 0.7 and 1.3. Each was fitted on 4 % more above its range: there the polynomials rise
# steeply, and bfloat16, whose products are off by up to a hundredth, threw values to 10 and more without that room.
COEFFICIENTS = [(7.7964, -21.0503, 14.3774), (3.5393, -2.4556, 0.4469), (2.6586, -1.8512, 0.3888)]


def orthogonal(x, dtype=torch.float32):
    """x (N, rows, columns), rows <= columns, with all singular values brought near 1; products in `dtype`.

    Singular values must begin below 1. The root of |X X^T| is an upper bound of them, closer than |X| (Frobenius norms both), and
    X X^T is made anyway.
    """
    x = x.to(dtype)
    for n, (a, b, c) in enumerate(COEFFICIENTS):
        gram = x @ x.mT                                                    # (N, rows, rows)
        if n == 0:
            bound = gram.norm(dim=(1, 2), keepdim=True).clamp(min=1e-14)   # (N, 1, 1): of the squares of singular values
            x, gram = x / bound.sqrt(), gram / bound
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Steps for matrices, sized as AdamW's usual ones are (0.2 a number), so that one learning rate serves both.

    torch.optim.Muon(adjust_lr_fn="match_rms_adamw") does the same, a matrix at a time, in bfloat16 and with five equal iterations.
    """

    def __init__(self, parameters, lr, weight_decay=0.0, momentum=0.95, dtype=torch.float32):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}                                                     # matrices of one shape, lying or standing, go together
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(average, group["momentum"])            # Nesterov's: where the average will be
                alike.setdefault(tuple(sorted(p.shape)), []).append((p, ahead))
            for shape, members in alike.items():
                lying = torch.stack([x if x.shape[0] == shape[0] else x.T for _, x in members])             # (N, rows, columns)
                for (p, _), step in zip(members, orthogonal(lying, self.dtype)):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(step if p.shape[0] == shape[0] else step.T, alpha=-0.2 * shape[1] ** 0.5 * group["lr"])


def draw(path):
    """Singular values from 0.001 to 1 and what they are after each iteration."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4), layout="tight")
    axes, before = figure.subplots(), torch.logspace(-3, 0, 2000)
    after = before
    axes.plot(before, before, label="before", color="0.7")
    for n, ((a, b, c), style) in enumerate(zip(COEFFICIENTS, (":", "--", "-")), 1):
        after = a * after + b * after ** 3 + c * after ** 5
        axes.plot(before, after, style, color="black", label=f"after {n}")
    axes.set(xscale="log", yscale="log", xlabel="singular value, as a share of the bound", ylabel="becomes")
    axes.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description="Draw what Muon's iterations make of singular values.")
    parser.add_argument("picture", help="a .png to write")
    draw(parser.parse_args().picture)


if __name__ == "__main__":
    main()
