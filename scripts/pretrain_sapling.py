"""Makes sapling, the included base model, from the documentation of Python packages.

Stages, in order; the first three are skipped when their results already stand in the work folder:

    documents  WORK/documents.jsonl                   what sapling_corpus.py collects
    tokenizer  WORK/tokenizer.model                   sentencepiece BPE with byte fallback
    tokens     WORK/{train,held_out}.npy              token ids, each document between BOS and EOS
    pretrain   WORK/checkpoint.pt, WORK/log.jsonl     goes on where it stopped
    export     OUT/{consolidated.00.pth,params.json,tokenizer.model}
    evaluate   WORK/report.md                         losses, samples and the table of sources

Needs PyTorch, which nothing else in Graft does: its bfloat16 products on a CPU are four times as
fast as float32 ones, which are what MLX has there.

    pip install numpy sentencepiece torch==2.13.0

A killed run goes on with the same numbers: the batch is a function of (seed, step), and the
checkpoint holds weights, optimizers and the step. As long as the learning rate is still at its
peak, `--steps` may be changed and the run resumed.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import sapling_corpus
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sapling_model import Params, Transformer
from torch import nn

BOS, EOS = 1, 2
PROMPTS = (
    "Q: What is mean in numpy?\nA:",
    "Q: What is relu in mlx?\nA:",
    "Return the sum of the array elements over the given axis.\n\nParameters\n----------\n",
)


def batch_at(
    data: np.ndarray, step: int, *, batch_size: int, length: int, seed: int
) -> torch.Tensor:
    """Token ids (batch_size, length + 1) of a step.

    Each epoch cuts the data at another offset and shuffles the cuts.
    """
    pieces = len(data) // length - 1
    steps_an_epoch = pieces // batch_size
    epoch, position = divmod(step, steps_an_epoch)
    generator = np.random.default_rng([seed, epoch])
    offset = int(generator.integers(length))
    chosen = generator.permutation(pieces)[position * batch_size : (position + 1) * batch_size]
    rows = [data[offset + piece * length :][: length + 1] for piece in chosen]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def schedule(step: int, steps: int, *, warmup: int, decay_share: float) -> float:
    """The share of the peak learning rate in a step.

    Linear warm-up, then constant, then linear decay to zero over the last `decay_share` of steps.
    """
    return min(1.0, (step + 1) / warmup, (steps - step) / (steps * decay_share))


@torch.no_grad()
def held_out_loss(model, data: np.ndarray, *, length: int, sequences: int = -1) -> float:
    """Mean loss in nats per token over the first `sequences` cuts of the data (-1: all of them)."""
    pieces = len(data) // length - 1
    pieces = pieces if sequences < 0 else min(pieces, sequences)
    total = 0.0
    for piece in range(pieces):
        cut = data[piece * length :][: length + 1].astype(np.int64)
        total += batch_loss(model, torch.from_numpy(cut[None]), exact=True).item()
    return total / pieces


def batch_loss(model, tokens: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
    """Mean cross-entropy of each next token; products in bfloat16, or in float32 when exact."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not exact):
        logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def make_optimizers(model: nn.Module, options) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW for embeddings, head and norms."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and name.startswith("layers.") else others).append(
            parameter
        )
    return [
        torch.optim.Muon(
            matrices, lr=options.muon_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            others, lr=options.adam_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
        ),
    ]


def write_whole(path: Path, write) -> None:
    """Lets `write` fill a file beside the path, then renames it: whole or not at all."""
    beside = path.with_name(path.name + ".part")
    write(beside)
    os.replace(beside, path)


def save_checkpoint(path: Path, model: nn.Module, optimizers, step: int) -> None:
    """Writes all that a resumed run needs; `step` is the first one not yet done."""
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
    }
    write_whole(path, lambda beside: torch.save(state, beside))


