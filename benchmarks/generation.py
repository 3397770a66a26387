"""Generation: users a second by beam search over a catalogue as large as Amazon Beauty's.

    python -m benchmarks.generation

Histories are as long as Beauty's test histories, on a GPU all 22,363; the weights are random, which changes no shape.
"eager": launched by the host; "recorded": CUDA graphs, as evaluation uses; "padded": every history has the length of
the longest, which is what a padded model computes.
"""

import argparse
import time

import torch
from accelerate import Accelerator

from benchmarks.training import MAX_ITEMS, WIDE, beauty_like, catalogue, full_length, mark, seconds_between
from data.schemas import Interactions, Samples
from data.utils import SequenceSource
from modules.generation.trie import Trie
from modules.model import EncoderDecoderRetrievalModel
from training.evaluate import Evaluation

REPEATS = 3  # rounds over all users


def last_of_each(data: Interactions, device: torch.device) -> SequenceSource:
    """Every user's last item as the target."""
    last = data.offsets.diff() - 1
    return SequenceSource(data, Samples(torch.arange(len(last)), last, torch.zeros_like(last)), MAX_ITEMS, device)


def batch_times(evaluation: Evaluation, source: SequenceSource) -> list[float]:
    """Seconds of each batch of one round, drawn and generated one after another."""
    marks = [mark(source.device)]
    for batch in evaluation.batches(source):
        evaluation.items(batch)
        marks.append(mark(source.device))
    return seconds_between(marks)


def measure(options: dict, batch_size: int, beams: int, kind: str, args) -> None:
    accelerator = Accelerator(mixed_precision="bf16" if args.dtype == "bfloat16" else "no", cpu=args.device == "cpu")
    device, (codes, sizes) = accelerator.device, catalogue()
    data = full_length(args.users) if kind == "padded" else beauty_like(args.users)
    source, trie = last_of_each(data, device), Trie.build(codes).to(device)
    torch.manual_seed(0)
    model = EncoderDecoderRetrievalModel(sizes, **options).to(device).eval()
    recorded = device.type == "cuda" and kind != "eager"
    evaluation = Evaluation(model, trie, beams, batch_size, accelerator, recorded)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    batch_times(evaluation, source)
    first = time.perf_counter() - start
    rounds = [batch_times(evaluation, source) for _ in range(REPEATS)]
    rates = sorted(args.users / sum(times) for times in rounds)
    p20, p50, p80 = torch.tensor(rounds).flatten().quantile(torch.tensor([0.2, 0.5, 0.8])).mul(1e3).tolist()
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
    print(
        f"d {options['dim']}, {args.users:,} users in batches of {batch_size}, {beams} beams, {args.dtype}, {kind}: "
        f"{rates[1]:,.1f} users/s ({rates[0]:,.1f} to {rates[2]:,.1f}), all in {args.users / rates[1]:.2f} s; a batch "
        f"{p20:.2f} / {p50:.2f} / {p80:.2f} ms (p20 / p50 / p80); first round {first:.1f} s{memory}",
        flush=True,
    )


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if gpu else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32")
    parser.add_argument("--batch", type=int, nargs="+", default=[512, 2048] if gpu else [128])
    parser.add_argument("--beams", type=int, nargs="+", default=[10, 50] if gpu else [10])
    parser.add_argument("--dims", type=int, nargs="+", default=[384, 128])
    parser.add_argument("--users", type=int, default=22_363 if gpu else 256)
    kinds = ["eager", "recorded", "padded"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds if gpu else ["eager", "padded"])
    args = parser.parse_args()
    if args.device == "cuda":
        from benchmarks.timing import heading

        heading()
    for dim in args.dims:
        for beams in args.beams:
            for batch in args.batch:
                for kind in args.kinds:
                    measure(WIDE | dict(dim=dim), batch, beams, kind, args)


if __name__ == "__main__":
    main()
