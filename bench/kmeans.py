"""How soon is a codebook fitted, how fast are frames assigned? Against scikit-learn's full
Lloyd and faiss's search, on the same cores.

in   nothing (MFCC-like frames drawn from a mixture)
out  rows of results/bench-cpu.json: kmeans/fit, kmeans/assign
run  python bench/kmeans.py    # wants bench/requirements.txt; about four minutes on two cores

fit: time until the inertia that scikit-learn ends with + 0.5 %. assign: frames a second, the
same nearest centroids.
"""

import argparse
import contextlib
import io
import sys
import time

import torch

from bench import ROOT, median, record

sys.path.insert(0, str(ROOT))
from tokenize_audio import kmeans, nearest

N, C, K = 100_000, 256, 500


def main():
    parser = argparse.ArgumentParser(description="Time k-means against scikit-learn and faiss.")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    import faiss
    import sklearn
    from sklearn.cluster import KMeans

    rng = torch.Generator().manual_seed(0)
    # Twice as many clouds as centroids, overlapping: nothing is easy.
    middles = torch.randn(2 * K, C, generator=rng)
    x = middles[torch.randint(2 * K, (N,), generator=rng)] + 0.8 * torch.randn(N, C, generator=rng)
    inertia = lambda c: ((x - c[nearest(x, c)]) ** 2).sum(1).mean().item()

    began = time.perf_counter()
    peer = KMeans(K, n_init=1, random_state=0, algorithm="lloyd").fit(x.numpy())
    theirs = time.perf_counter() - began
    wanted = inertia(torch.from_numpy(peer.cluster_centers_))
    with contextlib.redirect_stderr(io.StringIO()):
        began = time.perf_counter()
        quick = kmeans(x, K, seed=0, minibatch=10_000)
        ours = time.perf_counter() - began
    got = inertia(quick)
    print(
        f"scikit-learn {theirs:.1f} s, inertia {wanted:.4f} ({peer.n_iter_} passes); ours "
        f"{ours:.1f} s, {got:.4f} ({got / wanted - 1:+.2%})"
    )
    unit = f"s to an inertia {got / wanted - 1:.1%} above the peer's, {N} x {C}, k {K}"
    record(
        "cpu", "kmeans/fit", unit, ours, theirs, f"scikit-learn {sklearn.__version__}, full Lloyd",
        better="less", inertia_above_peer=round(got / wanted - 1, 5),
    )

    index = faiss.IndexFlatL2(C)
    index.add(quick.numpy())
    faiss.omp_set_num_threads(torch.get_num_threads())
    half = x.bfloat16(), quick.bfloat16()
    work = {
        "ours": lambda: nearest(x, quick),
        "faiss": lambda: torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0]),
        "bf16": lambda: (half[0] @ half[1].T - 0.5 * quick.pow(2).sum(1).bfloat16()).argmax(1),
    }
    said = {name: run() for name, run in work.items()}
    assert (said["ours"] == said["faiss"]).float().mean() > 0.9999
    times = {name: [] for name in work}
    for _ in range(args.rounds):
        for name, run in work.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    rate = {name: N / median(t) for name, t in times.items()}
    record(
        "cpu", "kmeans/assign", "frames/s, fp32", rate["ours"], rate["faiss"],
        f"faiss {faiss.__version__}", bf16_rate=round(rate["bf16"]),
        bf16_flips=round((said["bf16"] != said["ours"]).float().mean().item(), 5),
    )


if __name__ == "__main__":
    main()
