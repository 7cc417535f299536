"""Weights on disk: ours (safetensors), the released pickles (read safely), and the Hub."""

import argparse
import contextlib
import hashlib
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from core.checksums import CHECKSUMS, FileSums, checkpoint_folders, find_damage, read_checksums
from core.data.arrays import DAMAGE
from core.errors import InputError
from core.files import atomic_path, check_regular_file, read_record, write_text
from core.files import file_sha256 as file_sha256  # also imported from here
from core.hub import HubFile, NotOnHubError, Weights, fetch, parse_hub_id
from core.released import ReleasedModel, find_released

Tensors = Mapping[str, torch.Tensor]

logger = logging.getLogger(__name__)


class Released(NamedTuple):
    """A released checkpoint: weights by part ("model", "ema", "discriminator"), and its flags."""

    parts: dict[str, dict[str, torch.Tensor]]
    arguments: dict[str, Any]  # the training flags stored in the file, if any

    def weights(self, part: str, path: Path) -> dict[str, torch.Tensor]:
        """One part's weights; raises InputError if the file has none."""
        if part not in self.parts:
            raise InputError(f"{path}: has no {part} weights, only {', '.join(self.parts)}")
        return dict(self.parts[part])


# Keys of each part in files of the reference's trainers; DeepSpeed says module instead of model.
PART_KEYS: Mapping[str, tuple[str, ...]] = {
    "model": ("model", "module", "state_dict"),
    "ema": ("ema",),
    "discriminator": ("discriminator",),
}


def read_file(path: Path, part_keys: Mapping[str, tuple[str, ...]] = PART_KEYS) -> Released:
    """Read a safetensors file, or a released `.pt` / `.pth` / `.ckpt`.

    part_keys: the names under which a file may store each part.
    """
    if path.suffix == ".safetensors":
        beside = path.with_name("config.json")  # the Hub mixin's folders
        arguments = read_record(beside, {}) if beside.is_file() else {}
        return Released({"model": plain_keys(load_tensors(path))}, arguments)
    return read_released(path, part_keys)


