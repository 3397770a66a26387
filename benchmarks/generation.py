"""Generation: users a second by beam search over a catalogue as large as Amazon Beauty's.

    python -m benchmarks.generation

Histories are as long as Beauty's test histories; the weights are random, which changes no shape.
"""

import argparse
import time

import torch

from benchmarks.training import MAX_ITEMS, WIDE, beauty_like, catalogue
from data.schemas import Samples
from data.utils import SequenceSource, tokenize
from modules.generation.beam_search import beam_search
from modules.generation.trie import Trie
from modules.model import EncoderDecoderRetrievalModel


def measure(options: dict, users: int, batch_size: int, beams: int, args) -> None:
    device = torch.device(args.device)
    data, (codes, sizes) = beauty_like(users), catalogue()
    last = data.offsets.diff() - 1
    samples = Samples(torch.arange(len(last)), last, torch.zeros_like(last))
    source = SequenceSource(data, samples, MAX_ITEMS, device)
    trie = Trie.build(codes).to(device)
    torch.manual_seed(0)
    model = EncoderDecoderRetrievalModel(sizes, **options).to(device).eval()

    def generate() -> float:
        start = time.perf_counter()
        for batch in source.in_order(batch_size):
            with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
                items = beam_search(model, tokenize(batch, trie.item_codes), trie, beams).items
        int(items[-1, -1])
        return time.perf_counter() - start

    generate()
    seconds = sorted(generate() for _ in range(3))
    print(
        f"d {options['dim']}, {users:,} users in batches of {batch_size}, {beams} beams, {args.dtype}: "
        f"{users / seconds[1]:,.1f} users/s ({users / seconds[2]:,.1f} to {users / seconds[0]:,.1f}), "
        f"all in {seconds[1]:.2f} s",
        flush=True,
    )


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32")
    parser.add_argument("--batch", type=int, nargs="+", default=[512, 2048] if gpu else [128])
    parser.add_argument("--beams", type=int, nargs="+", default=[10, 50] if gpu else [10])
    parser.add_argument("--dims", type=int, nargs="+", default=[384, 128])
    parser.add_argument("--users", type=int, default=22_363 if gpu else 256)
    args = parser.parse_args()
    if gpu:
        from benchmarks.timing import heading

        heading()
    for dim in args.dims:
        for beams in args.beams:
            for batch in args.batch:
                measure(WIDE | dict(dim=dim), args.users, batch, beams, args)


if __name__ == "__main__":
    main()
