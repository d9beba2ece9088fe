"""Find a checkpoint, check its tensors against config.json, and read it into the model's state dict."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from csm.config import MIMI, CodecConfig, CSMConfig
from csm.errors import CheckpointError, CheckpointWarning
from csm.weights import hub
from csm.weights.config_json import read_config
from csm.weights.files import read_tensor, tensor_shapes
from csm.weights.gguf import ExtractedFiles, GGUFFile, open_gguf
from csm.weights.gguf_header import is_gguf
from csm.weights.hub import MIMI_FILE, MIMI_REPO
from csm.weights.layouts import Table, empty_state, hf_table, mimi_table, sesame_table

TINY = Path(__file__).parent / "tiny"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's metadata, known before any weight is read: the config, and the file and shape of each tensor.

    ``gguf`` is its file if it is a GGUF file, and ``extracted`` the folder of that file's metadata.
    """

    folder: Path
    config: CSMConfig
    codec_config: CodecConfig
    table: Table
    file_of: dict[str, Path]
    shape_of: dict[str, tuple[int, ...]]
    gguf: GGUFFile | None = None
    extracted: ExtractedFiles | None = None

    @property
    def config_folder(self) -> Path:
        """The folder of config.json, generation_config.json and the tokenizer."""
        return self.folder if self.extracted is None else self.extracted.folder

    @property
    def codec_path(self) -> Path | None:
        """The file of a GGUF model's own codec, beside it: NAME.codec.safetensors for NAME.gguf."""
        path = None if self.gguf is None else codec_beside(self.gguf.path)
        return path if path is not None and path.is_file() else None

    @property
    def tokenizer_path(self) -> Path:
        path = self.config_folder / "tokenizer.json"
        if not path.is_file() and self.gguf is not None:
            raise CheckpointError(
                f"{self.gguf.path}: no tokenizer in its metadata, and no tokenizer.json beside it; copy that of "
                f"sesame/csm-1b or unsloth/csm-1b there, or pass it as --tokenizer"
            )
        if not path.is_file():
            raise CheckpointError(
                f"{path}: no such file (early revisions of sesame/csm-1b have none); copy the tokenizer.json of "
                f"unsloth/csm-1b into this folder"
            )
        return path

    @property
    def has_codec(self) -> bool:
        """Whether the checkpoint contains the codec (HF layout)."""
        return any(name.startswith("codec_model.") for name in self.file_of)

    @property
    def has_own_codec(self) -> bool:
        """Whether the checkpoint contains the codec, or its folder has it."""
        return self.has_codec or self.codec_path is not None or (self.folder / MIMI_FILE).is_file()

    def read(self, name: str) -> Tensor:
        """One tensor of the files. Raises CheckpointError, which names both, if it cannot be read."""
        return read_tensor(self.file_of[name], name) if self.gguf is None else self.gguf.read(name)


def open_checkpoint(name: str | Path, progress: bool = True, tokenizer: str | Path | None = None) -> Checkpoint:
    """Find a checkpoint, download it if necessary, and check its tensors' names and shapes without reading them.

    ``name`` is "tiny", a folder, a GGUF file, or a hub name with an optional ``@revision``. ``progress`` shows what is
    downloaded. ``tokenizer`` is the tokenizer.json of a GGUF file, or its folder. Raises CheckpointError, which names
    the file and the tensor, or UnavailableError, which says what to do.
    """
    path = Path(name).expanduser()
    if str(name) != "tiny" and path.is_file() and is_gguf(path):
        return _open_gguf(path, None if tokenizer is None else Path(tokenizer).expanduser())
    if tokenizer is not None:
        raise CheckpointError(f"a tokenizer is given for a GGUF file only, and {name} is none")
    folder, files = _find(str(name), progress)
    config, codec_config = read_config(folder / "config.json")
    file_of: dict[str, Path] = {}
    shape_of: dict[str, tuple[int, ...]] = {}
    for path in files:
        for tensor, shape in tensor_shapes(path).items():
            if tensor in file_of:
                raise CheckpointError(
                    f"{path}: duplicate tensor {tensor}, also in {file_of[tensor].name}; remove one file"
                )
            file_of[tensor], shape_of[tensor] = path, shape
    table, codec_table = _choose_tables(files, file_of, config, codec_config)
    checkpoint = Checkpoint(folder, config, codec_config, table, file_of, shape_of)
    _check(checkpoint, table + codec_table)
    return checkpoint


