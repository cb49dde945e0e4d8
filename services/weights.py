"""Where weights come from: a diffusers-format folder, or random numbers in a preset's shape.

Families call `ModelSource`; nobody else opens weight files. Only safetensors are read, never pickle, and no code from
a model folder is ever run. Every problem with a file is a StartupError that names the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from accelerate.big_modeling import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from services.errors import StartupError
from services.families import family_of_pipeline, load_family

PROBE_BYTES = 64 * 1024


class Slice(Protocol):
    """The part of a stored tensor that a rank holds."""

    def of(self, weight: Any) -> torch.Tensor:
        """From an open safetensors slice, of which only the part is read."""


class Partition(Protocol):
    """What a rank of several holds of a denoiser (`services/parallel/partition.py`)."""

    def apply(self, module: Any) -> Mapping[str, Slice]:
        """Leaves this rank's share in the module; returns how cut parameters lie in the stored ones."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """An opened source. `root` is set for folders, `seed` and `preset` for random weights.

    Attributes:
        family, variant: who serves it, by the pipeline class that model_index.json (or the preset) names.
        partition: set on a rank that holds a share of the denoiser's weights.
        encoders: likewise of text encoders, by subfolder.
        expert: set where one expert of the denoiser is held, and the others' weights are not read.
        drawn_on: where random weights are drawn, if not on the device that they go to.
    """

    spec: str
    family: str
    variant: str
    root: Path | None = None
    seed: int = 0
    preset: Mapping[str, Mapping[str, Any]] | None = None
    partition: Partition | None = None
    encoders: Mapping[str, Partition] = field(default_factory=dict)
    expert: str = ""
    drawn_on: torch.device | None = None

    def config(self, subfolder: str, name: str = "config.json") -> dict[str, Any]:
        """A component's config as plain data.

        Raises:
            StartupError: missing or not JSON.
        """
        if self.preset is not None:
            if subfolder not in self.preset:
                raise StartupError(f"{self.spec}: its preset has no component {subfolder!r}")
            return dict(self.preset[subfolder])
        return _read_json(self.folder(subfolder) / name)

    def settings(self) -> dict[str, Any]:
        """The pipeline's own settings in model_index.json: what is neither a component nor the library's own."""
        index = self.preset["model_index"] if self.preset is not None else _read_json(self.folder("model_index.json"))
        return {key: value for key, value in index.items() if key[:1] != "_" and not isinstance(value, list)}

    def has(self, subfolder: str) -> bool:
        """Whether the source has that component."""
        if self.preset is not None:
            return subfolder in self.preset
        return self.folder(subfolder).is_dir()

    def folder(self, subfolder: str) -> Path:
        """The component's folder.

        Raises:
            StartupError: the source is random and has no files.
        """
        if self.root is None:
            raise StartupError(f"{self.spec} has no files: {subfolder!r} must be made by the family")
        return self.root / subfolder

    def without_weights(self) -> ModelSource:
        """The same model as a source of random weights, by its configs: for modules on the meta device.

        Raises:
            StartupError: a config is not JSON.
        """
        if self.root is None:
            return self
        preset = {"model_index": _read_json(self.root / "model_index.json")}
        for name in ("config", "scheduler_config", "preprocessor_config"):
            preset |= {path.parent.name: _read_json(path) for path in sorted(self.root.glob(f"*/{name}.json"))}
        return replace(self, root=None, preset=preset)

    def load(self, cls: Any, subfolder: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """A diffusers model class with its weights, in eval mode, without gradients.

        Raises:
            StartupError: config or weights are missing, cut short, of other shapes or names than the config says.
        """
        kept: Sequence[str] = cls._keep_in_fp32_modules or ()
        if self.preset is not None:
            if self.partition is not None and device.type != "meta":
                # What does not fit is refused before anything is made.
                with torch.device("meta"):
                    self.partition.apply(cls.from_config(self.config(subfolder)))
            module = self.randomise(lambda: cls.from_config(self.config(subfolder)), subfolder, device, dtype, kept)
            if self.partition is not None:
                # The numbers must be those of one rank, so the whole is made and cut.
                self.partition.apply(module)
            return module
        if self.partition is not None:
            return self._load_share(cls, subfolder, device, dtype, self.partition)
        folder = self.folder(subfolder)
        check_safetensors(folder)
        # The library insists on an empty module where a class keeps some of its weights in fp32.
        with _weight_errors(folder):
            module, report = cls.from_pretrained(
                str(folder),
                torch_dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                low_cpu_mem_usage=bool(kept),
                output_loading_info=True,
            )
        _check_complete(folder, report)
        return _frozen(module.to(device))

    def _load_share(
        self, cls: Any, subfolder: str, device: torch.device, dtype: torch.dtype, partition: Partition
    ) -> nn.Module:
        """Builds the module without weights, lets the partition cut it, and reads what is left of each tensor."""
        folder = self.folder(subfolder)
        check_safetensors(folder)
        with _weight_errors(folder):
            with init_empty_weights(include_buffers=False):
                module: nn.Module = cls.from_config(self.config(subfolder))
            slices = partition.apply(module)
            read_share(module, folder, slices, device, dtype, cls._keep_in_fp32_modules or ())
        return _frozen(module.to(device))

    def load_transformers(
        self, cls: Any, config_cls: Any, subfolder: str, device: torch.device, dtype: torch.dtype
    ) -> nn.Module:
        """The same for a transformers model class."""
        partition = self.encoders.get(subfolder)
        if self.preset is not None:
            config = config_cls.from_dict(self.config(subfolder))
            if partition is not None and device.type != "meta":
                with torch.device("meta"):
                    partition.apply(cls(config))
            module = self.randomise(lambda: cls(config), subfolder, device, dtype)
            if partition is not None:
                partition.apply(module)
            return module
        folder = self.folder(subfolder)
        check_safetensors(folder)
        with _weight_errors(folder):
            if partition is not None:
                config = config_cls.from_pretrained(str(folder), local_files_only=True)
                return _frozen(_load_encoder_share(cls, config, folder, device, dtype, partition).to(device))
            module, report = cls.from_pretrained(
                str(folder), dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        _check_complete(folder, report)
        return _frozen(module.to(device))

    def randomise(
        self, build: Any, subfolder: str, device: torch.device, dtype: torch.dtype, kept: Sequence[str] = ()
    ) -> nn.Module:
        """Builds a module with the class's own initialisation, seeded by source and component.

        Args:
            kept: names of submodules and parameters that stay in fp32.
        """
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{subfolder}".encode()).digest()[:4], "big")
        drawn_on = self.drawn_on or device
        with torch.random.fork_rng(devices=[drawn_on] if drawn_on.type == "cuda" else []):
            torch.manual_seed(seed)
            with _default_dtype(dtype), torch.device(drawn_on):
                module: nn.Module = build()
        if not kept:
            return _frozen(module.to(device=device, dtype=dtype))
        # As loading does: buffers stay as the class makes them.
        for name, parameter in module.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if set(kept) & set(name.split(".")) else dtype)
        return _frozen(module.to(device))

    def component_id(self, stage: str, subfolders: Sequence[str]) -> str:
        """An id made of the weights and the pipeline's settings: equal files (or preset and seed) give equal ids.

        Headers, sizes and the first and last 64 KiB of each file are hashed, so that 40 GB take milliseconds.
        """
        digest = hashlib.sha256(f"{self.family}/{self.variant}/{stage}/{self.seed}".encode())
        if settings := self.settings():
            digest.update(json.dumps(settings, sort_keys=True).encode())
        for subfolder in subfolders:
            digest.update(subfolder.encode())
            if self.preset is not None:
                digest.update(json.dumps(self.preset.get(subfolder, {}), sort_keys=True).encode())
                continue
            for path in sorted(self.folder(subfolder).rglob("*")):
                if path.is_file():
                    digest.update(path.name.encode() + _probe(path))
        return f"{stage}-{digest.hexdigest()[:12]}"


def open_source(spec: str, *, family: str = "", preset: str = "") -> ModelSource:
    """Opens a folder, or `random:SEED` with the family and preset that give its shape.

    Raises:
        StartupError: says what is missing and what there is.
    """
    if spec.startswith("random:"):
        return _open_random(spec, family, preset)
    root = Path(spec)
    if not root.is_dir():
        raise StartupError(f"model folder {spec} does not exist")
    index = _read_json(root / "model_index.json")
    pipeline = index.get("_class_name", "")
    config = root / "transformer" / "config.json"
    name, variant = family_of_pipeline(pipeline, (_read_json(config) if config.is_file() else {}) | index)
    if family and family != name:
        raise StartupError(f"{spec} holds a {pipeline}, served by family {name!r}, not {family!r}")
    return ModelSource(spec=spec, family=name, variant=variant, root=root)


def _open_random(spec: str, family: str, preset: str) -> ModelSource:
    text = spec.removeprefix("random:")
    if not text.isdigit():
        raise StartupError(f"{spec}: write it as random:SEED with a whole number")
    presets = load_family(family).presets
    if preset not in presets:
        raise StartupError(f"{spec}: family {family!r} has no preset {preset!r}, it has {', '.join(sorted(presets))}")
    index = presets[preset]["model_index"]
    _, variant = family_of_pipeline(index["_class_name"], {**presets[preset].get("transformer", {}), **index})
    return ModelSource(spec=spec, family=family, variant=variant, seed=int(text), preset=presets[preset])


def read_share(
    module: nn.Module,
    folder: Path,
    slices: Mapping[str, Slice],
    device: torch.device,
    dtype: torch.dtype,
    kept: Collection[str],
    names: Callable[[str], str] = str,
) -> None:
    """Fills a module's parameters from a folder's safetensors files, each read only where the rank holds it.

    Args:
        kept: names of submodules and parameters that stay in fp32.
        names: the parameter's name for a stored tensor's, where they differ.

    Raises:
        StartupError: a parameter has no stored tensor.
    """
    wanted = dict(module.named_parameters())
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - the file's handle is no mapping
                name = names(key)
                if name not in wanted:
                    continue
                stored = file.get_slice(key)
                part = slices[name].of(stored).contiguous() if name in slices else stored[:]
                parent, _, attribute = name.rpartition(".")
                precision = torch.float32 if set(kept) & set(name.split(".")) else dtype
                weight = nn.Parameter(part.to(device, precision), requires_grad=False)
                module.get_submodule(parent).register_parameter(attribute, weight)
                del wanted[name]
    if wanted:
        raise StartupError(f"{folder} has no weights for {len(wanted)} parameters, {min(wanted)} first")


def _load_encoder_share(
    cls: Any, config: Any, folder: Path, device: torch.device, dtype: torch.dtype, partition: Partition
) -> nn.Module:
    """A transformers class with this rank's share of its weights.

    Stored names are turned into the class's own by the library's rules. Of names for one tensor the first is kept.
    """
    with init_empty_weights(include_buffers=False):
        module: Any = cls(config)
    ties = module.all_tied_weights_keys
    known = module.state_dict()
    rules = get_model_conversion_mapping(module)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    slices = partition.apply(module)
    held = {name for name, _ in module.named_parameters(remove_duplicate=False)}

    def own_name(stored: str) -> str:
        name: str = rename_source_key(stored, renamings, [], cls.base_model_prefix, known)[0]
        alike = [name, *(one for pair in ties.items() if name in pair for one in pair)]
        return next((one for one in alike if one in held), name)

    kept = set(cls._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    read_share(module, folder, slices, device, dtype, kept | set(cls._keep_in_fp32_modules_strict or ()), own_name)
    return cast(nn.Module, module)


def check_safetensors(folder: Path) -> None:
    """Checks that every weight file of a component is there and whole, before a byte of it is loaded.

    Raises:
        StartupError: names the file and what is wrong with it.
    """
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    if index is not None:
        files = [folder / name for name in sorted(set(_read_json(index)["weight_map"].values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise StartupError(f"{folder} has no *.safetensors file (other formats are never read)")
    for path in files:
        _check_file(path)


def _check_complete(folder: Path, report: Mapping[str, Any]) -> None:
    # The libraries fill what a file does not have with random numbers, and only log it.
    missing = sorted(report["missing_keys"])
    if missing:
        raise StartupError(f"{folder} has no weights for {len(missing)} parameters, {missing[0]} first")


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise StartupError(f"weight file {path} is missing")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        header_bytes = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= header_bytes <= min(size - 8, 100_000_000):
            raise StartupError(f"weight file {path} is not a safetensors file or is cut short ({size} bytes)")
        try:
            header = json.loads(file.read(header_bytes))
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise StartupError(f"weight file {path} has a broken header: {error}") from error
    if size != 8 + header_bytes + end:
        raise StartupError(f"weight file {path} has {size} bytes but its header says {8 + header_bytes + end}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise StartupError(f"{path} is missing") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise StartupError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise StartupError(f"{path} must hold a JSON object")
    return value


def _probe(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(PROBE_BYTES)
        file.seek(max(0, size - PROBE_BYTES))
        return size.to_bytes(8, "little") + first + file.read()


def _frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _weight_errors(folder: Path) -> Iterator[None]:
    # The libraries raise several types for bad weights; all of them mean that this folder cannot be served.
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise StartupError(f"cannot load weights from {folder}: {error}") from error
