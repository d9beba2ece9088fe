"""``python -m csm finetune``: parses options, trains, and exports the trained model."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from csm.command_line import add_tokenizer_option
from csm.errors import CSMError
from csm.finetune.checkpoint import find_checkpoint
from csm.finetune.codes import CodecSource
from csm.finetune.data import Corpus, DataOptions, load_corpus
from csm.finetune.distributed import Processes
from csm.finetune.export import save_model
from csm.finetune.initial import initial_state
from csm.finetune.loss import Trainee
from csm.finetune.monitor import Samples
from csm.finetune.options import PRECISIONS, RENAMED, SCHEDULES, TrainOptions, out_of_memory_advice
from csm.finetune.train import Trainer
from csm.generator import DEFAULT_MODEL, Generator, find_device
from csm.lora import PARTS, TARGETS, Lora, LoraConfig, save_adapter
from csm.model import CSM
from csm.prompt import TextTokenizer
from csm.weights import Checkpoint, open_checkpoint, read_model
from csm.weights.config_json import read_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to ``parser``."""
    parser.add_argument("--data", type=Path, required=True, help="manifest.jsonl, its folder, or an LJSpeech folder")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="base model: a hub name, a folder, a GGUF file, or tiny")
    add_tokenizer_option(parser)
    parser.add_argument("--out", type=Path, default=Path("finetuned"), help="the run's folder (default: finetuned)")
    parser.add_argument(
        "--config", type=Path, help="train from scratch with this config.json (tokenizer and codec: from --model)"
    )
    parser.add_argument("--codec", type=Path, help="Mimi weights in Kyutai's layout (default: the model's own)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, if there is one")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--codes", type=Path, help="folder of encoded recordings, reused by later runs (default: codes, beside --data)"
    )
    data.add_argument("--valid", type=Path, help="a manifest of held-out data")
    data.add_argument("--valid-share", type=float, default=0.02, help="held-out share without --valid (default: 0.02)")
    data.add_argument("--context", type=int, default=0, help="earlier turns of a conversation per example (default: 0)")
    data.add_argument("--mask-context", action="store_true", help="compute the loss on an example's last turn only")
    data.add_argument("--jobs", type=int, default=1, help="processes that encode recordings (default: 1)")
    _add_lora_arguments(parser.add_argument_group("adapters"))
    training = parser.add_argument_group("training")
    training.add_argument("--sample-text", action="append", help="text of the audio samples; may be repeated")
    training.add_argument("--sample-speaker", type=int, default=0, help="speaker of --sample-text (default: 0)")
    for field in fields(TrainOptions):
        _add_option(training, field.name, field.default)
    for old, name in RENAMED.items():
        _add_former_name(training, old, name)


def _add_lora_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--lora", action="store_true", help="train low-rank adapters instead of the weights")
    group.add_argument("--rank", type=int, default=16, help="adapter rank (default: 16)")
    group.add_argument("--alpha", type=float, default=32.0, help="adapter scale times rank (default: 32)")
    group.add_argument("--dropout", type=float, default=0.0, help="dropout on the adapters' input (default: 0)")
    group.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="layers to adapt")
    group.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="transformers to adapt")
    group.add_argument("--merge", action="store_true", help="also write the model with the adapters merged")