def _open_gguf(path: Path, tokenizer: Path | None) -> Checkpoint:
    gguf = open_gguf(path)
    extracted = gguf.extract(tokenizer)
    if not (extracted.folder / "config.json").is_file():
        raise CheckpointError(
            f"{path}: no config in its metadata, and no config.json beside it; copy that of the original checkpoint "
            f"there (sesame/csm-1b, unsloth/csm-1b)"
        )
    config, codec_config = read_config(extracted.folder / "config.json")
    file_of = dict.fromkeys(gguf.shapes, path)
    table, codec_table = _choose_tables([path], file_of, config, codec_config)
    checkpoint = Checkpoint(path.parent, config, codec_config, table, file_of, gguf.shapes, gguf, extracted)
    _check(checkpoint, table + codec_table)
    return checkpoint


def codec_beside(path: Path) -> Path:
    """Where the codec of a GGUF file is: tiny-q8_0.gguf has tiny-q8_0.codec.safetensors."""
    return path.with_name(f"{path.stem}.codec.safetensors")


def _choose_tables(
    files: list[Path], file_of: dict[str, Path], config: CSMConfig, codec_config: CodecConfig
) -> tuple[Table, Table]:
    """The tables of the layout's model and of the codec in it, which may be empty. A tensor's name decides."""
    if "text_embeddings.weight" in file_of:
        return sesame_table(config), []
    if "embed_text_tokens.weight" in file_of:
        codec_table = mimi_table(codec_config)
        return hf_table(config), codec_table if any(entry.source in file_of for entry in codec_table) else []
    raise CheckpointError(
        f"{_listed(files)}: missing tensor text_embeddings.weight (Sesame layout) or embed_text_tokens.weight (HF "
        f"layout); these are not the weights of a CSM model"
    )


def read_model(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, progress: bool = False
) -> dict[str, Tensor]:
    """The model's state dict on ``device``. Tensors are memory-mapped one at a time, so peak memory stays low."""
    return _read(checkpoint, checkpoint.table, device, dtype, progress)


def read_codec(
    checkpoint: Checkpoint, codec: str | Path | None, device: torch.device, progress: bool = True
) -> dict[str, Tensor]:
    """The codec's state dict: moshi's names, float32.

    The first source that exists is read: the file ``codec``, the checkpoint (for a GGUF file, the codec beside it),
    Kyutai's file in the checkpoint's folder, Kyutai's file on the hub. A copy of Kyutai's codec inside the checkpoint
    that is rounded (bfloat16) is replaced by Kyutai's file if that is in the folder or in the cache; otherwise it is
    used with a CheckpointWarning.
    """
    own = checkpoint.codec_path if codec is None else Path(codec)
    if own is not None:
        return _read_codec_file(own, device)
    if checkpoint.gguf is not None and checkpoint.codec_config != MIMI and not checkpoint.has_codec:
        file = codec_beside(checkpoint.gguf.path)
        raise CheckpointError(f"{file}: no such file; this model's codec is not Kyutai's: put it there, or name it")
    beside = checkpoint.folder / MIMI_FILE
    path = beside if beside.is_file() else hub.cached(MIMI_REPO, MIMI_FILE)
    if not checkpoint.has_codec:
        return _read_codec_file(path or hub.fetch(MIMI_REPO, MIMI_FILE, progress=progress), device)
    state = _read(checkpoint, mimi_table(checkpoint.codec_config), device, torch.float32)
    dtype = _codec_dtype(checkpoint)
    if checkpoint.codec_config != MIMI or dtype == torch.float32:
        return state
    exact = _read_codec_file(path, device) if path is not None else {}
    if exact.keys() == state.keys() and all(torch.equal(exact[n].to(dtype).float(), state[n]) for n in state):
        return exact
    warnings.warn(
        f"{checkpoint.folder}: the codec in this checkpoint is {str(dtype).removeprefix('torch.')}, so its codebooks "
        f"are rounded: reference audio gets slightly different codes. For exact codes put {MIMI_FILE} of {MIMI_REPO} "
        f"into that folder",
        CheckpointWarning,
        stacklevel=2,
    )
    return state


