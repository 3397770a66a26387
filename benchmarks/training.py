"""Training speed of the retriever on histories as long as Amazon Beauty's, drawing and optimizer included.

    python -m benchmarks.training

An example is a target item. "one": each history has one target, as in the original TIGER; "bidirectional": the same
with an encoder that sees whole histories; "padded": the same with every history as long as the longest, which is what a
padded model computes; "all": one pass over a history serves each of its items as a target.
"""

import argparse
import time

import torch

from benchmarks.attention import BEAUTY
from data.schemas import Interactions
from data.splits import every_prefix, windows
from data.utils import SequenceSource, Shuffler, filled_size, filler_rows, tokenize
from modules.generation.trie import Trie
from modules.model import EncoderDecoderRetrievalModel
from training.flat import FlatParameters
from training.replay import Replay

MAX_ITEMS, N_ITEMS = 20, 12_101
WIDE = dict(dim=384, ff_dim=1024, n_heads=6, head_dim=64, encoder_layers=4, decoder_layers=4)
NARROW = WIDE | dict(dim=128)


def beauty_like(users: int = 22_363) -> Interactions:
    """Random items in histories whose lengths follow Beauty's; one more item each, the last one's target."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor(BEAUTY, dtype=torch.float)
    lengths = torch.multinomial(weights, users, replacement=True, generator=generator) + 2
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return Interactions(torch.randint(0, N_ITEMS, (int(offsets[-1]),), generator=generator, dtype=torch.int32), offsets)


def full_length(users: int = 22_363) -> Interactions:
    """Histories of the greatest length, and a target each."""
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(0, N_ITEMS, (users * (MAX_ITEMS + 1),), generator=generator, dtype=torch.int32)
    return Interactions(items, torch.arange(users + 1) * (MAX_ITEMS + 1))


def catalogue() -> tuple[torch.Tensor, tuple[int, ...]]:
    """Unique codes of four levels: three of 256 codes, and one that is mostly 0."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randperm(256**3, generator=generator)[:N_ITEMS]
    codes = torch.stack([numbers // 65536, numbers // 256 % 256, numbers % 256, torch.zeros_like(numbers)], 1)
    codes[::40, 3] = 1
    return codes, (256, 256, 256, 2)


def mark(device: torch.device) -> float | torch.cuda.Event:
    """A moment: of the host, or of the GPU's stream."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(marks: list) -> list[float]:
    """Of each moment to the next; waits for the GPU."""
    pairs = list(zip(marks, marks[1:], strict=False))
    if isinstance(marks[0], float):
        return [end - start for start, end in pairs]
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def operations(model: EncoderDecoderRetrievalModel, tokens: float, targets: float) -> float:
    """Of the matrix products of one history's forward and backward pass; attention itself and the head left out."""
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "blocks" in name}
    encoder = sum(n for name, n in matrices.items() if name.startswith("encoder"))
    memory = sum(n for name, n in matrices.items() if "cross_attention.key_value" in name)
    decoder = sum(n for name, n in matrices.items() if name.startswith("decoder")) - memory
    return 6 * (tokens * (encoder + memory) + 4 * targets * decoder)


def measure(options: dict, batch_size: int, kind: str, args, peak: float | None) -> None:
    device, all_positions = torch.device(args.device), kind == "all"
    data, (codes, sizes) = full_length() if kind == "padded" else beauty_like(), catalogue()
    lengths = data.offsets.diff()
    samples = windows(lengths, MAX_ITEMS) if all_positions else every_prefix(lengths)
    if not all_positions:  # the longest history of each user: the lengths that the table above is about
        last = data.offsets.diff() - 1
        samples = type(samples)(torch.arange(len(last)), last, torch.zeros_like(last))
    source = SequenceSource(data, samples, MAX_ITEMS, device, all_positions)
    trie = Trie.build(codes).to(device)
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = EncoderDecoderRetrievalModel(sizes, **options, prefix_buckets=args.prefix_buckets,
                                         causal_encoder=kind != "bidirectional").to(device)  # fmt: skip
    flat = FlatParameters(model.parameters())
    optimizer = torch.optim.AdamW([flat.whole], 1e-3, fused=True)
    forward = torch.compile(model, dynamic=True) if args.compile else model
    graphed = device.type == "cuda" and not args.eager
    fillers = filler_rows(batch_size) if graphed else 0

    def backward(n_items: int, index: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        batch = tokenize(source.device_batch(index, uniform, n_items, fillers), trie.item_codes)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = forward(batch, trie).loss
        loss.backward()
        flat.gather()
        return loss.detach()

    replay = Replay(backward, [flat.whole], device, graphed)
    shuffler = Shuffler(len(source), batch_size, 0)
    examples = items = 0

    def step(number: int) -> torch.Tensor:
        nonlocal examples, items
        index, uniform = shuffler.draw(number)
        n_items, n_targets = source.n_items(index, uniform), source.n_targets(index, uniform)
        examples, items = examples + n_targets, items + n_items
        loss = replay(filled_size(n_items, fillers, MAX_ITEMS), index, uniform)
        torch.nn.utils.clip_grad_norm_(flat.whole, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    start, sizes_seen = time.perf_counter(), set()
    for number in range(args.warmup):
        float(step(number))
    for number in range(3 * args.steps if graphed else 0):  # the timed steps find every size recorded
        index, uniform = shuffler.draw(args.warmup + number)
        size = filled_size(source.n_items(index, uniform), fillers, MAX_ITEMS)
        if size not in sizes_seen:
            float(step(args.warmup + number))
            sizes_seen.add(size)
    ready = time.perf_counter() - start
    rates, times = [], []
    for part in range(3):
        examples = items = 0
        marks = [mark(device)]
        for number in range(args.steps):
            loss = step(args.warmup + part * args.steps + number)
            marks.append(mark(device))
        times += seconds_between(marks)
        seconds = sum(times[-args.steps :])
        work = operations(model, 1 + 4 * items / (args.steps * batch_size), examples / (args.steps * batch_size))
        rates.append((examples / seconds, args.steps / seconds, work * batch_size * args.steps / seconds))
    examples_s, steps_s, operations_s = sorted(rates)[1]
    p20, p50, p80 = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).mul(1e3).tolist()
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0
    title = {"all": "all positions", "one": "one target"}.get(kind, f"one target, {kind}")
    print(
        f"d {options['dim']}, batch {batch_size}, {title}, {args.dtype}: {examples_s:,.0f} examples/s "
        f"({min(rates)[0]:,.0f} to {max(rates)[0]:,.0f}), {steps_s:.1f} steps/s; a step "
        f"{p20:.2f} / {p50:.2f} / {p80:.2f} ms (p20 / p50 / p80); {operations_s / 1e12:.2f} TFLOP/s"
        + (f" ({operations_s / peak:.0%} of the matrix rate)" if peak else "")
        + f", {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
        f"before that {ready:.0f} s for {len(sizes_seen)} recordings, {memory:.1f} GiB, "
        f"loss {float(loss):.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 4096] if torch.cuda.is_available() else [128])
    parser.add_argument("--dims", type=int, nargs="+", default=[384, 128])
    parser.add_argument("--kinds", nargs="+", default=["one", "padded", "all"],
                        choices=["one", "bidirectional", "padded", "all"])  # fmt: skip
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--prefix-buckets", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    args = parser.parse_args()
    peak = None
    if args.device == "cuda":
        from benchmarks.timing import heading, matrix_rate

        heading()
        peak = matrix_rate()
        print(f"bfloat16 matrix product: {peak / 1e12:.0f} TFLOP/s")
    for dim in args.dims:
        for kind in args.kinds:
            for batch in args.batch:
                measure(WIDE | dict(dim=dim), batch, kind, args, peak)


if __name__ == "__main__":
    main()
