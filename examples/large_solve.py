"""A solve whose tokens do not fit in memory: 100,000 taught tokens of a module with 18,944 inputs and 3,584 outputs.

    python examples/large_solve.py                      # the MLP of a 7B model; some 10 GB of memory, 9 GB of disk
    python examples/large_solve.py --tokens 3000 --inputs 400 --outputs 60

The keys and residuals (random, of rank 200 and noise) lie in temporary files (TMPDIR,
on a disk); the solve goes through them in blocks. It is the default setting's: half of the tokens are taught, half keep
their outputs. Printed are seconds, the peak of the memory that is not mapped from files, and how far the change is from
solving the normal equations, on a sample of their columns.
"""

import argparse
import time
from pathlib import Path

import torch

from qf_peft.forward.scratch import Scratch
from qf_peft.solve.least_squares import TaughtTokens, recursive_update
from qf_peft.solve.second_moment import SecondMoment


def anonymous():
    """MB of the process's memory that is not mapped from files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def rows(scratch, count, inputs, outputs, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = scratch.empty(count, inputs, torch.float32, "cpu")
    residual = scratch.empty(count, outputs, torch.float32, "cpu")
    basis = torch.randn(min(200, inputs), inputs, generator=torch.Generator().manual_seed(0))
    for first in range(0, count, 2048):
        part = slice(first, first + 2048)
        few = torch.randn(len(keys[part]), len(basis), generator=generator)
        keys[part] = few @ basis / len(basis) ** 0.5 + 0.1 * torch.randn(keys[part].shape, generator=generator)
        residual[part] = torch.randn(residual[part].shape, generator=generator)
    return keys, residual


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--inputs", type=int, default=18_944)
    parser.add_argument("--outputs", type=int, default=3_584)
    options = parser.parse_args()
    scratch, half = Scratch(budget=0), options.tokens // 2
    taught = TaughtTokens(*rows(scratch, half, options.inputs, options.outputs, 1), torch.ones(half))
    kept, residual = rows(scratch, options.tokens - half, options.inputs, options.outputs, 2)
    stays = TaughtTokens(kept, residual.zero_(), torch.ones(len(kept)))
    bound, peak, start = SecondMoment(options.inputs), 0.0, time.perf_counter()
    bound.ridge = 1e-3 * half
    original = SecondMoment.update

    def watched(self, *arguments):
        nonlocal peak
        result = original(self, *arguments)
        peak = max(peak, anonymous())
        print(f"{time.perf_counter() - start:8.0f} s  moment summed", flush=True)
        return result

    SecondMoment.update = watched
    change = recursive_update(bound, taught, stays)
    peak = max(peak, anonymous())
    seconds = time.perf_counter() - start
    # Q ΔWᵀ = Yᵀ R at some of ΔW's rows, whichever form the solve took.
    sample = torch.arange(0, options.outputs, max(1, options.outputs // 8))
    found = (change.B[sample].double() @ change.A.double()).T
    wanted = sum(
        taught.keys[p].double().T @ taught.residual[p][:, sample].double()
        for p in (slice(f, f + 2048) for f in range(0, half, 2048))
    )
    moment = bound.matrix if bound.matrix is not None else bound.root.double().T @ bound.root.double()
    left = (moment @ found + bound.ridge * found - wanted).norm() / wanted.norm()
    print(f"{seconds:.0f} s, {peak / 1000:.1f} GB, normal equations met to {float(left):.0e} (relative)")


if __name__ == "__main__":
    main()