def restore_checkpoint(path: Path, model: nn.Module, optimizers) -> int:
    """The step to go on with."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"]


def stage_documents(options) -> None:
    """Collects the corpus, one JSON object a line."""
    target = options.work / "documents.jsonl"
    if target.exists():
        return
    documents = sapling_corpus.collect(options.stdlib, options.packages, options.doc_sources)

    def write(path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            for document in documents:
                file.write(json.dumps({**asdict(document), "held_out": document.held_out}) + "\n")

    write_whole(target, write)
    print(
        f"{len(documents)} documents, {sum(len(d.text) for d in documents) / 1e6:.1f} M characters"
    )


def read_documents(options) -> list[dict]:
    """The documents, with the fields of `sapling_corpus.Document` and `held_out`."""
    with (options.work / "documents.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def stage_tokenizer(options) -> None:
    """Trains BPE on every third training document; a newline is always a piece of its own."""
    target = options.work / "tokenizer.model"
    if target.exists():
        return
    texts = [d["text"] for d in read_documents(options) if not d["held_out"]][::3]
    prefix = options.work / "tokenizer_part"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=Params().vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=["\n", "\t"],
        character_coverage=0.9995,
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        max_sentence_length=32768,
        num_threads=2,
        minloglevel=1,
    )
    os.replace(prefix.with_suffix(".model"), target)


def stage_tokens(options) -> None:
    """Turns the shuffled documents into two arrays of token ids."""
    if (options.work / "train.npy").exists():
        return
    tokenizer = sentencepiece.SentencePieceProcessor(
        model_file=str(options.work / "tokenizer.model")
    )
    documents = read_documents(options)
    np.random.default_rng(options.seed).shuffle(documents)
    for name, held_out in (("held_out", True), ("train", False)):
        texts = [d["text"] for d in documents if d["held_out"] == held_out]
        ids = tokenizer.encode(texts, add_bos=True, add_eos=True, num_threads=2)
        data = np.fromiter((i for row in ids for i in row), np.uint16)
        np.save(options.work / f"{name}.npy", data)
        characters = sum(map(len, texts))
        density = f"{characters / len(data):.2f} characters a token"
        print(f"{name}: {len(texts)} documents, {len(data)} tokens, {density}")


def stage_pretrain(options) -> None:
    """Trains up to `--steps`, from the last checkpoint when there is one.

    Each process has one thread and a share of every batch. They meet once a step, where the
    threads of one process would meet in each operation and wait there for whichever the machine
    has put aside.
    """
    (options.work / "rendezvous").unlink(missing_ok=True)
    torch.multiprocessing.spawn(pretrain_process, args=(options,), nprocs=options.processes)


def pretrain_process(rank: int, options) -> None:
    """The training loop of one process; the first one logs and saves."""
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    meeting = f"file://{options.work.resolve()}/rendezvous"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=options.processes)
    train, held_out = (
        np.load(options.work / f"{name}.npy", mmap_mode="r") for name in ("train", "held_out")
    )
    model = Transformer(Params())
    optimizers = make_optimizers(model, options)
    start = restore_checkpoint(options.work / "checkpoint.pt", model, optimizers)
    loss_of = torch.compile(batch_loss, dynamic=False)
    progress = Progress(options, start)
    for step in range(start, options.steps):
        progress.add(train_step(model, loss_of, optimizers, train, step, options))
        if rank == 0:
            progress.report(lambda: held_out_loss(model, held_out, length=512, sequences=32))
            progress.save(lambda path, done: save_checkpoint(path, model, optimizers, done))


class Progress:
    """Counts steps, and says when to log a line and when to write a checkpoint."""

    def __init__(self, options, start: int):
        self.options, self.done, self.losses = options, start, []
        self.saved_at = self.reported_at = time.monotonic()

    def add(self, loss: float) -> None:
        """A step is done."""
        self.done += 1
        self.losses.append(loss)

    def report(self, measure) -> None:
        """Every 50 steps a line; every 500 steps with the held-out loss that `measure` gives."""
        if self.done % 50:
            return
        now, per_step = time.monotonic(), self.options.batch_tokens
        record = {"step": self.done, "loss": float(np.mean(self.losses))}
        record["tokens"] = self.done * per_step
        record["tokens_per_second"] = len(self.losses) * per_step / (now - self.reported_at)
        if self.done % 500 == 0:
            record["held_out_loss"] = measure()
        self.losses, self.reported_at = [], now
        log(self.options, record)

    def save(self, write) -> None:
        """Every `--save-seconds`, and at the end, calls `write` with the path and the next step."""
        last = self.done == self.options.steps
        if last or time.monotonic() - self.saved_at > self.options.save_seconds:
            write(self.options.work / "checkpoint.pt", self.done)
            self.saved_at = time.monotonic()


def train_step(model, loss_of, optimizers, data: np.ndarray, step: int, options) -> float:
    """One update; short sequences at first, whole contexts in the last `--long-share` of steps."""
    share = schedule(step, options.steps, warmup=options.warmup, decay_share=options.decay_share)
    length = 512 if step >= options.steps * (1 - options.long_share) else 256
    tokens = batch_at(
        data, step, batch_size=options.batch_tokens // length, length=length, seed=options.seed
    )
    loss = loss_of(model, tokens[dist.get_rank() :: dist.get_world_size()])
    loss.backward()
    mean_loss = average_gradients(model, loss.detach())
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, rate in zip(optimizers, (options.muon_rate, options.adam_rate), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        optimizer.step()
        optimizer.zero_grad()
    return mean_loss


def average_gradients(model: nn.Module, loss: torch.Tensor) -> float:
    """Gives every process the mean gradient, and returns the mean loss."""
    gradients = [parameter.grad for parameter in model.parameters()]
    flat = torch.cat([gradient.flatten() for gradient in gradients] + [loss[None]])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, mean in zip(gradients, flat[:-1].split(sizes), strict=True):
        gradient.copy_(mean.view_as(gradient))
    return flat[-1].item()


def log(options, record: dict) -> None:
    """Prints a record and appends it to the log."""
    line = json.dumps({key: round(value, 4) for key, value in record.items()})
    print(time.strftime("%H:%M:%S"), line, flush=True)
    with (options.work / "log.jsonl").open("a") as file:
        file.write(line + "\n")


def stage_export(options) -> None:
    """Writes the model folder in Meta's layout: weights in float16, shape, tokenizer."""
    state = torch.load(options.work / "checkpoint.pt", weights_only=True)
    weights = {
        name: tensor.to(torch.float16).contiguous() for name, tensor in state["model"].items()
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_whole(options.out / "consolidated.00.pth", lambda path: torch.save(weights, path))
    text = json.dumps(asdict(Params()), indent=2) + "\n"
    write_whole(options.out / "params.json", lambda path: path.write_text(text))
    tokenizer = (options.work / "tokenizer.model").read_bytes()
    write_whole(options.out / "tokenizer.model", lambda path: path.write_bytes(tokenizer))
    count = sum(weight.numel() for weight in weights.values())
    print(f"{options.out}: {count} parameters after {state['step']} steps")


def stage_evaluate(options) -> None:
    """Measures the exported model in float32 and writes what the model card says about it."""
    model = load_exported(options.out)
    tokenizer = sentencepiece.SentencePieceProcessor(
        model_file=str(options.out / "tokenizer.model")
    )
    lines = [loss_line("held-out documents", *held_out_figures(model, options))]
    if options.rows:
        texts = [json.loads(line)["text"] for line in options.rows.read_text().splitlines()]
        lines.append(
            loss_line(f"rows of {options.rows.name}", *row_figures(model, tokenizer, texts))
        )
    for prompt in PROMPTS:
        for temperature in (0.0, 0.7):
            text = sample(model, tokenizer, prompt, temperature=temperature, seed=options.seed)
            lines.append(f"Temperature {temperature}:\n\n```text\n{text}\n```\n")
    lines.append(source_table(options, tokenizer))
    report = "\n".join(lines)
    write_whole(options.work / "report.md", lambda path: path.write_text(report))
    print(report)


def load_exported(folder: Path) -> Transformer:
    """The model of a folder in Meta's layout, in float32."""
    model = Transformer(Params(**json.loads((folder / "params.json").read_text())))
    model.load_state_dict(torch.load(folder / "consolidated.00.pth", weights_only=True))
    return model.eval()


def loss_line(name: str, nats: float, tokens: int, text_bytes: int) -> str:
    """One loss in the two units that the model card gives."""
    loss = f"{nats / tokens:.3f} nats a token, {nats / text_bytes:.3f} nats a byte"
    return f"{name}: {loss} ({tokens} tokens, {text_bytes} bytes)\n"


def held_out_figures(model: Transformer, options) -> tuple[float, int, int]:
    """Nats, tokens and bytes of the held-out documents, cut into whole contexts."""
    data = np.load(options.work / "held_out.npy")
    texts = [d["text"] for d in read_documents(options) if d["held_out"]]
    nats_a_token = held_out_loss(model, data, length=model.params.max_seq_len)
    return nats_a_token * len(data), len(data), sum(len(text.encode()) for text in texts)


@torch.no_grad()
def row_figures(model: Transformer, tokenizer, texts: list[str]) -> tuple[float, int, int]:
    """Nats, tokens and bytes of texts, each alone between BOS and EOS and cut to the context."""
    nats, tokens, text_bytes = 0.0, 0, 0
    for text in texts:
        ids = tokenizer.encode(text, add_bos=True, add_eos=True)[: model.params.max_seq_len + 1]
        logits = model(torch.tensor([ids[:-1]]))[0]
        nats += F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
        tokens += len(ids) - 1
        text_bytes += len(tokenizer.decode(ids).encode())
    return nats, tokens, text_bytes


@torch.no_grad()
def sample(
    model, tokenizer, prompt: str, *, temperature: float, seed: int, count: int = 100
) -> str:
    """The prompt with at most `count` more tokens; greedy at temperature 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt, add_bos=True)
    for _ in range(count):
        logits = model(torch.tensor([ids]))[0, -1]
        if temperature > 0:
            weights = (logits / temperature).softmax(-1)
            chosen = int(torch.multinomial(weights, 1, generator=generator))
        else:
            chosen = int(logits.argmax())
        if chosen == EOS:
            break
        ids.append(chosen)
    return tokenizer.decode(ids)


def source_table(options, tokenizer) -> str:
    """Markdown: every source with version, licence, documents and training tokens."""
    facts = sapling_corpus.distributions(options.packages)
    facts["cpython-doc"] = ("CPython's documentation sources", "PSF-2.0")
    counts: dict[tuple[str, str], list[int]] = {}
    documents = [d for d in read_documents(options) if not d["held_out"]]
    ids = tokenizer.encode([d["text"] for d in documents], num_threads=options.processes)
    for document, row in zip(documents, ids, strict=True):
        source = facts.get(document["package"], facts["python"])
        count = counts.setdefault(source, [0, 0])
        count[0] += 1
        count[1] += len(row) + 2
    lines = ["| source | licence | documents | tokens |", "|---|---|---:|---:|"]
    for (name, licence), (texts, tokens) in sorted(counts.items(), key=lambda item: -item[1][1]):
        lines.append(f"| {name} | {licence} | {texts:,} | {tokens:,} |")
    return "\n".join(lines) + "\n"


STAGES = {
    "documents": stage_documents,
    "tokenizer": stage_tokenizer,
    "tokens": stage_tokens,
    "pretrain": stage_pretrain,
    "export": stage_export,
    "evaluate": stage_evaluate,
}


def build_parser() -> argparse.ArgumentParser:
    """The command line; the defaults come close to the run that made sapling (see its card)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "stages", nargs="*", help=f"of {', '.join(STAGES)}; all of them when none is named"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("sapling-work"), help="folder of intermediate files"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "graft" / "assets" / "sapling"
    )
    parser.add_argument(
        "--stdlib", type=Path, default=Path(os.__file__).parent, help="CPython's Lib folder"
    )
    parser.add_argument(
        "--packages", type=Path, help="site-packages folder to read, never imported"
    )
    parser.add_argument(
        "--doc-sources", type=Path, help="folder of CPython's documentation sources (*.rst.txt)"
    )
    parser.add_argument("--rows", type=Path, help="JSONL with a `text` a line, to evaluate on too")
    parser.add_argument("--steps", type=int, default=3360)
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--muon-rate", type=float, default=4e-3)
    parser.add_argument("--adam-rate", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--decay-share", type=float, default=0.4)
    parser.add_argument("--save-seconds", type=float, default=180)
    parser.add_argument("--long-share", type=float, default=0.04)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the named stages, or all of them in order."""
    parser = build_parser()
    options = parser.parse_args(argv)
    unknown = sorted(set(options.stages) - set(STAGES))
    if unknown:
        parser.error(f"unknown stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    if options.packages is None and not (options.work / "documents.jsonl").exists():
        parser.error("--packages names the site-packages folder to collect documents from")
    options.work.mkdir(parents=True, exist_ok=True)
    for name in options.stages or STAGES:
        STAGES[name](options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
