"""Train the small Mimi: ``python -m csm.weights.recipe.codec train.jsonl RUN``. The same command resumes a run.

moshi's MimiModel is trained as an autoencoder of clips of about a second. The losses are L1 distances of mel
spectrograms at several sizes, linear and logarithmic, and the quantiser's commitment loss. The autoencoder starts
unquantised. Codebooks are then made by k-means over many clips. After that it is quantised, in some steps with a random
number of codebooks, so that the first ones carry the most information. ``--decoder-only CODES.npz`` trains only the
decoder of an existing codec, whose codes must not change, on codes that ``csm.weights.recipe.drawn`` wrote.

A language model has to predict the codes, so they must not depend on the position of a wave within a frame. Every clip
is encoded twice, each time shifted by some milliseconds; both must have the same latents, and there is no waveform
loss. moshi's quantiser keeps codebook 0 apart from the others; here it is trained to predict the phones and nothing
else.

Shapes: B clips, N samples, K codebooks, T frames, C latent channels, M mel bands, L phone labels a frame, P phones.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import sphn
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn import functional as F
from torchaudio.functional import melscale_fbanks
from tqdm import tqdm

from csm.codec import moshi_config
from csm.config import CodecConfig
from csm.weights.recipe.recordings import read_manifest
from csm.weights.recipe.shape import CODEC

# FFT size, bands. A window shorter than two periods of a low voice would show where each period begins.
MELS = ((512, 40), (1024, 80), (2048, 80))
PHONES = (  # of flite's voices, pauses first
    "pau aa ae ah ao aw ax ay b ch d dh eh er ey f g hh ih iy jh k l m n ng ow oy p r s sh t th uh uw v w y z zh"
).split()
LABEL_SAMPLES = 480  # 20 ms have one label: the phone in their middle
COLD_FRAMES = 2  # the decoder lacks context for these where a clip starts in the middle of a recording
UNKNOWN = 255  # the label where a recording has no phones


@dataclass(frozen=True)
class Training:
    """Options of a run. The learning rate falls to zero over ``steps``."""

    steps: int = 16_000
    warm_steps: int = 500  # unquantised steps before the codebooks are made
    clips: int = 4  # of each worker in a step
    clip_frames: int = 16
    learning_rate: float = 7e-4
    warmup: int = 100
    fewest_codebooks: int = 1
    dropout: float = 0.25  # share of the steps with a random number of codebooks
    commitment: float = 0.5
    phones: float = 0.5  # weight of the phones' cross-entropy
    likeness: float = 5.0  # weight of the distance between the latents of a clip's two shifts
    jitter: float = 5.0  # largest shift in milliseconds
    codebook_clips: int = 512  # of each worker, for k-means
    workers: int = 2
    seed: int = 0
    save_every: int = 250
    drawn_share: float = 0.5  # share of a decoder-only run's clips whose codes a model generated
    compiled: bool = True  # torch.compile of the convolutions halves a step's time and takes a minute once
    device: str = "cpu"  # a GPU takes one worker

    def __post_init__(self) -> None:
        for name in ("steps", "warmup", "clips", "clip_frames", "fewest_codebooks", "workers", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.workers > 1 and self.device != "cpu":
            raise ValueError(f"{self.workers} workers need the device cpu; {self.device} takes one worker")


class MelLoss(nn.Module):
    """Mean L1 distance of mel spectrograms over several FFT sizes, of magnitudes and of their logarithms.

    Multi-scale mel losses as in EnCodec (https://arxiv.org/abs/2210.13438, section 3.4).
    """

    floor = 1e-3  # about 60 dB below a voiced frame; quieter differences do not count

    def __init__(self, sample_rate: int):
        super().__init__()
        for size, bands in MELS:
            filters = melscale_fbanks(size // 2 + 1, 0.0, sample_rate / 2, bands, sample_rate, mel_scale="htk")
            window = torch.hann_window(size)
            self.register_buffer(f"filters_{size}", filters)
            self.register_buffer(f"window_{size}", window / window.square().sum().sqrt())

    def forward(self, audio_BN: Tensor, target_BN: Tensor) -> Tensor:
        losses = []
        for size, _ in MELS:
            mel_BTM = self.mel(audio_BN, size)
            with torch.no_grad():
                target_BTM = self.mel(target_BN, size)
            losses.append((mel_BTM - target_BTM).abs().mean())
            losses.append((mel_BTM.add(self.floor).log() - target_BTM.add(self.floor).log()).abs().mean())
        return torch.stack(losses).sum()

    def mel(self, audio_BN: Tensor, size: int) -> Tensor:
        window, filters = getattr(self, f"window_{size}"), getattr(self, f"filters_{size}")
        spectrum = torch.stft(audio_BN, size, size // 4, window=window, return_complex=True)
        magnitude = torch.view_as_real(spectrum).square().sum(-1).add(1e-9).sqrt()
        return magnitude.transpose(1, 2) @ filters


# Layer scales and the weights whose outputs they multiply.
SCALED = {"layer_scale_1.scale": "self_attn.out_projs.0.weight", "layer_scale_2.scale": "linear2.weight"}


def fold_layer_scales(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same codec with layer scales of 1: the scales are multiplied into the weights before them.

    moshi's scales start at 0.01. AdamW changes every weight by about the learning rate in a step, whatever its size, so
    a layer behind such a scale learns a hundred times more slowly.
    """
    state = dict(state)
    for scale, weight in SCALED.items():
        for name in [name for name in state if name.endswith(scale)]:
            before = name.removesuffix(scale) + weight
            state[before] = state[before] * state[name][:, None]
            state[name] = torch.ones_like(state[name])
    return state


class Clips:
    """Random clips of a manifest's recordings, which are kept as an array of 16-bit samples and one of phones."""

    def __init__(self, manifest: Path, samples: int):
        self.samples = samples
        digest = hashlib.sha256(manifest.read_bytes()).hexdigest()[:8]  # changed recordings get new arrays
        names = ("samples", "ends", "labels")
        array, ends, labels = (manifest.with_suffix(f".{digest}.{what}.npy") for what in names)
        if not array.exists():
            self._gather(manifest, array, ends, labels)
        self.array = np.load(array, mmap_mode="r")
        self.ends = np.load(ends)  # of each recording within the array
        self.labels = np.load(labels)  # one for every 10 ms that begins in a recording
        lengths = np.diff(self.ends, prepend=0)
        self.label_begins = np.cumsum(-(-lengths // self._label_step)) - -(-lengths // self._label_step)

    _label_step = LABEL_SAMPLES // 2

    @classmethod
    def _gather(cls, manifest: Path, array: Path, ends: Path, labels: Path) -> None:
        pieces, phones = [], []
        for line in tqdm(read_manifest(manifest), desc="gathering", mininterval=5):
            samples = sphn.read(line.audio, sample_rate=CODEC.sample_rate)[0][0]
            pieces.append(np.round(samples * 32767).astype(np.int16))
            phones.append(read_phones(Path(line.audio), -(-len(samples) // cls._label_step), cls._label_step))
        np.save(ends, np.cumsum([len(piece) for piece in pieces]))
        np.save(labels, np.concatenate(phones))
        part = array.with_suffix(".part.npy")
        np.save(part, np.concatenate(pieces))
        part.replace(array)

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Audio (count, 1, samples), with silence before and after a recording, and phone labels (count, labels).

        A clip is of one recording. A label is the phone in the middle of LABEL_SAMPLES samples.
        """
        clips = np.zeros((count, 1, self.samples), np.float32)
        labels = np.zeros((count, self.samples // LABEL_SAMPLES), np.int64)
        middles = np.arange(labels.shape[1]) * LABEL_SAMPLES + LABEL_SAMPLES // 2
        for row, which in enumerate(rng.integers(len(self.ends), size=count)):
            begin = int(self.ends[which - 1]) if which else 0
            length = int(self.ends[which]) - begin
            first = int(rng.integers(-self.samples // 4, max(length - self.samples // 2, 1)))
            piece = self.array[begin + max(first, 0) : begin + min(first + self.samples, length)]
            place = max(-first, 0)
            clips[row, 0, place : place + len(piece)] = piece / np.float32(32768)
            inside = (first + middles >= 0) & (first + middles < length)
            labels[row, inside] = self.labels[self.label_begins[which] + (first + middles[inside]) // self._label_step]
        return torch.from_numpy(clips), torch.from_numpy(labels)


def read_phones(audio: Path, count: int, step: int) -> np.ndarray:
    """The phone at every ``step`` samples of a recording, (count,) indices into PHONES; UNKNOWN without a file."""
    path = audio.with_suffix(".phones")
    if not path.exists():
        return np.full(count, UNKNOWN, np.uint8)
    phones, ends = zip(*(item.split(":") for item in path.read_text(encoding="utf-8").split()), strict=True)
    places = np.searchsorted(np.array(ends, float), np.arange(count) * step / CODEC.sample_rate, side="right")
    return np.array([PHONES.index(phone) for phone in (*phones, "pau")], np.uint8)[places]


class CodedClips:
    """Random clips with recorded or generated codes, from a file that ``csm.weights.recipe.drawn`` wrote."""

    def __init__(self, clips: Clips, path: Path):
        self.clips, self.num_frames = clips, clips.samples // CODEC.frame_size
        with np.load(path) as file:
            self.codes_2FK, self.ends = file["codes"], file["ends"]
        if len(self.ends) != len(clips.ends):
            raise ValueError(f"{path} has the codes of {len(self.ends)} recordings, the manifest {len(clips.ends)}")
        self.begins = np.concatenate(([0], self.ends[:-1]))
        self.long_enough = np.flatnonzero(self.ends - self.begins >= self.num_frames)

    def draw(self, count: int, drawn_share: float, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Audio (count, 1, samples), codes (count, K, frames), and whether each clip starts its recording.

        Clips start at frame boundaries. A quarter start their recording, where a decoder starts in use.
        """
        audio = np.zeros((count, 1, self.clips.samples), np.float32)
        codes = np.zeros((count, self.codes_2FK.shape[2], self.num_frames), np.int64)
        begins = np.zeros(count, bool)
        for row, which in enumerate(rng.choice(self.long_enough, size=count)):
            begin, length = int(self.begins[which]), int(self.ends[which] - self.begins[which])
            first = 0 if rng.random() < 0.25 else int(rng.integers(length - self.num_frames + 1))
            begins[row] = first == 0
            codes[row] = self.codes_2FK[int(rng.random() < drawn_share), begin + first :][: self.num_frames].T
            sample = (int(self.clips.ends[which - 1]) if which else 0) + first * CODEC.frame_size
            piece = self.clips.array[sample : min(sample + self.clips.samples, int(self.clips.ends[which]))]
            audio[row, 0, : len(piece)] = piece / np.float32(32768)
        return torch.from_numpy(audio), torch.from_numpy(codes), torch.from_numpy(begins)


class Trainer:
    """One worker of a training run. Workers train on different clips and apply the same averaged gradients."""

    def __init__(
        self,
        config: CodecConfig,
        training: Training,
        clips: Clips,
        folder: Path,
        rank: int = 0,
        coded: CodedClips | None = None,
    ):
        from moshi.models import loaders

        self.config, self.training, self.clips, self.folder, self.rank = config, training, clips, folder, rank
        self.coded = coded  # clips of a decoder-only run
        self.device = torch.device(training.device)
        torch.manual_seed(training.seed)
        self.mimi = loaders.get_mimi(None, mimi_config=moshi_config(config), num_codebooks=config.num_codebooks)
        self.mimi.load_state_dict(fold_layer_scales(self.mimi.state_dict()))
        self.labels = config.frame_size // LABEL_SAMPLES  # a frame
        self.phone_head = nn.Linear(config.codebook_dim, self.labels * len(PHONES))
        self.mimi.to(self.device).train()
        self.phone_head.to(self.device)
        if coded is not None:
            self.mimi.eval().requires_grad_(False)
            for part in (self.mimi.upsample, self.mimi.decoder_transformer, self.mimi.decoder):
                part.train().requires_grad_(True)
        self.mel_loss = MelLoss(config.sample_rate).to(self.device)
        if training.compiled:
            self.mimi.encoder.compile()
            self.mimi.decoder.compile()
        learning = [*self.mimi.parameters(), *self.phone_head.requires_grad_(coded is None).parameters()]
        self.parameters = [parameter for parameter in learning if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, betas=(0.8, 0.99), weight_decay=1e-3, fused=True)
        self.step = 0
        self.seconds = 0.0
        self.has_codebooks = False
        self._load()

    def start_from(self, state: dict[str, Tensor]) -> None:
        """Take a trained codec's weights and codebooks, unless this run has already started.

        Layers that ``state`` lacks start as the identity: their last weights are zero. Surplus codebooks are dropped.
        Raises ValueError if there are too few.
        """
        if self.step == 0:
            mine = self.mimi.state_dict()
            found = sum(name.endswith("embedding_sum") for name in state)
            if found < self.config.num_codebooks:
                raise ValueError(f"the codec to start from has {found} codebooks, not {self.config.num_codebooks}")
            for name in mine.keys() - state.keys():
                if name.endswith(tuple(SCALED.values())):
                    mine[name] = torch.zeros_like(mine[name])
            self.mimi.load_state_dict({name: (mine | fold_layer_scales(state))[name] for name in mine})
            self.has_codebooks = True

    def run(self, until: int | None = None) -> None:
        """Train to the end or to step ``until``, with regular checkpoints."""
        until = self.training.steps if until is None else until
        parent = os.getppid()
        begin = time.time() - self.seconds
        steps = range(self.step, until)
        for step in tqdm(steps, initial=self.step, total=until, disable=self.rank > 0, mininterval=30, desc="codec"):
            if self.training.workers > 1 and os.getppid() != parent:
                raise SystemExit("worker stopped: its parent process has ended")
            if step >= self.training.warm_steps and not self.has_codebooks:
                self.make_codebooks()
            losses = self.take_step()
            self.seconds = time.time() - begin
            if self.rank == 0:
                self._log(losses)
                if self.step % self.training.save_every == 0 or self.step == until:
                    self.save()

    def take_step(self) -> dict[str, float]:
        """One step, in all workers together. Returns the losses of this worker."""
        rng = self._seeded()
        number = self._codebooks_of_step()
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        losses = self._decoder_losses(rng) if self.coded is not None else self._losses(number, rng)
        weights = {"commitment": self.training.commitment, "phones": self.training.phones}
        weights["likeness"] = self.training.likeness
        self.optimizer.zero_grad()
        torch.stack([loss * weights.get(name, 1.0) for name, loss in losses.items()]).sum().backward()
        for codebook in self._codebooks():
            # moshi replaces unused codes by latents that keep their graph. Without detach, graphs would accumulate.
            codebook.embedding_sum.detach_()
            codebook.cluster_usage.detach_()
        self._share_gradients()
        norm = nn.utils.clip_grad_norm_(self.parameters, 5.0)
        self.optimizer.step()
        self.step += 1
        losses["gradient"] = norm
        return {"codebooks": number} | {name: round(float(value.detach()), 5) for name, value in losses.items()}

    def _decoder_losses(self, rng: np.random.Generator) -> dict[str, Tensor]:
        """The loss of a decoder-only step. The first frames of a clip from the middle of a recording do not count."""
        assert self.coded is not None
        drawn = self.coded.draw(self.training.clips, self.training.drawn_share, rng)
        audio_B1N, code_BKT, begins_B = (tensor.to(self.device) for tensor in drawn)
        decoded_BN, audio_BN = self._decode(self.mimi.decode_latent(code_BKT)), audio_B1N[:, 0]
        early_N = torch.arange(audio_BN.shape[1], device=self.device) < COLD_FRAMES * self.config.frame_size
        return {"mel": self.mel_loss(torch.where(early_N & ~begins_B[:, None], audio_BN, decoded_BN), audio_BN)}

    def _losses(self, number: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """The losses of a step with ``number`` codebooks; 0 is unquantised."""
        audio_B1N, label_BX = (tensor.to(self.device) for tensor in self.clips.draw(self.training.clips, rng))
        mimi, zero = self.mimi, audio_B1N.new_zeros(())
        mimi.set_num_codebooks(max(number, 1))
        first, rest = mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest
        latent_2BCT = self._latent(torch.cat([self._off(audio_B1N, rng), self._off(audio_B1N, rng)]))
        latent_BCT = latent_2BCT.chunk(2)[0]
        spoken_2BCT, fine_2BCT = first.input_proj(latent_2BCT), rest.input_proj(latent_2BCT)
        one_BCT, other_BCT = fine_2BCT.chunk(2)
        likeness = (one_BCT - other_BCT).square().mean() / fine_2BCT.detach().var(dim=(0, 2)).mean()
        commitment = zero
        if number:
            result = first.vq(spoken_2BCT)
            spoken_2BCT, commitment = result.quantized, result.loss.sum()
        logits = self.phone_head(spoken_2BCT.transpose(1, 2)).unflatten(-1, (self.labels, len(PHONES)))
        phones = F.cross_entropy(logits.flatten(0, 2), label_BX.repeat(2, 1).flatten(), ignore_index=UNKNOWN)
        if (label_BX == UNKNOWN).all():
            phones = zero
        # Detached: the reconstruction loss must not train codebook 0.
        output_BCT = first.output_proj(spoken_2BCT.chunk(2)[0].detach())
        if number == 0:
            output_BCT = output_BCT + rest.output_proj(one_BCT)
        elif number > 1:
            result = rest(latent_BCT, self.config.frame_rate)
            output_BCT, commitment = output_BCT + result.x, (commitment + (number - 1) * result.penalty) / number
        mel = self.mel_loss(self._decode(output_BCT)[:, : audio_B1N.shape[-1]], audio_B1N[:, 0])
        return {"mel": mel, "phones": phones, "likeness": likeness, "commitment": commitment}

    def _off(self, audio_B1N: Tensor, rng: np.random.Generator) -> Tensor:
        """The same clips, each shifted by up to ``jitter`` milliseconds in either direction."""
        most = int(self.training.jitter * self.config.sample_rate / 1000)
        padded_B1N = F.pad(audio_B1N, (most, most))
        begins = rng.integers(0, 2 * most + 1, size=len(audio_B1N))
        clips = [clip[:, begin : begin + audio_B1N.shape[-1]] for clip, begin in zip(padded_B1N, begins, strict=True)]
        return torch.stack(clips)

    def _latent(self, audio_B1N: Tensor) -> Tensor:
        (latent_BCT,) = self.mimi.encoder_transformer(self.mimi.encoder(audio_B1N))
        return self.mimi._to_framerate(latent_BCT)

    def _decode(self, latent_BCT: Tensor) -> Tensor:
        (latent_BCT,) = self.mimi.decoder_transformer(self.mimi._to_encoder_framerate(latent_BCT))
        return self.mimi.decoder(latent_BCT)[:, 0]

    @torch.no_grad()
    def make_codebooks(self) -> None:
        """moshi's k-means initialisation, one codebook after the other, on many clips instead of one step's."""
        rng = self._seeded()
        self.mimi.set_num_codebooks(self.config.num_codebooks)
        latents = []
        for _ in range(max(self.training.codebook_clips // 32, 1)):
            latents.append(self._latent(self.clips.draw(32, rng)[0].to(self.device)))
        for _ in range(self.config.num_codebooks):
            self.mimi.quantizer(torch.cat(latents), self.config.frame_rate)
        self.has_codebooks = True

    def _codebooks_of_step(self) -> int:
        if not self.has_codebooks:
            return 0
        if self.coded is not None:
            return self.config.num_codebooks
        rng = np.random.default_rng((self.training.seed, 1, self.step))  # the same in all workers
        whole = self.config.num_codebooks
        if rng.random() >= self.training.dropout:
            return whole
        return int(rng.integers(min(self.training.fewest_codebooks, whole), whole + 1))

    def _learning_rate(self) -> float:
        warm = min((self.step + 1) / self.training.warmup, 1.0)
        return self.training.learning_rate * warm * (1 - self.step / self.training.steps)

    def _seeded(self) -> np.random.Generator:
        """Random numbers of this step, from its number, so that on a CPU a resumed run equals an uninterrupted one."""
        torch.manual_seed((self.training.seed * 1_000_003 + self.step) * 64 + self.rank)
        return np.random.default_rng((self.training.seed, 0, self.step, self.rank))

    def _share_gradients(self) -> None:
        for parameter in self.parameters:
            if parameter.grad is None:  # a codebook's projections are unused in an unquantised step
                parameter.grad = torch.zeros_like(parameter)
        if self.training.workers == 1:
            return
        flat = torch.cat([parameter.grad.flatten() for parameter in self.parameters])
        distributed.all_reduce(flat)
        flat /= self.training.workers
        pieces = flat.split([parameter.numel() for parameter in self.parameters])
        for parameter, piece in zip(self.parameters, pieces, strict=True):
            parameter.grad.copy_(piece.view_as(parameter))

    def _codebooks(self) -> list[Any]:
        return [module for module in self.mimi.modules() if hasattr(module, "_next_unused_check")]

    def save(self) -> None:
        """Write ``checkpoint.pt`` atomically."""
        state = {
            "decoder_only": self.coded is not None,
            "step": self.step,
            "seconds": self.seconds,
            "has_codebooks": self.has_codebooks,
            "mimi": self.mimi.state_dict(),
            "phone_head": self.phone_head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "unused_checks": [codebook._next_unused_check for codebook in self._codebooks()],
        }
        part = self.folder / "checkpoint.part"
        torch.save(state, part)
        part.replace(self.folder / "checkpoint.pt")

    def _load(self) -> None:
        path = self.folder / "checkpoint.pt"
        if path.exists():
            self._restore(torch.load(path, weights_only=True, map_location=self.device))
        if self.rank == 0:
            self._forget_later_losses()

    def _restore(self, state: dict[str, Any]) -> None:
        if state["decoder_only"] != (self.coded is not None):
            raise ValueError(
                f"{self.folder} holds a run that trains other parts (--decoder-only): choose another folder"
            )
        self.mimi.load_state_dict(state["mimi"])
        self.phone_head.load_state_dict(state["phone_head"])
        self.optimizer.load_state_dict(state["optimizer"])
        for codebook, check in zip(self._codebooks(), state["unused_checks"], strict=True):
            codebook._next_unused_check = check
        self.step, self.seconds, self.has_codebooks = state["step"], state["seconds"], state["has_codebooks"]

    def _forget_later_losses(self) -> None:
        """Remove the rows after the checkpoint from the log: those steps are repeated."""
        log = self.folder / "losses.csv"
        if log.exists():
            rows = [row for row in log.read_text(encoding="utf-8").splitlines(keepends=True) if row.endswith("\n")]
            log.write_text("".join(rows[:1] + [row for row in rows[1:] if int(row.split(",")[0]) <= self.step]))

    def _log(self, losses: dict[str, float]) -> None:
        row = {"step": self.step, "seconds": round(self.seconds, 1)} | losses
        path = self.folder / "losses.csv"
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)


def work(
    rank: int,
    config: CodecConfig,
    training: Training,
    manifest: Path,
    folder: Path,
    start: Path | None,
    codes: Path | None = None,
    until: int | None = None,
) -> None:
    """Run one worker process."""
    from moshi.utils.compile import no_compile

    torch.set_num_threads(1)  # workers synchronise once a step, threads would hundreds of times
    if training.device != "cpu":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    if training.workers > 1:
        store = distributed.FileStore(str(folder / "workers"), training.workers)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=training.workers)
    clips = Clips(manifest, training.clip_frames * config.frame_size)
    trainer = Trainer(config, training, clips, folder, rank, None if codes is None else CodedClips(clips, codes))
    if start is not None:
        trainer.start_from({name: tensor.float() for name, tensor in load_file(start).items()})
    with nullcontext() if training.compiled else no_compile():  # moshi compiles parts of its transformer
        trainer.run(until)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--start", type=Path, help="start from the weights of a codec that export wrote")
    parser.add_argument("--decoder-only", type=Path, metavar="CODES.npz", help="train only the decoder")
    for field in fields(Training):
        flag, kind = f"--{field.name.replace('_', '-')}", type(field.default)
        how: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
        parser.add_argument(flag, default=field.default, **how)
    options = vars(parser.parse_args())
    manifest, folder, start, codes = (options.pop(name) for name in ("manifest", "folder", "start", "decoder_only"))
    training = Training(**options)
    if codes is not None and start is None and not (folder / "checkpoint.pt").exists():
        raise SystemExit("--decoder-only needs a trained codec: give it with --start")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "workers").unlink(missing_ok=True)
    Clips(manifest, 1)  # writes the arrays once, before the workers start
    if training.workers == 1:
        work(0, CODEC, training, manifest, folder, start, codes)
    else:
        multiprocessing.spawn(work, (CODEC, training, manifest, folder, start, codes), nprocs=training.workers)


if __name__ == "__main__":
    main()