HELP = {
    "steps": "optimizer steps",
    "batch_size": "maximum sequences in a batch, over all processes",
    "batch_rows": "maximum positions in a batch with padding, over all processes; a text token or a frame takes one",
    "grad_accum_steps": "batches per optimizer step",
    "learning_rate": "peak learning rate",
    "warmup": "steps of linear learning-rate warm-up",
    "schedule": "learning-rate schedule after warm-up",
    "min_lr_ratio": "final learning rate divided by the peak",
    "beta1": "AdamW's decay of the first moment",
    "beta2": "AdamW's decay of the second moment",
    "weight_decay": "weight decay of linear layers",
    "max_grad_norm": "maximum gradient norm (0 disables clipping)",
    "depth_share": "share of the frames that the depth decoder is trained on; 1 is all",
    "depth_weight": "weight of the depth decoder's loss relative to codebook 0's",
    "code_noise": "share of a turn's input frames replaced by other frames of the turn, against overfitting",
    "precision": "precision of matrix products; bfloat16 is autocast",
    "activation_checkpointing": "recompute activations in the backward pass to save memory",
    "ema": "decay of averaged weights, used for evaluation, samples and export (0 disables them)",
    "seed": "random seed",
    "eval_every": "steps between evaluations (0 disables them)",
    "eval_batches": "held-out batches per evaluation (0 is all)",
    "save_every": "steps between checkpoints (0: only the last step)",
    "keep": "checkpoints to keep",
    "sample_every": "steps between audio samples (0 disables them)",
    "sample_seconds": "maximum duration of an audio sample in seconds",
}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _add_option(group: argparse._ArgumentGroup, name: str, default: object) -> None:
    if isinstance(default, bool):
        group.add_argument(_flag(name), action="store_true", help=HELP[name])
        return
    choices = {"schedule": SCHEDULES, "precision": PRECISIONS}.get(name)
    text = f"{HELP[name]} (default: %(default)s)"
    group.add_argument(_flag(name), type=type(default), default=default, choices=choices, help=text)


