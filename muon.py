"""Muon: an optimizer whose step moves a matrix by the same amount in all its directions.

in   gradients of matrices          out  their steps
see  Muon (Jordan et al. 2024; arXiv:2502.16982 for the size of its steps)
run  python muon.py muon.png        # what the iterations make of singular values, as a picture

A gradient of a matrix is mostly its few strongest directions: of its singular values some
are large and hundreds are small. What is faint in it, like a copying head that begins to
form, hardly moves under plain steps. Muon replaces all singular values of the averaged
gradient by about 1 and keeps its singular vectors: U S V^T becomes U V^T.

A singular value decomposition would do that, slowly. Newton and Schulz need products
alone: a X + b (X X^T) X + c (X X^T)^2 X has X's own singular vectors, and the singular
values a s + b s^3 + c s^5. A polynomial that lifts small values and keeps those near 1
where they are, applied a few times, brings all of them near 1.
"""

import argparse
import sys

import torch

# a, b, c of the polynomial: an iteration lifts small values 3.4 times, and in the end
# none of those that were large enough lies outside of 0.68 to 1.21.
COEFFICIENTS = 3.4445, -4.7750, 2.0315
ITERATIONS = 5


def orthogonal(x, dtype=torch.float32):
    """x (N, rows, columns), rows <= columns, with all singular values brought near 1.

    `dtype` is what is multiplied in. Singular values must begin below 1, so each matrix
    is divided by its Frobenius norm, which none of them exceeds.
    """
    a, b, c = COEFFICIENTS
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    if x.dtype == torch.float32 and x.shape[2] > 2 * x.shape[1]:
        return orthogonal_long(x)
    for _ in range(ITERATIONS):
        gram = x @ x.mT                                           # (N, rows, rows): X X^T
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def orthogonal_long(x):
    """The same of long matrices (N, rows, columns) in two thirds of the products.

    Each iteration is x <- P x with a small symmetric P made of X X^T alone, which becomes
    P X X^T P. So the small matrices are multiplied first and x once. In bfloat16 faint
    directions would drown in the rounding of X X^T.
    """
    a, b, c = COEFFICIENTS
    p = product = None
    for _ in range(ITERATIONS):
        gram = x @ x.mT if p is None else p @ gram @ p              # (N, rows, rows)
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=1, dim2=2).add_(a)
        product = p if product is None else p @ product
    return product @ x


class Muon(torch.optim.Optimizer):
    """Steps for matrices, sized as AdamW's usual ones are, so that one learning rate serves both.

    torch.optim.Muon(adjust_lr_fn="match_rms_adamw") takes the same steps, a matrix at a
    time and always in bfloat16: a hundred times slower on a processor without its
    instructions.
    """

    def __init__(
        self, parameters, lr, weight_decay=0.0, momentum=0.95, dtype=torch.float32
    ):
        settings = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(parameters, settings)
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            # Matrices of one shape, lying or standing, are orthogonalised together.
            alike = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p not in self.state:
                    self.state[p]["average"] = torch.zeros_like(p)
                average = self.state[p]["average"]
                average.lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(average, group["momentum"])  # Nesterov's momentum
                alike.setdefault(tuple(sorted(p.shape)), []).append((p, ahead))
            for shape, members in alike.items():
                lies = [p.shape[0] == shape[0] for p, _ in members]
                lying = torch.stack(
                    [x if lie else x.T for lie, (_, x) in zip(lies, members)]
                )
                size = 0.2 * shape[1] ** 0.5 * group["lr"]
                for lie, (p, _), step in zip(lies, members, orthogonal(lying, self.dtype)):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(step if lie else step.T, alpha=-size)


def draw(path):
    """Singular values from 0.001 to 1 and what they are after each iteration."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.subplots()
    before = torch.logspace(-3, 0, 500)
    a, b, c = COEFFICIENTS
    after = before
    for n in range(ITERATIONS + 1):
        shade, label = str(0.8 * (1 - n / ITERATIONS)), f"after {n}" if n else "before"
        axes.plot(before, after, color=shade, linewidth=2 if n == ITERATIONS else 1)
        axes.text(0.9 * before[0], after[0], label, ha="right", va="center", fontsize=9)
        after = a * after + b * after**3 + c * after**5
    axes.set(xscale="log", yscale="log", xlim=(4e-4, 1.2), ylabel="becomes")
    axes.set_xlabel("singular value, as a share of the matrix's norm")
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description="Draw what Muon makes of singular values.")
    parser.add_argument("picture", help="a .png to write")
    try:
        draw(parser.parse_args().picture)
    except (OSError, ValueError) as error:  # no folder, or no ending that means a picture
        sys.exit(f"muon.py: {error}")


if __name__ == "__main__":
    main()