def read_released(path: Path, part_keys: Mapping[str, tuple[str, ...]] = PART_KEYS) -> Released:
    """Read a `.pt` / `.pth` of the reference, or a bare state dict; none of its code runs.

    Raises InputError for a damaged file and for a pickle that holds more than tensors and flags.
    """
    check_regular_file(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *_placeholders(path)]):
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: refused, it holds Python objects besides tensors and could run code; "
            "re-save it as safetensors where you trust it"
        ) from error
    except (*DAMAGE, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: not a PyTorch checkpoint, or damaged ({reason})") from error
    if not isinstance(stored, dict):
        raise InputError(f"{path}: holds a {type(stored).__name__}, expected a state dict")
    parts = {}
    for part, names in part_keys.items():
        for name in names:
            if _is_state_dict(stored.get(name)):
                parts[part] = plain_keys(stored[name])
                break
    if not parts and _is_state_dict(stored):
        parts["model"] = plain_keys(stored)
    if not parts:
        raise InputError(f"{path}: no weights under {', '.join(part_keys['model'])} or at the top")
    arguments = stored.get("args")
    return Released(parts, vars(arguments) if isinstance(arguments, argparse.Namespace) else {})


def _is_zip(path: Path) -> bool:
    with Path(path).open("rb") as file:
        return file.read(2) == b"PK"


def _is_state_dict(value: Any) -> bool:  # noqa: ANN401 - whatever the file holds
    return isinstance(value, Mapping) and any(torch.is_tensor(v) for v in value.values())


# Parts of keys that come from wrappers of the model: DDP, torch.compile, FSDP.
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")


def plain_keys(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, without the names of wrappers in their keys."""
    plain = {}
    for key, value in state.items():
        if torch.is_tensor(value):
            for wrapper in WRAPPERS[1:]:
                key = key.replace(wrapper, "")
            plain[key.removeprefix(WRAPPERS[0])] = value
    return plain


# Lightning pickles its settings beside the weights. They are not needed: their classes are replaced
# by one that does nothing, so that no code of the file or of these packages runs.
_SETTINGS_PACKAGES = ("omegaconf", "pytorch_lightning", "lightning", "lightning_fabric", "typing")


class _Placeholder:
    """Takes any arguments and state, and does nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _placeholders(path: Path) -> list[tuple[type, str]]:
    """Stand-ins for the settings classes that a Lightning checkpoint names."""
    if path.suffix != ".ckpt":
        return []
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [
        (type("Placeholder", (_Placeholder,), {}), name)
        for name in names
        if name.split(".")[0] in _SETTINGS_PACKAGES
    ]


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU."""
    check_regular_file(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: damaged safetensors file ({error})") from error


def save_tensors(tensors: Tensors, path: Path) -> None:
    """Write tensors as safetensors; raises OSError if the disk is full."""
    try:
        with atomic_path(path) as temporary:
            save_file(
                {key: value.detach().contiguous() for key, value in tensors.items()}, temporary
            )
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error


def save_model(module: nn.Module, config: str, folder: Path) -> None:
    """Write a folder of model.safetensors and config.yaml, whose text is `config`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(module.state_dict(), folder / "model.safetensors")
    write_text(folder / "config.yaml", config)


def check_shapes(module: nn.Module, shapes: Mapping[str, tuple[int, ...]], source: object) -> None:
    """Raise InputError, which names what does not fit, if `shapes` are not the module's."""
    own = module.state_dict()
    problems = [f"{key} is missing" for key in own if key not in shapes]
    problems += [f"{key} is not part of the model" for key in shapes if key not in own]
    problems += [
        f"{key} is {tuple(shapes[key])}, the model has {tuple(value.shape)}"
        for key, value in own.items()
        if key in shapes and tuple(shapes[key]) != tuple(value.shape)
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(
            f"{source}: weights of another architecture: {'; '.join(problems[:3])}{more}"
        )


def check_finite(tensors: Tensors, source: object) -> None:
    """Raise InputError, which names the first tensor that has a NaN or an infinite value."""
    if name := first_not_finite(tensors):
        raise InputError(f"{source}: {name} has values that are not finite; take other weights")


def first_not_finite(tensors: Tensors) -> str:
    """The name of a tensor with a NaN or an infinite value, or ""; waits for the device once."""
    floating = {n: t for n, t in tensors.items() if t.is_floating_point() and t.numel()}
    if not floating:
        return ""
    # The largest magnitude is NaN if any value is.
    largest = [torch.linalg.vector_norm(t.float(), torch.inf) for t in floating.values()]
    finite = torch.stack(largest).isfinite().tolist()
    return next((name for name, fine in zip(floating, finite, strict=True) if not fine), "")


def load_weights(module: nn.Module, tensors: Tensors, source: object, assign: bool = False) -> None:
    """load_state_dict(strict=True); raises InputError, one line that names what does not fit.

    assign: let the module use these tensors instead of copying them, for a module on the meta
        device.
    """
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    check_shapes(module, shapes, source)
    check_finite(tensors, source)
    module.load_state_dict(tensors, assign=assign)


def find_weights(source: str | Path, filename: str, revision: str | None = None) -> Path:
    """The file or folder of a local path, a released name, or `owner/name[/file][@revision]`.

    A local path wins. For `owner/name` alone, `filename` and its configuration are fetched and
    their folder is returned. Raises InputError if there is none of these.
    """
    local = Path(source)
    if local.exists():
        return local
    released = find_released(source)
    if released:
        return fetch(hub_file(released))
    file = parse_hub_id(str(source))
    if file is None:
        raise InputError(f"{source}: no such file or folder, and no released model of this name")
    file = file._replace(revision=revision or file.revision)
    if file.filename:
        return fetch(file)
    try:
        fetch(file._replace(filename="config.yaml"))
    except NotOnHubError:  # a folder as huggingface_hub's model mixin writes it
        fetch(file._replace(filename="config.json"))
    else:
        with contextlib.suppress(InputError):  # older folders have none
            fetch(file._replace(filename=CHECKSUMS))
    return fetch(file._replace(filename=filename)).parent


def hub_file(released: ReleasedModel) -> HubFile:
    """Where a released model is; raises InputError if the table does not say."""
    if not released.repository or not released.file:
        raise InputError(f"{released.name}: {released.note or 'not on the Hub'}")
    return HubFile(released.repository, released.file, released.revision, released.sha256)


def tensors_sha256(tensors: Tensors) -> str:
    """One sha256 of names, shapes and float32 values: the same for every file of these weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().float().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class InferenceFiles(NamedTuple):
    """The files of a checkpoint that inference reads.

    sha256: of the file of weights, if the checkpoint has a checksums.json.
    """

    config: Path
    weights: Path
    sha256: str | None


def inference_files(folder: Path, weights: Weights, verify: bool = True) -> InferenceFiles:
    """The files of a checkpoint folder, or of a run's newest intact checkpoint.

    weights: "auto" takes EMA weights if the checkpoint has any.
    verify: compare the files with their checksums; a run's damaged checkpoint is skipped, with a
        warning.
    Raises InputError if there is no checkpoint, or none is intact.
    """
    folder = Path(folder)
    steps = list(checkpoint_folders(folder / "checkpoints").values())
    if not steps:
        files, damage = _checkpoint_files(folder, weights, verify)
        if damage:
            raise InputError(
                f"{folder}: damaged ({damage}); copy it again, or take another checkpoint"
            )
        return files
    for checkpoint in reversed(steps):
        files, damage = _checkpoint_files(checkpoint, weights, verify)
        if not damage:
            return files
        logger.warning("%s is damaged (%s); trying the one before", checkpoint, damage)
    raise InputError(f"{folder}: none of its {len(steps)} checkpoints is intact")


def _checkpoint_files(folder: Path, weights: Weights, verify: bool) -> tuple[InferenceFiles, str]:
    """The files of one checkpoint folder, and what is wrong with them ("" for nothing)."""
    sums: dict[str, FileSums] = {}
    damage = ""
    if (folder / CHECKSUMS).exists():
        try:
            sums = read_checksums(folder).files
        except InputError as error:
            damage = str(error)
    elif (
        folder / "training"
    ).is_dir():  # a checkpoint that a training wrote, not a converted folder
        damage = f"{CHECKSUMS} is missing"
    averaged = "ema.safetensors" in sums or (folder / "ema.safetensors").exists()
    name = "ema" if weights == "auto" and averaged else weights
    path = folder / f"{'model' if name == 'auto' else name}.safetensors"
    sha256 = sums[path.name].sha256 if path.name in sums else None
    files = InferenceFiles(folder / "config.yaml", path, sha256)
    if damage and verify:
        return files, damage
    listed = path.name in sums and "config.yaml" in sums
    if not listed and not (path.is_file() and files.config.is_file()):
        raise InputError(f"{folder}: no checkpoint here (expected config.yaml and {path.name})")
    if sums and verify:
        return files, find_damage(folder, names=("config.yaml", path.name), progress=True)
    return files, ""


class ModelFiles(NamedTuple):
    """Where a model's weights are, and its configuration: None if only the weights tell it.

    sha256: of the file of weights, where its checkpoint has recorded it.
    """

    weights: Path
    config: Path | None = None
    sha256: str | None = None


def find_model(
    source: str | Path, weights: Weights, revision: str | None, verify_weights: bool
) -> ModelFiles:
    """The files of a model: our folder, a folder of the Hub's model mixin, or a released file.

    source, revision: see find_weights. weights, verify_weights: see inference_files.
    Raises InputError if there is no model, or its files are damaged.
    """
    path = find_weights(source, "model.safetensors", revision)
    mixin = mixin_file(path)
    if mixin or not path.is_dir():
        return ModelFiles(mixin or path)
    files = inference_files(path, weights, verify_weights)
    return ModelFiles(files.weights, files.config, files.sha256)


def mixin_file(folder: Path) -> Path | None:
    """The weights of a folder that huggingface_hub's model mixin wrote; None for anything else."""
    weights = folder / "model.safetensors"
    ours = (folder / "config.yaml").exists() or (folder / "checkpoints").exists()
    return weights if (folder / "config.json").is_file() and not ours else None