def _add_former_name(group: argparse._ArgumentGroup, old: str, name: str) -> None:
    """Accept an option's former name; the help does not show it."""
    default = getattr(TrainOptions, name)
    if isinstance(default, bool):
        group.add_argument(
            _flag(old), dest=name, action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    else:
        group.add_argument(_flag(old), dest=name, type=type(default), default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> str:
    """Train. Returns the closing line; an empty string on ranks other than 0."""
    options = TrainOptions(**{field.name: getattr(args, field.name) for field in fields(TrainOptions)})
    lora = (
        LoraConfig(args.rank, args.alpha, args.dropout, tuple(args.targets), tuple(args.parts)) if args.lora else None
    )
    if lora is not None and args.config is not None:
        raise CSMError("--lora adapts an existing model, --config trains from scratch: give only one of them")
    newest = find_checkpoint(args.out, args.resume)
    processes = Processes.start(find_device(None if args.device == "auto" else args.device))
    try:
        with out_of_memory_advice(options, args.lora):
            return _run(args, options, lora, newest, processes)
    finally:
        processes.stop()


def _run(
    args: argparse.Namespace, options: TrainOptions, lora: LoraConfig | None, newest: Path | None, processes: Processes
) -> str:
    checkpoint = base_checkpoint(args.model, args.config, args.codec, args.tokenizer)
    source = CodecSource(checkpoint, args.codec, checkpoint.config.num_codebooks, str(processes.device))
    corpus = prepare_corpus(args, source, processes)
    trainee = build_trainee(checkpoint, args.config is not None, lora, options, processes)
    trainer = Trainer(trainee, corpus.train, corpus.valid, options, args.out, processes, progress=not args.quiet)
    if newest is not None:
        trainer.resume(newest)
    if options.sample_every:
        texts = [(args.sample_speaker, text) for text in args.sample_text or ()] or corpus.texts
        generator = Generator(checkpoint, trainee.model, args.codec)
        trainer.samples = Samples(generator, texts, args.out / "samples", options.sample_seconds)
    if processes.is_main:
        write_options(args, options, checkpoint)
    finished = trainer.run()
    if not processes.is_main:
        return ""
    write_result(args, trainer, checkpoint)
    if not finished:
        so_far = f"stopped after {trainer.state.step} of {options.steps} steps; add --resume to continue"
        return f"{args.out}: {so_far}; {_how_to_use(args)}"
    return f"{args.out}: {options.steps} steps; {_how_to_use(args)}"


def base_checkpoint(model: str, config: Path | None, codec: Path | None, tokenizer: Path | None = None) -> Checkpoint:
    """The checkpoint to start from. With ``config``: its tokenizer and codec, and the model configuration in the file.

    If the codec is a separate file, ``config`` also describes the codec.
    """
    checkpoint = open_checkpoint(model, tokenizer=tokenizer)
    if config is None:
        return checkpoint
    model_config, config_codec = read_config(config)
    mimi = checkpoint.codec_config if codec is None else config_codec
    if model_config.codebook_size != mimi.codebook_size or model_config.num_codebooks > mimi.num_codebooks:
        raise CSMError(
            f"{config}: {model_config.num_codebooks} codebooks of {model_config.codebook_size}; the codec of {model} "
            f"has {mimi.num_codebooks} of {mimi.codebook_size}; change num_codebooks, codebook_size or the codec "
            "(codec_config: num_quantizers, codebook_size)"
        )
    return replace(checkpoint, config=model_config, codec_config=mimi)


def prepare_corpus(args: argparse.Namespace, source: CodecSource, processes: Processes) -> Corpus:
    """Check, encode and load the data. The main process does all work; the others wait, then load the codes."""
    tokenizer = TextTokenizer(source.checkpoint.tokenizer_path, source.checkpoint.config.text_vocab_size)
    data_folder = args.data if args.data.is_dir() else args.data.parent
    paths = args.data, args.codes or data_folder / "codes", args.valid
    options = DataOptions(*paths, args.valid_share, args.context, args.mask_context, args.jobs)
    corpus = None
    if processes.is_main:
        corpus = load_corpus(options, source, tokenizer, source.checkpoint.config, progress=not args.quiet)
    processes.barrier()
    return corpus or load_corpus(options, source, tokenizer, source.checkpoint.config, progress=False)


def build_trainee(
    checkpoint: Checkpoint, scratch: bool, lora: LoraConfig | None, options: TrainOptions, processes: Processes
) -> Trainee:
    """The model on its device, its trained parameters with requires_grad.

    Frozen weights have the dtype of ``options.precision``, trained ones are float32 or wider.
    """
    device, config = processes.device, checkpoint.config
    dtype = DTYPES[options.precision] if lora is not None or options.precision == "float64" else torch.float32
    if scratch:
        state = {name: tensor.to(device, dtype) for name, tensor in initial_state(config, options.seed).items()}
    else:
        state = read_model(checkpoint, device, dtype, progress=processes.is_main)
    model = CSM.from_state_dict(config, state, device)
    adapters = (
        None if lora is None else Lora(config, lora, device, options.seed).to(torch.promote_types(dtype, torch.float32))
    )
    if adapters is None:
        model.requires_grad_(True)
    return Trainee(model, adapters, options.activation_checkpointing).train()


def write_options(args: argparse.Namespace, options: TrainOptions, checkpoint: Checkpoint) -> None:
    """Record the run's options and versions in ``options.json``; nothing reads this file."""
    args.out.mkdir(parents=True, exist_ok=True)
    values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    values = {name: value for name, value in values.items() if not callable(value)}
    values |= {"torch": torch.__version__, "tokenizer_and_codec": str(checkpoint.folder), **asdict(options)}
    (args.out / "options.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_result(args: argparse.Namespace, trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Write the adapter or the model in HF's layout; with ``--merge`` both."""
    model, lora = trainer.trainee.model, trainer.trainee.lora
    if lora is not None:
        with trainer.ema_weights():
            save_adapter(lora, args.out / "adapter", base=args.model)
    if lora is None or args.merge:
        with trainer.inference_weights():
            save_model(model, args.out / "model", checkpoint, args.codec)


def _how_to_use(args: argparse.Namespace) -> str:
    adapted = f"--model {args.model} --lora {args.out / 'adapter'}"
    use = adapted if args.lora else f"--model {args.out / 'model'}"
    return f'generate with: python generate.py {use} --text "..."'
