"""``python -m csm finetune``: options to a run, and the run's end to a folder that speaks."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from csm.errors import CSMError
from csm.finetune.codes import CodecSource
from csm.finetune.data import Corpus, DataOptions, load_corpus
from csm.finetune.export import save_model
from csm.finetune.initial import initial_state
from csm.finetune.loss import Trainee
from csm.finetune.memory import advising
from csm.finetune.options import PRECISIONS, SCHEDULES, TrainOptions
from csm.finetune.processes import Processes
from csm.finetune.samples import Samples
from csm.finetune.train import Trainer, check_started
from csm.generator import DEFAULT_MODEL, Generator, find_device
from csm.lora import PARTS, TARGETS, Lora, LoraConfig, save_adapter
from csm.model import CSM
from csm.prompt import TextTokenizer
from csm.weights import Checkpoint, open_checkpoint, read_model
from csm.weights.config_json import read_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--data", type=Path, required=True, help="manifest.jsonl, its folder, or an LJSpeech folder")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="what to start from: a hub name, a folder, or tiny")
    parser.add_argument("--out", type=Path, default=Path("finetuned"), help="folder of the run (default: finetuned)")
    parser.add_argument(
        "--config", type=Path, help="train from scratch: a config.json (tokenizer and codec: --model's)"
    )
    parser.add_argument("--codec", type=Path, help="Mimi weights in Kyutai's layout (default: the model's own)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, if there is one")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--codes", type=Path, help="folder of encoded recordings, kept for later runs (default: beside --data)"
    )
    data.add_argument("--valid", type=Path, help="a second manifest, held out")
    data.add_argument("--valid-share", type=float, default=0.02, help="held out of --data otherwise (default: 0.02)")
    data.add_argument("--context", type=int, default=0, help="earlier turns of its conversation before a turn")
    data.add_argument("--mask-context", action="store_true", help="only the last turn of a sequence counts in the loss")
    data.add_argument("--jobs", type=int, default=1, help="processes that encode recordings (default: 1)")
    lora = parser.add_argument_group("adapters")
    lora.add_argument("--lora", action="store_true", help="train low-rank adapters, not the weights")
    lora.add_argument("--rank", type=int, default=16, help="of the adapters (default: 16)")
    lora.add_argument("--alpha", type=float, default=32.0, help="their scale times their rank (default: 32)")
    lora.add_argument("--dropout", type=float, default=0.0, help="before them (default: 0)")
    lora.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="layers that have one")
    lora.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="transformers that have them")
    lora.add_argument("--merge", action="store_true", help="write the merged model too, not the adapter alone")
    training = parser.add_argument_group("training")
    training.add_argument("--sample-text", action="append", help="spoken every --sample-every steps; may be repeated")
    training.add_argument("--sample-speaker", type=int, default=0, help="who speaks them (default: 0)")
    for field in fields(TrainOptions):
        _add_option(training, field.name, field.default)


HELP = {
    "steps": "steps of the optimiser",
    "batch_size": "most sequences in a batch, over all processes",
    "batch_rows": "most positions in a batch, padded, over all processes (a frame or a text token is one)",
    "accumulate": "batches a step",
    "schedule": "of the learning rate after warm-up",
    "final_rate": "what it ends at, as a share",
    "clip": "longest gradient; 0 is none",
    "depth_share": "of the frames that the depth decoder is trained on; 1 is all",
    "depth_weight": "of its loss, codebook 0's being 1",
    "code_noise": "share of the frames that are read as another one of their turn: less is learned by heart",
    "precision": "of matrix products; bfloat16 is autocast",
    "checkpointing": "compute activations twice and keep few",
    "ema": "decay of averaged weights, which are then what is evaluated and written; 0 is none",
    "eval_every": "steps between evaluations; 0 is never",
    "eval_batches": "held-out batches that are looked at; 0 is all",
    "keep": "checkpoints that are kept",
    "sample_every": "steps between samples of speech; 0 is never",
}


def _add_option(group: argparse._ArgumentGroup, name: str, default: object) -> None:
    flag, said = f"--{name.replace('_', '-')}", HELP.get(name, name.replace("_", " "))
    if isinstance(default, bool):
        group.add_argument(flag, action="store_true", help=said)
        return
    choices = {"schedule": SCHEDULES, "precision": PRECISIONS}.get(name)
    group.add_argument(
        flag, type=type(default), default=default, choices=choices, help=f"{said} (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> str:
    """Train; return the closing line, which only the first process has."""
    options = TrainOptions(**{field.name: getattr(args, field.name) for field in fields(TrainOptions)})
    lora = (
        LoraConfig(args.rank, args.alpha, args.dropout, tuple(args.targets), tuple(args.parts)) if args.lora else None
    )
    if lora is not None and args.config is not None:
        raise CSMError("--lora adapts weights that are there, --config starts from none: give one of them")
    newest = check_started(args.out, args.resume)
    processes = Processes.start(find_device(None if args.device == "auto" else args.device))
    try:
        with advising(options, args.lora):
            return _run(args, options, lora, newest, processes)
    finally:
        processes.stop()


def _run(
    args: argparse.Namespace, options: TrainOptions, lora: LoraConfig | None, newest: Path | None, processes: Processes
) -> str:
    checkpoint = source_of(args.model, args.config, args.codec)
    source = CodecSource(checkpoint, args.codec, checkpoint.config.num_codebooks, str(processes.device))
    corpus = corpus_of(args, source, processes)
    trainee = build(checkpoint, args.config is not None, lora, options, processes)
    progress = not args.quiet
    trainer = Trainer(trainee, corpus.train, corpus.valid, options, args.out, processes, progress)
    if newest is not None:
        trainer.resume(newest)
    if options.sample_every:
        texts = [(args.sample_speaker, text) for text in args.sample_text or ()] or corpus.texts
        generator = Generator(checkpoint, trainee.model, args.codec)
        trainer.samples = Samples(generator, texts, args.out / "samples", options.sample_seconds)
    if processes.first:
        write_options(args, options, checkpoint)
    finished = trainer.run()
    if not processes.first:
        return ""
    write_result(args, trainer, checkpoint)
    if not finished:
        so_far = f"stopped after {trainer.place.step} of {options.steps} steps; --resume goes on"
        return f"{args.out}: {so_far}; {_how_to_use(args)}"
    return f"{args.out}: {options.steps} steps; {_how_to_use(args)}"


def source_of(model: str, config: Path | None, codec: Path | None) -> Checkpoint:
    """The checkpoint to start from; with ``config``, its tokenizer and codec around a model of that shape.

    Where the codec is a file of its own, ``config`` tells its shape too.
    """
    checkpoint = open_checkpoint(model)
    if config is None:
        return checkpoint
    shape, written = read_config(config)
    mimi = checkpoint.codec_config if codec is None else written
    if shape.codebook_size != mimi.codebook_size or shape.num_codebooks > mimi.num_codebooks:
        raise CSMError(
            f"{config}: {shape.num_codebooks} codebooks of {shape.codebook_size}; the codec of {model} has "
            f"{mimi.num_codebooks} of {mimi.codebook_size} (codec_config: num_quantizers, codebook_size)"
        )
    return replace(checkpoint, config=shape, codec_config=mimi)


def corpus_of(args: argparse.Namespace, source: CodecSource, processes: Processes) -> Corpus:
    """The data; the first process checks and encodes it, the others then read what it wrote."""
    tokenizer = TextTokenizer(source.checkpoint.tokenizer_path, source.checkpoint.config.text_vocab_size)
    beside = args.data if args.data.is_dir() else args.data.parent
    where = args.data, args.codes or beside / "codes", args.valid, args.valid_share
    options = DataOptions(*where, args.context, args.mask_context, args.jobs)
    corpus = None
    if processes.first:
        corpus = load_corpus(options, source, tokenizer, source.checkpoint.config, progress=not args.quiet)
    processes.wait()
    return corpus or load_corpus(options, source, tokenizer, source.checkpoint.config, progress=False)


def build(
    checkpoint: Checkpoint, scratch: bool, lora: LoraConfig | None, options: TrainOptions, processes: Processes
) -> Trainee:
    """The model on its device, with what is to be trained marked so. Frozen weights are as wide as the precision."""
    device, config = processes.device, checkpoint.config
    dtype = DTYPES[options.precision] if lora is not None or options.precision == "float64" else torch.float32
    if scratch:
        state = {name: tensor.to(device, dtype) for name, tensor in initial_state(config, options.seed).items()}
    else:
        state = read_model(checkpoint, device, dtype, progress=processes.first)
    model = CSM.from_state_dict(config, state, device)
    adapters = (
        None if lora is None else Lora(config, lora, device, options.seed).to(torch.promote_types(dtype, torch.float32))
    )
    if adapters is None:
        model.requires_grad_(True)
    return Trainee(model, adapters, options.checkpointing).train()


def write_options(args: argparse.Namespace, options: TrainOptions, checkpoint: Checkpoint) -> None:
    """What the run was told, for people."""
    args.out.mkdir(parents=True, exist_ok=True)
    told = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    told = {name: value for name, value in told.items() if not callable(value)}
    told |= {"torch": torch.__version__, "tokenizer_and_codec": str(checkpoint.folder), **asdict(options)}
    (args.out / "options.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def write_result(args: argparse.Namespace, trainer: Trainer, checkpoint: Checkpoint) -> None:
    """What was learned: the adapter alone, or the model in HF's layout, and with ``--merge`` both."""
    model, lora = trainer.trainee.model, trainer.trainee.lora
    if lora is not None:
        with trainer.averaged():
            save_adapter(lora, args.out / "adapter", base=args.model)
    if lora is None or args.merge:
        with trainer.speaking():
            save_model(model, args.out / "model", checkpoint, args.codec)


def _how_to_use(args: argparse.Namespace) -> str:
    adapted = f"--model {args.model} --lora {args.out / 'adapter'}"
    use = adapted if args.lora else f"--model {args.out / 'model'}"
    return f'speak with: python generate.py {use} --text "..."'