def _codec_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of the codebooks that the checkpoint contains."""
    name = next(entry.source for entry in mimi_table(checkpoint.codec_config) if entry.source.endswith(".embed_sum"))
    return checkpoint.read(name).dtype


def _read_codec_file(path: Path, device: torch.device) -> dict[str, Tensor]:
    """A file with moshi's names. Kyutai's has those of moshi's first release for the attention projections."""
    state = {}
    for name in tensor_shapes(path):
        current = name.replace("in_proj_weight", "in_projs.0.weight").replace("out_proj.weight", "out_projs.0.weight")
        state[current] = read_tensor(path, name).to(device, torch.float32)
    return state


def _listed(files: list[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"


def _find(name: str, progress: bool) -> tuple[Path, list[Path]]:
    """The folder of a checkpoint and its weight files."""
    path = TINY if name == "tiny" else Path(name).expanduser()
    if path.is_dir():
        return path, hub.weight_files(path)
    if path.exists():
        raise CheckpointError(f"{path} is a file; pass the folder with the weights, config.json and tokenizer.json")
    if path.suffix == ".gguf":
        raise CheckpointError(f"{path}: no such file")
    repo, _, revision = name.partition("@")
    if repo.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"no folder {name!r}, and not a hub name either; pass a folder, owner/model or owner/model@revision"
        )
    return hub.fetch_checkpoint(repo, revision or None, progress)


def _check(checkpoint: Checkpoint, table: Table) -> None:
    """Raise CheckpointError at the first missing tensor, wrong shape or unexpected tensor."""
    known: set[str] = set()
    for entry in table:
        names = [name for name in entry.names if name in checkpoint.file_of]
        if not names:
            files = sorted(set(checkpoint.file_of.values()))
            raise CheckpointError(
                f"{_listed(files)}: missing tensor {entry.source}; is the file complete, and config.json of this model?"
            )
        for name in names:
            if checkpoint.shape_of[name] != entry.shape:
                shape, path = checkpoint.shape_of[name], checkpoint.file_of[name]
                raise CheckpointError(
                    f"{path}: tensor {name}: expected shape {entry.shape}, got {shape}; is config.json of this model?"
                )
        known.update(names)
    for name, path in checkpoint.file_of.items():
        if name not in known:
            raise CheckpointError(f"{path}: unexpected tensor {name}; this model has no such part")


def _read(
    checkpoint: Checkpoint, table: Table, device: torch.device, dtype: torch.dtype, progress: bool = False
) -> dict[str, Tensor]:
    state = empty_state(table, device, dtype)
    # Largest first: the mapped source of a large tensor then never adds to a nearly complete model.
    entries = sorted(table, key=lambda entry: -torch.Size(entry.shape).numel())
    for entry in tqdm(entries, desc="loading weights", delay=1, leave=False, disable=None if progress else True):
        names = [name for name in entry.names if name in checkpoint.file_of]
        tensor = checkpoint.read(names[0])
        for tied in names[1:]:
            if not torch.equal(tensor, checkpoint.read(tied)):
                path = checkpoint.file_of[tied]
                raise CheckpointError(
                    f"{path}: tensor {tied} differs from {names[0]}; these must be equal: untied audio embeddings are "
                    f"not supported"
                )
        rows = state[entry.target][entry.first : entry.first + entry.target_shape[0]]
        rows.copy_(entry.to_target(tensor))
    return state
